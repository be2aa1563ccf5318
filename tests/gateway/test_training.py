"""Facts about the trainers' callback: a training ends as a version, and is never lost to one."""

import asyncio
import logging
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from adapters.errors import ServerUnreachable
from adapters.training import FOLDER_NAME, PushToManylora
from gateway.database import Database
from tests.adapters.tiny_adapters import BASE, shape_of, tiny_llama
from tests.gateway.admin_plane import INFO, Plane, admin_plane

TRAINED = msgspec.structs.replace(INFO, base_model=BASE, base_shape=shape_of(tiny_llama()))
DATA = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(4)]


@pytest.fixture
async def plane(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Plane]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    async with admin_plane(database, tmp_path, info=TRAINED) as plane:
        await plane.make_tenant("acme")
        yield plane


def callback(plane: Plane, **options: Any) -> PushToManylora:
    key = plane.client.headers["authorization"].removeprefix("Bearer ")
    return PushToManylora(
        str(plane.client.base_url), key, **{"tenant": "acme", "name": "sql", **options}
    )


async def train(folder: Path, pushing: PushToManylora, *, model: Any = None) -> int:
    """Two steps; return how many were done."""

    def work() -> int:
        trainer = Trainer(
            model or adapted(),
            TrainingArguments(
                str(folder),
                max_steps=2,
                save_steps=1,
                learning_rate=0.1,
                per_device_train_batch_size=2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=DATA,
            callbacks=[pushing],
        )
        with warnings.catch_warnings():
            # Of PEFT, about a model that has no folder of its own.
            warnings.simplefilter("ignore", UserWarning)
            return int(trainer.train().global_step)

    return await asyncio.to_thread(work)


def adapted() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return get_peft_model(tiny_llama(), config)


def trained() -> Any:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


async def versions(plane: Plane) -> list[dict[str, Any]]:
    answer = await plane.client.get("/admin/v1/tenants/acme/adapters/sql/versions")
    return list(answer.json()["data"]) if answer.is_success else []


async def test_what_was_trained_is_a_version_and_its_alias_when_the_training_ends(
    plane: Plane, tmp_path: Path
) -> None:
    pushing = callback(plane, alias="prod")
    await train(tmp_path / "out", pushing)
    assert pushing.pushed_model == "acme-sql@1"
    assert [version["state"] for version in await versions(plane)] == ["ready"]
    alias = await plane.client.get("/admin/v1/tenants/acme/adapters/sql/aliases/prod")
    assert alias.json()["version"] == 1
    # The last checkpoint has the same contents, so it is the same version.
    pushed_again = await plane.upload(
        {
            name: (tmp_path / "out" / "checkpoint-2" / name).read_bytes()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
    )
    assert pushed_again.json()["number"] == 1
    assert not (tmp_path / "out" / FOLDER_NAME).exists()


async def test_every_checkpoint_is_a_version_where_that_is_wanted(
    plane: Plane, tmp_path: Path
) -> None:
    await train(tmp_path / "out", callback(plane, every_save=True))
    assert [version["number"] for version in await versions(plane)] == [2, 1]


async def test_a_server_that_is_away_costs_no_training(
    plane: Plane, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.push.WAITS_S", ())
    pushing = PushToManylora("http://127.0.0.1:1", "key", tenant="acme", name="sql")
    with caplog.at_level(logging.ERROR, "adapters.training"):
        assert await train(tmp_path / "out", pushing) == 2
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "Manylora may not take the adapter later",
        "The adapter was not pushed to Manylora",
    ]
    # For the command line.
    assert (tmp_path / "out" / FOLDER_NAME / "adapter_model.safetensors").is_file()


async def test_what_the_server_finds_wrong_is_logged(
    plane: Plane, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraConfig(r=16, target_modules=["q_proj"])
    with caplog.at_level(logging.ERROR, "adapters.training"):
        await train(tmp_path / "out", callback(plane), model=get_peft_model(tiny_llama(), config))
    assert "rank" in caplog.records[-1].getMessage()
    assert await versions(plane) == []


async def test_who_wants_it_has_the_push_raised(plane: Plane, tmp_path: Path) -> None:
    options = {"tenant": "acme", "name": "sql", "raise_on_error": True}
    with pytest.raises(ServerUnreachable):
        await train(tmp_path / "out", PushToManylora("http://127.0.0.1:1", "key", **options))


async def test_a_model_that_has_no_adapter_is_not_pushed(
    plane: Plane, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "adapters.training"):
        assert await train(tmp_path / "out", callback(plane), model=tiny_llama()) == 2
    assert "is no PEFT model" in caplog.text


async def test_only_the_main_process_pushes(plane: Plane, tmp_path: Path) -> None:
    pushing, arguments = callback(plane), TrainingArguments(str(tmp_path), use_cpu=True)
    for is_main in (False, True):
        state = TrainerState(is_world_process_zero=is_main)
        await asyncio.to_thread(
            pushing.on_train_end, arguments, state, TrainerControl(), model=trained()
        )
        assert len(await versions(plane)) == is_main


def test_an_address_that_is_none_is_refused_before_the_training() -> None:
    with pytest.raises(ValueError, match="is no URL"):
        PushToManylora("acme.example", "key", tenant="acme", name="sql")
