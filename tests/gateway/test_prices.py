"""What tokens cost, and which price holds when."""

import asyncio
import datetime
import itertools
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError

from gateway.database import Database
from gateway.errors import Conflict, InvalidRequest
from gateway.prices import (
    MAX_RATE_NANO,
    WHOLE_BP,
    Price,
    PriceScope,
    Rates,
    bill,
    ceiling,
    cost,
    discounted,
    ensure_default,
    set_price,
)
from gateway.tables import PriceVersion, new_id
from tests.gateway.money import a_base_model

RATES = st.integers(0, MAX_RATE_NANO)
TOKENS = st.integers(0, 10_000_000)
PRICES = st.builds(
    Price,
    id=st.just(new_id()),
    input_nano_per_million=RATES,
    cached_input_nano_per_million=RATES,
    output_nano_per_million=RATES,
)


def price_of(input_rate: int, cached_rate: int, output_rate: int) -> Price:
    return Price(new_id(), input_rate, cached_rate, output_rate)


@given(PRICES, TOKENS, TOKENS, TOKENS)
def test_a_cost_is_the_exact_sum_rounded_once_to_even(price, uncached, cached, completion):
    exact = (
        Decimal(uncached * price.input_nano_per_million)
        + Decimal(cached * price.cached_input_nano_per_million)
        + Decimal(completion * price.output_nano_per_million)
    ).scaleb(-6)
    found = cost(
        price,
        prompt_tokens=uncached + cached,
        cached_tokens=cached,
        completion_tokens=completion,
    )
    assert type(found) is int
    assert found == int(exact.quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


@given(PRICES, TOKENS, TOKENS, TOKENS)
def test_no_cost_is_above_what_a_hold_of_its_tokens_reserves(price, uncached, cached, completion):
    prompt = uncached + cached
    reserved = ceiling(price, prompt_tokens=prompt, output_tokens=completion)
    charged = cost(price, prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)
    assert charged <= reserved


def test_a_half_goes_to_the_even_neighbour():
    price = price_of(500_000, 0, 0)
    costs = [
        cost(price, prompt_tokens=n, cached_tokens=0, completion_tokens=0) for n in range(1, 6)
    ]
    assert costs == [0, 1, 2, 2, 2]


def test_parts_that_are_nothing_alone_are_not_lost_together():
    price = price_of(300_000, 300_000, 300_000)
    assert cost(price, prompt_tokens=2, cached_tokens=1, completion_tokens=1) == 1


def test_cached_tokens_are_charged_at_their_own_rate():
    price = price_of(3_000_000, 1_000_000, 10_000_000)
    charged = bill(price, prompt_tokens=100, cached_tokens=40, completion_tokens=7)
    assert charged.cost_nano == 60 * 3 + 40 * 1 + 7 * 10


async def test_a_discounted_rate_is_the_same_here_and_in_the_schema(database: Database) -> None:
    rates = (0, 1, 2, 3, 5, 9_999, 10_001, 3_000_001, MAX_RATE_NANO - 1, MAX_RATE_NANO)
    cases = [(rate, bp) for rate in rates for bp in (0, 1, 2_500, 3_333, 5_000, 9_999, WHOLE_BP)]
    query = text("""
        SELECT discounted(rate, bp) FROM unnest(
            CAST(:rates AS bigint[]), CAST(:discounts AS integer[])
        ) WITH ORDINALITY AS asked (rate, bp, place) ORDER BY place
    """)
    asked = {"rates": [rate for rate, _ in cases], "discounts": [bp for _, bp in cases]}
    async with database.as_worker() as session:
        found = list(await session.scalars(query, asked))
    assert found == [discounted(rate, discount_bp=bp) for rate, bp in cases]
    # Half of an odd rate goes to the even neighbour.
    assert [discounted(rate, discount_bp=5_000) for rate in (1, 3, 5)] == [0, 2, 2]


async def all_prices(database: Database) -> list[PriceVersion]:
    async with database.as_worker() as session:
        found = await session.scalars(
            select(PriceVersion).order_by(func.lower(PriceVersion.effective))
        )
        return list(found.all())


async def test_a_new_price_begins_when_the_old_one_ends(database: Database) -> None:
    base_model, _ = await a_base_model(database)
    async with database.as_worker() as session:
        # Twice in one transaction, whose now() stands still.
        for rate in (5, 6):
            await set_price(
                session, PriceScope(base_model.id), rates=Rates(output_nano_per_million=rate)
            )
    first, second, third = await all_prices(database)
    assert first.effective.upper == second.effective.lower
    assert second.effective.upper == third.effective.lower
    assert third.effective.upper is None
    assert third.output_nano_per_million == 6


async def test_changes_of_one_price_at_once_leave_one_running(database: Database) -> None:
    base_model, _ = await a_base_model(database)

    async def change(rate: int) -> None:
        async with database.as_worker() as session:
            await set_price(
                session, PriceScope(base_model.id), rates=Rates(input_nano_per_million=rate)
            )

    await asyncio.gather(*(change(rate) for rate in range(5)))
    spans = [row.effective for row in await all_prices(database)]
    assert len(spans) == 6
    assert all(one.upper == next_.lower for one, next_ in itertools.pairwise(spans))


async def test_a_price_may_be_set_for_a_day_to_come(database: Database) -> None:
    base_model, _ = await a_base_model(database)
    scope = PriceScope(base_model.id)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=7)
    later = soon + datetime.timedelta(days=7)

    async def change(rate: int, since: datetime.datetime | None) -> None:
        async with database.as_worker() as session:
            rates = Rates(output_nano_per_million=rate)
            await set_price(session, scope, rates=rates, since=since)

    await change(2, later)
    await change(1, soon)
    await change(9, None)
    prices = await all_prices(database)
    assert [row.output_nano_per_million for row in prices[1:]] == [9, 1, 2]
    assert [row.effective.lower for row in prices[2:]] == [soon, later]
    assert all(
        one.effective.upper == next_.effective.lower for one, next_ in itertools.pairwise(prices)
    )
    assert prices[-1].effective.upper is None
    with pytest.raises(Conflict, match="already"):
        await change(5, soon)
    with pytest.raises(InvalidRequest, match="in the past"):
        await change(5, soon - datetime.timedelta(days=8))


async def test_the_default_price_is_zero_and_comes_once(database: Database) -> None:
    base_model, price = await a_base_model(database)
    async with database.as_worker() as session:
        await ensure_default(session, base_model.id)
    assert [row.id for row in await all_prices(database)] == [price.id]


async def test_the_schema_refuses_rates_below_zero(database: Database) -> None:
    base_model, _ = await a_base_model(database)
    with pytest.raises(IntegrityError):
        async with database.as_worker() as session:
            await set_price(
                session, PriceScope(base_model.id), rates=Rates(input_nano_per_million=-1)
            )
