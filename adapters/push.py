"""Send an adapter's folder to a Manylora server, over lines that break and through restarts.

The one file of this package that speaks HTTP: the server's other side, for the command line and
for trainers. Files go in ranges, and what has arrived is asked of the server, so whoever comes
again goes on from there. Which upload that was is kept in the user's state folder.
"""

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx

from adapters.errors import (
    Finding,
    InvalidAdapter,
    ServerRefused,
    ServerTrouble,
    ServerUnreachable,
)
from adapters.folder import ADAPTER_FILES, OPTIONAL_FILES, is_left_by_trainers

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Of one request. What a server has taken of it is kept when it breaks off.
RANGE_BYTES = 32 << 20
CHUNK_BYTES = 256 << 10
# Between attempts that bring nothing new: a minute in all, which a server's restart takes.
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
MAX_RETRY_AFTER_S = 60.0
CONNECT_TIMEOUT_S = 10.0
# The probe of a large adapter on a CPU takes minutes, and the answer comes after it.
ANSWER_TIMEOUT_S = 900.0

# Told how many bytes of how many have arrived.
OnProgress = Callable[[int, int], None]
# Told why and for how many seconds there is a pause.
OnPause = Callable[[ServerTrouble, float], None]


@dataclass(frozen=True, slots=True)
class Destination:
    """Whose adapter a folder becomes, and what it is called."""

    tenant: str
    name: str
    # By name; needed where the server has several.
    base_model: str | None = None

    @property
    def route(self) -> str:
        return adapter_route(self.tenant, self.name)


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file that is going to be sent."""

    path: Path
    size_bytes: int
    # 64 hexadecimal digits
    sha256: str


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """What a trainer saved: what is sent, and what is not."""

    # By name.
    files: dict[str, LocalFile]
    # What trainers leave beside an adapter; folders end with a slash.
    ignored: list[str]
    # The same of what nobody knows here.
    unknown: list[str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Look through a folder and hash its files. Raises InvalidAdapter and OSError."""
        there = {path.name: path for path in sorted(folder.iterdir())}
        if missing := [name for name in ADAPTER_FILES if name not in there]:
            raise InvalidAdapter([_missing(name, folder) for name in missing])
        wanted = [name for name in (*ADAPTER_FILES, *OPTIONAL_FILES) if name in there]
        rest = [name for name in there if name not in wanted]
        return cls(
            files={name: _hashed(there[name]) for name in wanted},
            ignored=[_label(there[name]) for name in rest if _is_ignored(there[name])],
            unknown=[_label(there[name]) for name in rest if not _is_ignored(there[name])],
        )

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


