"""The disk cache gives whole, verified folders, once each, and never takes one from a reader."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adapters import manifest, weights
from adapters.cache import DiskCache
from adapters.errors import ArtifactMissing, DigestMismatch
from adapters.store import ArtifactStore
from tests.adapters.tiny_adapters import BASE, Saved, shape_of, tiny_llama

ROOMY = 1 << 30


class CountingStore(ArtifactStore):
    """The real store, which remembers what was fetched and can be told to wait."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.fetched: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_asked = threading.Event()

    def fetch_adapter(self, digest: str, into: Path) -> None:
        self.fetched.append(digest)
        self.is_asked.set()
        self.gate.wait()
        super().fetch_adapter(digest, into)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore((tmp_path / "store").as_uri())


@pytest.fixture
async def digests(store: CountingStore, save_adapter: Callable[..., Saved]) -> list[str]:
    """Three adapters of one size."""
    found = []
    for _ in range(3):
        adapter = save_adapter()
        one = adapter.read()
        await adapter.put(store)
        found.append(one.weights_digest)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def size_of_one(store: CountingStore, digest: str, scratch: Path) -> int:
    cache = DiskCache(store, scratch, max_bytes=ROOMY)
    with cache.fetch(digest):
        return cache.size_bytes


def digest_of(folder: Path) -> str:
    config = (folder / manifest.CONFIG_FILE).read_bytes()
    return manifest.read(config, folder / manifest.WEIGHTS_FILE, base_model=BASE).weights_digest


async def test_what_changes_more_than_linear_layers_is_verified_too(
    store: CountingStore, save_adapter: Callable[..., Saved], root: Path
) -> None:
    """Saved under other names than the base model's, of which the cache knows nothing."""
    model = tiny_llama(attention_bias=True, tie_word_embeddings=True)
    base_shape = shape_of(model)
    adapter = save_adapter(
        model=model,
        use_dora=True,
        bias="all",
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["norm"],
    )
    adapter.edit_tensors(spell_as_with_vision)
    one = adapter.read(base_shape)
    assert one.leftovers == {}
    await adapter.put(store, base_shape)
    with DiskCache(store, root, max_bytes=ROOMY).fetch(one.weights_digest) as folder:
        loaded = weights.load(folder, base_model=BASE, dtype=torch.float32)
    assert loaded.lora.keys() == one.modules.keys()
    assert loaded.replaced.keys() == one.replaced.keys()


def spell_as_with_vision(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("model.model.model.", "model.model.language_model.")] = tensors.pop(
            name
        )


def held(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_an_adapter_is_fetched_once_and_then_read_from_disk(
    store: CountingStore, digests: list[str], root: Path
) -> None:
    cache = DiskCache(store, root, max_bytes=ROOMY)
    for _ in range(3):
        with cache.fetch(digests[0]) as folder:
            assert digest_of(folder) == digests[0]
    assert store.fetched == [digests[0]]


def test_threads_that_want_the_same_adapter_share_one_fetch(
    store: CountingStore, digests: list[str], root: Path
) -> None:
    cache = DiskCache(store, root, max_bytes=ROOMY)
    store.gate.clear()

    def read() -> str:
        with cache.fetch(digests[0]) as folder:
            return digest_of(folder)

    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(read) for _ in range(8)]
        store.gate.set()
        assert {result.result() for result in results} == {digests[0]}
    assert store.fetched == [digests[0]]


def test_the_least_recently_used_goes_first(
    store: CountingStore, digests: list[str], root: Path, tmp_path: Path
) -> None:
    a, b, c = digests
    size = size_of_one(store, a, tmp_path / "scratch")
    cache = DiskCache(store, root, max_bytes=2 * size)
    for digest in (a, b, a, c):
        with cache.fetch(digest):
            pass
    assert held(root) == {a, c}
    assert cache.size_bytes == 2 * size


