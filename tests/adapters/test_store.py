"""What is stored under a digest is whole, and comes back as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters import text_bundle
from adapters.errors import AdapterError, ArtifactMissing, DigestMismatch, StoreUnavailable
from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from tests.adapters.tiny_adapters import Saved

BUNDLE = TextBundle(
    tokenizer_json=b"{}",
    chat_template=None,
    special_tokens={"eos_token": "</s>"},
    eos_token_ids=(2,),
    generation_defaults={},
    context_length=128,
    vocab_size=48,
)
NOWHERE = "0" * 64


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    folder = tmp_path / "not there yet" / "store"
    return ArtifactStore(folder.as_uri() if request.param == "file" else "memory:///")


async def test_an_adapter_comes_back_as_the_same_adapter(
    store: ArtifactStore, save_adapter: Callable[..., Saved], tmp_path: Path
) -> None:
    adapter = save_adapter(rank_pattern={"q_proj": 6}, use_rslora=True)
    digest = await adapter.put(store)
    fetched = Saved(tmp_path / "fetched")
    fetched.folder.mkdir()
    store.fetch_adapter(digest, fetched.folder)

    assert await store.has_adapter(digest)
    assert fetched.weights_path.read_bytes() == adapter.weights_path.read_bytes()
    assert fetched.read().weights_digest == digest


async def test_storing_again_changes_nothing(
    store: ArtifactStore, save_adapter: Callable[..., Saved], tmp_path: Path
) -> None:
    adapter = save_adapter()
    digest = await adapter.put(store)
    original = adapter.weights_path.read_bytes()
    config = adapter.read().canonical_config()
    adapter.weights_path.write_bytes(b"something else")
    other = adapter.weights_sha256
    await store.put_adapter(digest, config, adapter.weights_path, weights_sha256=other)
    store.fetch_adapter(digest, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == original


async def test_an_adapter_whose_weights_alone_arrived_is_not_there(
    tmp_path: Path, save_adapter: Callable[..., Saved]
) -> None:
    store = ArtifactStore(tmp_path.as_uri())
    digest = await save_adapter().put(store)
    (tmp_path / "adapters" / digest[:2] / digest / "adapter_config.json").unlink()
    assert not await store.has_adapter(digest)
    with pytest.raises(ArtifactMissing):
        store.fetch_adapter(digest, tmp_path)


async def test_weights_beside_an_adapter_are_found_by_their_own_hash_alone(
    store: ArtifactStore, save_adapter: Callable[..., Saved], tmp_path: Path
) -> None:
    adapter = save_adapter()
    digest, sha256 = await adapter.put(store), adapter.weights_sha256
    assert await store.find_file(sha256, beside=digest) is not None
    assert await store.find_file(sha256) is None
    assert await store.find_file(NOWHERE, beside=digest) is None
    other = tmp_path / "other"
    other.write_bytes(b"spelled in another way")
    await store.put_file(NOWHERE, other)
    found = await store.find_file(NOWHERE, beside=digest)
    assert found is not None
    assert [chunk async for chunk in store.stream_file(found)] == [other.read_bytes()]
    assert [chunk async for chunk in store.stream_file(found, begin=3, end=7)] == [b"lled"]


async def test_a_deleted_adapter_is_gone_and_deleting_twice_is_no_error(
    store: ArtifactStore, save_adapter: Callable[..., Saved]
) -> None:
    digest = await save_adapter().put(store)
    await store.delete_adapter(digest)
    await store.delete_adapter(digest)
    assert not await store.has_adapter(digest)


async def test_only_canonical_configurations_are_stored(
    store: ArtifactStore, save_adapter: Callable[..., Saved]
) -> None:
    adapter = save_adapter()
    with pytest.raises(AdapterError, match="canonical_config"):
        await store.put_adapter(
            NOWHERE, adapter.config_path.read_bytes(), adapter.weights_path, weights_sha256=NOWHERE
        )
    assert not await store.has_adapter(NOWHERE)


async def test_a_bundle_comes_back(store: ArtifactStore) -> None:
    digest = await store.put_bundle(BUNDLE)
    assert digest == text_bundle.digest(BUNDLE) == await store.put_bundle(BUNDLE)
    assert await store.get_bundle(digest) == BUNDLE


async def test_a_bundle_under_the_wrong_digest_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path.as_uri())
    digest = await store.put_bundle(BUNDLE)
    stored = tmp_path / "text-bundles" / digest[:2] / digest
    moved = tmp_path / "text-bundles" / NOWHERE[:2] / NOWHERE
    moved.parent.mkdir()
    stored.rename(moved)
    with pytest.raises(DigestMismatch):
        await store.get_bundle(NOWHERE)


@pytest.mark.parametrize("digest", [NOWHERE, "../../../etc", "", "A" * 64])
async def test_what_is_not_there_is_missing_by_name(
    store: ArtifactStore, digest: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactMissing):
        await store.get_bundle(digest)
    with pytest.raises(ArtifactMissing) as caught:
        store.fetch_adapter(digest, tmp_path)
    assert caught.value.digest == digest


@pytest.mark.parametrize("url", ["", "nowhere", "ftp://host/path", "/a/path"])
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        ArtifactStore(url)
