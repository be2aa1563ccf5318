"""The witness finds what it is there to find: one wrong fact in any account does not pass."""

import copy
from collections.abc import Callable

import pytest

from tests.crash.clients import Ask, Attempt
from tests.crash.journals import Counts, Entry
from tests.crash.trace import Traced
from tests.crash.witness import Court, Event

KEY = ("gateway", 1, 1)
ALL = Counts(3, 0, 2)


def a_court() -> Court:
    """One stream of two tokens, seen to its end, and nothing wrong with it."""
    ask = Ask("user-1", "acme", "key", "echo", [1, 2, 3], "w001 w002 w003", max_tokens=2)
    seen = Attempt(ask, "r1", 200, pieces=["w001", " w002"], finish_reason="length", is_done=True)
    seen.usage, seen.cost_nano = ALL, 50
    entry = Entry("r1", [KEY], True, 3, "user-1", [Counts(3, 0, 1), ALL], True, "length", ALL)
    return Court(
        entries={"r1": entry},
        trace={KEY: Traced([1, 2, 3], [1, 2], [1, 2], is_finished=True)},
        attempts=[seen],
        events={"r1": Event("r1", "acme", "user-1", "length", ALL, 50)},
    )


def lose_the_bill(court: Court) -> None:
    del court.events["r1"]


def bill_a_token_more(court: Court) -> None:
    court.events["r1"] = Event("r1", "acme", "user-1", "length", Counts(3, 0, 3), 50)


def bill_the_prompt_twice(court: Court) -> None:
    court.events["r1"] = Event("r1", "acme", "user-1", "length", Counts(6, 0, 2), 50)


def bill_another_sum(court: Court) -> None:
    court.events["r1"] = Event("r1", "acme", "user-1", "length", ALL, 51)


def bill_another_tenant(court: Court) -> None:
    court.events["r1"] = Event("r1", "bolt", "user-1", "length", ALL, 50)


def bill_twice(court: Court) -> None:
    """A second bill for the one attempt, with a journal entry and a sequence of its own."""
    court.entries["r2"] = copy.copy(court.entries["r1"])
    court.entries["r2"].request_id = "r2"
    court.events["r2"] = Event("r2", "acme", "user-1", "length", ALL, 50)


def bill_out_of_nothing(court: Court) -> None:
    court.events["r2"] = Event("r2", "acme", "user-1", "length", ALL, 50)


def journal_what_was_not_sampled(court: Court) -> None:
    court.trace[KEY] = Traced([1, 2, 3], [1], [1])


def compute_another_prompt(court: Court) -> None:
    court.trace[KEY].prompt = [1, 2, 4]


def show_a_token_more(court: Court) -> None:
    court.attempts[0].pieces.append(" w003")


def show_another_answer(court: Court) -> None:
    court.attempts[0].pieces[1] = " w003"


def forget_the_last_mark(court: Court) -> None:
    court.entries["r1"].marks.pop()


@pytest.mark.parametrize(
    "spoil",
    [
        lose_the_bill,
        bill_a_token_more,
        bill_the_prompt_twice,
        bill_another_sum,
        bill_another_tenant,
        bill_twice,
        bill_out_of_nothing,
        journal_what_was_not_sampled,
        compute_another_prompt,
        show_a_token_more,
        show_another_answer,
        forget_the_last_mark,
    ],
)
def test_one_wrong_fact_is_found(spoil: Callable[[Court], None]) -> None:
    court = a_court()
    assert court.judge() == []
    spoiled = a_court()
    spoil(spoiled)
    assert spoiled.judge() != []
