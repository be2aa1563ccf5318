"""A header that a stranger wrote is read whole and consistent, or refused with a reason."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from adapters import tensor_file
from adapters.errors import UnreadableArtifact
from tests.adapters.tiny_adapters import Saved

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter_model.safetensors"


def refusal(path: Path) -> str:
    """The one finding, which must name its place and a fix."""
    with pytest.raises(UnreadableArtifact) as caught:
        tensor_file.read_header(path)
    (finding,) = caught.value.findings
    assert finding.where
    assert finding.fix
    return f"{finding.code}: {finding.where} {finding.message}"


def test_entries_are_where_safetensors_put_them(save_adapter: Callable[..., Saved]) -> None:
    adapter = save_adapter(dtype=torch.bfloat16)
    entries = tensor_file.read_header(adapter.weights_path)
    with safe_open(adapter.weights_path, framework="pt") as tensors:
        assert entries.keys() == set(tensors.keys())
        for name, entry in entries.items():
            expected = tensors.get_tensor(name)
            data = b"".join(tensor_file.chunks(adapter.weights_path, entry))
            assert data == expected.view(torch.uint8).numpy().tobytes()
            assert (entry.dtype, entry.shape) == ("BF16", tuple(expected.shape))


def test_a_truncated_file_is_refused(save_adapter: Callable[..., Saved]) -> None:
    path = save_adapter().weights_path
    whole = path.read_bytes()
    for size in (0, 7, 8, 9, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert refusal(path).startswith("weights_unreadable")


def test_bytes_after_the_last_tensor_are_refused(path: Path) -> None:
    assert "belong to no tensor" in refusal(written(path, {"a": ONE}, bytes(9)))


def test_a_header_length_beyond_the_file_is_refused_before_it_is_read(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert "is truncated" in refusal(path)


def test_a_header_that_is_too_long_is_refused_before_it_is_read(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", tensor_file.MAX_HEADER_BYTES + 1) + b"{")
        file.truncate(tensor_file.MAX_HEADER_BYTES + 100)
    assert "has a header of more than" in refusal(path)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({**ONE, "data_offsets": [4, 12]}, "overlaps another tensor"),
        ({**ONE, "data_offsets": [0, 8]}, "overlaps another tensor"),
        ({**ONE, "data_offsets": [12, 20]}, "leaves a gap before it"),
        ({**ONE, "data_offsets": [8, 0]}, "does not fit its bytes"),
        ({**ONE, "data_offsets": [8, 1 << 70]}, "does not fit its bytes"),
        ({**ONE, "data_offsets": [8, 12]}, "does not fit its bytes"),
        ({**ONE, "shape": [1 << 62] * 8}, "does not fit its bytes"),
        ({**ONE, "shape": [-2]}, "malformed header"),
        ({**ONE, "shape": [1] * 9}, "malformed header"),
        ({**ONE, "dtype": "F7"}, "unknown dtype"),
        ({**ONE, "extra": 1}, "malformed header"),
        ({"dtype": "F32"}, "malformed header"),
        ([], "malformed header"),
    ],
)
def test_an_inconsistent_entry_is_refused(path: Path, second: Any, reason: str) -> None:
    assert reason in refusal(written(path, {"a": ONE, "b": second}, bytes(16)))


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a":' * 100_000,
        b'{"a":1}',
        b'{"\xff":1}',
        b'{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"format":{}}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    ],
)
def test_a_header_that_is_not_json_of_the_right_shape_is_refused(path: Path, header: bytes) -> None:
    assert refusal(written(path, header, bytes(8))).startswith("weights_unreadable")


def test_a_name_that_is_too_long_is_refused(path: Path) -> None:
    header = {"a" * (tensor_file.MAX_NAME_LENGTH + 1): ONE}
    assert "has a name of more than" in refusal(written(path, header, bytes(8)))


def test_one_name_for_two_tensors_is_refused(path: Path) -> None:
    entry = json.dumps(ONE).encode()
    header = b'{"a":' + entry + b',"a":' + entry + b"}"
    assert "appears twice" in refusal(written(path, header, bytes(8)))


def test_a_pickle_is_called_a_pickle_whatever_its_name(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": [1.0] * 100}))
    assert refusal(path).startswith("pickle_refused")
    torch.save({"weights": torch.ones(2)}, path)
    assert refusal(path).startswith("pickle_refused")


def test_a_header_whose_length_looks_like_a_pickle_is_read(path: Path) -> None:
    header = json.dumps({"a": ONE}).encode().ljust(0x280)
    assert "a" in tensor_file.read_header(written(path, header, bytes(8)))


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(path: Path) -> None:
    entry = tensor_file.read_header(written(path, {"a": ONE}, bytes(8)))["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UnreadableArtifact):
        list(tensor_file.chunks(path, entry))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "", "X"]),
        "shape": st.lists(st.integers(-1, 1 << 65) | st.integers(0, 4), max_size=3),
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | JSON,
    }
)
HEADERS = st.dictionaries(st.text(max_size=6), ENTRIES | JSON, max_size=4)
FILES = st.one_of(
    st.binary(max_size=64),
    st.builds(
        lambda head, size: head + struct.pack("<Q", size), st.binary(max_size=4), st.integers(0, 99)
    ),
    st.builds(
        lambda header, data, shift: struct.pack("<Q", max(0, len(header) + shift)) + header + data,
        HEADERS.map(lambda header: json.dumps(header).encode()) | st.binary(max_size=40),
        st.binary(max_size=64),
        st.sampled_from([0, 0, 0, -1, 1, 1 << 40]),
    ),
)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FILES)
def test_any_bytes_are_read_or_refused_and_nothing_else(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        entries = tensor_file.read_header(path)
    except UnreadableArtifact:
        return
    # What we accept, the format's own reader accepts and reads alike.
    try:
        with safe_open(path, framework="pt") as tensors:
            assert entries.keys() == set(tensors.keys())
    except SafetensorError as error:
        raise AssertionError(data) from error
