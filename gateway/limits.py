"""May this request begin, and how much may it spend? One statement answers and holds the money.

A hold is a row from admission to settlement, never a counter. It pays for the prompt and the first
tranche of output, and grows ahead of need with each heartbeat of its gateway. Rates are leaky
buckets and concurrency is the number of open holds of gateways that live, so a crash heals itself.
All rules of a request are charged together or not at all. The statements are functions of the
schema, in migration 0005. What a name was assumed to mean is confirmed in the same statement that
admits for it. Knows nothing of how tokens are counted or of what a request really cost.
"""

import datetime
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.auth import Principal
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import BudgetSpent, InvalidRequest, LimitReached, MeaningChanged, Unavailable
from gateway.prices import Price
from gateway.registry import MEANING, Recollection, Target

# Output tokens that a hold is extended by: some ten seconds of a fast stream.
TRANCHE_TOKENS = 256
# Ask for the next tranche when fewer are left: more than a heartbeat's worth of tokens.
RESERVE_TOKENS = 128

ADMIT = text("""
    SELECT * FROM admit_request(
        :request_id, :tenant_id, :api_key_id, :base_model_id, :adapter_id, :adapter_version_id,
        :gateway_instance_id, :endpoint, :prompt_tokens, :max_output_tokens, :tranche_tokens,
        :max_cost_nano, :is_rehearsal
    )
""")

# The same for what a name means, where that is what was assumed; no row where it is not, or where
# there is no price. The function is given what was found, so it cannot run before that is known.
ADMIT_AS_ASSUMED = text(f"""
    SELECT admission.* FROM (
        SELECT meaning.* FROM {MEANING} WHERE CAST(meaning AS text) = :assumed OFFSET 0
    ) AS found
    CROSS JOIN LATERAL admit_request(
        :request_id, :tenant_id, :api_key_id, found.base_model_id, found.adapter_id,
        found.adapter_version_id, :gateway_instance_id, :endpoint, :prompt_tokens,
        :max_output_tokens, :tranche_tokens, :max_cost_nano, :is_rehearsal
    ) AS admission
""")  # noqa: S608 - a constant of ours

EXTEND = text("""
    SELECT id, funded_output_tokens, is_budgeted
    FROM extend_holds(
        :gateway_instance_id, :ids, :progress_output_tokens, :progress_cached_tokens,
        :wanted_output_tokens
    )
""")

REFUND = text("SELECT refund_tokens(:tenants, :keys, :adapters, :refunds, :admitted)")

# What each rule is called where a client reads of it.
RULES: Mapping[str, str] = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "concurrent_requests": "concurrent requests",
    "queue_time_ms": "milliseconds of waiting",
}


@dataclass(frozen=True, slots=True)
class Level:
    """How full the tightest of the rules of one kind is: what OpenAI's headers tell."""

    ceiling: int
    remaining: int
    # Until nothing of it is used.
    resets_in_us: int


