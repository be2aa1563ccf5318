"""The same store on a real S3 server: moto's, over a socket, with credentials by environment."""

import itertools
import logging
import os
import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from adapters.errors import ArtifactMissing, StoreUnavailable
from adapters.store import ArtifactStore
from tests.adapters.tiny_adapters import Saved

NUMBERS = itertools.count(1)
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    bucket = f"shelf-{next(NUMBERS)}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture
def store(endpoint: str, bucket: str) -> ArtifactStore:
    return ArtifactStore(f"s3://{bucket}/some/folder?endpoint={endpoint}")


async def test_an_adapter_is_put_listed_fetched_and_deleted(
    store: ArtifactStore, save_adapter: Callable[..., Saved], tmp_path: Path
) -> None:
    adapter = save_adapter()
    digest = await adapter.put(store)
    assert await store.has_adapter(digest)
    [stored] = await store.adapters()
    assert stored.name == digest
    assert stored.files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.safetensors.sha256",
    }
    store.fetch_adapter(digest, tmp_path)
    fetched = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert fetched == adapter.weights_path.read_bytes()
    await store.delete_adapter(digest)
    await store.delete_adapter(digest)
    assert await store.adapters() == []
    assert not await store.has_adapter(digest)
    with pytest.raises(ArtifactMissing):
        store.fetch_adapter(digest, tmp_path)


async def test_a_large_file_goes_in_parts_and_comes_back_the_same(
    store: ArtifactStore, save_adapter: Callable[..., Saved], tmp_path: Path
) -> None:
    adapter = save_adapter()
    config = adapter.read().canonical_config()
    adapter.weights_path.write_bytes(random.Random(1).randbytes(12 << 20))
    await store.put_adapter(
        "0" * 64, config, adapter.weights_path, weights_sha256=adapter.weights_sha256
    )
    store.fetch_adapter("0" * 64, tmp_path)
    fetched = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert fetched == adapter.weights_path.read_bytes()


async def test_files_as_they_were_uploaded_come_and_go(
    store: ArtifactStore, save_adapter: Callable[..., Saved], tmp_path: Path
) -> None:
    adapter = save_adapter()
    digest, sha256 = await adapter.put(store), adapter.weights_sha256
    assert await store.files() == []
    beside = await store.find_file(sha256, beside=digest)
    assert beside is not None
    whole = b"".join([chunk async for chunk in store.stream_file(beside)])
    assert whole == adapter.weights_path.read_bytes()
    (tmp_path / "empty").write_bytes(b"")
    for name, path in (("1" * 64, adapter.config_path), ("2" * 64, tmp_path / "empty")):
        await store.put_file(name, path)
        found = await store.find_file(name)
        assert found is not None
        part = b"".join([chunk async for chunk in store.stream_file(found, begin=2)])
        assert part == path.read_bytes()[2:]
    assert [each.name for each in await store.files()] == ["1" * 64, "2" * 64]
    for name in ("1" * 64, "1" * 64, "2" * 64):
        await store.delete_file(name)
    assert await store.files() == []


async def test_pieces_of_uploads_come_and_go(store: ArtifactStore) -> None:
    upload, other = uuid.uuid4(), uuid.uuid4()
    for part in ("a.0", "a.1"):
        await store.put_part(upload, part, part.encode())
    await store.put_part(other, "b", b"b")
    assert [chunk async for chunk in store.stream_part(upload, "a.1")] == [b"a.1"]
    await store.delete_upload(upload)
    assert [each.name for each in await store.uploads()] == [str(other)]
    with pytest.raises(ArtifactMissing):
        [chunk async for chunk in store.stream_part(upload, "a.1")]


async def test_the_environment_says_the_same_as_the_url(
    endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    store = ArtifactStore(f"s3://{bucket}")
    await store.put_part(uuid.UUID(int=1), "p", b"x")
    assert len(await store.uploads()) == 1


async def test_a_bucket_that_is_not_there_is_named(
    endpoint: str, bucket: str, save_adapter: Callable[..., Saved]
) -> None:
    wrong = ArtifactStore(f"s3://no-{bucket}?endpoint={endpoint}")
    for attempt in (save_adapter().put(wrong), wrong.adapters(), wrong.get_bundle("0" * 64)):
        with pytest.raises(StoreUnavailable, match=f"'s3://no-{bucket}'.*no such bucket"):
            await attempt


async def test_a_server_that_is_away_is_told_in_time(bucket: str) -> None:
    away = ArtifactStore(f"s3://{bucket}?endpoint=http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable, match=bucket):
        await away.has_adapter("0" * 64)


def test_credentials_in_the_url_are_not_told(bucket: str) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        ArtifactStore(f"s3://{bucket}?secret_access_key=hush&nonsense=1")
    assert "hush" not in str(caught.value)
    assert "nonsense" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket/folder",
        "az://container/folder?account_name=account&account_key=a2V5",
        "s3://bucket/folder?region=eu-central-1&virtual_hosted_style_request=true",
    ],
)
def test_other_clouds_are_opened_by_url(url: str) -> None:
    ArtifactStore(url)
