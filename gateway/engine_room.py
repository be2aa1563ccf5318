"""The engines of one host: a process for each, as the command line and operators want them.

Starts them, keeps them, ends them, and remembers over restarts what was changed meanwhile. Answers
the gateways of this host, see `engine_host`. Knows nothing of requests or of a database.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from gateway.children import CannotServe, Child
from gateway.engine_host import MAX_LINE_BYTES, KeepOrder, Order, Reply, StartOrder, StopOrder
from gateway.private_files import write_private
from gateway.settings import PARENT_VARIABLE

logger = logging.getLogger(__name__)

SOCKET = "supervisor.sock"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A base model that an engine of this host serves."""

    # Its public name.
    name: str
    # Folder or hub id.
    path: str
    # What its engine takes as it is.
    engine_flags: tuple[str, ...] = ()


class Change(msgspec.Struct, frozen=True):
    """A model that an operator had served while all ran."""

    path: str
    # What the command line said then; None where it did not name the model. A command line that
    # says something else since has the last word.
    instead_of: str | None


@dataclass(frozen=True, slots=True)
class _Running:
    """An engine process."""

    model: ServedModel
    child: Child
    keeper: asyncio.Task[None]


class EngineRoom:
    """Mutable: the engine processes.

    `asked`: the models of the command line; `engine_flags`: those of any other. Folders of models
    that operators may start lie below `model_folder`; None for none.
    """

    def __init__(
        self,
        asked: Sequence[ServedModel],
        *,
        engine_flags: tuple[str, ...],
        model_folder: Path | None,
        runtime_dir: Path,
        data_dir: Path,
        store_url: str,
        secret: str,
        say: Callable[[str], None],
        is_ending: Callable[[], bool],
    ) -> None:
        self._asked = {model.name: model for model in asked}
        self._engine_flags = engine_flags
        self._model_folder = model_folder
        self._runtime_dir = runtime_dir
        self._data_dir = data_dir
        self._store_url = store_url
        self._secret = secret
        self._say = say
        self._is_ending = is_ending
        self._changes_path = data_dir / "models.json"
        self._changes = _read_changes(self._changes_path)
        self._running: dict[str, _Running] = {}
        # What comes up at the start, by address.
        self.planned = {
            self._address(number): model for number, model in enumerate(self._models(), start=1)
        }

    @property
    def addresses_begin(self) -> str:
        """What the addresses of all engines here begin with."""
        return f"unix:{self._runtime_dir}/"

    @property
    def socket_path(self) -> Path:
        """Where gateways ask."""
        return self._runtime_dir / SOCKET

    @property
    def expected(self) -> set[str]:
        """The addresses of those that came up, or may still do so."""
        return {address for address, each in self._running.items() if not each.keeper.done()}

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start what is planned; a task fails with CannotServe where nothing can be kept."""
        is_alone = len(self.planned) == 1
        for address, model in self.planned.items():
            child = self._child(address, model, is_vital=is_alone)
            keeper = tasks.create_task(child.keep() if is_alone else self._keep_beside(child))
            self._running[address] = _Running(model, child, keeper)

    async def _keep_beside(self, child: Child) -> None:
        """One model that cannot be served is no reason to serve none."""
        try:
            await child.keep()
        except CannotServe as error:
            self._say(str(error))
            others = (each for each in self._running.values() if each.child is not child)
            if all(each.keeper.done() for each in others):
                raise

    async def stop(self) -> None:
        running = list(self._running.values())
        await asyncio.gather(*(each.child.stop() for each in running))
        for each in running:
            each.keeper.cancel()

    @contextlib.asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Take orders of this host's gateways."""
        self.socket_path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(
            self._answer, self.socket_path, limit=MAX_LINE_BYTES
        )
        self.socket_path.chmod(0o600)
        try:
            yield
        finally:
            server.close()
            self.socket_path.unlink(missing_ok=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            match await _read_order(reader):
                case StartOrder() as order:
                    await self._start_one(order, reader, writer)
                case StopOrder(address):
                    await self._end(address, forget=True)
                    _reply(writer, Reply("done", address))
                case KeepOrder():
                    _reply(writer, Reply("refused", problem="Nothing was started here."))
        except (EOFError, OSError, asyncio.LimitOverrunError, msgspec.MsgspecError) as error:
            logger.warning("order_not_read", extra={"reason": repr(error)})
        finally:
            writer.close()

    async def _start_one(
        self, order: StartOrder, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Until it is kept, the engine is its connection's: it ends with that."""
        if problem := self._problem_of(order.model):
            _reply(writer, Reply("refused", problem=problem))
            return
        address = self._free_address()
        model = self._model_of(order.name, order.model)
        # Until it is kept, whoever waits for it should hear soon that it is in vain.
        child = self._child(address, model, is_vital=False, is_on_trial=True)
        keeper = asyncio.create_task(child.keep())
        self._running[address] = _Running(model, child, keeper)
        _reply(writer, Reply("done", address))
        asking = asyncio.create_task(_read_order(reader))
        await asyncio.wait({keeper, asking}, return_when=asyncio.FIRST_COMPLETED)
        is_kept = asking.done() and not asking.cancelled() and asking.exception() is None
        if is_kept and isinstance(asking.result(), KeepOrder):
            child.is_on_trial = False
            # None is the only one any more.
            for each in self._running.values():
                each.child.is_vital = False
            keeper.add_done_callback(self._note_end)
            self._remember(model)
            _reply(writer, Reply("done", address))
            return
        asking.cancel()
        await self._end(address, forget=False)
        # Its fault was told above, to whoever reads what this process says.
        await asyncio.gather(keeper, asking, return_exceptions=True)
        _reply(writer, Reply("failed", problem=_why(keeper)))

    def _note_end(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            self._say(str(error))

    async def _end(self, address: str, *, forget: bool) -> None:
        running = self._running.pop(address, None)
        if running is None:
            return
        self._say(f"{running.child.name}: no longer wanted")
        await running.child.stop()
        running.keeper.cancel()
        if forget:
            self._forget(running.model)

    def _problem_of(self, path: str) -> str:
        """Why no engine is started for it; nothing where one may be."""
        if self._model_folder is None:
            return (
                "This server starts no engines for others than its own models: start it with"
                " --model-folder, or send the address of an engine."
            )
        root = Path(os.path.realpath(self._model_folder))
        if "\x00" in path or not Path(os.path.realpath(root / path)).is_relative_to(root):
            return f"{path!r} is not below the folder of this server's models (--model-folder)."
        if not (root / path / "config.json").is_file():
            return f"{path!r} is no folder of a model: it has no config.json."
        return ""

    def _model_of(self, name: str, path: str) -> ServedModel:
        """With the flags of the one whose place it takes."""
        assert self._model_folder is not None, "it was looked at before"
        whole = os.path.realpath(self._model_folder / path)
        asked = self._asked.get(name)
        return ServedModel(name, whole, asked.engine_flags if asked else self._engine_flags)

    def _child(
        self, address: str, model: ServedModel, *, is_vital: bool, is_on_trial: bool = False
    ) -> Child:
        # The only one, or the first, is called what it always was.
        number = address.removeprefix(self._address(1).removesuffix(".sock")).removesuffix(".sock")
        command = [
            *(sys.executable, "-m", "engine"),
            *("--model", model.path),
            *("--served-name", model.name),
            *("--listen", address),
            *("--store-url", self._store_url),
            # Each its own: two processes would evict what the other reads.
            *("--cache-dir", str(self._data_dir / f"adapter-cache{number}")),
            *model.engine_flags,
        ]
        environment = {
            "MANYLORA_ENGINE_SECRET": self._secret,
            PARENT_VARIABLE: str(os.getpid()),
        }
        return Child(
            f"engine{number}",
            command,
            environment,
            say=self._say,
            is_ending=self._is_ending,
            is_vital=is_vital,
            is_on_trial=is_on_trial,
        )

    def _address(self, number: int) -> str:
        name = "engine.sock" if number == 1 else f"engine-{number}.sock"
        return f"{self.addresses_begin}{name}"

    def _free_address(self) -> str:
        number = 1
        while self._address(number) in self._running:
            number += 1
        return self._address(number)

    # What stays over restarts.

    def _models(self) -> list[ServedModel]:
        """Those of the command line, with what was changed since it said so."""
        models = []
        for name, model in self._asked.items():
            change = self._changes.get(name)
            is_changed = change is not None and change.instead_of == model.path
            if change is not None and is_changed:
                self._say(f"{name}: served from {change.path}, as was asked for since")
                models.append(replace(model, path=change.path))
            else:
                models.append(model)
        models += [
            ServedModel(name, change.path, self._engine_flags)
            for name, change in self._changes.items()
            if name not in self._asked and change.instead_of is None
        ]
        return models

    def _remember(self, model: ServedModel) -> None:
        asked = self._asked.get(model.name)
        self._changes[model.name] = Change(model.path, asked.path if asked else None)
        if asked is not None and asked.path == model.path:
            del self._changes[model.name]
        self._write_changes()

    def _forget(self, model: ServedModel) -> None:
        """The last engine of a model that the command line does not name is not started again."""
        is_served = any(each.model.name == model.name for each in self._running.values())
        if not is_served and model.name not in self._asked:
            self._changes.pop(model.name, None)
            self._write_changes()

    def _write_changes(self) -> None:
        write_private(self._changes_path, json.dumps(msgspec.to_builtins(self._changes)) + "\n")


def _read_changes(path: Path) -> dict[str, Change]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Change])
    except FileNotFoundError:
        return {}
    except msgspec.MsgspecError as error:
        raise CannotServe(f"{path} cannot be read: {error}; repair or remove it") from error


async def _read_order(reader: asyncio.StreamReader) -> Order:
    order: Order = msgspec.json.decode(await reader.readuntil(b"\n"), type=Order)
    return order


def _reply(writer: asyncio.StreamWriter, reply: Reply) -> None:
    if not writer.is_closing():
        writer.write(msgspec.json.encode(reply) + b"\n")


def _why(keeper: asyncio.Task[None]) -> str:
    error = None if keeper.cancelled() else keeper.exception()
    return str(error) if error is not None else "the engine was not kept"
