"""What tokens cost: the only place where a rate meets a count.

Rates are integer nano-USD per million tokens, money is integer nano-USD, and a request is rounded
once. Prices are rows with a span of time; a rate is never changed, it ends and another begins.
Knows nothing of requests' lives or of reports.
"""

import datetime
import uuid
from dataclasses import dataclass
from typing import Annotated, Self

import msgspec
from sqlalchemy import ColumnElement, DateTime, and_, cast, func, select
from sqlalchemy.dialects.postgresql import Range
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.errors import Conflict, InvalidRequest
from gateway.tables import BaseModel, PriceVersion, new_id

TOKENS_PER_RATE = 1_000_000
BYTE_HOURS_PER_RATE = 1 << 30
# A million USD per million tokens: far above any price, far below where BIGINT would overflow.
MAX_RATE_NANO = 10**15
# A basis point is a ten-thousandth.
WHOLE_BP = 10_000
# What the endpoint of a batch's requests begins with, in holds, events and reports.
BATCH = "batch."

Rate = Annotated[int, msgspec.Meta(ge=0, le=MAX_RATE_NANO)]
Discount = Annotated[int, msgspec.Meta(ge=0, le=WHOLE_BP)]


class Rates(msgspec.Struct, frozen=True):
    """Nano-USD per million tokens, and per GiB of an adapter and hour that it is kept."""

    input_nano_per_million: Rate = 0
    cached_input_nano_per_million: Rate = 0
    output_nano_per_million: Rate = 0
    storage_nano_per_gib_hour: Rate = 0
    # What tokens of a batch's requests cost less.
    batch_discount_bp: Discount = 0

    @classmethod
    def of(cls, row: PriceVersion) -> Self:
        return cls(**{name: getattr(row, name) for name in cls.__struct_fields__})


class Price(msgspec.Struct, frozen=True, array_like=True):
    """The rates that were pinned for a request when it was admitted; a batch's are discounted."""

    # The row of `price_versions`.
    id: uuid.UUID
    input_nano_per_million: int
    cached_input_nano_per_million: int
    output_nano_per_million: int


class Bill(msgspec.Struct, frozen=True, array_like=True):
    """What a request used and costs: what its client is shown and what its usage event says."""

    prompt_tokens: int = 0
    # How many of the prompt tokens came from the prefix cache.
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_nano: int = 0
    # Engine time spent on it; not billed.
    engine_ns: int = 0


