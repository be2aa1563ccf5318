"""Facts about uploads: what comes in whole, and that of everything else nothing remains."""

import asyncio
import contextlib
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from safetensors.numpy import load, save

from adapters.validate import BaseShape
from engine.errors import EngineUnreachable
from engine.protocol import ProbeReport
from gateway.base_models import BaseModels
from gateway.database import Database
from gateway.staging import MAX_UPLOADS_UNDER_WAY
from tests.conftest import Cluster, Home
from tests.gateway.admin_plane import (
    INFO,
    MAX_UPLOAD_BYTES,
    MODULES,
    Plane,
    adapter_files,
    admin_plane,
    passing_probe,
    report,
    until,
)

VERSIONS = "/admin/v1/tenants/acme/adapters/sql/versions"
HEADERS = {"content-type": "multipart/form-data; boundary=between"}


@pytest.fixture
async def plane(database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        yield plane


async def assert_nothing_remains(plane: Plane) -> None:
    assert plane.stored_files() == []
    assert plane.staged_files() == []
    adapters = (await plane.client.get("/admin/v1/tenants/acme/adapters")).json()
    assert adapters["data"] == []
    assert plane.probe.asked_for == []


def codes(answer: httpx.Response) -> set[str]:
    assert answer.status_code == 422, answer.text
    return {finding["code"] for finding in answer.json()["findings"]}


def tar_of(files: dict[str, bytes], *, mode: Any = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


# What comes in.


async def test_two_files_become_a_version_that_can_be_called(plane: Plane) -> None:
    files = adapter_files(rank=3)
    answer = await plane.upload(files)
    assert answer.status_code == 201, answer.text
    version = answer.json()
    assert version["model"] == "acme-sql"
    assert version["pinned_model"] == "acme-sql@1"
    assert (version["number"], version["state"]) == (1, "ready")
    assert (version["rank"], version["num_modules"]) == (3, len(MODULES))
    assert version["size_bytes"] == len(files["adapter_model.safetensors"])
    assert version["findings"] == []
    assert version["certificate"]["is_passed"] is True
    digest = version["weights_digest"]
    assert plane.probe.asked_for == [digest]
    folder = f"adapters/{digest[:2]}/{digest}"
    config = hashlib.sha256(files["adapter_config.json"]).hexdigest()
    assert plane.stored_files() == [
        f"{folder}/adapter_config.json",
        f"{folder}/adapter_model.safetensors",
        f"{folder}/adapter_model.safetensors.sha256",
        f"files/{config[:2]}/{config}",
    ]
    assert plane.staged_files() == []


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.zip", "A.TAR.GZ"])
async def test_an_archive_gives_the_same_version_as_its_files(plane: Plane, name: str) -> None:
    files = adapter_files()
    if name.endswith("zip"):
        data = zip_of(files)
    else:
        data = tar_of(files, mode="w" if name.endswith("tar") else "w:gz")
    by_archive = await plane.upload({name: data})
    assert by_archive.status_code == 201, by_archive.text
    by_files = await plane.upload(files)
    assert by_files.status_code == 200
    assert by_files.json() == by_archive.json()


async def test_a_trainers_whole_folder_is_an_upload_and_the_answer_says_what_was_left_aside(
    plane: Plane,
) -> None:
    files = adapter_files()
    left = {"README.md": b"#", "training_args.bin": b"\x80\x02", "checkpoint-9/optimizer.pt": b"x"}
    folder = {f"out/{name}": data for name, data in {**files, **left}.items()}
    answer = await plane.upload({"out.tar.gz": tar_of(folder)})
    assert answer.status_code == 201, answer.text
    assert answer.json()["ignored_files"] == ["README.md", "training_args.bin", "checkpoint-9/"]
    assert (await plane.upload(files)).status_code == 200


async def test_a_tokenizer_and_examples_come_as_parts_of_their_own(plane: Plane) -> None:
    others = {"tokenizer_config.json": b"{}", "generation_config.json": b"{}"}
    answer = await plane.upload({**adapter_files(), **others, "examples.jsonl": b""})
    assert answer.status_code == 201, answer.text


async def test_part_names_do_not_matter(plane: Plane) -> None:
    files = {name: (name, data) for name, data in adapter_files().items()}
    assert (await plane.client.post(VERSIONS, files=files)).status_code == 201


async def test_a_right_sha256_is_accepted(plane: Plane) -> None:
    files = adapter_files()
    digest = hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()
    assert (await plane.upload(files, fields={"sha256": digest.upper()})).status_code == 201
    archive = tar_of(adapter_files(seed=1))
    digest = hashlib.sha256(archive).hexdigest()
    assert (await plane.upload({"a.tgz": archive}, fields={"sha256": digest})).status_code == 201


async def test_the_same_contents_again_are_the_same_version(plane: Plane) -> None:
    first = await plane.upload(adapter_files())
    again = await plane.upload(adapter_files(lora_dropout=0.1))
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert len(plane.probe.asked_for) == 1


async def test_other_contents_are_the_next_version_and_latest_follows(plane: Plane) -> None:
    await plane.upload(adapter_files(seed=0))
    second = await plane.upload(adapter_files(seed=1))
    assert second.json()["number"] == 2
    adapter = (await plane.client.get("/admin/v1/tenants/acme/adapters/sql")).json()
    assert adapter["aliases"] == {"latest": 2}


async def test_uploads_of_one_name_at_once_get_numbers_of_their_own(plane: Plane) -> None:
    answers = await asyncio.gather(*(plane.upload(adapter_files(seed=n)) for n in range(6)))
    assert {answer.status_code for answer in answers} == {201}
    assert sorted(answer.json()["number"] for answer in answers) == [1, 2, 3, 4, 5, 6]
    adapter = (await plane.client.get("/admin/v1/tenants/acme/adapters/sql")).json()
    assert adapter["aliases"] == {"latest": 6}


async def test_the_same_contents_at_once_are_one_version(plane: Plane) -> None:
    answers = await asyncio.gather(*(plane.upload() for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 201]
    assert len({answer.json()["version_digest"] for answer in answers}) == 1
    versions = (await plane.client.get(VERSIONS)).json()["data"]
    assert [(version["number"], version["state"]) for version in versions] == [(1, "ready")]


# What is refused.


async def test_every_finding_is_listed(plane: Plane) -> None:
    tensors = load(adapter_files(rank=16)["adapter_model.safetensors"])
    names = sorted(tensors)
    tensors[names[0]][0, 0] = np.nan
    tensors["base_model.model.lm_head.bias"] = np.ones(4, np.float32)
    files = adapter_files(rank=16, use_dora=True) | {"adapter_model.safetensors": save(tensors)}
    answer = await plane.upload(files)
    assert len(codes(answer)) >= 4
    assert "not_finite" in codes(answer)
    assert "rank_too_large" in codes(answer)
    for finding in answer.json()["findings"]:
        assert set(finding) == {"code", "where", "message", "fix"}
    await assert_nothing_remains(plane)


def zeroed(files: dict[str, bytes]) -> dict[str, bytes]:
    tensors = load(files["adapter_model.safetensors"])
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor[:] = 0
    return files | {"adapter_model.safetensors": save(tensors)}


def with_weights(data: bytes) -> dict[str, bytes]:
    return adapter_files() | {"adapter_model.safetensors": data}


WEIGHTS = adapter_files()["adapter_model.safetensors"]
OTHER_BASE = {name: (inner * 2, outer) for name, (inner, outer) in MODULES.items()}
HOSTILE: dict[str, dict[str, bytes]] = {
    "a pickle": with_weights(pickle.dumps({"weights": [1, 2, 3]}, protocol=2)),
    "no safetensors": with_weights(b"GGUF" + bytes(100)),
    "nothing": with_weights(b""),
    "a truncated file": with_weights(WEIGHTS[:-7]),
    "a header beyond the file": with_weights((1 << 40).to_bytes(8, "little") + b"{}"),
    "trailing bytes": with_weights(WEIGHTS + b"tail"),
    "another base model": adapter_files(modules=OTHER_BASE),
    "unknown modules": adapter_files(modules={"model.layers.7.mlp.up": (16, 16)}),
    "a rank above the limit": adapter_files(rank=9),
    "a rank that is not the trained one": adapter_files(r=3),
    "no effect": zeroed(adapter_files()),
    "a configuration that is no JSON": adapter_files() | {"adapter_config.json": b"{"},
    "a huge configuration": adapter_files()
    | {"adapter_config.json": b"[" * (MAX_UPLOAD_BYTES // 2)},
    "a kind of adapter that is not served": adapter_files(peft_type="IA3"),
    "a way out of the archive": {"a.tar": tar_of({**adapter_files(), "../evil": b"x"}, mode="w")},
    "an absolute path": {"a.zip": zip_of({**adapter_files(), "/etc/evil": b"x"})},
    "an archive without weights": {"a.tgz": tar_of({"adapter_config.json": b"{}"})},
    "an archive with a pickle": {"a.tgz": tar_of({**adapter_files(), "model.pt": b"\x80\x02"})},
    "an archive that is none": {"a.zip": b"PK\x03\x04 and no more"},
}


async def test_what_is_no_adapter_leaves_nothing(plane: Plane, subtests: pytest.Subtests) -> None:
    for what, files in HOSTILE.items():
        with subtests.test(what):
            answer = await plane.upload(files)
            assert answer.headers["content-type"] == "application/problem+json"
            assert codes(answer)
            await assert_nothing_remains(plane)


async def test_a_wrong_sha256_is_refused(plane: Plane) -> None:
    answer = await plane.upload(fields={"sha256": "0" * 64})
    assert codes(answer) == {"sha256_mismatch"}
    await assert_nothing_remains(plane)


async def test_a_malformed_sha256_is_named(plane: Plane) -> None:
    answer = await plane.upload(fields={"sha256": "deadbeef"})
    assert (answer.status_code, answer.json()["param"]) == (400, "sha256")
    await assert_nothing_remains(plane)


async def test_too_large_a_file_is_refused_with_the_limit(plane: Plane) -> None:
    answer = await plane.upload(with_weights(bytes(MAX_UPLOAD_BYTES + 1)))
    assert answer.status_code == 413
    assert str(MAX_UPLOAD_BYTES) in answer.json()["detail"]
    await assert_nothing_remains(plane)


async def test_too_large_a_body_without_length_is_refused_while_it_arrives(plane: Plane) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"--x\r\n"
        while True:
            yield b"y" * 65536

    answer = await plane.client.post(
        VERSIONS,
        content=_first(endless(), num_chunks=64),
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert answer.status_code in (400, 413)
    await assert_nothing_remains(plane)


async def test_too_large_a_body_is_refused_before_it_is_sent(plane: Plane) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", plane.client.base_url.port)
    headers = {**plane.client.headers, **HEADERS, "host": "x", "content-length": str(1 << 40)}
    head = [f"POST {VERSIONS} HTTP/1.1"] + [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n")
    assert b" 413 " in await reader.readline()
    writer.transport.abort()
    await assert_nothing_remains(plane)


async def test_too_large_a_side_file_is_refused(plane: Plane) -> None:
    files = adapter_files() | {"chat_template.jinja": bytes((1 << 20) + 1)}
    async with admin_plane(plane.database, plane.folder, max_upload_bytes=8 << 20) as wide:
        answer = await wide.upload(files)
    assert answer.status_code == 413
    assert "chat_template.jinja" in answer.json()["detail"]
    await assert_nothing_remains(plane)


async def test_one_tenant_cannot_fill_the_staging_disk(plane: Plane) -> None:
    with contextlib.ExitStack() as stack:
        tenant_id = (await plane.registry.destination("acme", "sql")).tenant_id
        for _ in range(MAX_UPLOADS_UNDER_WAY):
            stack.enter_context(plane.staging.folder(tenant_id)).claim(MAX_UPLOAD_BYTES)
        answer = await plane.upload()
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_uploads")
        assert "retry-after" in answer.headers
        await plane.make_tenant("globex")
        assert (await plane.upload(tenant="globex")).status_code == 201
    assert (await plane.upload()).status_code == 201


async def test_an_archive_that_grows_beyond_the_limit_is_refused(plane: Plane) -> None:
    bomb = zip_of(with_weights(bytes(100 * MAX_UPLOAD_BYTES)))
    assert len(bomb) < MAX_UPLOAD_BYTES
    answer = await plane.upload({"a.zip": bomb})
    assert answer.status_code == 413
    await assert_nothing_remains(plane)


MALFORMED: dict[str, tuple[dict[str, bytes], dict[str, str] | None, str]] = {
    "an unknown file": (adapter_files() | {"notes.txt": b"hello"}, None, "notes.txt"),
    "a pickle by name": ({"adapter_model.bin": b"\x80\x02"}, None, "adapter_model.bin"),
    "a path as a file name": ({"../adapter_config.json": b"{}"}, None, "../adapter_config.json"),
    "an unknown field": (adapter_files(), {"alias": "prod"}, "alias"),
    "no configuration": ({"adapter_model.safetensors": WEIGHTS}, None, "adapter_config.json"),
    "no weights": ({"adapter_config.json": b"{}"}, None, "adapter_model.safetensors"),
    "files beside an archive": (adapter_files() | {"a.zip": zip_of({})}, None, "archive"),
    "a base model nobody serves": (adapter_files(), {"base_model": "llama"}, "Tiny-Base"),
    "a long field": (adapter_files(), {"sha256": "0" * 5000}, "sha256"),
}


async def test_a_malformed_form_is_refused_by_name(plane: Plane, subtests: pytest.Subtests) -> None:
    for what, (files, fields, named) in MALFORMED.items():
        with subtests.test(what):
            answer = await plane.upload(files, fields=fields)
            assert answer.status_code == 400, answer.text
            assert named in answer.json()["detail"]
            await assert_nothing_remains(plane)


async def test_a_part_that_comes_twice_is_refused(plane: Plane) -> None:
    part = ("files", ("adapter_config.json", b"{}"))
    answer = await plane.client.post(VERSIONS, files=[part, part])
    assert (answer.status_code, answer.json()["param"]) == (400, "adapter_config.json")
    await assert_nothing_remains(plane)


async def test_a_body_that_is_no_whole_form_is_refused(
    plane: Plane, subtests: pytest.Subtests
) -> None:
    form = "multipart/form-data; boundary=x"
    for content_type, body in (
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x--\r\n"),
        (form, b""),
        (form, b"no parts here"),
        (form, b'--x\r\ncontent-disposition: form-data; name="a"'),
        (form, b"--x--\r\n"),
    ):
        with subtests.test(f"{content_type} {body!r}"):
            headers = {"content-type": content_type}
            answer = await plane.client.post(VERSIONS, content=body, headers=headers)
            assert answer.status_code == 400
            assert answer.json()["code"] == "invalid_request"
            await assert_nothing_remains(plane)


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(plane: Plane) -> None:
    request = plane.client.build_request("POST", VERSIONS, files={"f": ("a.tar", bytes(100_000))})
    body = request.read()
    port = plane.client.base_url.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = [f"POST {VERSIONS} HTTP/1.1"] + [f"{k}: {v}" for k, v in request.headers.items()]
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body[: len(body) // 2])
    await writer.drain()
    await until(lambda: plane.staged_files() != [])
    writer.transport.abort()
    await until(lambda: plane.staged_files() == [])
    del reader
    await assert_nothing_remains(plane)


# The engine's word.


async def test_a_version_that_fails_its_probe_is_rejected(plane: Plane) -> None:
    async def failing(digest: str) -> ProbeReport:
        return report(digest, is_passed=False, largest_relative_error=0.3)

    plane.probe.answer = failing
    answer = await plane.upload()
    assert codes(answer) == {"probe_failed"}
    assert plane.stored_files() == []
    [version] = (await plane.client.get(VERSIONS)).json()["data"]
    assert version["state"] == "rejected"
    assert version["certificate"]["largest_relative_error"] == 0.3
    assert [finding["code"] for finding in version["findings"]] == ["probe_failed"]
    adapter = (await plane.client.get("/admin/v1/tenants/acme/adapters/sql")).json()
    assert adapter["aliases"] == {}


async def test_untouched_modules_are_named(plane: Plane) -> None:
    async def failing(digest: str) -> ProbeReport:
        return report(digest, is_passed=False, untouched_modules=["model.layers.1.mlp.up_proj"])

    plane.probe.answer = failing
    [finding] = (await plane.upload()).json()["findings"]
    assert finding["where"] == "model.layers.1.mlp.up_proj"


async def test_a_rejected_version_can_be_tried_again(plane: Plane) -> None:
    async def failing(digest: str) -> ProbeReport:
        return report(digest, is_passed=False)

    plane.probe.answer = failing
    assert (await plane.upload()).status_code == 422
    plane.probe.answer = passing_probe
    answer = await plane.upload()
    assert (answer.status_code, answer.json()["number"]) == (201, 2)


async def unreachable(digest: str) -> ProbeReport:
    raise EngineUnreachable


async def test_without_an_engine_the_upload_waits_and_the_next_one_finishes_it(
    plane: Plane,
) -> None:
    plane.probe.answer = unreachable
    answer = await plane.upload()
    assert answer.status_code == 503
    assert "version 1" in answer.json()["detail"]
    assert plane.staged_files() == []
    plane.probe.answer = passing_probe
    again = await plane.upload()
    assert (again.status_code, again.json()["state"], again.json()["number"]) == (200, "ready", 1)


async def test_a_store_that_fails_leaves_nothing(plane: Plane) -> None:
    (plane.folder / "store" / "adapters").write_bytes(b"no folder")
    assert (await plane.upload()).status_code == 503
    (plane.folder / "store" / "adapters").unlink()
    await assert_nothing_remains(plane)


async def test_a_new_start_finishes_what_the_last_one_left(plane: Plane) -> None:
    plane.probe.answer = unreachable
    await plane.upload()
    left = plane.folder / "staging" / "left"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half of")
    await plane.start_anew()
    [version] = (await plane.client.get(VERSIONS)).json()["data"]
    assert version["state"] == "probing"
    assert not left.exists()
    plane.probe.answer = passing_probe
    await plane.start_anew()
    [version] = (await plane.client.get(VERSIONS)).json()["data"]
    assert version["state"] == "ready"


async def test_a_new_start_waits_for_a_database_that_is_away(
    plane: Plane, cluster: Cluster, home: Home
) -> None:
    plane.probe.answer = unreachable
    await plane.upload()
    plane.probe.answer = passing_probe
    [entry] = await BaseModels(plane.database).entries()
    name = home.owner_url.rpartition("/")[2].partition("?")[0]
    await cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await plane.database.close()
    recovery = asyncio.create_task(plane.uploads.recover(entry.base_model.id))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(recovery), 0.5)
    await cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    await recovery
    [version] = (await plane.client.get(VERSIONS)).json()["data"]
    assert version["state"] == "ready"


async def test_an_upload_under_way_outlives_the_start_of_another_gateway(plane: Plane) -> None:
    started, may_go = asyncio.Event(), asyncio.Event()
    files = adapter_files()

    async def slowly() -> AsyncIterator[bytes]:
        request = plane.client.build_request("POST", VERSIONS, files=_parts(files), headers=HEADERS)
        body = request.read()
        yield body[:-1000]
        started.set()
        await may_go.wait()
        yield body[-1000:]

    upload = asyncio.create_task(plane.client.post(VERSIONS, content=slowly(), headers=HEADERS))
    await started.wait()
    await until(lambda: len(plane.staged_files()) == 2)
    await plane.start_anew()
    may_go.set()
    assert (await upload).status_code == 201


async def test_memory_stays_constant_however_large_the_file(
    database: Database, tmp_path: Path
) -> None:
    rank, in_features, out_features = 8, 100 * (1 << 20) // 32, 4
    shape = BaseShape(base_model="Tiny-Base", modules={"model.wide": (in_features, out_features)})
    info = msgspec.structs.replace(INFO, base_shape=shape)
    size_bytes = 4 * rank * (in_features + out_features)

    async with admin_plane(database, tmp_path, info=info, max_upload_bytes=128 << 20) as plane:
        await plane.make_tenant("acme")
        before_bytes = _resident_bytes()
        peaks = []

        async def body() -> AsyncIterator[bytes]:
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["wide"]}
            yield _part_head("adapter_config.json") + json.dumps(config).encode() + b"\r\n"
            yield _part_head("adapter_model.safetensors")
            split = size_bytes - 4 * rank * out_features
            header = {
                "model.wide.lora_A.weight": _entry([rank, in_features], 0, split),
                "model.wide.lora_B.weight": _entry([out_features, rank], split, size_bytes),
            }
            head = json.dumps(header).encode()
            yield len(head).to_bytes(8, "little") + head
            for begin in range(0, size_bytes, 1 << 20):
                length = min(1 << 20, size_bytes - begin)
                yield np.full(length // 4, 0.01, np.float32).tobytes()
                peaks.append(_resident_bytes())
            yield b"\r\n--between--\r\n"

        async def watching(digest: str) -> ProbeReport:
            peaks.append(_resident_bytes())
            return report(digest)

        plane.probe.answer = watching
        answer = await plane.client.post(VERSIONS, content=body(), headers=HEADERS, timeout=300)
        assert answer.status_code == 201, answer.text
        assert answer.json()["size_bytes"] > size_bytes
        while_receiving, at_last = max(peaks[:-1]), max(peaks)
        assert while_receiving - before_bytes < 24 << 20
        # What judging and storing hold at a time is bounded too, and is not the file.
        assert at_last - before_bytes < 72 << 20
        assert plane.staged_files() == []


def _entry(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def _part_head(file: str) -> bytes:
    return (
        f'--between\r\ncontent-disposition: form-data; name="files"; filename="{file}"\r\n\r\n'
    ).encode()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _parts(files: dict[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (name, data)) for name, data in files.items()]


async def _first(chunks: AsyncIterator[bytes], *, num_chunks: int) -> AsyncIterator[bytes]:
    for _ in range(num_chunks):
        yield await anext(chunks)
