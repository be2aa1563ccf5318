"""The comparison with other servers: who is judged right, what is counted, what is told."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from adapters.demo.base_model import default_folder
from benchmarks.peers.figures import figure
from benchmarks.peers.load import expect_lengths
from benchmarks.peers.peer import PeerFailed, program
from benchmarks.peers.quiet import Quiet
from benchmarks.peers.report import Report
from benchmarks.peers.results import Results, read
from benchmarks.peers.scene import PROMPT_TOKENS, Ask, Prompt, Prompts, mixed
from benchmarks.peers.truth import Reference, Truth
from benchmarks.peers.watch import Clock, between, cpu_s, memory_bytes, tree
from benchmarks.serve import Answer

MODEL = default_folder()
ANSWERS = {None: "The sea is wide and cold.", 0: "The sea is green, my friend.", 1: "Ships go by."}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def reference(tokenizer: Tokenizer, text: str, *, ties: dict[int, str] | None = None) -> Reference:
    """An answer in which every token but those of `ties` was far likelier than any other."""
    ids = tokenizer.encode(text).ids
    others = {place: tokenizer.encode(word).ids[0] for place, word in (ties or {}).items()}
    steps = [
        ((token, 20.0), (others.get(place, 0), 19.99 if place in others else 10.0))
        for place, token in enumerate(ids)
    ]
    return Reference(tuple(ids), tuple(steps))


@pytest.fixture(scope="module")
def truth(tokenizer: Tokenizer) -> Truth:
    references = {
        (model, 0): reference(tokenizer, text, ties={3: " very"}) for model, text in ANSWERS.items()
    }
    return Truth(tokenizer, [Prompt("Tell me.", (1, 2))], references)


# Who is right


def test_the_answers_of_peft_are_right(truth: Truth) -> None:
    verdict = truth.judge(list(ANSWERS.values()), precision="fp32")
    assert verdict.is_right
    assert (verdict.num_equal, verdict.num_ties, verdict.num_of_another) == (2, 0, 0)
    assert [ask.adapter for ask in truth.asks()] == [None, 0, 1]


def test_one_adapters_answer_to_everybody_is_wrong(truth: Truth) -> None:
    verdict = truth.judge([ANSWERS[0]] * 3, precision="fp32")
    assert not verdict.is_right
    assert (verdict.num_of_another, verdict.num_wrong_of_base) == (1, 1)


def test_wrong_answers_of_the_base_model_beside_adapters_are_told_of_by_themselves(
    truth: Truth,
) -> None:
    verdict = truth.judge([ANSWERS[0], ANSWERS[0], ANSWERS[1]], precision="fp32")
    assert verdict.is_right
    assert verdict.num_wrong_of_base == 1


@pytest.mark.parametrize("precision", ["fp32", "Q4_1"])
def test_adapters_that_do_nothing_are_wrong_at_every_precision(
    truth: Truth, precision: str
) -> None:
    assert not truth.judge([ANSWERS[None]] * 3, precision=precision).is_right


def test_a_tie_may_be_called_otherwise(truth: Truth) -> None:
    said = [ANSWERS[None], "The sea is very deep.", ANSWERS[1]]
    verdict = truth.judge(said, precision="fp32")
    assert verdict.is_right
    assert (verdict.num_equal, verdict.num_ties) == (1, 1)


def test_another_token_where_peft_saw_no_tie_is_wrong_and_told_of(truth: Truth) -> None:
    said = [ANSWERS[None], "The sea was green.", ANSWERS[1]]
    verdict = truth.judge(said, precision="fp32")
    assert not verdict.is_right
    assert verdict.why == "adapter 0, prompt 0, token 2"


def test_what_comes_behind_an_end_of_text_is_not_compared(tokenizer: Tokenizer) -> None:
    ended = reference(tokenizer, "Yes.<|im_end|> And so on")
    truth = Truth(tokenizer, [Prompt("", ())], {(None, 0): ended})
    assert truth.judge(["Yes. Or no?"], precision="fp32").num_equal == 1


def test_adapters_that_answer_alike_would_prove_nothing(tokenizer: Tokenizer) -> None:
    same = reference(tokenizer, "Yes.")
    truth = Truth(tokenizer, [Prompt("", ())], {(None, 0): same, (0, 0): same})
    with pytest.raises(SystemExit, match="do not differ"):
        truth.check_distinct()


def test_adapters_that_answer_one_prompt_alike_are_told_apart_by_another(
    tokenizer: Tokenizer,
) -> None:
    yes, no = reference(tokenizer, "Yes."), reference(tokenizer, "No.")
    references = {(None, 0): yes, (0, 0): yes, (None, 1): yes, (0, 1): no}
    truth = Truth(tokenizer, 2 * [Prompt("", ())], references)
    truth.check_distinct()
    assert truth.judge(["Yes.", "Yes.", "Yes.", "No."], precision="fp32").is_right
    assert truth.judge(4 * ["Yes."], precision="fp32").num_of_another == 1


# What is asked


def test_prompts_have_all_the_same_length_in_tokens(tokenizer: Tokenizer) -> None:
    prompts = Prompts(MODEL, seed="a").draw(5)
    assert {len(prompt.token_ids) for prompt in prompts} == {PROMPT_TOKENS}
    assert all(tokenizer.encode(prompt.text).ids == [*prompt.token_ids] for prompt in prompts)
    assert len(set(prompts)) == 5
    assert Prompts(MODEL, seed="a").draw(5) == prompts != Prompts(MODEL, seed="b").draw(5)


def test_adapters_are_mixed_evenly_or_by_zipf() -> None:
    prompts = [Prompt(str(number), ()) for number in range(400)]

    def shares(mix: str) -> list[int]:
        asks = mixed(prompts, num_adapters=4, mix=mix, seed="s")
        return [sum(ask.adapter == adapter for ask in asks) for adapter in range(4)]

    assert shares("even") == [100] * 4
    assert shares("zipf") == sorted(shares("zipf"), reverse=True)
    assert mixed(prompts[:1], num_adapters=0, mix="base", seed="s") == [Ask(prompts[0], None)]


def test_answers_of_another_length_are_errors() -> None:
    answers = [
        Answer("a", prompt_tokens=5, completion_tokens=number, error=None) for number in (7, 6)
    ]
    expect_lengths(answers, prompt_tokens=5, new_tokens=7)
    assert [answer.error for answer in answers] == [None, "5 + 6 tokens"]


# What is counted


def test_an_interval_of_95_percent_needs_six_values() -> None:
    six, five = figure([3, 1, 6, 2, 5, 4]), figure([3, 1, 2, 5, 4])
    assert (six.median, six.low, six.high) == (3.5, 1, 6)
    assert six.is_certain
    assert not five.is_certain


def test_with_more_values_the_interval_leaves_the_outermost_out() -> None:
    # At most one of nine tosses is a head, or a tail, in 20 of 512 cases: 3.9 %.
    nine = figure(range(9))
    assert (nine.median, nine.low, nine.high) == (4, 1, 7)


def test_others_work_is_what_the_machine_did_and_we_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    before = Clock(100, 50, {"client": 5, "engine": 15})
    use = between(before, Clock(110, 65, {"client": 6, "engine": 25, "late": 1}))
    assert (use.own, use.foreign) == (0.6, 0.15)
    assert use.cores == {"client": 0.1, "engine": 1.0, "late": 0.1}


def test_what_a_program_uses_is_counted_with_its_children(tmp_path: Path) -> None:
    command = ["sh", "-c", "sleep 60 & echo ready; wait"]
    with program(command, MODEL, log=tmp_path / "log") as running:
        pids = list(tree(running.child.pid))
        assert len(pids) == 2
        assert memory_bytes(running.child.pid) > 0
        # How a shell calls itself depends on the system.
        assert len(cpu_s(running.child.pid)) == 2
        assert "sleep" in cpu_s(running.child.pid)
    deadline = time.monotonic() + 30
    # The one that nobody waits for is told to end, and holds nothing once it did.
    while memory_bytes(pids[1]) > 0:
        assert time.monotonic() < deadline


def test_a_program_that_ends_says_why(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo no such model >&2"]
    with (
        pytest.raises(PeerFailed, match="no such model"),
        program(command, MODEL, log=tmp_path / "log"),
    ):
        pass


def test_others_are_kept_off_while_it_is_quiet_and_let_in_between(tmp_path: Path) -> None:
    mark, holder = tmp_path / "held", tmp_path / "holder"
    holder.write_text(f'#!/bin/sh\necho >> {mark}\n"$@"\necho >> {mark}\n')
    holder.chmod(0o755)

    def times_taken(most_s: float) -> int:
        mark.write_text("")
        quiet = Quiet(str(holder), most_s=most_s)
        quiet.begin()
        quiet.begin()
        assert len(mark.read_text()) % 2 == 1
        quiet.end()
        return len(mark.read_text()) // 2

    assert (times_taken(60), times_taken(0)) == (1, 2)


# What is told


def run(peer: str, speed: float, pair: int, **more: Any) -> dict[str, Any]:
    times = dict.fromkeys(("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"), 10.0)
    place = {"adapters": 8, "mix": "even", "concurrency": 8, "pair": pair}
    counted = {"errors": {}, "dropped": False, "foreign": 0.01, "bytes": 2**30}
    counted["cores"] = {"client": 0.1, "engine": 1.8}
    return {"peer": peer, "tokens_per_s": speed, **times, **place, **counted, **more}


def verdict(peer: str, *, is_right: bool) -> dict[str, Any]:
    return {
        "peer": peer,
        "adapters": 8,
        "is_right": is_right,
        "num_answers": 18,
        "num_equal": 18 if is_right else 4,
        "num_ties": 0,
        "num_of_another": 0 if is_right else 14,
        "num_wrong_of_base": 0,
        "errors": [],
    }


@pytest.fixture
def report(tmp_path: Path) -> Report:
    path = tmp_path / "peers.json"
    where = {"cpu": "2 x C", "system": "Linux", "python": "3"}
    results = Results(path, {"machine": where, "commit": "abc", "command": "go", "begun": "now"})
    for name in ("slow", "hasty", "manylora"):
        results.know(name, {"title": name.title(), "precision": "fp32", "versions": {name: "1"}})
        results.add("checks", verdict(name, is_right=name != "hasty"))
    for pair, (ours, theirs) in enumerate([(100, 50), (90, 30), (80, 40)]):
        results.add("runs", run("manylora", ours, pair))
        results.add("runs", run("slow", theirs, pair))
    results.add("runs", run("manylora", 1, 3, dropped=True, foreign=0.5))
    results.add("runs", run("hasty", 1000, 0))
    return Report(read(path))


def row_of(report: Report, title: str) -> list[str]:
    lines = report.markdown().splitlines()
    line = next(line for line in lines if line.startswith(f"| {title} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_has_medians_of_the_runs_that_count_and_ratios_of_neighbours(
    report: Report,
) -> None:
    assert row_of(report, "Manylora")[1] == "90 (80 to 100; 3)"
    assert row_of(report, "Slow")[1:3] == ["40 (30 to 50; 3)", "2.00 (2.00 to 3.00; 3)"]
    assert row_of(report, "8 adapters, all equally often, 8 at once")[1:] == ["0.10", "1.80"]
    assert "1 of 8 runs were dropped" in report.markdown()


def test_who_answers_wrongly_is_listed_as_wrong_and_not_as_fast(report: Report) -> None:
    assert row_of(report, "Hasty")[1] == "wrong: 14 of 18 answers are another's"
    assert "1000" not in report.markdown()
    assert "1000" not in report.plot()
    assert "wrong" in report.plot()


def test_sessions_are_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    for commit in ("one", "two"):
        Results(path, {"commit": commit}).add("runs", {"peer": "a"})
    assert [session["commit"] for session in json.loads(path.read_text())["sessions"]] == [
        "one",
        "two",
    ]
