"""Facts about the embedded PostgreSQL: it is private, it dies with us, and it loses nothing."""

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url

from gateway.embedded import EmbeddedPostgres
from gateway.errors import PostgresFailed

PATIENCE_S = 60
ORDINARY_UID = 65534
ROOT = Path(__file__).parents[2]

# Starts a server, says so, and waits to be killed.
SUPERVISOR = """
import sys, time
from pathlib import Path
from gateway.embedded import EmbeddedPostgres
postgres = EmbeddedPostgres(Path(sys.argv[1]))
print(postgres.home, flush=True)
postgres.start()
print(postgres.url, flush=True)
time.sleep(600)
"""


def ask(url: str, query: str) -> Any:
    async def run() -> Any:
        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(run())


def processes_of(postgres: EmbeddedPostgres) -> set[int]:
    """Every process that stands in the cluster's folder: the server and all its children."""
    cluster = (postgres.home / "data").resolve()
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink() == cluster:
                found.add(int(entry.name))
    return found


def owners_of(pid: int) -> list[int]:
    """Whose process it is; nobody's once it has ended."""
    with contextlib.suppress(OSError):
        return [Path(f"/proc/{pid}").stat().st_uid]
    return []


def wait_until_gone(postgres: EmbeddedPostgres) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while left := processes_of(postgres):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def remove(data_dir: Path) -> None:
    """Root's clusters are not under the data directory."""
    shutil.rmtree(EmbeddedPostgres(data_dir).home, ignore_errors=True)


