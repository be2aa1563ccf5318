"""A tenant with something of everything: at least one row in every table that a tenant can have.

All of it comes about as in life, through the operator's routes and the tenant's own calls. Only
what takes weeks to come about, a month that is over, is written into the books as the settler does.
"""

import asyncio
import datetime
import hashlib
import json
import os
import secrets
import string
import tempfile
import uuid
from dataclasses import dataclass, replace
from typing import Any

import httpx
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from engine.protocol import ProbeReport
from gateway.journal import Opened, Settlement
from gateway.ledger import settle
from gateway.object_ids import BATCH, FILE, read_id, spell_id
from gateway.prices import bill
from gateway.tables import (
    AdapterVersion,
    ApiKey,
    BaseModel,
    Batch,
    BatchResult,
    GatewayInstance,
    PriceVersion,
    StorageHour,
    Tenant,
    UsageCredit,
    UsageEvent,
    new_id,
)
from tests.engine.echo_engine import INFO, EchoCore
from tests.gateway.admin_plane import adapter_files, report
from tests.gateway.money import a_request, price_of
from tests.gateway.whole_gateway import MODEL, Gateway, chat, speaking

MODULES = dict(INFO.base_shape.modules)
ROLES = ("owner", "developer", "billing", "viewer")
# On its way in each estate: the configuration has arrived.
UPLOADED = adapter_files(seed=7, modules=MODULES, target_modules=["up_proj"])
DELETED_VERSION = "3"
WITHHELD = "withheld-base"
# Engines of a base model that no tenant has anything to do with: an operator attaches the first
# one, and swaps it for the second.
SPARE = "spare-base"
SPARE_ADDRESSES = tuple(
    f"unix:{tempfile.gettempdir()}/ml-spare-{os.getpid()}-{number}" for number in (1, 2)
)
# The days of a month that is surely over.
LONG_AGO = datetime.datetime(2026, 3, 14, 15, 9, 26, tzinfo=datetime.UTC)
PATIENCE_S = 30


class TrustingCore(EchoCore):
    """An echo that finds nothing wrong with any adapter."""

    def probe(self, adapter_digest: str) -> ProbeReport:
        return report(adapter_digest)


@dataclass(frozen=True)
class Names:
    """How somebody who knows a tenant well would name what it has."""

    tenant: str
    adapter: str
    version: str
    alias: str
    file: str
    key_id: str
    budget_id: str
    webhook_id: str
    upload_id: str
    grantee: str
    statement: str
    request_id: str
    end_user: str
    # As in the header Idempotency-Key.
    attempt: str
    version_digest: str
    # The second one is read by nobody.
    file_id: str
    old_file_id: str
    batch_id: str

    @property
    def model(self) -> str:
        return f"{self.tenant}-{self.adapter}"

    def of_nothing(self, *, tenant: str) -> "Names":
        """Names of the same shape, and of nothing, with a tenant that may be there or not."""
        return replace(
            self,
            tenant=tenant,
            adapter=other(self.adapter),
            key_id=str(new_id()),
            request_id=str(new_id()),
            attempt=f"attempt-{secrets.token_hex(6)}",
            statement=f"{tenant}-1999-12",
            version_digest=self.version_digest[::-1],
            file_id=spell_id(FILE, new_id()),
            old_file_id=spell_id(FILE, new_id()),
            batch_id=spell_id(BATCH, new_id()),
        )


@dataclass(frozen=True)
class Estate:
    """A tenant and what can be said of it."""

    tenant_id: uuid.UUID
    names: Names
    # role -> key
    keys: dict[str, str]
    # A key of its owner that was taken back.
    revoked_key: str


def other(name: str) -> str:
    """Each letter another."""
    letters = string.ascii_lowercase
    return name.translate(str.maketrans(letters, letters[13:] + letters[:13]))


async def build(gateway: Gateway, slug: str, *, grantee: str) -> Estate:
    """Make the tenant, where it is not there yet, and all that it has."""
    builder = _Builder(gateway, slug)
    await builder.make_tenant()
    keys, revoked = await builder.make_keys()
    await builder.make_adapter(grantee)
    await builder.set_rules(keys)
    request_id = await builder.use_it(keys)
    statement = await builder.close_a_month()
    await builder.write_rare_rows()
    return Estate(
        builder.tenant_id,
        builder.names(grantee=grantee, statement=statement, request_id=request_id),
        {role: key["key"] for role, key in keys.items()},
        revoked["key"],
    )