def test_one_that_is_being_read_stays_and_goes_when_it_is_not(
    store: CountingStore, digests: list[str], root: Path, tmp_path: Path
) -> None:
    a, b, _ = digests
    cache = DiskCache(store, root, max_bytes=size_of_one(store, a, tmp_path / "scratch"))
    with cache.fetch(a) as folder:
        with cache.fetch(b):
            assert held(root) == {a, b}
        assert digest_of(folder) == a
        assert held(root) == {a}
    assert held(root) == {a}


def test_an_adapter_larger_than_the_cache_can_be_read_and_does_not_stay(
    store: CountingStore, digests: list[str], root: Path
) -> None:
    cache = DiskCache(store, root, max_bytes=1)
    with cache.fetch(digests[0]) as folder:
        assert digest_of(folder) == digests[0]
    assert held(root) == set()


def test_what_is_not_stored_is_missing_and_can_be_fetched_once_it_is(
    store: CountingStore, digests: list[str], root: Path
) -> None:
    cache = DiskCache(store, root, max_bytes=ROOMY)
    with pytest.raises(ArtifactMissing), cache.fetch("0" * 64):
        pass
    assert held(root) == set()
    with cache.fetch(digests[0]) as folder:
        assert folder.is_dir()


def test_an_adapter_that_changed_in_the_store_is_refused_and_not_kept(
    store: CountingStore, digests: list[str], root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store" / "adapters" / digests[0][:2] / digests[0] / manifest.WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    cache = DiskCache(store, root, max_bytes=ROOMY)
    with pytest.raises(DigestMismatch), cache.fetch(digests[0]):
        pass
    assert held(root) == set()


def test_a_new_process_goes_on_with_what_was_whole_and_sweeps_the_rest(
    store: CountingStore, digests: list[str], root: Path
) -> None:
    with DiskCache(store, root, max_bytes=ROOMY).fetch(digests[0]):
        pass
    half = root / "passing-abc"
    half.mkdir()
    (half / manifest.WEIGHTS_FILE).write_bytes(b"half")

    with DiskCache(store, root, max_bytes=ROOMY).fetch(digests[0]) as folder:
        assert digest_of(folder) == digests[0]
    assert store.fetched == [digests[0]]
    assert held(root) == {digests[0]}


def test_many_threads_over_a_small_cache_always_read_what_they_asked_for(
    store: CountingStore, digests: list[str], root: Path, tmp_path: Path
) -> None:
    size = size_of_one(store, digests[0], tmp_path / "scratch")
    cache = DiskCache(store, root, max_bytes=size)

    def read(turn: int) -> bool:
        wanted = digests[turn % 3]
        with cache.fetch(wanted) as folder:
            return digest_of(folder) == wanted

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(120)))
    assert cache.size_bytes <= size
    assert held(root) <= set(digests)


def test_a_forgotten_adapter_is_gone_and_can_be_fetched_anew(
    store: CountingStore, digests: list[str], root: Path
) -> None:
    a, b, _ = digests
    cache = DiskCache(store, root, max_bytes=ROOMY)
    for digest in (a, b):
        with cache.fetch(digest):
            pass
    size = cache.size_bytes
    assert cache.forget(a) == size - cache.size_bytes > 0
    assert cache.forget(a) == 0
    assert held(root) == {b}
    with cache.fetch(a) as folder:
        assert digest_of(folder) == a
    assert store.fetched == [a, b, a]


def test_a_forgotten_adapter_stays_for_those_who_read_it(
    store: CountingStore, digests: list[str], root: Path
) -> None:
    cache = DiskCache(store, root, max_bytes=ROOMY)
    with cache.fetch(digests[0]) as folder:
        assert cache.forget(digests[0]) == 0
        assert digest_of(folder) == digests[0]
    assert held(root) == set()


def test_one_that_is_forgotten_while_it_is_fetched_does_not_stay(
    store: CountingStore, digests: list[str], root: Path
) -> None:
    cache = DiskCache(store, root, max_bytes=ROOMY)
    store.gate.clear()

    def read() -> str:
        with cache.fetch(digests[0]) as folder:
            return digest_of(folder)

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(read)
        assert store.is_asked.wait(60)
        assert cache.forget(digests[0]) == 0
        store.gate.set()
        assert result.result() == digests[0]
    assert held(root) == set()
