"""The books in the words of other people's programs: FOCUS for finance, meter events for Stripe.

Both say the same however often they are made: FOCUS rows are lines of closed statements, and a
meter event is a tenant's usage that was settled in one hour, which is over. Knows nothing of HTTP.
"""

import csv
import datetime
import io
import uuid
from collections.abc import AsyncIterator, Iterable
from decimal import Context, Decimal
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.billing.documents import NANO_PER_USD, LineView, StatementView
from gateway.billing.periods import month_end
from gateway.billing.usage import cell
from gateway.prices import BYTE_HOURS_PER_RATE, TOKENS_PER_RATE

# Wide enough for every quotient by a power of two or ten here to be exact.
_EXACT = Context(prec=60)

# Columns of FOCUS 1.2 (FinOps Open Cost and Usage Specification) that apply to us, by its names.
FOCUS_COLUMNS = (
    *("BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency"),
    *("BillingPeriodEnd", "BillingPeriodStart", "ChargeCategory", "ChargeClass"),
    *("ChargeDescription", "ChargeFrequency", "ChargePeriodEnd", "ChargePeriodStart"),
    *("ConsumedQuantity", "ConsumedUnit", "ContractedCost", "ContractedUnitPrice"),
    *("EffectiveCost", "InvoiceId", "InvoiceIssuerName", "ListCost", "ListUnitPrice"),
    *("PricingCategory", "PricingQuantity", "PricingUnit", "ProviderName", "PublisherName"),
    *("ResourceId", "ResourceName", "ResourceType", "ServiceCategory", "ServiceName"),
    *("ServiceSubcategory", "SkuId", "SkuMeter", "SkuPriceId"),
)
_PROVIDER = "Manylora"
_TOKEN_UNITS = ("input_tokens", "cached_input_tokens", "output_tokens")
_UNITS = {
    **{
        f"{kind}{unit}": ("Tokens", "1000000 Tokens", TOKENS_PER_RATE)
        for kind in ("", "batch_")
        for unit in _TOKEN_UNITS
    },
    "byte_hours": ("Byte-Hours", "GiB-Hours", BYTE_HOURS_PER_RATE),
}

# What each paying tenant's events of one hour of settlement add up to.
METERED = text("""
    SELECT e.tenant_id, a.stripe_customer_id, date_trunc('hour', e.settled_at, 'UTC') AS hour,
           CAST(sum(e.prompt_tokens - e.cached_tokens) AS bigint) AS input_tokens,
           CAST(sum(e.cached_tokens) AS bigint) AS cached_input_tokens,
           CAST(sum(e.completion_tokens) AS bigint) AS output_tokens,
           CAST(sum(e.cost_nano) AS bigint) AS cost_nano
    FROM usage_events e
    JOIN billing_accounts a ON a.tenant_id = e.tenant_id
    WHERE e.settled_at >= :since AND e.settled_at < :until
      AND a.stripe_customer_id IS NOT NULL
    GROUP BY e.tenant_id, a.stripe_customer_id, hour
    ORDER BY hour, e.tenant_id
""")
METERS = ("input_tokens", "cached_input_tokens", "output_tokens", "cost_nano")


class MeterPayload(msgspec.Struct, frozen=True):
    """Whose usage, and how much; Stripe takes the number as text."""

    stripe_customer_id: str
    value: str


class MeterEvent(msgspec.Struct, frozen=True):
    """The body of one `POST /v1/billing/meter_events` of Stripe's."""

    event_name: str
    # The same for the same hour, tenant and meter, whenever it is exported: Stripe takes it once.
    identifier: str
    # Seconds since 1970.
    timestamp: int
    payload: MeterPayload


def focus_csv(statements: Iterable[StatementView]) -> str:
    """The lines of closed statements as FOCUS rows; `BilledCost` adds up to the statements."""
    file = io.StringIO()
    writer = csv.DictWriter(file, FOCUS_COLUMNS, restval="")
    writer.writeheader()
    for statement in statements:
        writer.writerows(_focus_row(statement, line) for line in statement.lines)
    return file.getvalue()


def _focus_row(statement: StatementView, line: LineView) -> dict[str, str]:
    cost = _usd(line.amount_nano)
    name = line.adapter or line.model
    row = {
        "BilledCost": cost,
        "BillingAccountId": cell(statement.tenant),
        "BillingAccountName": cell(statement.tenant_name),
        "BillingCurrency": "USD",
        "BillingPeriodStart": _midnight(statement.month),
        "BillingPeriodEnd": _time(month_end(statement.month)),
        "ChargeCategory": _category(line),
        # A correction is of a period that was invoiced before.
        "ChargeClass": "Correction" if line.is_adjustment else "",
        "ChargeDescription": f"{line.kind} of {name}: {line.unit.replace('_', ' ')}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodStart": _midnight(line.usage_month),
        "ChargePeriodEnd": _time(month_end(line.usage_month)),
        "ContractedCost": cost,
        "EffectiveCost": cost,
        "InvoiceId": statement.number,
        "InvoiceIssuerName": _PROVIDER,
        "ListCost": cost,
        "ProviderName": _PROVIDER,
        "PublisherName": _PROVIDER,
        "ResourceId": name,
        "ResourceName": name,
        "ResourceType": "Base model" if line.adapter is None else "LoRA adapter",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Manylora",
        "ServiceSubcategory": "Generative AI",
        "SkuId": f"{line.model}/{line.unit}",
        "SkuMeter": line.unit,
    }
    return row | _pricing(line)


def _pricing(line: LineView) -> dict[str, str]:
    if line.rate_nano is None:
        return {}
    consumed, priced, per = _UNITS[line.unit]
    price = _usd(line.rate_nano)
    return {
        "ConsumedQuantity": str(line.quantity),
        "ConsumedUnit": consumed,
        "ContractedUnitPrice": price,
        "ListUnitPrice": price,
        "PricingCategory": "Standard",
        "PricingQuantity": _plain(_EXACT.divide(Decimal(line.quantity), Decimal(per))),
        "PricingUnit": priced,
        "SkuPriceId": f"{line.model}/{line.unit}/{line.rate_nano}",
    }


def _category(line: LineView) -> str:
    if line.kind == "credit":
        return "Credit"
    return "Adjustment" if line.unit == "roundings" else "Usage"


def _usd(amount_nano: int) -> str:
    return _plain(_EXACT.divide(Decimal(amount_nano), Decimal(NANO_PER_USD)))


def _plain(number: Decimal) -> str:
    return format(number.normalize(_EXACT), "f")


def _midnight(day: datetime.date) -> str:
    return _time(datetime.datetime.combine(day, datetime.time(), datetime.UTC))


def _time(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


async def meter_events(
    session: AsyncSession, *, since: datetime.datetime, until: datetime.datetime
) -> AsyncIterator[MeterEvent]:
    """What tenants with a Stripe customer used, by the hour of settlement.

    Both moments are full hours, and the last one is over: see `periods.settled_now`.
    """
    found = await session.stream(METERED, {"since": since, "until": until})
    async for row in found:
        for meter in METERS:
            if value := getattr(row, meter):
                yield _meter_event(row, meter, value)


def _meter_event(row: Any, meter: str, value: int) -> MeterEvent:
    hour: datetime.datetime = row.hour
    tenant_id: uuid.UUID = row.tenant_id
    return MeterEvent(
        event_name=f"manylora_{meter}",
        identifier=f"{tenant_id}-{hour.astimezone(datetime.UTC):%Y%m%dT%HZ}-{meter}",
        timestamp=int(hour.timestamp()),
        payload=MeterPayload(row.stripe_customer_id, str(value)),
    )
