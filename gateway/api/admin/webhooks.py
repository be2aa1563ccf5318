"""Where alerts go, for operators. Tenants never name a URL."""

import datetime
import uuid
from typing import Any, Literal

import msgspec
from litestar import delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from sqlalchemy import select

from gateway import audit, tenants, webhooks
from gateway.auth import Principal
from gateway.database import Database
from gateway.tables import Tenant, Webhook, WebhookDelivery
from gateway.webhooks import Outbox

TAGS = ["admin: webhooks"]
MAX_SHOWN = 100


class NewWebhook(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A URL that is told of one tenant's events, or of all tenants'."""

    url: str
    tenant: str | None = None


class WebhookView(msgspec.Struct, frozen=True):
    """A webhook. Its URL is called with `x-manylora-signature: t=<unix seconds>,v1=<hex>`."""

    id: uuid.UUID
    url: str
    # Null for the events of all tenants.
    tenant: str | None
    created_at: datetime.datetime


class WebhookMade(WebhookView, frozen=True):
    """`secret` is what HMAC-SHA256 of `<unix seconds>.<body>` is made with."""

    secret: str


class WebhookList(msgspec.Struct, frozen=True):
    """All webhooks, oldest first."""

    data: list[WebhookView]


class DeliveryView(msgspec.Struct, frozen=True):
    """An event on its way, or there."""

    id: uuid.UUID
    state: Literal["waiting", "delivered", "failed"]
    num_attempts: int
    last_error: str | None
    event: dict[str, Any]
    created_at: datetime.datetime
    next_attempt_at: datetime.datetime


class DeliveryList(msgspec.Struct, frozen=True):
    """The newest hundred, newest first."""

    data: list[DeliveryView]


@post("/webhooks", scope="operator", tags=TAGS, summary="Create a webhook")
async def create_webhook(
    data: JSONBody[NewWebhook],
    database: NamedDependency[Database],
    outbox: NamedDependency[Outbox],
    principal: NamedDependency[Principal],
) -> WebhookMade:
    """Private addresses are not called, unless the gateway's settings name them."""
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, data.tenant) if data.tenant else None
        row = await webhooks.create_webhook(
            session,
            tenant_id=owner.id if owner else None,
            url=data.url,
            pepper_version=outbox.newest_pepper_version,
        )
        await audit.record(
            session,
            tenant_id=row.tenant_id,
            actor_key_id=principal.key_id,
            action="webhook.create",
            subject=str(row.id),
            details={"url": row.url},
        )
    view = WebhookView(row.id, row.url, data.tenant, row.created_at)
    secret = outbox.secret_of(row.id, pepper_version=row.pepper_version)
    return WebhookMade(**msgspec.structs.asdict(view), secret=secret)


@get("/webhooks", scope="operator", tags=TAGS, summary="List the webhooks")
async def list_webhooks(database: NamedDependency[Database]) -> WebhookList:
    query = (
        select(Webhook, Tenant.slug)
        .outerjoin(Tenant, Tenant.id == Webhook.tenant_id)
        .order_by(Webhook.id)
    )
    async with database.as_worker() as session:
        rows = (await session.execute(query)).all()
    return WebhookList([WebhookView(row.id, row.url, slug, row.created_at) for row, slug in rows])


@delete(
    "/webhooks/{webhook_id:uuid}",
    scope="operator",
    tags=TAGS,
    summary="Remove a webhook",
    description="What it has not been told yet is dropped.",
)
async def delete_webhook(
    webhook_id: FromPath[uuid.UUID],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> None:
    async with database.as_worker() as session:
        row = await webhooks.get_webhook(session, webhook_id)
        await audit.record(
            session,
            tenant_id=row.tenant_id,
            actor_key_id=principal.key_id,
            action="webhook.delete",
            subject=str(row.id),
            details={"url": row.url},
        )
        await session.delete(row)


@get(
    "/webhooks/{webhook_id:uuid}/deliveries",
    scope="operator",
    tags=TAGS,
    summary="Show what a webhook was told",
)
async def list_deliveries(
    webhook_id: FromPath[uuid.UUID], database: NamedDependency[Database]
) -> DeliveryList:
    query = (
        select(WebhookDelivery)
        .where(WebhookDelivery.webhook_id == webhook_id)
        .order_by(WebhookDelivery.created_at.desc())
        .limit(MAX_SHOWN)
    )
    async with database.as_worker() as session:
        await webhooks.get_webhook(session, webhook_id)
        rows = (await session.scalars(query)).all()
    fields = DeliveryView.__struct_fields__
    return DeliveryList(
        [
            msgspec.convert({name: getattr(row, name) for name in fields}, DeliveryView)
            for row in rows
        ]
    )
