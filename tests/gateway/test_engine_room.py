"""Facts about the engines of one host: which ones start, and what becomes of one on demand."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest

from gateway.children import CannotServe
from gateway.cli import models
from gateway.engine_host import EngineHost
from gateway.engine_room import EngineRoom, ServedModel
from gateway.errors import InvalidRequest, Unavailable
from tests.engine.echo_engine import short_folder

SMALL = ServedModel("small", "/models/small", ("--block-size", "32"))
LARGE = ServedModel("large", "/models/large")


@dataclass
class Place:
    """Where rooms are opened, one after another."""

    folder: Path
    sockets: Path
    said: list[str] = field(default_factory=list)

    @property
    def model_folder(self) -> Path:
        return self.folder / "models"

    def room(self, *asked: ServedModel) -> EngineRoom:
        return EngineRoom(
            asked,
            engine_flags=("--memory-mib", "64"),
            model_folder=self.model_folder,
            runtime_dir=self.sockets,
            data_dir=self.folder,
            store_url=(self.folder / "store").as_uri(),
            secret="of this host",
            say=self.said.append,
            is_ending=lambda: False,
        )

    def make_model(self, name: str) -> str:
        """A folder that looks like a model, and is none that an engine could load."""
        (self.model_folder / name).mkdir(parents=True)
        (self.model_folder / name / "config.json").write_text("{}")
        return str(self.model_folder / name)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with short_folder() as sockets:
        yield Place(tmp_path, sockets)


# What starts.


async def test_each_model_has_an_engine_and_the_first_one_is_where_it_always_was(
    place: Place,
) -> None:
    assert place.room(SMALL, LARGE).planned == {
        f"unix:{place.sockets}/engine.sock": SMALL,
        f"unix:{place.sockets}/engine-2.sock": LARGE,
    }


async def test_what_was_asked_for_since_is_served_until_the_command_line_changes(
    place: Place,
) -> None:
    (place.folder / "models.json").write_text(
        '{"small": {"path": "/models/small-2", "instead_of": "/models/small"},'
        ' "added": {"path": "/models/added", "instead_of": null},'
        ' "large": {"path": "/models/large-2", "instead_of": "/models/large-0"}}'
    )
    planned = {model.name: model for model in place.room(SMALL, LARGE).planned.values()}
    assert planned["small"].path == "/models/small-2"
    assert planned["small"].engine_flags == SMALL.engine_flags
    assert planned["large"] == LARGE
    assert planned["added"] == ServedModel("added", "/models/added", ("--memory-mib", "64"))


async def test_what_was_remembered_and_cannot_be_read_is_told(place: Place) -> None:
    (place.folder / "models.json").write_text("{")
    with pytest.raises(CannotServe, match=r"models\.json cannot be read"):
        place.room(SMALL)


# On demand.


@pytest.mark.parametrize("path", ["/etc", "../elsewhere", "small/../../..", "a\x00b"])
async def test_only_models_of_the_operators_folder_are_started(place: Place, path: str) -> None:
    place.make_model("small")
    room = place.room(LARGE)
    async with room.answering():
        with pytest.raises(InvalidRequest, match="is not below the folder"):
            async with EngineHost(room.socket_path).start("small", path):
                pass
        with pytest.raises(InvalidRequest, match="no folder of a model"):
            async with EngineHost(room.socket_path).start("small", "nothing"):
                pass
        with pytest.raises(InvalidRequest, match="no folder of a model"):
            async with EngineHost(room.socket_path).start("small", "."):
                pass
    assert room.expected == set()


async def test_a_model_that_no_engine_can_load_is_told_and_leaves_nothing(place: Place) -> None:
    place.make_model("broken")
    room = place.room(LARGE)
    async with room.answering():
        async with EngineHost(room.socket_path).start("broken", "broken") as started:
            assert started.address.startswith(room.addresses_begin)
            async with asyncio.timeout(60):
                assert "cannot start" in await started.failure()
        assert room.expected == set()
    assert not (place.folder / "models.json").exists()


async def test_an_engine_ends_with_whoever_asked_for_it_unless_it_is_kept(place: Place) -> None:
    place.make_model("small")
    room = place.room(LARGE)
    host = EngineHost(room.socket_path)
    async with room.answering():
        async with host.start("small", "small"):
            assert len(room.expected) == 1
        async with asyncio.timeout(60):
            while room.expected:  # noqa: ASYNC110 - a process
                await asyncio.sleep(0.05)
        async with host.start("small", "small") as started:
            await started.keep()
        remembered = place.room(LARGE).planned.values()
        assert [model.name for model in remembered] == ["large", "small"]
        await host.stop(started.address)
        await host.stop("unix:/not/ours")
    assert [model.name for model in place.room(LARGE).planned.values()] == ["large"]
    await room.stop()


async def test_without_a_supervisor_the_gateway_is_told(place: Place) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        await EngineHost(place.sockets / "nobody").stop("unix:/x")


# How models are spelled.


def parsed(*words: str, served_name: str | None = None) -> list[tuple[str, str]]:
    found = models.from_words(words, served_name=served_name, engine_flags=())
    return [(model.name, model.path) for model in models.check(found)]


def test_a_model_has_its_own_name_or_is_given_one() -> None:
    assert parsed("/models/small/") == [("small", "/models/small/")]
    assert parsed("org/small", "big=/models/x") == [("small", "org/small"), ("big", "/models/x")]
    assert parsed("/models/small", served_name="mine") == [("mine", "/models/small")]


@contextlib.contextmanager
def refused(reason: str) -> Iterator[None]:
    with pytest.raises(click.UsageError, match=reason):
        yield


def test_models_that_cannot_be_told_apart_are_refused() -> None:
    with refused("two models are called 'Small'"):
        parsed("/a/small", "/b/Small")
    with refused("--model NAME=PATH for each"):
        parsed("/a", "/b", served_name="mine")
    with refused("must be PATH or NAME=PATH"):
        parsed("=/a")
    with refused("Missing option '--model'"):
        parsed()


def test_a_file_gives_each_model_flags_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text(
        '[small]\npath = "/a"\nmax-model-len = 64\n[large]\npath = "/b"\ncuda-graphs = false\n'
    )
    flags = {"max_model_len": 2048, "device": "cpu", "dtype": None, "cuda_graphs": None}
    found = models.from_file(file, flags=flags, known_flags=flags.keys())
    assert found == [
        ServedModel("small", "/a", ("--max-model-len", "64", "--device", "cpu")),
        ServedModel(
            "large", "/b", ("--max-model-len", "2048", "--device", "cpu", "--no-cuda-graphs")
        ),
    ]
    for text, reason in (
        ("[small]\nspeed = 9\npath = '/a'", r"\[small\] speed is no flag"),
        ("[small]\ndevice = true\npath = '/a'", "must be a number or a word"),
        ("[small]\ncuda-graphs = 1\npath = '/a'", "must be true or false"),
        ("[small]\n", "must be a table with the model's path"),
        ("small", "models.toml"),
    ):
        file.write_text(text)
        with refused(reason):
            models.from_file(file, flags=flags, known_flags=flags.keys())