def cost(price: Price, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
    """Nano-USD of one request, rounded once, half to even."""
    assert 0 <= cached_tokens <= prompt_tokens, "cached tokens are prompt tokens"
    assert completion_tokens >= 0
    total = (
        (prompt_tokens - cached_tokens) * price.input_nano_per_million
        + cached_tokens * price.cached_input_nano_per_million
        + completion_tokens * price.output_nano_per_million
    )
    return _divide_half_even(total, TOKENS_PER_RATE)


def bill(
    price: Price,
    *,
    prompt_tokens: int,
    cached_tokens: int,
    completion_tokens: int,
    engine_ns: int = 0,
) -> Bill:
    """The counts together with their cost."""
    cost_nano = cost(
        price,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        completion_tokens=completion_tokens,
    )
    return Bill(prompt_tokens, cached_tokens, completion_tokens, cost_nano, engine_ns)


def ceiling(price: Price, *, prompt_tokens: int, output_tokens: int) -> int:
    """Nano-USD that so many tokens cannot exceed; what a hold reserves. The same as admission's."""
    input_rate = max(price.input_nano_per_million, price.cached_input_nano_per_million)
    total = prompt_tokens * input_rate + output_tokens * price.output_nano_per_million
    return -(-total // TOKENS_PER_RATE)


def amount(quantity: int, *, rate_nano: int, per: int) -> int:
    """Nano-USD of a quantity at a rate, rounded once, half to even; less than nothing too."""
    return _divide_half_even(quantity * rate_nano, per)


def discounted(rate_nano: int, *, discount_bp: int) -> int:
    """A rate for batches: a whole number of nano-USD again, rounded half to even.

    The requests of a batch are then priced like any other. The schema has the same function.
    """
    return _divide_half_even(rate_nano * (WHOLE_BP - discount_bp), WHOLE_BP)


def storage_cost(size_bytes: int, *, rate_nano: int) -> int:
    """Nano-USD of keeping so many bytes for one hour."""
    return amount(size_bytes, rate_nano=rate_nano, per=BYTE_HOURS_PER_RATE)


def _divide_half_even(numerator: int, denominator: int) -> int:
    quotient, remainder = divmod(numerator, denominator)
    if 2 * remainder > denominator or (2 * remainder == denominator and quotient % 2):
        return quotient + 1
    return quotient


@dataclass(frozen=True, slots=True)
class PriceScope:
    """Whom a price is for: all of a base model, one tenant, or one adapter."""

    base_model_id: uuid.UUID
    tenant_id: uuid.UUID | None = None
    adapter_id: uuid.UUID | None = None

    def is_of(self, table: type[PriceVersion]) -> ColumnElement[bool]:
        return and_(
            table.base_model_id == self.base_model_id,
            table.tenant_id.is_not_distinct_from(self.tenant_id),
            table.adapter_id.is_not_distinct_from(self.adapter_id),
        )


async def price_at(
    session: AsyncSession, scope: PriceScope, moment: datetime.datetime | None = None
) -> PriceVersion | None:
    """The row of exactly this scope that holds at a moment; now, where none is named."""
    # Not now(): that is when the transaction began, which may be before the row did.
    asked = func.clock_timestamp() if moment is None else cast(moment, DateTime(timezone=True))
    found = await session.scalars(
        select(PriceVersion)
        .where(scope.is_of(PriceVersion), PriceVersion.effective.op("@>")(asked))
        .execution_options(populate_existing=True)
    )
    return found.one_or_none()


async def set_price(
    session: AsyncSession,
    scope: PriceScope,
    *,
    rates: Rates,
    since: datetime.datetime | None = None,
) -> PriceVersion:
    """Begin a price of this scope now or at a moment to come, and end there the one before it.

    It holds until the next one that is planned. Requests that were admitted before keep the price
    that they were admitted at. Raises InvalidRequest for the past, Conflict where one begins then.
    """
    # One change of a base model's prices at a time, so that the spans meet without a gap.
    await session.execute(
        select(BaseModel.id).where(BaseModel.id == scope.base_model_id).with_for_update()
    )
    now: datetime.datetime = (await session.execute(select(func.clock_timestamp()))).scalar_one()
    if since is not None and since < now:
        raise InvalidRequest("A price cannot begin in the past.", param="from")
    moment = since or now
    before = await price_at(session, scope, moment)
    if before is not None and before.effective.lower == moment:
        raise Conflict(f"A price begins at {moment.isoformat()} already.", param="from")
    until = await _next_begin(session, scope, after=moment)
    if before is not None:
        before.effective = Range(before.effective.lower, moment, bounds="[)")
        await session.flush()
    return await _insert_price(session, scope, rates=rates, span=Range(moment, until, bounds="[)"))


async def _next_begin(
    session: AsyncSession, scope: PriceScope, *, after: datetime.datetime
) -> datetime.datetime | None:
    begin = func.lower(PriceVersion.effective)
    found: datetime.datetime | None = await session.scalar(
        select(func.min(begin)).where(scope.is_of(PriceVersion), begin > after)
    )
    return found


async def ensure_default(session: AsyncSession, base_model_id: uuid.UUID) -> None:
    """Give a base model that has no price a price of zero, so that it can be served."""
    scope = PriceScope(base_model_id)
    if await price_at(session, scope) is None:
        await set_price(session, scope, rates=Rates())


async def _insert_price(
    session: AsyncSession, scope: PriceScope, *, rates: Rates, span: Range[datetime.datetime]
) -> PriceVersion:
    row = PriceVersion(
        id=new_id(),
        base_model_id=scope.base_model_id,
        tenant_id=scope.tenant_id,
        adapter_id=scope.adapter_id,
        effective=span,
        input_nano_per_million=rates.input_nano_per_million,
        cached_input_nano_per_million=rates.cached_input_nano_per_million,
        output_nano_per_million=rates.output_nano_per_million,
        storage_nano_per_gib_hour=rates.storage_nano_per_gib_hour,
        batch_discount_bp=rates.batch_discount_bp,
    )
    session.add(row)
    await session.flush()
    return row
