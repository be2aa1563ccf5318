"""Links to all engines, kept as settings and rows say; and how engines come, change and go.

Each gateway holds a link to every engine that serves or drains, and looks at the rows when it hears
of a change, and now and then. An engine that has drained is let go, and whoever started it ends it.
Knows nothing of requests.
"""

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from engine.client import EngineLink
from engine.errors import LinkError
from engine.protocol import EngineInfo
from gateway.base_models import BaseModels, EngineRow
from gateway.database import DATABASE_TROUBLE, Database
from gateway.engine_host import EngineHost, StartedEngine
from gateway.errors import Conflict, GatewayError, NotAllowed, Unavailable
from gateway.routing import Replica, Router
from gateway.tables import BaseModel

logger = logging.getLogger(__name__)

# Notices of the database may be lost; rows are not.
LOOK_INTERVAL_S = 5.0
# While some engine drains, so that it ends soon after its last sequence.
DRAIN_INTERVAL_S = 0.5
# A request that was resolved before may still be on its way to the engine.
MIN_IDLE_LOOKS = 2
# One that does not answer for so long has lost its sequences already.
MAX_SILENT_LOOKS = 20
RETRY_S = 0.5
# An engine that an operator names answers within that time; one that is started loads a model.
ANSWER_PATIENCE_S = 10.0
START_PATIENCE_S = 3600.0
CLOSE_PATIENCE_S = 1.0
CHANNEL = "engines"

Connect = Callable[[str, Callable[[], None]], EngineLink]
Enroll = Callable[[EngineInfo, str], Awaitable[BaseModel]]
Admit = Callable[[EngineInfo, str], Awaitable[EngineRow]]


class _Tie:
    """Mutable: a link, and what its engine was the last time that it told."""

    def __init__(
        self, address: str, router: Router, connect: Connect, *, is_asked_for: bool
    ) -> None:
        self.link = connect(address, self._on_session)
        self._router = router
        # An operator's, until it is admitted: it does not enroll by itself.
        self.is_asked_for = is_asked_for
        # Filled by whoever introduces it.
        self.engine_epoch: int | None = None
        self.replica: Replica | None = None
        self.num_idle_looks = 0
        self.num_silent_looks = 0
        self.is_ending = False
        self.news = asyncio.Event()

    def _on_session(self) -> None:
        # It may have been started again, perhaps as something else: no request before it tells.
        self._router.doubt(self.link)
        self.news.set()

    def end(self) -> None:
        self.is_ending = True
        self.news.set()


