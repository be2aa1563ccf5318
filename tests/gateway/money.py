"""Requests, frames and rows for the tests of money."""

import datetime
import uuid
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.protocol import Frame, SequenceEvent, SequenceState
from gateway.auth import Principal
from gateway.database import Database
from gateway.journal import Opened
from gateway.prices import Price, PriceScope, Rates, set_price
from gateway.registry import Target
from gateway.tables import Adapter, AdapterVersion, ApiKey, BaseModel, PriceVersion, Tenant, new_id

PRICE = Price(uuid.UUID(int=7), 3_000_000, 1_000_000, 10_500_001)


def a_request(**facts: Any) -> Opened:
    request = Opened(
        number=0,
        request_id=new_id(),
        gateway_instance_id=uuid.UUID(int=1),
        tenant_id=uuid.UUID(int=2),
        api_key_id=uuid.UUID(int=3),
        base_model_id=uuid.UUID(int=4),
        adapter_id=uuid.UUID(int=5),
        adapter_version_id=uuid.UUID(int=6),
        version_digest="d" * 64,
        price=PRICE,
        endpoint="chat.completions",
        is_streamed=True,
        prompt_tokens=10,
        max_output_tokens=1000,
        funded_output_tokens=256,
        started_at=datetime.datetime.now(datetime.UTC),
        sequence_ids=(1,),
    )
    return msgspec.structs.replace(request, **facts)


def frame_of(*progress: tuple[int, int], cached: int = 0, engine_ns: int = 0) -> Frame:
    """One step in which each (sequence id) reached (generated tokens)."""
    return Frame(
        1,
        1,
        [
            SequenceEvent(sequence_id, SequenceState.RUNNING, [0], 10, cached, generated, engine_ns)
            for sequence_id, generated in progress
        ],
    )


RATES = Rates(
    input_nano_per_million=PRICE.input_nano_per_million,
    cached_input_nano_per_million=PRICE.cached_input_nano_per_million,
    output_nano_per_million=PRICE.output_nano_per_million,
)


def price_of(row: PriceVersion) -> Price:
    return Price(
        row.id,
        row.input_nano_per_million,
        row.cached_input_nano_per_million,
        row.output_nano_per_million,
    )


@dataclass(frozen=True, slots=True)
class Shop:
    """A tenant with a key, an adapter with one version, and the price of its base model."""

    tenant: Tenant
    key: ApiKey
    base_model: BaseModel
    adapter: Adapter
    version: AdapterVersion
    price: Price

    @property
    def principal(self) -> Principal:
        return Principal(
            key_id=self.key.id,
            key_name=self.key.name,
            tenant_id=self.tenant.id,
            tenant_slug=self.tenant.slug,
            cache_salt=b"salt",
            scopes=frozenset({"inference", "usage"}),
        )

    @property
    def target(self) -> Target:
        return Target(
            public_name=self.adapter.public_name,
            base_model_id=self.base_model.id,
            base_model=self.base_model.name,
            base_text_bundle_digest="b" * 64,
            context_length=2048,
            adapter_id=self.adapter.id,
            adapter_version_id=self.version.id,
            version_number=1,
            weights_digest=self.version.weights_digest,
            version_digest=self.version.version_digest,
            fingerprint=None,
            text_bundle_digest="b" * 64,
        )

    def request(self, gateway_instance_id: uuid.UUID, **facts: Any) -> Opened:
        return a_request(
            **{
                "gateway_instance_id": gateway_instance_id,
                "tenant_id": self.tenant.id,
                "api_key_id": self.key.id,
                "base_model_id": self.base_model.id,
                "adapter_id": self.adapter.id,
                "adapter_version_id": self.version.id,
                "version_digest": self.version.version_digest,
                "price": self.price,
            }
            | facts
        )


async def a_base_model(database: Database, name: str = "tiny") -> tuple[BaseModel, Price]:
    base_model = BaseModel(
        id=new_id(),
        name=name,
        digest="a" * 64,
        text_bundle_digest="b" * 64,
        shape={},
        context_length=2048,
        vocab_size=100,
        max_lora_rank=64,
    )
    async with database.as_worker() as session:
        session.add(base_model)
        await session.flush()
        price = await set_price(session, PriceScope(base_model.id), rates=RATES)
    return base_model, price_of(price)


async def a_shop(
    database: Database, slug: str, base: tuple[BaseModel, Price], *, key_name: str = "first"
) -> Shop:
    base_model, price = base
    tenant = Tenant(id=new_id(), slug=slug, name=slug, cache_salt=b"salt")
    key = ApiKey(
        id=new_id(),
        public_id=new_id().hex,
        tenant_id=tenant.id,
        name=key_name,
        secret_hmac=bytes(32),
        scopes=["inference", "usage"],
    )
    adapter = Adapter(
        id=new_id(),
        tenant_id=tenant.id,
        base_model_id=base_model.id,
        slug="sql",
        public_name=f"{slug}-sql",
    )
    version = AdapterVersion(
        id=new_id(),
        tenant_id=tenant.id,
        adapter_id=adapter.id,
        base_model_id=base_model.id,
        number=1,
        state="ready",
        weights_digest="c" * 64,
        version_digest="d" * 64,
        rank=8,
        num_modules=1,
        size_bytes=1,
    )
    async with database.as_worker() as session:
        for row in (tenant, key, adapter, version):
            session.add(row)
            await session.flush()
    return Shop(tenant, key, base_model, adapter, version, price)
