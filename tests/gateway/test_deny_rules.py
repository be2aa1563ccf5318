"""Facts about deny rules: what they find, what they are refused for, and what is held back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ContentRefused, InvalidPolicy
from gateway.policies.document import DenyRule, Policy
from gateway.policies.patterns import compile_output, first_hit
from gateway.policies.rules import Asked, Rules
from gateway.policies.screen import Window

WINDOW_CHARS = 5


def window(*patterns: str, window_chars: int = WINDOW_CHARS) -> Window:
    rules = [DenyRule(f"rule{number}", pattern) for number, pattern in enumerate(patterns)]
    compiled = compile_output(rules, window_chars=window_chars)
    return Window(compiled, window_chars=window_chars)


def sent(window: Window, *pieces: str) -> str:
    return "".join(map(window.feed, pieces)) + window.finish()


def asked(*texts: str) -> Asked:
    return Asked(
        fields=frozenset(),
        prompt_field="messages",
        num_prompt_tokens=1,
        max_tokens=1,
        texts=lambda: texts,
    )


def denying(*patterns: str) -> Rules:
    rules = [DenyRule(f"rule{number}", pattern) for number, pattern in enumerate(patterns)]
    return Rules(Policy(deny_input=rules))


@given(
    pattern=st.sampled_from(
        [r"\bab\b", "a{2,4}c", "b$", r"(?m)^cb", "^ab", r"(?:x|^a)b", r"\Bc", "é.", r"(?m)a$"]
    ),
    pieces=st.lists(st.text("abcé \n", max_size=7), max_size=8),
)
def test_what_is_sent_does_not_depend_on_how_the_text_falls_into_steps(
    pattern: str, pieces: list[str]
) -> None:
    whole = "".join(pieces)
    [rule] = compile_output([DenyRule("x", pattern)], window_chars=WINDOW_CHARS)
    found = rule.whole.search(whole)
    screen = window(pattern)
    assert sent(screen, *pieces) == (whole[: found.start()] if found else whole)
    assert (screen.hit is not None) == bool(found)


def test_nothing_of_a_match_is_sent_that_comes_letter_by_letter() -> None:
    screen = window("abcde")
    assert sent(screen, *"xxabcdeyy") == "xx"
    assert screen.hit == "rule0"


def test_a_match_that_could_end_anywhere_ends_the_answer_at_its_beginning() -> None:
    assert sent(window("a+"), *("x" + "a" * 50)) == "x"
    assert sent(window("a.*"), *("x" + "a" * 50)) == "x"


def test_a_word_is_not_denied_before_it_is_known_to_end() -> None:
    assert sent(window(r"\bass\b"), "an ass", "istant") == "an assistant"
    assert sent(window(r"\bass\b"), "an ass", " here") == "an "
    assert sent(window(r"\bass\b"), "an ", "a", "ss") == "an "


def test_no_more_than_the_window_is_held_back() -> None:
    screen = window("zzz")
    assert screen.feed("a" * 100) == "a" * (100 - WINDOW_CHARS)
    assert screen.finish() == "a" * WINDOW_CHARS


def test_a_match_that_is_longer_than_the_window_may_pass() -> None:
    text = "abcdefghij"
    assert sent(window(text), *text) == text
    assert sent(window(text, window_chars=10), *text) == ""


def test_the_leftmost_of_several_rules_ends_the_answer() -> None:
    screen = window("d", "b")
    assert sent(screen, "abcde") == "a"
    assert screen.hit == "rule1"


async def test_every_message_is_read() -> None:
    rules = denying("(?i)bomb")
    await rules.check(asked("a", "b"))
    with pytest.raises(ContentRefused, match="rule0"):
        await rules.check(asked("how", "to build a BoMb"))


async def test_a_refusal_says_nothing_of_the_text() -> None:
    with pytest.raises(ContentRefused) as refused:
        await denying("bomb").check(asked("a bomb of ours"))
    assert "bomb" not in refused.value.message


def test_half_a_surrogate_pair_hides_nothing() -> None:
    [rule] = compile_output([DenyRule("x", "bomb")], window_chars=16)
    assert first_hit([rule], "\ud800 bomb") == "x"


def test_letters_of_all_scripts_are_letters() -> None:
    [rule] = compile_output([DenyRule("x", r"(?i)größe|日本|\p{Greek}")], window_chars=16)
    for text in ("GRÖSSE GRÖßE", "in 日本", "λ"):
        assert first_hit([rule], text) == "x"
    # As it was written: what only looks alike is another text.
    assert first_hit([rule], "日\u200b本") is None


async def test_a_long_prompt_is_read_beside_the_event_loop_and_to_its_end() -> None:
    rules = denying("(x+x+)+y", "[^a]*a[^b]{20}b", "needle")
    with pytest.raises(ContentRefused, match="rule2"):
        await rules.check(asked("x" * 200_000 + "needle"))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a)(b", "unexpected"),
        ("(", "missing"),
        (r"(?=a)", "invalid"),
        (r"(a)\1", "invalid escape"),
        ("((a{100}){100}){100}", "repetition"),
        (r"(?i)(\pL{1,50}\s){15}q", "too large"),
        (r"\Qabc", "missing"),
        ("a\x00b", "NUL"),
        ("\ud800", "surrogates"),
        *((empty, "nothing") for empty in ("a*", "^", "$", r"\b", r"\B", "(a|)", "(?m)^", r"\bq?")),
    ],
)
def test_a_pattern_that_cannot_be_is_refused_by_its_place(pattern: str, why: str) -> None:
    rules = [DenyRule("fine", "fine"), DenyRule("bad", pattern)]
    with pytest.raises(InvalidPolicy, match=why) as refused:
        Rules(Policy(deny_input=rules))
    assert refused.value.param == "deny_input[1].pattern"


def test_a_name_stands_for_one_rule() -> None:
    with pytest.raises(InvalidPolicy) as refused:
        Rules(Policy(deny_output=[DenyRule("x", "a"), DenyRule("x", "b")]))
    assert refused.value.param == "deny_output[1].name"


def test_patterns_are_bounded_together() -> None:
    large = [DenyRule(f"r{number}", rf"\p{{L}}{{5}}{number}") for number in range(64)]
    with pytest.raises(InvalidPolicy, match="the most in deny_input") as refused:
        Rules(Policy(deny_input=large))
    assert refused.value.param == "deny_input[3].pattern"
    assert len(compile_output(large[:1], window_chars=64)) == 1
    with pytest.raises(InvalidPolicy, match="lower window_chars") as refused:
        Rules(Policy(deny_output=large, window_chars=4096))
    assert refused.value.param == "deny_output[0].pattern"