class _Builder:
    """Mutable: remembers the ids of what it has made."""

    def __init__(self, gateway: Gateway, slug: str) -> None:
        self.slug = slug
        self.base = f"/admin/v1/tenants/{slug}"
        self.gateway = gateway
        # Part of everything that can be named freely.
        self.mark = secrets.token_hex(6)
        self.adapter = f"sql-{self.mark}"
        self.made: dict[str, str] = {}
        self.batch_id = new_id()

    def names(self, *, grantee: str, statement: str, request_id: str) -> Names:
        return Names(
            tenant=self.slug,
            adapter=self.adapter,
            version="1",
            alias=f"prod-{self.mark}",
            file="adapter_config.json",
            key_id=self.made["key_id"],
            budget_id=self.made["budget_id"],
            webhook_id=self.made["webhook_id"],
            upload_id=self.made["upload_id"],
            grantee=grantee,
            statement=statement,
            request_id=request_id,
            end_user=f"user-{self.mark}",
            attempt=f"attempt-{self.mark}",
            version_digest=self.made["version_digest"],
            file_id=self.made["file_id"],
            old_file_id=self.made["old_file_id"],
            batch_id=spell_id(BATCH, self.batch_id),
        )

    async def make_tenant(self) -> None:
        answer = await self.gateway.operator.post("/admin/v1/tenants", json={"slug": self.slug})
        assert answer.status_code in (httpx.codes.CREATED, httpx.codes.CONFLICT), answer.text
        async with self.gateway.database.as_worker() as session:
            tenant = (await session.scalars(select(Tenant).filter_by(slug=self.slug))).one()
            tenant.name = f"The {self.mark} company"
            self.tenant_id = tenant.id
            if await session.scalar(select(BaseModel).filter_by(name=WITHHELD)) is None:
                session.add(_a_base_model(WITHHELD))
        await self.call("PATCH", "", {"base_model_access": {WITHHELD: "withheld"}})

    async def make_keys(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """One key of each role, and one that was taken back."""
        keys = {
            role: await self.call("POST", "/keys", {"name": f"{role} {self.mark}", "role": role})
            for role in ROLES
        }
        narrow = {
            "name": f"narrow {self.mark}",
            "allowed_models": [f"*{self.mark}*"],
            "ip_ranges": ["10.20.30.0/24"],
        }
        kept = await self.call("POST", "/keys", narrow)
        self.made["key_id"] = kept["id"]
        await self.call("POST", f"/keys/{kept['id']}/rotate", {"overlap_s": 3600})
        revoked = await self.call("POST", "/keys", {"name": f"gone {self.mark}", "role": "owner"})
        await self.call("DELETE", f"/keys/{revoked['id']}")
        return keys, revoked

    async def make_adapter(self, grantee: str) -> None:
        """Two versions behind an alias, pinned and shared; a deleted one, and one on its way."""
        adapter = f"/adapters/{self.adapter}"
        versions = [await self.upload(number) for number in (1, 2, 3)]
        self.made["version_digest"] = versions[0]["version_digest"]
        alias = f"{adapter}/aliases/prod-{self.mark}"
        await self.call("PUT", alias, {"version": 1, "reason": f"as {self.mark} wants"})
        canary = {"version": 2, "percent": 7}
        await self.call("PUT", alias, {"version": 1, "canary": canary, "expected_version": 1})
        await self.call("PATCH", adapter, {"default_alias": f"prod-{self.mark}"})
        await self.call("PUT", f"{adapter}/grants/{grantee}")
        await self.call("POST", f"{adapter}/versions/1/pin")
        await self.call("DELETE", f"{adapter}/versions/{DELETED_VERSION}")
        self.made["upload_id"] = await self.begin_upload()

    async def begin_upload(self) -> str:
        """Declare all of it and send the first file; return its id."""
        uploads = f"/adapters/{self.adapter}/uploads"
        files = [
            {"name": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in UPLOADED.items()
        ]
        upload = await self.call("POST", uploads, {"files": files, "base_model": MODEL})
        first = UPLOADED["adapter_config.json"]
        answer = await self.gateway.operator.put(
            f"{self.base}{uploads}/{upload['id']}/files/adapter_config.json",
            content=first,
            headers={"content-range": f"bytes 0-{len(first) - 1}/{len(first)}"},
        )
        assert answer.is_success, answer.text
        return str(upload["id"])

    async def upload(self, number: int) -> Any:
        seed = int(self.mark, 16) % 2**32 + number
        example = {"prompt": "w7", "expected": "w8", "check": "contains", "max_tokens": 2}
        files = {
            **adapter_files(seed=seed, modules=MODULES, target_modules=["up_proj"]),
            "examples.jsonl": f"{json.dumps(example)}\n".encode(),
            "chat_template.jinja": f"{{# {self.mark} #}}{{{{ messages[-1].content }}}}".encode(),
        }
        answer = await self.gateway.operator.post(
            f"{self.base}/adapters/{self.adapter}/versions",
            files=[("files", (name, data)) for name, data in files.items()],
        )
        assert answer.status_code == httpx.codes.CREATED, answer.text
        assert answer.json()["state"] == "ready", answer.text
        return answer.json()

    async def set_rules(self, keys: dict[str, Any]) -> None:
        """Prices, ceilings, budgets, alerts, who pays, what is denied, and that texts are kept."""
        odd = int(self.mark[:8], 16)
        for whose in ({"tenant": self.slug}, {"adapter": f"{self.slug}-{self.adapter}"}):
            price = {"input_nano_per_million": 10**9 + odd, "output_nano_per_million": 10**9}
            await self.send("POST", "/admin/v1/prices", {"base_model": MODEL, **price, **whose})
        for place in ("", f"/keys/{keys['developer']['id']}", f"/adapters/{self.adapter}"):
            await self.call("PUT", f"{place}/limits", {"tokens_per_minute": 10**9 + odd})
        webhook = {"url": f"http://127.0.0.1:9/{self.mark}", "tenant": self.slug}
        made = await self.send("POST", "/admin/v1/webhooks", webhook)
        self.made["webhook_id"] = made["id"]
        soft = {"cap_nano": 1 + odd % 1000, "kind": "soft", "time_zone": "Europe/Berlin"}
        budget = await self.call("POST", "/budgets", soft)
        self.made["budget_id"] = budget["id"]
        await self.call(
            "POST", "/budgets", {"cap_nano": 10**15 + odd, "key_id": keys["developer"]["id"]}
        )
        account = {"bill_to": f"{self.mark} Street", "stripe_customer_id": f"cus_{self.mark}"}
        await self.call("PUT", "/billing-account", account)
        await self.call("PUT", "/retention", {"keep_days": 30})
        rule = {"name": f"rule-{self.mark}", "pattern": f"denied-{self.mark}"}
        await self.call("PUT", "/policy", {"deny_input": [rule]})

    async def use_it(self, keys: dict[str, Any]) -> str:
        """Requests with all that a request can leave behind; return the first one's id."""
        user = f"user-{self.mark}"
        mine = chat(f"w7 w8 {self.mark}", model=f"{self.slug}-{self.adapter}", user=user)
        named = {"idempotency-key": f"attempt-{self.mark}"}
        async with speaking(self.gateway.url, keys["developer"]["key"]) as client:
            answers = [
                await client.post("/v1/chat/completions", json=mine),
                await client.post("/v1/chat/completions", json=chat(user=user), headers=named),
            ]
            for name in ("file_id", "old_file_id"):
                self.made[name] = await self.upload_lines(client)
            denied = await client.post("/v1/chat/completions", json=chat(f"denied-{self.mark}"))
        assert denied.json()["error"]["code"] == "content_policy", denied.text
        # Asking for them writes them down.
        await self.call("GET", "/policy/decisions")
        for answer in answers:
            assert answer.is_success, answer.text
            async with asyncio.timeout(PATIENCE_S):
                while not await self.is_written_down(answer):  # noqa: ASYNC110 - a ledger
                    await asyncio.sleep(0.02)
        return str(answers[0].headers["x-request-id"])

    async def upload_lines(self, client: httpx.AsyncClient) -> str:
        """What a batch could do; return the file's id."""
        named = (f"lines-{self.mark}.jsonl", a_line(f"line-{self.mark}"))
        answer = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": named})
        assert answer.is_success, answer.text
        return str(answer.json()["id"])

    async def is_written_down(self, answer: httpx.Response) -> bool:
        request_id = uuid.UUID(answer.headers["x-request-id"])
        written = text("""
            SELECT EXISTS (SELECT FROM usage_events WHERE id = :id)
               AND EXISTS (SELECT FROM stored_contents WHERE id = :id)
        """)
        async with self.gateway.database.as_worker() as session:
            return bool(await session.scalar(written, {"id": request_id}))

    async def close_a_month(self) -> str:
        """Usage of a month that is over, and its statement; return the statement's number."""
        async with self.gateway.database.as_worker() as session:
            opened = await self.an_old_request(session)
            charged = bill(
                opened.price,
                prompt_tokens=opened.prompt_tokens,
                cached_tokens=0,
                completion_tokens=int(self.mark[:6], 16),
            )
            await settle(session, [Settlement(opened, "stop", LONG_AGO, charged)])
        await self.send(
            "POST",
            "/admin/v1/billing/close",
            {"month": f"{LONG_AGO:%Y-%m}", "tenant": self.slug},
        )
        return f"{self.slug}-{LONG_AGO:%Y-%m}"

    async def an_old_request(self, session: AsyncSession) -> Opened:
        version = await self.version(session)
        price = (await session.scalars(select(PriceVersion).filter_by(**self.ours))).first()
        key_id = await session.scalar(select(ApiKey.id).filter_by(**self.ours).limit(1))
        instance = await session.scalar(select(GatewayInstance.id).limit(1))
        assert price is not None
        return a_request(
            gateway_instance_id=instance,
            tenant_id=self.tenant_id,
            api_key_id=key_id,
            base_model_id=version.base_model_id,
            adapter_id=version.adapter_id,
            adapter_version_id=version.id,
            version_digest=version.version_digest,
            price=price_of(price),
            started_at=LONG_AGO,
        )

    async def write_rare_rows(self) -> None:
        """Storage where it had a price, an attempt that its client left, and a batch that was
        cancelled, with a line that it had done."""
        async with self.gateway.database.as_worker() as session:
            version = await self.version(session)
            event = (
                await session.scalars(select(UsageEvent).filter_by(**self.ours).limit(1))
            ).one()
            used = {"base_model_id": version.base_model_id, "adapter_id": version.adapter_id}
            paid = {**self.ours, **used, "price_version_id": event.price_version_id}
            file_id = read_id(FILE, self.made["file_id"])
            session.add(
                Batch(
                    id=self.batch_id,
                    api_key_id=event.api_key_id,
                    endpoint="/v1/chat/completions",
                    input_file_id=file_id,
                    metadata_={"note": f"batch-{self.mark}"},
                    status="cancelled",
                    expires_at=LONG_AGO,
                    ended_at=LONG_AGO,
                    **self.ours,
                )
            )
            await session.flush()
            done = a_line(f"done-{self.mark}")
            session.add(
                BatchResult(
                    batch_id=self.batch_id,
                    number=1,
                    request_id=event.id,
                    is_error=False,
                    line=done,
                    **self.ours,
                )
            )
            cost = int(self.mark, 16)
            session.add(StorageHour(hour=LONG_AGO, size_bytes=cost, cost_nano=cost, **paid))
            session.add(
                UsageCredit(
                    id=event.id, retry_id=new_id(), at=event.finished_at, amount_nano=cost, **paid
                )
            )

    @property
    def ours(self) -> dict[str, uuid.UUID]:
        return {"tenant_id": self.tenant_id}

    async def version(self, session: AsyncSession) -> AdapterVersion:
        query = select(AdapterVersion).filter_by(number=1, **self.ours)
        return (await session.scalars(query)).one()

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """What the operator asks for below this tenant."""
        return await self.send(method, self.base + path, body)

    async def send(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self.gateway.operator.request(method, path, json=body)
        assert answer.is_success, f"{method} {path}: {answer.text}"
        return answer.json() if answer.content else None


def a_line(custom_id: str) -> bytes:
    """A batch's input of one line."""
    request = {"url": "/v1/chat/completions", "method": "POST", "body": chat("w7")}
    return json.dumps({"custom_id": custom_id, **request}).encode()


def _a_base_model(name: str) -> BaseModel:
    return BaseModel(
        id=new_id(),
        name=name,
        digest="d" * 64,
        text_bundle_digest="t" * 64,
        shape={},
        context_length=1,
        vocab_size=1,
        max_lora_rank=1,
    )
