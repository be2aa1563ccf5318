"""May this request begin, and how much may it spend? One statement answers and holds the money.

A hold is a row from admission to settlement, never a counter. It pays for the prompt and the first
tranche of output, and grows ahead of need with each heartbeat of its gateway. Knows nothing of how
tokens are counted or of what a request really cost.
"""

import datetime
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.auth import Principal
from gateway.database import Database
from gateway.errors import Unavailable
from gateway.prices import Price, ceiling
from gateway.registry import Target

# Output tokens that a hold is extended by: some ten seconds of a fast stream.
TRANCHE_TOKENS = 256
# Ask for the next tranche when fewer are left: more than a heartbeat's worth of tokens.
RESERVE_TOKENS = 128

# Pin the price that holds now (adapter's before tenant's before the base model's) and reserve what
# the first tranche can cost. Asynchronous commit: should the database lose the hold, the journal
# still has it, and settlement puts it back.
ADMIT = text("""
    WITH price AS (
        SELECT id, input_nano_per_million, cached_input_nano_per_million, output_nano_per_million
        FROM price_versions
        WHERE base_model_id = CAST(:base_model_id AS uuid) AND effective @> now()
          AND (tenant_id IS NULL OR tenant_id = CAST(:tenant_id AS uuid))
          AND (adapter_id IS NULL OR adapter_id = CAST(:adapter_id AS uuid))
        ORDER BY adapter_id IS NULL, tenant_id IS NULL
        LIMIT 1
    ), hold AS (
        INSERT INTO holds (
            id, tenant_id, api_key_id, base_model_id, adapter_id, adapter_version_id,
            price_version_id, gateway_instance_id, endpoint, prompt_tokens, funded_output_tokens,
            amount_nano
        )
        SELECT
            CAST(:request_id AS uuid), CAST(:tenant_id AS uuid), CAST(:api_key_id AS uuid),
            CAST(:base_model_id AS uuid), CAST(:adapter_id AS uuid),
            CAST(:adapter_version_id AS uuid), price.id, CAST(:gateway_instance_id AS uuid),
            CAST(:endpoint AS text), CAST(:prompt_tokens AS bigint),
            CAST(:funded_output_tokens AS bigint),
            CAST(ceil((
                CAST(:prompt_tokens AS bigint)
                    * CAST(greatest(input_nano_per_million, cached_input_nano_per_million)
                           AS numeric)
                + CAST(:funded_output_tokens AS bigint) * CAST(output_nano_per_million AS numeric)
            ) / 1000000) AS bigint)
        FROM price
        RETURNING amount_nano, created_at
    )
    SELECT price.*, hold.amount_nano, hold.created_at,
           set_config('synchronous_commit', 'off', true)
    FROM price, hold
""")

# The heartbeat: this gateway lives, and its streams have come so far and are funded so far.
EXTEND = text("""
    WITH beat AS (
        UPDATE gateway_instances SET heartbeat_at = now()
        WHERE id = CAST(:gateway_instance_id AS uuid)
    )
    UPDATE holds SET
        progress_output_tokens = stream.progress_output_tokens,
        progress_cached_tokens = stream.progress_cached_tokens,
        funded_output_tokens = greatest(holds.funded_output_tokens, stream.funded_output_tokens),
        amount_nano = greatest(holds.amount_nano, stream.amount_nano)
    FROM unnest(
        CAST(:ids AS uuid[]), CAST(:progress_output_tokens AS bigint[]),
        CAST(:progress_cached_tokens AS bigint[]), CAST(:funded_output_tokens AS bigint[]),
        CAST(:amounts_nano AS bigint[])
    ) AS stream (
        id, progress_output_tokens, progress_cached_tokens, funded_output_tokens, amount_nano
    )
    WHERE holds.id = stream.id AND holds.state = 'open'
""")


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that may begin, and the money that is held for it."""

    request_id: uuid.UUID
    gateway_instance_id: uuid.UUID
    price: Price
    # Over all sequences of the request.
    max_output_tokens: int
    funded_output_tokens: int
    amount_nano: int
    # By the database's clock.
    admitted_at: datetime.datetime


@dataclass(frozen=True, slots=True)
class Stream:
    """How far a running request has come, and what it is to be funded for."""

    request_id: uuid.UUID
    progress_output_tokens: int
    progress_cached_tokens: int
    funded_output_tokens: int
    amount_nano: int


async def admit(
    database: Database,
    principal: Principal,
    target: Target,
    *,
    request_id: uuid.UUID,
    endpoint: str,
    prompt_tokens: int,
    max_tokens: int,
    gateway_instance_id: uuid.UUID,
    num_sequences: int = 1,
) -> Admission:
    """Hold the money for a request's first tranche; `max_tokens` is for each sequence.

    Raises Unavailable when the database does not answer or has no price: nothing is served then
    that could not be billed.
    """
    assert principal.tenant_id is not None, "only tenants are billed"
    funded = num_sequences * min(max_tokens, TRANCHE_TOKENS)
    parameters = {
        "request_id": request_id,
        "tenant_id": principal.tenant_id,
        "api_key_id": principal.key_id,
        "base_model_id": target.base_model_id,
        "adapter_id": target.adapter_id,
        "adapter_version_id": target.adapter_version_id,
        "gateway_instance_id": gateway_instance_id,
        "endpoint": endpoint,
        "prompt_tokens": prompt_tokens,
        "funded_output_tokens": funded,
    }
    try:
        async with database.as_tenant(principal.tenant_id) as session:
            row = (await session.execute(ADMIT, parameters)).one_or_none()
    except (DBAPIError, PoolExhausted, OSError) as fault:
        raise Unavailable("The ledger does not answer. Try again shortly.") from fault
    if row is None:
        raise Unavailable(f"The model {target.public_name} has no price yet.", retry_after_s=60)
    return Admission(
        request_id=request_id,
        gateway_instance_id=gateway_instance_id,
        price=Price(
            row.id,
            row.input_nano_per_million,
            row.cached_input_nano_per_million,
            row.output_nano_per_million,
        ),
        max_output_tokens=num_sequences * max_tokens,
        funded_output_tokens=funded,
        amount_nano=row.amount_nano,
        admitted_at=row.created_at,
    )


def fund(
    price: Price, *, prompt_tokens: int, progress: int, funded: int, max_output_tokens: int
) -> tuple[int, int]:
    """Output tokens that a stream should be funded for now, and nano-USD that they may cost."""
    while funded - progress < RESERVE_TOKENS and funded < max_output_tokens:
        funded = min(funded + TRANCHE_TOKENS, max_output_tokens)
    return funded, ceiling(price, prompt_tokens=prompt_tokens, output_tokens=funded)


async def extend(
    session: AsyncSession, *, gateway_instance_id: uuid.UUID, streams: Sequence[Stream]
) -> None:
    """One heartbeat of a gateway and of all its open holds, as the worker role."""
    await session.execute(
        EXTEND,
        {
            "gateway_instance_id": gateway_instance_id,
            "ids": [stream.request_id for stream in streams],
            "progress_output_tokens": [stream.progress_output_tokens for stream in streams],
            "progress_cached_tokens": [stream.progress_cached_tokens for stream in streams],
            "funded_output_tokens": [stream.funded_output_tokens for stream in streams],
            "amounts_nano": [stream.amount_nano for stream in streams],
        },
    )
