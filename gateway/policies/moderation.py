"""The webhook that is asked whether a text may pass, and an answer that waits for what it says.

Signed, sent to a checked address and never redirected, as all webhooks are. A question has one
limit of time for everything, its wait for its turn included; few are asked at once, and little is
read of what comes back. What is no answer in time is a failure, and the policy says what that
means.

An answer that is not streamed is judged once, whole. A stream is held back until another window of
it is there, and sent when all of it up to there was allowed; what its client saw was judged. The
reason that a refusal gives goes to the client alone.
"""

import asyncio
import functools
import hmac
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx
import msgspec

from gateway.addresses import Address, Network
from gateway.errors import Unavailable
from gateway.policies.decisions import Verdict
from gateway.policies.document import Direction, ModerationHook
from gateway.webhooks import DeliveryFault, find_address, post_signed

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 1 << 16
MAX_REASON_LENGTH = 200
# Of one policy in one gateway.
MAX_QUESTIONS = 32
# A name is looked up once in so many seconds, by one thread: a slow resolver takes no others.
ADDRESS_S = 30.0
FAILED_ADDRESS_S = 1.0
MAX_ADDRESSES = 1000

# What an answer that cannot be had, or be believed, comes up as. TimeoutError is an OSError;
# KeyError is a pepper that is no longer kept, UnicodeError a host that is no name.
FAILURES = (
    *(DeliveryFault, httpx.HTTPError, OSError, KeyError, UnicodeError),
    *(msgspec.MsgspecError, RecursionError),
)


class Answer(msgspec.Struct, frozen=True):
    """What a moderation says; whatever else it says is not read."""

    allow: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose text it is."""

    tenant_id: uuid.UUID
    tenant: str
    model: str
    request_id: uuid.UUID


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of a question."""

    verdict: Verdict
    # For the client, where the text was refused.
    reason: str = ""


class Moderation:
    """One policy's webhook, with its secret and its turns."""

    def __init__(self, hook: ModerationHook, *, secret: str, addresses: "CheckedAddresses") -> None:
        self.hook = hook
        self._secret = secret
        self._addresses = addresses
        self._turns = asyncio.Semaphore(MAX_QUESTIONS)

    async def ask(self, subject: Subject, direction: Direction, text: str) -> Judgement:
        """Never raises for what the webhook does."""
        try:
            async with asyncio.timeout(self.hook.timeout_ms / 1000), self._turns:
                answer = await self._send(subject, direction, text)
        except FAILURES as error:
            logger.warning(
                "moderation_failed",
                extra={
                    "tenant": subject.tenant,
                    "request_id": str(subject.request_id),
                    "reason": f"{type(error).__name__}: {error}"[:MAX_REASON_LENGTH],
                },
            )
            return Judgement("failed_open" if self.hook.on_failure == "open" else "failed_closed")
        return Judgement("passed") if answer.allow else Judgement("refused", _spoken(answer.reason))

    async def _send(self, subject: Subject, direction: Direction, text: str) -> Answer:
        body = msgspec.json.encode(
            {
                "tenant": subject.tenant,
                "model": subject.model,
                "direction": direction,
                # Half a surrogate pair is no JSON.
                "text": text.encode(errors="replace").decode(),
                "request_id": str(subject.request_id),
            }
        )
        async with post_signed(
            self.hook.url,
            body,
            address=await self._addresses.find(self.hook.url),
            secret=self._secret,
            headers={"accept-encoding": "identity"},
        ) as response:
            if not response.is_success:
                raise DeliveryFault(f"answered {response.status_code}")
            return msgspec.json.decode(await _read(response), type=Answer)


class Judge:
    """Mutable: an answer that is held back until its policy's moderation allows it."""

    def __init__(
        self,
        moderation: Moderation,
        subject: Subject,
        *,
        is_streamed: bool,
        on_judged: Callable[[Verdict], None],
    ) -> None:
        self._moderation = moderation
        self._subject = subject
        # None where the whole answer is judged at once.
        self._window_chars = moderation.hook.window_chars if is_streamed else None
        self._on_judged = on_judged
        # Everything so far, and how much of it was allowed.
        self._text = ""
        self._num_allowed = 0

    async def hear(self, text: str, *, is_last: bool) -> str | None:
        """Take more of the answer; return what may be sent, None where nothing may any more.

        Raises Unavailable where the moderation does not answer and its policy fails closed.
        """
        self._text += text
        num_held = len(self._text) - self._num_allowed
        is_full = self._window_chars is not None and num_held >= self._window_chars
        if not num_held or not (is_last or is_full):
            return ""
        judgement = await self._moderation.ask(self._subject, "output", self._text)
        self._on_judged(judgement.verdict)
        if judgement.verdict == "failed_closed":
            raise not_answered()
        if judgement.verdict == "refused":
            return None
        held, self._num_allowed = self._text[self._num_allowed :], len(self._text)
        return held


class CheckedAddresses:
    """Mutable: addresses of webhooks' hosts that may be called, remembered for a short while."""

    def __init__(self, allowed_networks: Sequence[Network]) -> None:
        self._allowed_networks = tuple(allowed_networks)
        # URL -> (until when by the monotonic clock, the look-up); the oldest first.
        self._found: dict[str, tuple[float, asyncio.Task[Address]]] = {}

    async def find(self, url: str) -> Address:
        """Raises DeliveryFault or OSError."""
        until, task = self._found.get(url, (0.0, None))
        if task is None or time.monotonic() >= until:
            task = asyncio.create_task(
                find_address(url, allowed_networks=self._allowed_networks), name="find address"
            )
            self._remember(url, task, for_s=ADDRESS_S)
            task.add_done_callback(functools.partial(self._judge, url))
        # Others wait for it too, and whoever comes next.
        return await asyncio.shield(task)

    def _judge(self, url: str, task: asyncio.Task[Address]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._remember(url, task, for_s=FAILED_ADDRESS_S)

    def _remember(self, url: str, task: asyncio.Task[Address], *, for_s: float) -> None:
        self._found.pop(url, None)
        self._found[url] = time.monotonic() + for_s, task
        while len(self._found) > MAX_ADDRESSES:
            del self._found[next(iter(self._found))]


def secret_of(tenant_id: uuid.UUID, *, peppers: Mapping[int, bytes], pepper_version: int) -> str:
    """What a tenant's questions are signed with; derived, so that nothing secret is stored."""
    pepper = peppers[pepper_version]
    return "whsec_" + hmac.digest(pepper, b"moderation " + tenant_id.bytes, "sha256").hex()


def not_answered() -> Unavailable:
    """Where a policy fails closed."""
    return Unavailable("The moderation of this tenant's texts does not answer. Try again shortly.")


async def _read(response: httpx.Response) -> bytes:
    """The body, as it came. Raises DeliveryFault where it is longer than any answer."""
    body = b""
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise DeliveryFault("answered with too much")
    return body


def _spoken(reason: str | None) -> str:
    """One line of a reason."""
    return " ".join((reason or "").split())[:MAX_REASON_LENGTH]
