"""Answers that may be asked for again: once made, once billed, kept for a quarter of an hour.

A client names a request; whoever asks by the same name with the same body gets the same answer.
What is kept is encrypted under a key that comes from the caller's own, which is stored nowhere
here, and so are the fingerprints of names and bodies. A name is claimed under a lease, so one
whose gateway died can be claimed again. An answer that failed, or that its client left, is not
kept. Knows nothing of HTTP or of how an answer came about.
"""

import asyncio
import hmac
import logging
import re
import secrets
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import text

from gateway.auth import Principal
from gateway.background import Background
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import InvalidRequest, OtherBody, StillRunning, Unavailable
from gateway.tables import new_id

logger = logging.getLogger(__name__)

# Longer than any client retries.
KEEP = "15 minutes"
# A gateway that has not renewed its claims for so long is gone.
LEASE = "60 seconds"
RENEWAL_S = 15.0
NAME = re.compile(r"[\x21-\x7e]{1,255}")
# Larger answers are not kept: a retry makes them anew.
MAX_KEPT_BYTES = 8 << 20
SALT_BYTES, NONCE_BYTES = 16, 12

# Take a name that is free, or whose lease or keeping is over.
CLAIM = text(f"""
    INSERT INTO idempotency_keys AS kept
        (api_key_id, key_digest, tenant_id, body_digest, claim_id, expires_at)
    VALUES (:api_key_id, :key_digest, :tenant_id, :body_digest, :claim_id,
            now() + interval '{LEASE}')
    ON CONFLICT (api_key_id, key_digest) DO UPDATE SET
        attempt = CASE
            WHEN kept.answer IS NULL AND kept.body_digest = excluded.body_digest
            THEN kept.attempt + 1 ELSE 1
        END,
        body_digest = excluded.body_digest, claim_id = excluded.claim_id,
        expires_at = excluded.expires_at, salt = NULL, answer = NULL
    WHERE kept.expires_at <= now()
    RETURNING attempt
""")  # noqa: S608 - a constant of ours

LOOK_UP = text("""
    SELECT body_digest, salt, answer FROM idempotency_keys
    WHERE api_key_id = :api_key_id AND key_digest = :key_digest AND expires_at > now()
""")

STORE = text(f"""
    UPDATE idempotency_keys
    SET salt = :salt, answer = :answer, expires_at = now() + interval '{KEEP}'
    WHERE api_key_id = :api_key_id AND key_digest = :key_digest AND claim_id = :claim_id
""")  # noqa: S608 - a constant of ours

# The row stays a while, so that the next attempt is known to be one.
RELEASE = text("""
    UPDATE idempotency_keys SET expires_at = now(), salt = NULL, answer = NULL
    WHERE api_key_id = :api_key_id AND key_digest = :key_digest AND claim_id = :claim_id
""")

RENEW = text(f"""
    UPDATE idempotency_keys SET expires_at = now() + interval '{LEASE}'
    WHERE claim_id = ANY (CAST(:claim_ids AS uuid[])) AND answer IS NULL
""")  # noqa: S608 - a constant of ours

FORGET = text(f"DELETE FROM idempotency_keys WHERE expires_at < now() - interval '{KEEP}'")  # noqa: S608


