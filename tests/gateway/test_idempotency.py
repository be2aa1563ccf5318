"""A request that its client named is answered once, however often it is asked for."""

import asyncio
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text

from gateway.auth import new_key
from gateway.database import Database
from gateway.errors import InvalidRequest, OtherBody, StillRunning
from gateway.idempotency import (
    MAX_KEPT_BYTES,
    Answers,
    Claim,
    KeptAnswer,
    _open,
    _seal,
    forget_answers,
)
from gateway.tables import IdempotencyKey
from tests.conftest import Home, execute
from tests.gateway.money import Shop, a_base_model, a_shop

SECRET = new_key().plain
ANSWER = KeptAnswer("application/json", {"x-request-id": "7"}, b'{"choices": ["the answer"]}')


@pytest.fixture
async def shop(database: Database) -> Shop:
    return await a_shop(database, "acme", await a_base_model(database))


async def ask(
    answers: Answers, shop: Shop, *, name: str = "order-7", body: bytes = b"{}"
) -> Claim | KeptAnswer:
    return await answers.claim(shop.principal, secret=SECRET, name=name, body=body)


async def claimed(answers: Answers, shop: Shop) -> Claim:
    claim = await ask(answers, shop)
    assert isinstance(claim, Claim)
    return claim


async def test_the_same_name_and_body_get_the_same_answer(database: Database, shop: Shop) -> None:
    answers = Answers(database)
    await answers.keep(await claimed(answers, shop), ANSWER)
    for gateway in (answers, Answers(database)):
        assert await ask(gateway, shop) == ANSWER
    assert isinstance(await ask(answers, shop, name="order-8"), Claim)


async def test_another_body_under_the_same_name_is_refused(database: Database, shop: Shop) -> None:
    answers = Answers(database)
    claim = await claimed(answers, shop)
    with pytest.raises(OtherBody):
        await ask(answers, shop, body=b'{"other": 1}')
    await answers.keep(claim, ANSWER)
    with pytest.raises(OtherBody):
        await ask(answers, shop, body=b'{"other": 1}')


async def test_of_many_at_once_one_answers_and_the_others_are_told_to_wait(
    database: Database, shop: Shop
) -> None:
    answers = Answers(database)
    found = await asyncio.gather(*(ask(answers, shop) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(each, Claim) for each in found) == 1
    waiting = [each for each in found if isinstance(each, StillRunning)]
    assert len(waiting) == 7
    assert (waiting[0].status, waiting[0].headers) == (409, {"retry-after": "1"})


async def test_a_name_that_was_let_go_of_is_free_and_its_next_attempt_a_retry(
    database: Database, shop: Shop
) -> None:
    async with Answers(database) as answers:
        answers.release(await claimed(answers, shop))
    again = await claimed(answers, shop)
    assert again.attempt == 2
    await answers.keep(again, ANSWER)
    assert await ask(answers, shop) == ANSWER


async def test_a_name_whose_gateway_died_is_free_once_its_lease_is_over(
    database: Database, shop: Shop, home: Home
) -> None:
    lost = await claimed(Answers(database), shop)
    await execute(home.superuser_url, "UPDATE idempotency_keys SET expires_at = now()")
    answers = Answers(database)
    await answers.keep(await claimed(answers, shop), ANSWER)
    # Whoever lost the name cannot overwrite the answer any more.
    await Answers(database).keep(lost, KeptAnswer("text/plain", {}, b"late"))
    assert await ask(answers, shop) == ANSWER


async def test_an_answer_is_forgotten_after_its_time(
    database: Database, shop: Shop, home: Home
) -> None:
    answers = Answers(database)
    await answers.keep(await claimed(answers, shop), ANSWER)
    await execute(home.superuser_url, "UPDATE idempotency_keys SET expires_at = now()")
    assert (await claimed(answers, shop)).attempt == 1
    long_ago = "UPDATE idempotency_keys SET expires_at = now() - interval '16 minutes'"
    await execute(home.superuser_url, long_ago)
    await forget_answers(database)
    async with database.as_worker() as session:
        assert (await session.scalars(select(IdempotencyKey))).all() == []


async def test_nothing_that_is_stored_shows_the_answer_the_name_or_the_body(
    database: Database, shop: Shop
) -> None:
    answers = Answers(database)
    claim = await ask(answers, shop, name="order-7", body=b"a secret prompt")
    assert isinstance(claim, Claim)
    await answers.keep(claim, ANSWER)
    async with database.as_worker() as session:
        row = await session.execute(text("SELECT idempotency_keys::text FROM idempotency_keys"))
        stored = str(row.scalar_one())
    for word in (b"the answer", b"order-7", b"secret prompt"):
        assert word.decode() not in stored
        assert word.hex() not in stored


async def test_an_answer_that_is_too_large_is_made_anew(database: Database, shop: Shop) -> None:
    async with Answers(database) as answers:
        large = KeptAnswer("text/plain", {}, bytes(MAX_KEPT_BYTES + 1))
        await answers.keep(await claimed(answers, shop), large)
    assert (await claimed(answers, shop)).attempt == 2


@pytest.mark.parametrize("name", ["", " ", "a b", "ü", "x" * 256, "a\n"])
async def test_what_is_no_name_is_refused(database: Database, shop: Shop, name: str) -> None:
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        await ask(Answers(database), shop, name=name)


@given(body=st.binary(), headers=st.dictionaries(st.text(), st.text()), secret=st.binary())
def test_what_is_sealed_opens_under_the_same_secret_alone(
    body: bytes, headers: dict[str, str], secret: bytes
) -> None:
    claim = Claim(*(uuid.UUID(int=n) for n in range(3)), b"name", b"body", 1, secret)
    answer = KeptAnswer("text/plain", headers, body)
    salt, sealed = _seal(claim, answer)
    assert _open(claim, salt, sealed) == answer
    stranger = Claim(claim.id, claim.tenant_id, claim.api_key_id, b"name", b"", 1, secret + b"x")
    with pytest.raises(Exception, match="cannot be read"):
        _open(stranger, salt, sealed)