class Engines:
    """Mutable: the links to all engines, while used as a context.

    `given`: addresses that are there from the start. `on_attached` is called with a base model's id
    whenever an engine of it was attached, and runs beside all else.
    """

    def __init__(
        self,
        database: Database,
        router: Router,
        *,
        connect: Connect,
        enroll: Enroll,
        given: Sequence[str],
        host: EngineHost | None,
        on_attached: Callable[[uuid.UUID], Coroutine[Any, Any, None]],
        look_interval_s: float = LOOK_INTERVAL_S,
    ) -> None:
        self._database = database
        self._base_models = BaseModels(database)
        self._router = router
        self._connect = connect
        self._enroll = enroll
        self._given = frozenset(given)
        self._host = host
        self._on_attached = on_attached
        self._look_interval_s = look_interval_s
        self._ties: dict[str, _Tie] = {}
        # Whose end was asked of our host.
        self._ended: set[str] = set()
        self._has_news = asyncio.Event()
        # Held from reading rows until all follows them, and while an operator changes them.
        self._seeing_to_it = asyncio.Lock()
        self._own: list[asyncio.Task[None]] = []
        # What holds links open, and what follows from an engine's coming.
        self._holding: set[asyncio.Task[None]] = set()
        self._following: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        for address in sorted(self._given):
            self._tie(address)
        self._own = [
            asyncio.create_task(self._look_forever(), name="engines"),
            asyncio.create_task(self._database.listen(CHANNEL, self._has_news.set)),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ending = [*self._own, *self._following]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        for address in list(self._ties):
            self._end(address)
        holding = list(self._holding)
        if holding:
            # One may be asking an engine that does not answer.
            _, waiting = await asyncio.wait(holding, timeout=CLOSE_PATIENCE_S)
            for task in waiting:
                task.cancel()
        await asyncio.gather(*holding, return_exceptions=True)

    # What operators do.

    async def attach(self, address: str, *, actor_key_id: uuid.UUID) -> EngineRow:
        """Have the engine at `address` serve what it has loaded.

        Raises Unavailable, InvalidRequest or Conflict.
        """
        admit = partial(self._base_models.attach, actor_key_id=actor_key_id)
        return await self._bring(address, admit, patience_s=ANSWER_PATIENCE_S)

    async def start(self, name: str, model: str, *, actor_key_id: uuid.UUID) -> EngineRow:
        """Start an engine of ours for the model in a folder, and have it serve under `name`.

        Raises NotAllowed, InvalidRequest, Conflict or Unavailable; no engine is left behind then.
        """
        admit = partial(self._base_models.attach, actor_key_id=actor_key_id)
        return await self._start(name, model, admit)

    async def swap(self, name: str, address: str, *, actor_key_id: uuid.UUID) -> EngineRow:
        """Have the engine at `address` take the place of all that serve the base model `name`.

        Raises NotFound, Unavailable, InvalidRequest or Conflict.
        """
        admit = partial(self._base_models.swap, name, actor_key_id=actor_key_id)
        return await self._bring(address, admit, patience_s=ANSWER_PATIENCE_S)

    async def start_and_swap(self, name: str, model: str, *, actor_key_id: uuid.UUID) -> EngineRow:
        """The same with an engine of ours for the model in a folder.

        Raises NotFound, and as `start` does.
        """
        name = await self._base_models.name_of(name)
        admit = partial(self._base_models.swap, name, actor_key_id=actor_key_id)
        return await self._start(name, model, admit)

    async def retire(self, name: str, *, address: str | None, actor_key_id: uuid.UUID) -> BaseModel:
        """Give a base model no more requests, or one of its engines; what runs goes on to its end.

        Raises NotFound or Conflict.
        """
        found = await self._base_models.retire(name, address=address, actor_key_id=actor_key_id)
        self._has_news.set()
        return found

    async def _start(self, name: str, model: str, admit: Admit) -> EngineRow:
        if self._host is None:
            raise NotAllowed(
                "This gateway starts no engines: start one yourself, and send its address."
            )
        async with self._host.start(name, model) as started:
            bringing = self._bring(started.address, admit, patience_s=START_PATIENCE_S)
            row = await _unless_failed(bringing, started)
            await started.keep()
        return row

    async def _bring(self, address: str, admit: Admit, *, patience_s: float) -> EngineRow:
        """Reach an engine, have it admitted, and send it requests from then on."""
        known = self._ties.get(address)
        tie = known or self._tie(address, is_asked_for=True)
        try:
            info = await _told(tie, patience_s=patience_s)
            async with self._seeing_to_it:
                row = await admit(info, address)
                tie.is_asked_for = False
                self._ended.discard(address)
                self._introduced(tie, info, _replica(tie, row))
        except BaseException:
            if known is None:
                self._end(address)
            raise
        # What drains from now on is seen to.
        self._has_news.set()
        return row

    # Keeping links.

    def _tie(self, address: str, *, is_asked_for: bool = False) -> _Tie:
        tie = _Tie(address, self._router, self._connect, is_asked_for=is_asked_for)
        self._ties[address] = tie
        _keep(self._holding, self._hold(tie))
        return tie

    def _end(self, address: str) -> None:
        tie = self._ties.pop(address, None)
        if tie is not None:
            self._router.detach(tie.link)
            tie.end()

    async def _hold(self, tie: _Tie) -> None:
        try:
            async with tie.link:
                while not tie.is_ending:
                    tie.news.clear()
                    if not tie.is_asked_for:
                        await self._introduce(tie)
                    if not tie.is_ending:
                        await tie.news.wait()
        except Exception:
            # Its journal cannot be written, say: whoever saw to that ends this process.
            logger.exception("engine_link_ended", extra={"address": tie.link.address})
        finally:
            self._router.detach(tie.link)

    async def _introduce(self, tie: _Tie) -> None:
        """Offer what the engine serves, as soon as it tells; nothing where it is the same one."""
        reason = ""
        while not tie.is_ending and not tie.is_asked_for:
            try:
                info = await tie.link.info()
                if info.engine_epoch == tie.engine_epoch:
                    self._router.trust(tie.link)
                    return
                self._router.detach(tie.link)
                tie.replica = None
                base_model = await self._enroll(info, tie.link.address)
                self._introduced(
                    tie,
                    info,
                    Replica(tie.link, base_model.id, base_model.name, base_model.revision),
                )
                return
            except (LinkError, GatewayError, *DATABASE_TROUBLE) as error:
                if str(error) != reason:
                    reason = str(error)
                    logger.warning("engine_not_attached", extra={"reason": reason})
                # What an operator or its own start must change will not have changed at once.
                pause_s = LOOK_INTERVAL_S if isinstance(error, GatewayError) else RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await tie.news.wait()
                    # Also where it began to answer just now.
                    tie.news.clear()

    def _introduced(self, tie: _Tie, info: EngineInfo, replica: Replica) -> None:
        tie.engine_epoch, tie.replica = info.engine_epoch, replica
        self._router.attach(replica)
        self._router.trust(tie.link)
        logger.info(
            "engine_attached",
            extra={"base_model": replica.base_model, "revision": replica.revision},
        )
        _keep(self._following, self._on_attached(replica.base_model_id))

    async def _look_forever(self) -> None:
        while True:
            is_draining = any(self._router.is_draining(tie.link) for tie in self._ties.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(
                    min(DRAIN_INTERVAL_S, self._look_interval_s)
                    if is_draining
                    else self._look_interval_s
                ):
                    await self._has_news.wait()
            self._has_news.clear()
            try:
                async with self._seeing_to_it:
                    await self._look()
                await self._look_for_residents()
            except DATABASE_TROUBLE as error:
                logger.info("engines_not_looked_at", extra={"reason": str(error)})

    async def _look(self) -> None:
        """See to what rows say: who is new, serves another revision, drains, or is gone."""
        rows = {row.address: row for row in await self._base_models.engines()}
        gone = {address for address, row in rows.items() if row.state == "gone"}
        for address in (rows.keys() | self._given) - gone - self._ties.keys():
            self._tie(address)
        for address, tie in list(self._ties.items()):
            if tie.is_asked_for:
                continue
            row = rows.get(address)
            if row is not None and row.state == "serving":
                self._serve(tie, row)
            elif row is not None and row.state == "draining":
                await self._drain(tie, address)
            elif (row is not None or address not in self._given) and not tie.link.num_sequences:
                # Another gateway found it idle; what we had there has ended too.
                self._end(address)
        self._ended &= gone
        is_asked_for = {address for address, tie in self._ties.items() if tie.is_asked_for}
        for address in gone - self._ended - is_asked_for:
            await self._have_ended(address)

    def _serve(self, tie: _Tie, row: EngineRow) -> None:
        tie.num_idle_looks = 0
        if tie.replica is None:
            return
        replica = _replica(tie, row)
        if replica != tie.replica or self._router.is_draining(tie.link):
            tie.replica = replica
            self._router.attach(replica)

    async def _drain(self, tie: _Tie, address: str) -> None:
        self._router.drain(tie.link)
        is_idle = not tie.link.num_sequences and await self._is_idle(tie)
        tie.num_idle_looks = tie.num_idle_looks + 1 if is_idle else 0
        if tie.num_idle_looks >= MIN_IDLE_LOOKS:
            await self._base_models.let_go(address)
            self._end(address)
            logger.info("engine_drained", extra={"address": address})
            await self._have_ended(address)

    async def _is_idle(self, tie: _Tie) -> bool:
        """Whether no gateway has anything on the engine."""
        try:
            status = await tie.link.status()
        except LinkError:
            tie.num_silent_looks += 1
            return tie.num_silent_looks >= MAX_SILENT_LOOKS
        tie.num_silent_looks = 0
        return status.num_running + status.num_waiting == 0

    async def _have_ended(self, address: str) -> None:
        """Let whoever started the engine end it, once."""
        self._ended.add(address)
        if self._host is not None:
            try:
                await self._host.stop(address)
            except Unavailable as error:
                self._ended.discard(address)
                logger.warning("engine_not_ended", extra={"reason": error.message})

    async def _look_for_residents(self) -> None:
        """Where there is a choice of engines, know which adapters are near which."""
        replicas = self._router.replicas
        numbers = Counter(replica.base_model_id for replica in replicas)
        for replica in replicas:
            if numbers[replica.base_model_id] > 1:
                with contextlib.suppress(LinkError):
                    status = await replica.link.status()
                    self._router.note_residents(replica.link, status.resident_adapters)


def _keep(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    """Run it, and hold on to it until it ends."""

    def forget(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("engines_task_failed", exc_info=error)

    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(forget)


def _replica(tie: _Tie, row: EngineRow) -> Replica:
    return Replica(tie.link, row.base_model_id, row.base_model, row.revision)


async def _told(tie: _Tie, *, patience_s: float) -> EngineInfo:
    """What the engine serves, once frames can come from it too. Raises Unavailable."""
    reason = "nobody answers"
    try:
        async with asyncio.timeout(patience_s):
            while True:
                try:
                    info = await tie.link.info()
                    if tie.link.is_connected:
                        return info
                except LinkError as error:
                    reason = str(error)
                    if not error.is_retryable:
                        break
                await asyncio.sleep(DRAIN_INTERVAL_S / 5)
    except TimeoutError:
        pass
    raise Unavailable(f"The engine at {tie.link.address} cannot be reached: {reason}")


async def _unless_failed(work: Awaitable[EngineRow], started: StartedEngine) -> EngineRow:
    """Finish the work, or raise Conflict saying why the engine died before."""
    working = asyncio.ensure_future(work)
    failing = asyncio.ensure_future(started.failure())
    try:
        await asyncio.wait({working, failing}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Conflict(failing.result())
    finally:
        for task in (working, failing):
            task.cancel()
        await asyncio.gather(working, failing, return_exceptions=True)