class KeptAnswer(msgspec.Struct, frozen=True, array_like=True):
    """An answer as it went over the wire."""

    media_type: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to answer a named request."""

    id: uuid.UUID
    tenant_id: uuid.UUID
    api_key_id: uuid.UUID
    key_digest: bytes
    body_digest: bytes
    # 1 for the first; more where earlier ones failed or were left.
    attempt: int
    # The caller's own key.
    secret: bytes

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "api_key_id": self.api_key_id,
            "key_digest": self.key_digest,
            "claim_id": self.id,
        }


class Answers(Background):
    """Claims names, keeps answers. Used as a context it renews its claims."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._claims: set[uuid.UUID] = set()
        self._releasing: set[asyncio.Task[None]] = set()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await super().__aexit__(kind, error, trace)
        await asyncio.gather(*self._releasing)

    async def claim(
        self, principal: Principal, *, secret: str, name: str, body: bytes
    ) -> Claim | KeptAnswer:
        """The right to answer, or the answer where there is one.

        Raises InvalidRequest for what is no name, OtherBody where the name stands for another
        body, StillRunning where the request is being answered, or Unavailable.
        """
        if NAME.fullmatch(name) is None:
            raise InvalidRequest(
                "'Idempotency-Key' must be 1 to 255 visible ASCII characters.",
                param="Idempotency-Key",
            )
        assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
        claim = Claim(
            id=new_id(),
            tenant_id=principal.tenant_id,
            api_key_id=principal.key_id,
            key_digest=fingerprint(secret, b"name", name.encode()),
            body_digest=fingerprint(secret, b"body", body),
            attempt=1,
            secret=secret.encode(),
        )
        try:
            return await self._claim(claim)
        except DATABASE_TROUBLE as fault:
            raise Unavailable("Idempotency keys cannot be looked up; try again shortly.") from fault

    async def _claim(self, claim: Claim) -> Claim | KeptAnswer:
        while True:
            async with self._database.as_tenant(claim.tenant_id) as session:
                asked = {
                    **claim.parameters,
                    "tenant_id": claim.tenant_id,
                    "body_digest": claim.body_digest,
                }
                attempt = await session.scalar(CLAIM, asked)
                if attempt is not None:
                    break
                row = (await session.execute(LOOK_UP, claim.parameters)).one_or_none()
            # None where it was let go of in this moment.
            if row is not None:
                return await _judge(claim, row._mapping)
        self._claims.add(claim.id)
        return Claim(
            claim.id,
            claim.tenant_id,
            claim.api_key_id,
            claim.key_digest,
            claim.body_digest,
            attempt,
            claim.secret,
        )

    async def keep(self, claim: Claim, answer: KeptAnswer) -> None:
        """Keep an answer; where that cannot be, the name is let go of and the answer goes out."""
        self._claims.discard(claim.id)
        if len(answer.body) > MAX_KEPT_BYTES:
            logger.warning("answer_not_kept", extra={"size_bytes": len(answer.body)})
            self.release(claim)
            return
        salt, sealed = await asyncio.to_thread(_seal, claim, answer)
        try:
            async with self._database.as_tenant(claim.tenant_id) as session:
                await session.execute(STORE, {**claim.parameters, "salt": salt, "answer": sealed})
        except DATABASE_TROUBLE:
            logger.warning("answer_not_kept", exc_info=True)

    def release(self, claim: Claim) -> None:
        """Let go of a name, soon: the next attempt may have it."""
        self._claims.discard(claim.id)
        task = asyncio.create_task(self._release(claim))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _release(self, claim: Claim) -> None:
        try:
            async with self._database.as_tenant(claim.tenant_id) as session:
                await session.execute(RELEASE, claim.parameters)
        except DATABASE_TROUBLE:
            logger.warning("claim_not_released", exc_info=True)

    async def _run_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL_S)
            if not self._claims:
                continue
            try:
                async with self._database.as_worker() as session:
                    await session.execute(RENEW, {"claim_ids": list(self._claims)})
            except DATABASE_TROUBLE:
                logger.warning("claims_not_renewed", exc_info=True)


async def forget_answers(database: Database) -> None:
    """Delete what is past its time."""
    async with database.as_worker() as session:
        await session.execute(FORGET)


def fingerprint(secret: str, purpose: bytes, *parts: bytes) -> bytes:
    """What two requests have in common, to be compared and not to be guessed at."""
    return hmac.digest(secret.encode(), b"\x00".join((b"manylora", purpose, *parts)), "sha256")


async def _judge(claim: Claim, row: Mapping[Any, Any]) -> KeptAnswer:
    if not hmac.compare_digest(row["body_digest"], claim.body_digest):
        raise OtherBody(param="Idempotency-Key")
    if row["answer"] is None:
        raise StillRunning(param="Idempotency-Key")
    return await asyncio.to_thread(_open, claim, row["salt"], row["answer"])


def _seal(claim: Claim, answer: KeptAnswer) -> tuple[bytes, bytes]:
    """HKDF (RFC 5869) makes a key of its own for each answer; AES-GCM seals it."""
    salt, nonce = secrets.token_bytes(SALT_BYTES), secrets.token_bytes(NONCE_BYTES)
    packed = zlib.compress(msgspec.msgpack.encode(answer), level=1)
    return salt, nonce + AESGCM(_key(claim, salt)).encrypt(nonce, packed, claim.key_digest)


def _open(claim: Claim, salt: bytes, sealed: bytes) -> KeptAnswer:
    nonce, rest = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
    try:
        packed = AESGCM(_key(claim, salt)).decrypt(nonce, rest, claim.key_digest)
    except InvalidTag as fault:
        raise Unavailable("The kept answer cannot be read: use another key.") from fault
    return msgspec.msgpack.decode(zlib.decompress(packed), type=KeptAnswer)


def _key(claim: Claim, salt: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, b"manylora kept answer").derive(claim.secret)
