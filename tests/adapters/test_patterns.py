"""Patterns mean what they mean to Python, and cost little whoever wrote them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from adapters.patterns import Pattern, PatternRefused, PatternTable

PIECES = [
    "a",
    "b",
    ".",
    r"\.",
    "x*",
    "(a|b)",
    "(?:ab)+",
    "[a-x]",
    "[^.]",
    r"\d{1,2}",
    "b?",
    "^",
    "$",
    r"\b",
    r"[\w-]",
    r"\W",
    r"\s??",
    "(?i:A)",
    "x{0,2}?",
    "a|",
]
SHORT_TEXTS = st.text(alphabet="abx.1_", max_size=8)


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), SHORT_TEXTS)
def test_a_pattern_matches_what_python_says(source: str, text: str) -> None:
    assert Pattern(source, field="f").matches(text) == bool(re.fullmatch(source, text))


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), SHORT_TEXTS)
def test_a_tail_matches_what_peft_says(source: str, text: str) -> None:
    by_peft = re.match(rf"(.*\.)?({source})$", text)
    assert Pattern(source, field="f", is_tail=True).matches(text) == bool(by_peft)


@given(st.text(alphabet=r"abi01.,*+?|()[]{}^$\-:<>=PdBZx&~", max_size=12), SHORT_TEXTS)
def test_any_source_is_refused_or_means_what_python_says(source: str, text: str) -> None:
    try:
        pattern = Pattern(source, field="f")
    except PatternRefused:
        return
    assert pattern.matches(text) == bool(re.fullmatch(source, text))


def test_a_word_boundary_and_the_long_patterns_of_trainers_are_understood() -> None:
    source = (
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
    )
    pattern = Pattern(source, field="target_modules")
    assert pattern.matches("model.layers.12.self_attn.q_proj")
    assert pattern.matches("language_model.layers.1.mlp.v_proj.base")
    assert not pattern.matches("model.layers.12.self_attn.k_proj")


@pytest.mark.parametrize(
    "source", ["(a*)*b", "(a+a+)+b", "(a|aa)+$b", "((a{0,30}){30})*b", "(.*a){99}b"]
)
def test_a_pattern_that_would_backtrack_for_ever_is_answered(source: str) -> None:
    pattern = Pattern(source, field="f")
    assert not pattern.matches("a" * 500 + ".")


def test_a_pattern_may_not_be_asked_without_end() -> None:
    pattern = Pattern("(a?){900}", field="f")
    with pytest.raises(PatternRefused, match="too much"):
        any(pattern.matches("." * 500) for _ in range(100_000))


def test_what_no_module_is_called_matches_nothing() -> None:
    pattern = Pattern(".*", field="f")
    assert pattern.matches("model.layers.0 x")
    assert not any(pattern.matches(text) for text in ("é", "\ud800", "a\n", "\t", "\0"))


@pytest.mark.parametrize(
    "source",
    [
        "(",
        "a)(b",
        "a**",
        "*a",
        "a++",
        "(?>a)",
        "a{3,2}",
        "[",
        "[z-a]",
        "\\",
        r"(a)\1",
        "(?=a)",
        "(?!a)",
        "(?x)a",
        "(?P<a",
        "^*",
        "(" * 900 + ")" * 900,
        "((a{1000}){1000}){1000}",
        "((){9999}){9999}",
        "[ab]{999}" * 99,
        "a" * 5000,
    ],
)
def test_what_one_of_the_engines_refuses_is_refused(source: str) -> None:
    with pytest.raises(PatternRefused):
        Pattern(source, field="f")


@pytest.mark.parametrize(
    "source",
    [
        "a{,3}",
        "a{03}",
        "[[a]",
        "[^[a]",
        "[a[:alpha:]]",
        "[a--b]",
        "[a&&b]",
        "[a~~b]",
        "[a||b]",
        r"\B",
        r"\Z",
        r"\z",
        r"\x61",
        r"\012",
        r"(a)(a)(a)(a)(a)(a)(a)(a)(a)(a)\10",
        r"\pL",
        r"\Qa\E",
        "é",
        "(?i)\u017f",
    ],
)
def test_what_the_engines_may_read_differently_is_refused(source: str) -> None:
    with pytest.raises(PatternRefused, match="unclear"):
        Pattern(source, field="f")


def test_a_flag_is_read_where_peft_would_read_it() -> None:
    assert Pattern("(?i)Q_PROJ|v_proj", field="f").matches("V_PROJ")
    with pytest.raises(PatternRefused, match="global flags"):
        Pattern("(?i)q_proj", field="f", is_tail=True)


SOURCES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join)


@given(st.dictionaries(SOURCES, st.integers(), max_size=6), SHORT_TEXTS)
def test_the_first_match_of_a_table_decides_as_in_peft(table: dict[str, int], path: str) -> None:
    key = get_pattern_key(table.keys(), path)
    assert PatternTable(table.items(), field="f").find(path) == table.get(key)


def test_a_table_of_escaped_names_is_literal_and_of_patterns_is_not() -> None:
    assert PatternTable([(r"model\.layers\.0\.q_proj", 1)], field="f").is_literal
    assert not PatternTable([("model.layers", 1)], field="f").is_literal


def test_a_table_that_names_very_many_modules_is_fine() -> None:
    names = [f"model.layers.{number}.q_proj" for number in range(50_000)]
    table = PatternTable([(re.escape(name), name) for name in names], field="f")
    assert all(table.find(name) == name for name in names)


def test_a_table_of_very_many_patterns_is_refused() -> None:
    with pytest.raises(PatternRefused, match="too many"):
        PatternTable([(f"a.{number}", 1) for number in range(2000)], field="f")


def test_the_patterns_of_a_table_share_what_they_may_spend() -> None:
    table = PatternTable([(f"(a?){{900}}{number}", 1) for number in range(20)], field="f")
    with pytest.raises(PatternRefused, match="too much"):
        any(table.find("b" * 500) for _ in range(10_000))