class Server:
    """A server's REST API, as the owner of one key sees it. A context that closes connections."""

    def __init__(self, url: str, key: str) -> None:
        """Raises ValueError for what is no address of a server, or no key."""
        self.url = url.rstrip("/")
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise ValueError(f"{url!r} is no URL: {error}") from error
        if not host or not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no URL: give http://HOST:PORT or https://HOST")
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError("The key is empty, or has characters that no key has.")
        self._client = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(CONNECT_TIMEOUT_S, read=ANSWER_TIMEOUT_S, write=60.0),
            # No proxy reaches this machine's own loopback.
            trust_env=host not in ("127.0.0.1", "localhost", "::1"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def get(self, route: str, **params: Any) -> Any:
        """The decoded answer. Raises ServerTrouble, as all that follow."""
        given = {name: value for name, value in params.items() if value is not None}
        return self._ask(self._client.build_request("GET", route, params=given))

    def find(self, route: str) -> Any:
        """The same, None where there is nothing of that name."""
        try:
            return self.get(route)
        except ServerRefused as refusal:
            if refusal.status != HTTPStatus.NOT_FOUND:
                raise
        return None

    def send(self, method: str, route: str, body: object = None) -> Any:
        """The decoded answer to a JSON body, or to none; None where the answer is empty."""
        return self._ask(self._client.build_request(method, route, json=body))

    def put_bytes(self, route: str, body: Iterator[bytes], headers: Mapping[str, str]) -> Any:
        request = self._client.build_request("PUT", route, content=body, headers=dict(headers))
        return self._ask(request)

    def stream(
        self, method: str, route: str, body: object = None
    ) -> AbstractContextManager[httpx.Response]:
        """An answer that is read as it comes; opening and reading it raises ServerTrouble."""
        return _Streamed(self, self._client.build_request(method, route, json=body))

    def open(self, request: httpx.Request) -> httpx.Response:
        """Send a request; what it answers has begun, and is to be closed."""
        try:
            answer = self._client.send(request, stream=True)
        except httpx.TransportError as error:
            raise self.unreachable(error) from error
        if answer.is_success:
            return answer
        try:
            answer.read()
            raise _refusal(answer)
        except httpx.TransportError as error:
            raise self.unreachable(error) from error
        finally:
            answer.close()

    def unreachable(self, error: httpx.TransportError) -> ServerUnreachable:
        return ServerUnreachable(f"{self.url} does not answer: {error or type(error).__name__}.")

    def _ask(self, request: httpx.Request) -> Any:
        with _Streamed(self, request) as answer:
            content = answer.read()
        if not content:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerRefused(
                answer.status_code, {"detail": f"{self.url} answers, and not as Manylora does."}
            ) from error


class _Streamed:
    """An open answer whose breaking off is told in our own words."""

    def __init__(self, server: Server, request: httpx.Request) -> None:
        self._server = server
        self._request = request
        self._answer: httpx.Response | None = None

    def __enter__(self) -> httpx.Response:
        self._answer = self._server.open(self._request)
        return self._answer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._answer is not None
        self._answer.close()
        if isinstance(error, httpx.TransportError):
            raise self._server.unreachable(error) from error


def adapter_route(tenant: str, name: str) -> str:
    return f"/admin/v1/tenants/{quote(tenant, safe='')}/adapters/{quote(name, safe='')}"


def push(
    folder: LocalFolder,
    server: Server,
    to: Destination,
    *,
    on_progress: OnProgress = lambda sent_bytes, total_bytes: None,
    on_pause: OnPause | None = None,
    state_folder: Path | None = None,
) -> dict[str, Any]:
    """Make a version of a folder; return it, in the server's words, once it can be called.

    Goes on with what an earlier push of the same files to the same place has sent. `state_folder`
    is where that is kept, `default_state_folder()` unless told otherwise. Raises ServerTrouble when
    the server refuses, or stays away; and OSError for files that cannot be read.
    """
    memory = _Memory.of(folder, server, to, state_folder or default_state_folder())
    pushing = _Push(folder, server, to, memory, on_progress, _Patience(WAITS_S, on_pause or _log))
    return pushing.run()


def move_alias(
    server: Server, route: str, alias: str, *, version: int, is_forced: bool = False
) -> Any:
    """Have an alias of the adapter at `route` stand for a version; return it, in server's words.

    One that stands for it already, alone, is left as it is. Raises ServerTrouble.
    """
    return _move(server, route, alias, {"version": version, "canary": None}, is_forced=is_forced)


def move_canary(
    server: Server, route: str, alias: str, *, version: int, percent: int, is_forced: bool = False
) -> Any:
    """Have so many of a hundred callers of an alias get a version. Raises ServerTrouble."""
    current = server.get(f"{route}/aliases/{quote(alias, safe='')}")
    body = {
        "version": current["version"],
        "canary": {"version": version, "percent": percent},
    }
    return _move(server, route, alias, body, is_forced=is_forced)


def _move(
    server: Server, route: str, alias: str, meaning: dict[str, Any], *, is_forced: bool
) -> Any:
    place = f"{route}/aliases/{quote(alias, safe='')}"
    current = server.find(place)
    if current is not None and all(current[name] == value for name, value in meaning.items()):
        return current
    body = {**meaning, "force": is_forced}
    if current is not None:
        body["expected_revision"] = current["revision"]
    return server.send("PUT", place, body)


def default_state_folder() -> Path:
    """Where the user's programs keep what they were doing (XDG base directories)."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "manylora" / "uploads"


class _Push:
    """One push under way. Mutable: the upload as the server last described it."""

    def __init__(
        self,
        folder: LocalFolder,
        server: Server,
        to: Destination,
        memory: "_Memory",
        on_progress: OnProgress,
        patience: "_Patience",
    ) -> None:
        self._folder = folder
        self._server = server
        self._to = to
        self._memory = memory
        self._on_progress = on_progress
        self._patience = patience
        self._upload: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        begun = self._patience.ask(self._resume)
        if begun is not None:
            try:
                return self._go_on(begun)
            except ServerRefused as refusal:
                if refusal.status != HTTPStatus.NOT_FOUND:
                    raise
                # It has expired.
        return self._go_on(self._patience.ask(self._declare))

    def _go_on(self, upload: dict[str, Any]) -> dict[str, Any]:
        self._upload = upload
        try:
            while (file := self._next_file()) is not None:
                self._send_some(file)
            version: dict[str, Any] = self._patience.ask(self._complete)
        except ServerRefused as refusal:
            if _is_final(refusal):
                self._memory.forget()
            raise
        self._memory.forget()
        return version

    @property
    def _route(self) -> str:
        return f"{self._to.route}/uploads/{self._upload['id']}"

    def _resume(self) -> dict[str, Any] | None:
        """The upload that an earlier push began, as long as the server knows it."""
        upload_id = self._memory.recall()
        if upload_id is None:
            return None
        found: dict[str, Any] | None = self._server.find(
            f"{self._to.route}/uploads/{quote(upload_id, safe='')}"
        )
        return found

    def _declare(self) -> dict[str, Any]:
        files = [
            {"name": name, "size_bytes": file.size_bytes, "sha256": file.sha256}
            for name, file in self._folder.files.items()
        ]
        body: dict[str, Any] = {"files": files}
        if self._to.base_model is not None:
            body["base_model"] = self._to.base_model
        upload: dict[str, Any] = self._server.send("POST", f"{self._to.route}/uploads", body)
        self._memory.keep(upload["id"])
        return upload

    def _look(self) -> dict[str, Any]:
        upload: dict[str, Any] = self._server.get(self._route)
        return upload

    def _complete(self) -> Any:
        return self._server.send("POST", f"{self._route}/complete")

    def _received_bytes(self) -> int:
        return sum(file["received_bytes"] for file in self._upload["files"])

    def _next_file(self) -> dict[str, Any] | None:
        """The first file of which bytes are missing."""
        self._on_progress(self._received_bytes(), self._folder.size_bytes)
        for file in self._upload["files"]:
            if file["received_bytes"] < file["size_bytes"]:
                found: dict[str, Any] = file
                return found
        return None

    def _send_some(self, file: dict[str, Any]) -> None:
        """Send the next range of a file; where that fails, wait, and look what has arrived."""
        before = self._received_bytes()
        try:
            self._upload = self._put_range(file)
        except ServerTrouble as trouble:
            # Another process may be sending the same upload, or have finished it.
            is_elsewhere = isinstance(trouble, ServerRefused) and trouble.status == 409
            self._patience.spend(trouble, is_worth_it=trouble.is_passing or is_elsewhere)
            self._upload = self._patience.ask(self._look)
        if self._received_bytes() > before:
            self._patience.restore()

    def _put_range(self, file: dict[str, Any]) -> dict[str, Any]:
        begin, size = file["received_bytes"], file["size_bytes"]
        end = min(begin + RANGE_BYTES, size)
        headers = {
            "content-range": f"bytes {begin}-{end - 1}/{size}",
            "content-length": str(end - begin),
            "content-type": "application/octet-stream",
        }
        body = self._read(self._folder.files[file["name"]].path, begin, end)
        upload: dict[str, Any] = self._server.put_bytes(
            f"{self._route}/files/{quote(file['name'], safe='')}", body, headers
        )
        return upload

    def _read(self, path: Path, begin: int, end: int) -> Iterator[bytes]:
        arrived_bytes, position = self._received_bytes(), begin
        with path.open("rb") as source:
            source.seek(begin)
            while position < end:
                chunk = source.read(min(CHUNK_BYTES, end - position))
                if not chunk:
                    raise OSError(f"{path} became shorter while it was sent: push it again.")
                yield chunk
                position += len(chunk)
                self._on_progress(arrived_bytes + position - begin, self._folder.size_bytes)


class _Patience:
    """How long a server may stay away. Mutable: what is left of the waits."""

    def __init__(self, waits_s: Sequence[float], on_pause: OnPause) -> None:
        self._waits_s = waits_s
        self._on_pause = on_pause
        self._left = iter(waits_s)

    def restore(self) -> None:
        self._left = iter(self._waits_s)

    def spend(self, trouble: ServerTrouble, *, is_worth_it: bool) -> None:
        """Wait, or raise the trouble where that is of no use any more."""
        wait_s = next(self._left, None) if is_worth_it else None
        if wait_s is None:
            raise trouble
        wait_s = max(wait_s, min(trouble.retry_after_s, MAX_RETRY_AFTER_S))
        self._on_pause(trouble, wait_s)
        time.sleep(wait_s)

    def ask(self, question: Callable[[], T]) -> T:
        """Ask what may be asked twice, until there is an answer."""
        while True:
            try:
                return question()
            except ServerTrouble as trouble:
                self.spend(trouble, is_worth_it=trouble.is_passing)


class _Memory:
    """Which upload a push began: a file that is there from its declaration to its end.

    Only what saves work: where no file can be written, a push that breaks off begins anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def of(cls, folder: LocalFolder, server: Server, to: Destination, state_folder: Path) -> Self:
        digests = {name: file.sha256 for name, file in folder.files.items()}
        facts = [server.url, to.tenant, to.name, to.base_model, digests]
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return cls(state_folder / name)

    def recall(self) -> str | None:
        with suppress(OSError, UnicodeDecodeError):
            return self._path.read_text().strip() or None
        return None

    def keep(self, upload_id: str) -> None:
        scratch = self._path.with_suffix(f".{secrets.token_hex(8)}")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            scratch.write_text(upload_id)
            scratch.replace(self._path)
        except OSError as error:
            logger.warning("cannot_remember_upload", extra={"reason": str(error)})

    def forget(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def _log(trouble: ServerTrouble, wait_s: float) -> None:
    logger.warning("push_paused", extra={"reason": str(trouble), "wait_s": wait_s})


def _is_final(refusal: ServerRefused) -> bool:
    """Whether going on with the same upload would be refused again, whoever asks."""
    return not refusal.is_passing and refusal.status not in (
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
    )


def _refusal(answer: httpx.Response) -> ServerRefused:
    """What an answer says, in whichever of the two forms of our errors, or in none of them."""
    problem = {"detail": f"The server answered {answer.status_code} without a reason."}
    with suppress(ValueError, TypeError, KeyError):
        said = answer.json()
        problem = {"detail": said["error"]["message"]} if "error" in said else {**said}
    try:
        retry_after_s = float(answer.headers.get("retry-after", 0))
    except ValueError:
        # A date; our own waits do as well.
        retry_after_s = 0.0
    return ServerRefused(answer.status_code, problem, retry_after_s=retry_after_s)


def _missing(name: str, folder: Path) -> Finding:
    return Finding(
        code="file_missing",
        where=name,
        message=f"{folder} has no such file",
        fix="save the adapter with PEFT's save_pretrained, as safetensors",
    )


def _hashed(path: Path) -> LocalFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size_bytes = file.tell()
    if size_bytes == 0:
        raise InvalidAdapter(
            [Finding("file_empty", path.name, "is empty", "save the adapter again")]
        )
    return LocalFile(path, size_bytes, digest)


def _label(path: Path) -> str:
    return f"{path.name}/" if path.is_dir() else path.name


def _is_ignored(path: Path) -> bool:
    return path.is_dir() or is_left_by_trainers(path.name)