@contextlib.contextmanager
def supervised(data_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that runs a server on this data directory."""
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(data_dir)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with supervisor:
        try:
            yield supervisor
        finally:
            supervisor.kill()


def next_line(supervisor: "subprocess.Popen[str]") -> str:
    assert supervisor.stdout is not None
    return supervisor.stdout.readline().strip()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a cluster is, once the first test has made it. Deeper than a socket's path may be."""
    data_dir = tmp_path_factory.mktemp("embedded") / ("deep" * 25) / "data"
    data_dir.mkdir(parents=True, mode=0o700)
    yield data_dir
    remove(data_dir)


@pytest.fixture
def server(data_dir: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(data_dir) as postgres:
        yield postgres


def test_it_is_postgresql_18_and_our_role_owns_our_database(server: EmbeddedPostgres) -> None:
    assert ask(server.url, "SHOW server_version").startswith("18.")
    assert (
        ask(
            server.url,
            "SELECT current_user || ' ' || pg_get_userbyid(datdba) || ' ' || datname || ' '"
            " || pg_encoding_to_char(encoding) || ' ' || datlocprovider::text || ' ' || datlocale"
            " FROM pg_database WHERE datname = current_database()",
        )
        == "manylora_owner manylora_owner manylora UTF8 b C.UTF-8"
    )
    facts = (
        "SELECT (rolsuper, rolcreaterole, rolbypassrls) FROM pg_roles WHERE rolname = current_user"
    )
    assert tuple(ask(server.url, facts)) == (False, True, False)
    assert ask(server.url, "SHOW data_checksums") == "on"
    assert ask(server.url, "SHOW fsync") == "on"


def test_it_listens_on_no_network_and_asks_for_a_password(server: EmbeddedPostgres) -> None:
    assert ask(server.url, "SHOW listen_addresses") == ""
    password = (server.home / "owner.password").read_text()
    with pytest.raises(asyncpg.InvalidPasswordError):
        ask(server.url.replace(password, "wrong"), "SELECT 1")


def test_its_files_are_its_own_and_no_other_folder_changes(data_dir: Path) -> None:
    def modes() -> dict[Path, tuple[int, int]]:
        around = [data_dir, *data_dir.parents, Path("/run"), Path("/var/lib")]
        return {path: (path.stat().st_mode, path.stat().st_uid) for path in around}

    before = modes()
    with EmbeddedPostgres(data_dir) as postgres:
        assert modes() == before
        for name in ("owner.password", "superuser.password", "lock", "postgres.log"):
            assert stat.S_IMODE((postgres.home / name).stat().st_mode) == 0o600
        assert stat.S_IMODE((postgres.home / "data").stat().st_mode) == 0o700
        owner = (postgres.home / "data").stat().st_uid
        assert owner != 0
        assert {uid for pid in processes_of(postgres) for uid in owners_of(pid)} == {owner}
        socket_dir = Path(ask(postgres.superuser_url, "SHOW unix_socket_directories"))
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
    assert modes() == before
    assert not socket_dir.exists()


def test_what_was_written_is_there_after_a_restart(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as postgres:
        ask(postgres.url, "CREATE TABLE kept AS SELECT 7 AS number")
    wait_until_gone(postgres)
    with EmbeddedPostgres(data_dir) as postgres:
        assert ask(postgres.url, "SELECT number FROM kept") == 7
        ask(postgres.url, "DROP TABLE kept")


def test_a_second_start_is_told_who_holds_the_data(
    server: EmbeddedPostgres, data_dir: Path
) -> None:
    with pytest.raises(PostgresFailed, match=f"in use by process {os.getpid()}"):
        EmbeddedPostgres(data_dir).start()
    assert server.is_running
    assert ask(server.url, "SELECT 1") == 1


def test_killing_the_supervisor_ends_every_process_and_loses_nothing(data_dir: Path) -> None:
    with supervised(data_dir) as supervisor:
        next_line(supervisor)
        url = next_line(supervisor)
        ask(url, "CREATE TABLE survivors AS SELECT 42 AS number")
        postgres = EmbeddedPostgres(data_dir)
        assert len(processes_of(postgres)) > 3
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait()
        # At once, while the orphans may still be leaving.
        with postgres:
            assert ask(postgres.url, "SELECT number FROM survivors") == 42
            ask(postgres.url, "DROP TABLE survivors")
    wait_until_gone(postgres)


def test_killing_the_supervisor_while_the_cluster_is_made_leaves_no_half(tmp_path: Path) -> None:
    with supervised(tmp_path) as supervisor:
        unfinished = Path(next_line(supervisor)) / "data.new"
        while not (unfinished / "PG_VERSION").exists():
            assert supervisor.poll() is None
            time.sleep(0.005)
        supervisor.send_signal(signal.SIGKILL)
    try:
        with EmbeddedPostgres(tmp_path) as postgres:
            assert ask(postgres.url, "SELECT 1") == 1
            assert not unfinished.exists()
    finally:
        remove(tmp_path)


def test_it_outlives_the_thread_that_started_it(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    thread = threading.Thread(target=postgres.start)
    thread.start()
    thread.join()
    try:
        assert ask(postgres.url, "SELECT 1") == 1
        assert postgres.is_running
    finally:
        postgres.stop()
    assert not postgres.is_running


def test_a_killed_server_can_be_started_again(server: EmbeddedPostgres) -> None:
    pid = int((server.home / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while server.is_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.start()
    assert ask(server.url, "SELECT 1") == 1


def test_a_cluster_that_was_lost_is_not_replaced_by_an_empty_one(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    with postgres:
        pass
    cluster, aside = postgres.home / "data", postgres.home / "aside"
    cluster.rename(aside)
    try:
        with pytest.raises(PostgresFailed, match="is gone"):
            postgres.start()
        assert not cluster.exists()
    finally:
        aside.rename(cluster)


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_pid_file_with_a_strangers_pid_or_nothing_is_no_obstacle(
    data_dir: Path, is_empty: bool
) -> None:
    with EmbeddedPostgres(data_dir) as postgres:
        pid_file = postgres.home / "data" / "postmaster.pid"
        _, *others = pid_file.read_text().splitlines()
        owner = pid_file.stat().st_uid
    wait_until_gone(postgres)
    # Of the server's own user, for PostgreSQL looks no closer.
    account = owner if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "600"], cwd="/", user=account) as stranger:
        try:
            lines = [] if is_empty else [str(stranger.pid), *others]
            pid_file.write_text("\n".join(lines))
            os.chown(pid_file, owner, -1)
            with EmbeddedPostgres(data_dir) as postgres:
                assert ask(postgres.url, "SELECT 1") == 1
        finally:
            stranger.kill()


def test_a_cluster_of_another_version_is_refused(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    with postgres:
        pass
    version = postgres.home / "data" / "PG_VERSION"
    version.write_text("17\n")
    try:
        with pytest.raises(PostgresFailed, match=r"made by PostgreSQL 17, this is 18: dump it"):
            postgres.start()
    finally:
        version.write_text("18\n")
    assert not postgres.is_running


def test_a_server_that_cannot_start_says_why(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    with postgres:
        pass
    settings = postgres.home / "data" / "postgresql.auto.conf"
    before = settings.read_text()
    settings.write_text("shared_buffers = nonsense\n")
    try:
        with pytest.raises(PostgresFailed, match="invalid value for parameter"):
            postgres.start()
    finally:
        settings.write_text(before)
    with postgres:
        assert postgres.is_running


def test_as_root_an_ordinary_user_can_run_one_too(tmp_path: Path) -> None:
    """And as an ordinary user, this is what every other test here does."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    prefix = _as_ordinary_user()
    data_dir = Path("/var/tmp") / f"manylora-test-{os.getpid()}"  # noqa: S108 - removed below
    data_dir.mkdir(mode=0o700)
    os.chown(data_dir, ORDINARY_UID, ORDINARY_UID)
    command = [*prefix, sys.executable, "-c", SUPERVISOR, str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as supervisor:
        try:
            assert next_line(supervisor) == str(data_dir / "postgres")
            url = next_line(supervisor)
            assert ask(url, "SELECT 1") == 1
            cluster = data_dir / "postgres" / "data"
            pid = int((cluster / "postmaster.pid").read_text().split()[0])
            assert Path(f"/proc/{pid}").stat().st_uid == ORDINARY_UID
            supervisor.kill()
            supervisor.wait()
            deadline = time.monotonic() + PATIENCE_S
            while Path(f"/proc/{pid}").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            shutil.rmtree(str(make_url(url).query["host"]))
        finally:
            supervisor.kill()
            shutil.rmtree(data_dir)


def _as_ordinary_user() -> list[str]:
    """The words before a command that run it as nobody in particular.

    Where the interpreter lies in a folder of root's, that user is allowed to look into it.
    """
    plain = ["setpriv", f"--reuid={ORDINARY_UID}", f"--regid={ORDINARY_UID}", "--clear-groups"]
    reading = [*plain, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    # The interpreter must be able to start itself again.
    inner = [sys.executable, "-c", "import gateway.embedded"]
    again = f"import subprocess; subprocess.run({inner!r}, check=True)"
    for words in (plain, reading):
        with contextlib.suppress(FileNotFoundError):
            tried = subprocess.run(
                [*words, sys.executable, "-c", again],
                cwd=ROOT,
                check=False,
                capture_output=True,
            )
            if tried.returncode == 0:
                return words
    pytest.skip("no other user may run this interpreter here, and setpriv cannot change that")