@dataclass(frozen=True, slots=True)
class Levels:
    """None where no rule of that kind concerns the request."""

    requests: Level | None = None
    tokens: Level | None = None

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`: three for each kind that there is a rule of."""
        found = {}
        for kind, level in (("requests", self.requests), ("tokens", self.tokens)):
            if level is not None:
                found[f"x-ratelimit-limit-{kind}"] = str(level.ceiling)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(level.remaining, 0))
                found[f"x-ratelimit-reset-{kind}"] = spell_duration(level.resets_in_us)
        return found


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which rule says no, and when it may say yes."""

    # A name of RULES, "budget" or "max_cost".
    rule: str
    # "tenant", "key", "adapter" or "request"
    scope: str
    # Tokens, requests, or nano-USD.
    ceiling: int
    current: int
    # None where waiting does not help.
    clears_in_us: int | None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as the rules see it."""

    request_id: uuid.UUID
    # e.g. "chat.completions"
    endpoint: str
    prompt_tokens: int
    # For each sequence.
    max_tokens: int
    gateway_instance_id: uuid.UUID
    num_sequences: int = 1
    # Nano-USD that the client will pay at most; None for no bound of its own.
    max_cost_nano: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the rules say to a request, whether it is admitted or only asked about."""

    price: Price
    # What the hold pays for, and what that costs at most.
    funded_output_tokens: int
    amount_nano: int
    # Over all sequences; fewer than asked for where `max_cost` pays for no more.
    max_output_tokens: int
    # Whether a hard budget may refuse the next tranche.
    is_budgeted: bool
    queue_time_ms: int | None
    # By the database's clock.
    asked_at: datetime.datetime
    levels: Levels
    refusal: Refusal | None


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
    is_budgeted: bool = False
    # Whether `max_cost` pays for fewer tokens than were asked for.
    is_cut_by_max_cost: bool = False
    # How long it may wait for its first token; None for as long as it takes.
    queue_time_ms: int | None = None
    levels: Levels = Levels()


@dataclass(frozen=True, slots=True)
class Stream:
    """How far a running request has come, and what it wants to be funded for."""

    request_id: uuid.UUID
    progress_output_tokens: int
    progress_cached_tokens: int
    wanted_output_tokens: int


@dataclass(frozen=True, slots=True)
class Funding:
    """What a stream is funded for now. Less than it wanted means that a budget has no more."""

    request_id: uuid.UUID
    funded_output_tokens: int
    is_budgeted: bool


@dataclass(frozen=True, slots=True)
class Refund:
    """Tokens that a request was charged for and did not use; below zero where it used more."""

    tenant_id: uuid.UUID
    api_key_id: uuid.UUID
    adapter_id: uuid.UUID | None
    tokens: int
    admitted_at: datetime.datetime


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
    max_cost_nano: int | None = None,
    assumed: Recollection | None = None,
) -> Admission:
    """Charge every rule and hold the money for a request's first tranche; `max_tokens` is for each
    sequence. `assumed` is what the target was taken from, where that is not certain.

    Raises LimitReached or BudgetSpent, InvalidRequest where `max_cost_nano` pays for no token, and
    Unavailable when the database does not answer or has no price: nothing is served then that could
    not be billed. Raises MeaningChanged where nothing can be admitted as `assumed`.
    """
    ask = Ask(
        request_id=request_id,
        endpoint=endpoint,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        gateway_instance_id=gateway_instance_id,
        num_sequences=num_sequences,
        max_cost_nano=max_cost_nano,
    )
    answer = await _ask(database, principal, target, ask, is_rehearsal=False, assumed=assumed)
    if answer.refusal is not None:
        raise refused(answer.refusal, principal, target, levels=answer.levels)
    return Admission(
        request_id=request_id,
        gateway_instance_id=gateway_instance_id,
        price=answer.price,
        max_output_tokens=answer.max_output_tokens,
        funded_output_tokens=answer.funded_output_tokens,
        amount_nano=answer.amount_nano,
        admitted_at=answer.asked_at,
        is_budgeted=answer.is_budgeted,
        is_cut_by_max_cost=answer.max_output_tokens < num_sequences * max_tokens,
        queue_time_ms=answer.queue_time_ms,
        levels=answer.levels,
    )


async def rehearse(database: Database, principal: Principal, target: Target, ask: Ask) -> Answer:
    """What `admit` would say now; nothing is charged or held. Raises Unavailable."""
    return await _ask(database, principal, target, ask, is_rehearsal=True)


async def _ask(
    database: Database,
    principal: Principal,
    target: Target,
    ask: Ask,
    *,
    is_rehearsal: bool,
    assumed: Recollection | None = None,
) -> Answer:
    assert principal.tenant_id is not None, "only tenants are billed"
    parameters: dict[str, Any] = {
        "request_id": ask.request_id,
        "tenant_id": principal.tenant_id,
        "api_key_id": principal.key_id,
        "base_model_id": target.base_model_id,
        "adapter_id": target.adapter_id,
        "adapter_version_id": target.adapter_version_id,
        "gateway_instance_id": ask.gateway_instance_id,
        "endpoint": ask.endpoint,
        "prompt_tokens": ask.prompt_tokens,
        "max_output_tokens": ask.num_sequences * ask.max_tokens,
        "tranche_tokens": ask.num_sequences * min(ask.max_tokens, TRANCHE_TOKENS),
        "max_cost_nano": ask.max_cost_nano,
        "is_rehearsal": is_rehearsal,
    }
    statement = ADMIT
    if assumed is not None:
        statement, parameters = ADMIT_AS_ASSUMED, {**parameters, **assumed.parameters}
    try:
        rows = await database.call(statement, parameters, locks_rows_of=principal.tenant_id)
    except DATABASE_TROUBLE as fault:
        raise Unavailable("The ledger does not answer. Try again shortly.") from fault
    if not rows and assumed is not None:
        raise MeaningChanged
    if not rows:
        raise Unavailable(f"The model {target.public_name} has no price yet.", retry_after_s=60)
    return _answer(rows[0])


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(
        price=Price(
            row["price_id"],
            row["input_nano_per_million"],
            row["cached_input_nano_per_million"],
            row["output_nano_per_million"],
        ),
        funded_output_tokens=row["funded_output_tokens"],
        amount_nano=row["amount_nano"],
        max_output_tokens=row["max_output_tokens"],
        is_budgeted=row["is_budgeted"],
        queue_time_ms=row["queue_time_ms"],
        asked_at=row["admitted_at"],
        levels=Levels(
            _level(row["requests_ceiling"], row["requests_remaining"], row["requests_reset_us"]),
            _level(row["tokens_ceiling"], row["tokens_remaining"], row["tokens_reset_us"]),
        ),
        refusal=_refusal(row),
    )


def _level(ceiling: int | None, remaining: int, resets_in_us: int) -> Level | None:
    return None if ceiling is None else Level(ceiling, remaining, resets_in_us)


def _refusal(row: Mapping[str, Any]) -> Refusal | None:
    if row["refused_rule"] is None:
        return None
    return Refusal(
        rule=row["refused_rule"],
        scope=row["refused_scope"],
        ceiling=row["refused_ceiling"],
        current=row["refused_current"],
        clears_in_us=row["refused_clears_us"],
    )


def refused(
    refusal: Refusal, principal: Principal, target: Target, *, levels: Levels = Levels()
) -> InvalidRequest | LimitReached:
    """The error that tells a client of a refusal, with all its headers."""
    if refusal.rule == "max_cost":
        return InvalidRequest(
            f"'max_cost' is {refusal.ceiling} nano-USD, and the prompt with one token of answer"
            f" can cost {refusal.current}: raise it or shorten the prompt.",
            param="max_cost",
        )
    whose = {"tenant": principal.tenant_slug, "key": principal.key_name}
    name = f"{refusal.scope} {whose.get(refusal.scope, target.public_name)!r}"
    error: LimitReached
    if refusal.rule == "budget":
        error = BudgetSpent(
            f"The budget of the {name} is {refusal.ceiling} nano-USD for this period, of which"
            f" {refusal.current} are spent or held. It {_when(refusal.clears_in_us)}."
        )
    else:
        error = LimitReached(
            f"The {name} may have {refusal.ceiling} {RULES[refusal.rule]} and is at"
            f" {refusal.current}. It {_when(refusal.clears_in_us)}."
        )
        if refusal.clears_in_us is None:
            error = LimitReached(
                f"This request counts {refusal.current} tokens, more than the {name} may ever have"
                f" at once at {refusal.ceiling} tokens per minute: make it smaller."
            )
    error.rule = asdict(refusal)
    error.headers |= levels.headers() | _retry_headers(refusal)
    return error


def waited_too_long(admission: Admission) -> LimitReached:
    """The error that tells a client that its first token did not come in time."""
    assert admission.queue_time_ms is not None, "nobody waits too long without a limit"
    error = LimitReached(
        f"The request waited {admission.queue_time_ms} ms for its first token, as long as it may,"
        " and was withdrawn. Try again shortly."
    )
    refusal = Refusal(
        "queue_time_ms", "request", admission.queue_time_ms, admission.queue_time_ms, 1_000_000
    )
    error.rule = asdict(refusal)
    error.headers |= admission.levels.headers() | _retry_headers(refusal)
    return error


def _when(clears_in_us: int | None) -> str:
    return "clears in " + spell_duration(clears_in_us or 0)


def _retry_headers(refusal: Refusal) -> dict[str, str]:
    # Clients retry by themselves; they must not where it cannot help.
    headers = {}
    if refusal.rule == "budget" or refusal.clears_in_us is None:
        headers["x-should-retry"] = "false"
    if refusal.clears_in_us is not None:
        headers["retry-after"] = str(math.ceil(refusal.clears_in_us / 1_000_000))
        headers["retry-after-ms"] = str(math.ceil(refusal.clears_in_us / 1_000))
    return headers


def spell_duration(duration_us: int) -> str:
    """As OpenAI's headers spell it: 250ms, 1.5s, 6m0s."""
    duration_ms = math.ceil(duration_us / 1000)
    if duration_ms < 1000:
        return f"{duration_ms}ms"
    minutes, rest_ms = divmod(duration_ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest_ms / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds


def want(*, progress: int, funded: int, max_output_tokens: int) -> int:
    """Output tokens that a stream should be funded for now."""
    while funded - progress < RESERVE_TOKENS and funded < max_output_tokens:
        funded = min(funded + TRANCHE_TOKENS, max_output_tokens)
    return funded


async def extend(
    session: AsyncSession, *, gateway_instance_id: uuid.UUID, streams: Sequence[Stream]
) -> list[Funding]:
    """One heartbeat of a gateway and of all its open holds, as the worker role.

    Held and spent together never pass a hard budget: who asks for more is funded as far as it goes.
    """
    rows = await session.execute(
        EXTEND,
        {
            "gateway_instance_id": gateway_instance_id,
            "ids": [stream.request_id for stream in streams],
            "progress_output_tokens": [stream.progress_output_tokens for stream in streams],
            "progress_cached_tokens": [stream.progress_cached_tokens for stream in streams],
            "wanted_output_tokens": [stream.wanted_output_tokens for stream in streams],
        },
    )
    return [Funding(row.id, row.funded_output_tokens, row.is_budgeted) for row in rows]


async def refund(database: Database, refunds: Sequence[Refund]) -> None:
    """Correct the token buckets by what requests really used. Raises what the database raises."""
    due = [each for each in refunds if each.tokens]
    if due:
        await database.call_as_worker(
            REFUND,
            {
                "tenants": [each.tenant_id for each in due],
                "keys": [each.api_key_id for each in due],
                "adapters": [each.adapter_id for each in due],
                "refunds": [each.tokens for each in due],
                "admitted": [each.admitted_at for each in due],
            },
        )
