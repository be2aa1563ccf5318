"""What a request must reserve before it begins, and at which price."""

import dataclasses
import uuid
from typing import Any

import pytest
from sqlalchemy import select

from gateway.database import Database
from gateway.errors import Unavailable
from gateway.limits import Admission, admit, want
from gateway.prices import PriceScope, Rates, ceiling, set_price
from gateway.tables import GatewayInstance, Hold, new_id
from tests.conftest import Cluster, Home
from tests.gateway.money import PRICE, Shop, a_base_model, a_shop

INSTANCE = uuid.UUID(int=99)


@pytest.fixture
async def shop(database: Database) -> Shop:
    async with database.as_worker() as session:
        session.add(GatewayInstance(id=INSTANCE, host="here", epoch=1))
    return await a_shop(database, "acme", await a_base_model(database))


async def admitted(database: Database, shop: Shop, **changes: Any) -> Admission:
    facts = {
        "request_id": new_id(),
        "endpoint": "completions",
        "prompt_tokens": 11,
        "max_tokens": 20,
        "gateway_instance_id": INSTANCE,
    }
    return await admit(database, shop.principal, shop.target, **{**facts, **changes})


async def holds(database: Database) -> list[Hold]:
    async with database.as_worker() as session:
        return list((await session.scalars(select(Hold))).all())


async def test_a_hold_pays_for_the_prompt_and_all_of_a_short_answer(
    database: Database, shop: Shop
) -> None:
    admission = await admitted(database, shop)
    [hold] = await holds(database)
    assert (hold.id, hold.state, hold.endpoint) == (admission.request_id, "open", "completions")
    assert hold.gateway_instance_id == INSTANCE
    assert (hold.prompt_tokens, hold.funded_output_tokens) == (11, 20)
    assert hold.amount_nano == admission.amount_nano
    # The statement and Python agree on what tokens can cost at most.
    assert hold.amount_nano == ceiling(admission.price, prompt_tokens=11, output_tokens=20)
    assert hold.created_at == admission.admitted_at


async def test_a_hold_pays_for_the_first_tranche_of_each_sequence(
    database: Database, shop: Shop
) -> None:
    admission = await admitted(database, shop, max_tokens=2000, num_sequences=3)
    assert (admission.funded_output_tokens, admission.max_output_tokens) == (768, 6000)


async def test_the_narrowest_price_wins(database: Database, shop: Shop) -> None:
    assert (await admitted(database, shop)).price.output_nano_per_million == (
        PRICE.output_nano_per_million
    )
    scopes = [
        PriceScope(shop.base_model.id, shop.tenant.id),
        PriceScope(shop.base_model.id, None, shop.adapter.id),
    ]
    for rate, scope in enumerate(scopes, start=1):
        async with database.as_worker() as session:
            await set_price(session, scope, rates=Rates(output_nano_per_million=rate))
        assert (await admitted(database, shop)).price.output_nano_per_million == rate


async def test_another_tenants_price_is_not_ours(database: Database, shop: Shop) -> None:
    other = await a_shop(database, "globex", (shop.base_model, shop.price))
    async with database.as_worker() as session:
        await set_price(session, PriceScope(shop.base_model.id, other.tenant.id), rates=Rates())
    assert (await admitted(database, shop)).price.id == shop.price.id


async def test_nothing_is_held_where_there_is_no_price(database: Database, shop: Shop) -> None:
    nowhere = dataclasses.replace(
        shop.target, base_model_id=uuid.uuid4(), adapter_id=None, adapter_version_id=None
    )
    with pytest.raises(Unavailable, match="no price"):
        await admit(
            database,
            shop.principal,
            nowhere,
            request_id=new_id(),
            endpoint="completions",
            prompt_tokens=1,
            max_tokens=1,
            gateway_instance_id=INSTANCE,
        )
    assert await holds(database) == []


async def test_no_request_begins_while_the_database_is_away(
    database: Database, shop: Shop, cluster: Cluster, home: Home
) -> None:
    name = home.owner_url.rpartition("/")[2].partition("?")[0]
    await cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await database.close()
    with pytest.raises(Unavailable):
        await admitted(database, shop)
    await cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    await admitted(database, shop)


@pytest.mark.parametrize(
    ("progress", "funded", "expected"),
    [(0, 256, 256), (128, 256, 256), (129, 256, 512), (500, 256, 768), (990, 768, 1000)],
)
def test_a_stream_is_funded_ahead_of_its_need_and_never_beyond_its_limit(
    progress: int, funded: int, expected: int
) -> None:
    assert want(progress=progress, funded=funded, max_output_tokens=1000) == expected
