"""An archive gives an adapter's files, or nothing."""

import io
import pickle
import random
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.archive import Unpacked, unpack
from adapters.errors import ArchiveRefused, TooLarge

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXAMPLES = "examples.jsonl"
WEIGHTS_BYTES = (64).to_bytes(8, "little") + b"{" + bytes(5000)
GOOD = {CONFIG: b"{}", WEIGHTS: WEIGHTS_BYTES}
Pack = Callable[[Path, list[tuple[str, bytes]]], None]


def pack_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pack_tar_gz(path: Path, files: list[tuple[str, bytes]]) -> None:
    pack_tar(path, files, "w:gz")


def pack_zip(path: Path, files: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            info = zipfile.ZipInfo("placeholder")
            # Set afterwards: the constructor would make a hostile name harmless.
            info.filename = name
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)


@pytest.fixture(params=[pack_tar, pack_tar_gz, pack_zip])
def pack(request: pytest.FixtureRequest) -> Pack:
    return request.param


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "upload"


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


def unpacked(archive: Path, into: Path, *, max_total_bytes: int = 1 << 20) -> Unpacked:
    return unpack(archive, into, max_total_bytes=max_total_bytes, max_files=10)


def refusals(archive: Path, into: Path) -> set[str]:
    with pytest.raises(ArchiveRefused) as caught:
        unpacked(archive, into)
    assert list(into.iterdir()) == [], "nothing is left behind"
    assert all(f.where and f.message and f.fix for f in caught.value.findings)
    return {f.code for f in caught.value.findings}


@pytest.mark.parametrize("top", ["", "adapter/", "./", "./adapter/"])
def test_an_adapter_is_unpacked_from_the_top_or_from_one_folder(
    pack: Pack, archive: Path, into: Path, top: str
) -> None:
    pack(archive, [(top + name, data) for name, data in GOOD.items()])
    result = unpacked(archive, into)
    assert (result.findings, result.ignored_files) == ([], [])
    assert {name: path.read_bytes() for name, path in result.files.items()} == GOOD


def test_a_tokenizer_and_examples_are_taken_along(pack: Pack, archive: Path, into: Path) -> None:
    others = {name: name.encode() for name in ("tokenizer.json", "chat_template.jinja", EXAMPLES)}
    pack(archive, list({**GOOD, **others}.items()))
    result = unpacked(archive, into)
    assert {name: path.read_bytes() for name, path in result.files.items()} == {**GOOD, **others}


def test_a_folder_as_a_trainer_leaves_it_is_an_adapter(
    pack: Pack, archive: Path, into: Path
) -> None:
    left = ["README.md", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "merges.txt"]
    folder = {**GOOD, "tokenizer.json": b"{}", **dict.fromkeys(left, b"left")}
    deeper = {
        "checkpoint-5/adapter_model.safetensors": b"old",
        "checkpoint-5/adapter_config.json": b"old",
        "checkpoint-5/global_step5/mp_rank_00_model_states.pt": b"pickle",
        "runs/Nov1/events.out.tfevents.1": b"",
    }
    files = [(f"out/{name}", data) for name, data in {**deeper, **folder}.items()]
    pack(archive, [*files, ("__MACOSX/._adapter_config.json", b"mac")])
    result = unpack(archive, into, max_total_bytes=1 << 20, max_files=20)
    assert result.findings == []
    assert result.ignored_files == [*sorted(left), "checkpoint-5/", "runs/", "__MACOSX/"]
    assert {path.name: path.read_bytes() for path in into.iterdir()} == {
        **GOOD,
        "tokenizer.json": b"{}",
    }


def test_what_nobody_knows_is_told_and_never_unpacked(
    pack: Pack, archive: Path, into: Path
) -> None:
    pack(archive, [*GOOD.items(), ("notes.txt", b"x"), ("tokenizer.model", b"x")])
    findings = unpacked(archive, into).findings
    assert {(f.code, f.where) for f in findings} == {
        ("unexpected_file", "notes.txt"),
        ("file_not_served", "tokenizer.model"),
    }
    assert {path.name for path in into.iterdir()} == {CONFIG, WEIGHTS}


def test_two_adapters_in_one_archive_are_refused(pack: Pack, archive: Path, into: Path) -> None:
    pack(archive, [(f"{top}/{name}", data) for top in "ab" for name, data in GOOD.items()])
    assert refusals(archive, into) == {"several_adapters"}


def test_an_archive_in_an_archive_is_refused(pack: Pack, archive: Path, into: Path) -> None:
    pack(archive, [*GOOD.items(), ("deeper/inner.tar.gz", b"x")])
    assert refusals(archive, into) == {"nested_archive"}


def test_a_tokenizer_that_is_too_large_is_refused(pack: Pack, archive: Path, into: Path) -> None:
    large = random.Random(1).randbytes((1 << 20) + 1)
    pack(archive, [*GOOD.items(), ("chat_template.jinja", large)])
    with pytest.raises(ArchiveRefused) as caught:
        unpacked(archive, into, max_total_bytes=8 << 20)
    assert [(f.code, f.where) for f in caught.value.findings] == [
        ("file_too_large", "chat_template.jinja")
    ]
    assert list(into.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "/etc/evil.json",
        "adapter/../../evil.json",
        "..\\evil.json",
        "C:evil.json",
        "evil\n.json",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(
    pack: Pack, archive: Path, into: Path, name: str
) -> None:
    pack(archive, [*GOOD.items(), (name, b"x")])
    assert refusals(archive, into) == {"path_refused"}
    assert not (into.parent / "evil.json").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_a_link_or_device_in_a_tar_is_refused(archive: Path, into: Path, kind: bytes) -> None:
    info = tarfile.TarInfo(WEIGHTS)
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(info)
    assert refusals(archive, into) == {"file_refused"}


def test_a_link_in_a_zip_is_refused(archive: Path, into: Path) -> None:
    info = zipfile.ZipInfo(WEIGHTS)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr(info, "/etc/passwd")
    assert refusals(archive, into) == {"file_refused"}


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_in_an_unusual_compression_is_refused(archive: Path, into: Path, method: int) -> None:
    with zipfile.ZipFile(archive, "w", method) as packed:
        packed.writestr(WEIGHTS, b"x")
    assert refusals(archive, into) == {"file_refused"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("twin", [WEIGHTS, WEIGHTS.upper()])
def test_a_name_that_comes_twice_is_refused(
    pack: Pack, archive: Path, into: Path, twin: str
) -> None:
    pack(archive, [*GOOD.items(), (twin, b"other")])
    assert refusals(archive, into) == {"duplicate_file"}


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.PT", "a.pth", "a.pkl", "a.ckpt"])
def test_a_pickle_is_refused_by_its_name(pack: Pack, archive: Path, into: Path, name: str) -> None:
    pack(archive, [*GOOD.items(), (name, b"x")])
    assert refusals(archive, into) == {"pickle_refused"}


def test_a_pickle_is_refused_by_its_content(pack: Pack, archive: Path, into: Path) -> None:
    pack(archive, [(CONFIG, b"{}"), (WEIGHTS, pickle.dumps([1.0] * 100))])
    assert refusals(archive, into) == {"pickle_refused"}


def test_an_archive_without_one_of_the_two_files_is_refused(
    pack: Pack, archive: Path, into: Path
) -> None:
    pack(archive, [(CONFIG, b"{}")])
    assert refusals(archive, into) == {"missing_file"}


def test_too_many_files_are_refused(pack: Pack, archive: Path, into: Path) -> None:
    pack(archive, [*GOOD.items(), *((f"{number}.txt", b"") for number in range(9))])
    assert refusals(archive, into) == {"too_many_files"}


def test_everything_that_is_wrong_is_told_at_once(pack: Pack, archive: Path, into: Path) -> None:
    pack(archive, [("../x", b""), ("a.zip", b"")])
    assert refusals(archive, into) == {"path_refused", "nested_archive"}
    pack(archive, [(CONFIG, b"{}"), (CONFIG.upper(), b"{}"), ("a.bin", b"")])
    assert refusals(archive, into) == {"duplicate_file", "missing_file", "pickle_refused"}


def test_a_bomb_is_stopped_when_its_bytes_pass_the_limit(
    pack: Pack, archive: Path, into: Path
) -> None:
    pack(archive, [(CONFIG, b"{}"), (WEIGHTS, bytes(8 << 20))])
    with pytest.raises(TooLarge) as caught:
        unpacked(archive, into)
    assert caught.value.limit_bytes == 1 << 20
    assert list(into.iterdir()) == []


@pytest.mark.parametrize("pack", [pack_tar_gz, pack_zip])
def test_what_grows_beyond_all_reason_is_a_bomb_even_under_the_limit(
    pack: Pack, archive: Path, into: Path
) -> None:
    pack(archive, [(CONFIG, b"{}"), (WEIGHTS, (64).to_bytes(8, "little") + b"{" + bytes(32 << 20))])
    with pytest.raises(ArchiveRefused) as caught:
        unpacked(archive, into, max_total_bytes=1 << 30)
    assert [f.code for f in caught.value.findings] == ["decompression_bomb"]
    assert list(into.iterdir()) == []


def test_a_zip_whose_files_share_their_bytes_is_refused(archive: Path, into: Path) -> None:
    pack_zip(archive, list(GOOD.items()))
    data = bytearray(archive.read_bytes())
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    # Where the entry's local header lies: both at the first one's.
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    archive.write_bytes(data)
    assert refusals(archive, into) == {"archive_unreadable"}


def test_a_zip_that_lies_about_a_length_is_refused(archive: Path, into: Path) -> None:
    pack_zip(archive, list(GOOD.items()))
    data = bytearray(archive.read_bytes())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    data[entry + 24 : entry + 28] = (len(WEIGHTS_BYTES) + 1).to_bytes(4, "little")
    archive.write_bytes(data)
    assert refusals(archive, into) == {"archive_unreadable"}


def test_a_sparse_tar_is_refused(archive: Path, into: Path) -> None:
    info = tarfile.TarInfo(WEIGHTS)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": WEIGHTS,
        "GNU.sparse.realsize": str(1 << 40),
    }
    info.size = 512
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(f"1\n{1 << 40}\n0\n".encode().ljust(512, b"\0")))
    assert refusals(archive, into) == {"file_refused"}


def test_garbage_behind_a_gzip_stream_is_refused(archive: Path, into: Path) -> None:
    pack_tar_gz(archive, list(GOOD.items()))
    archive.write_bytes(archive.read_bytes() + b"garbage")
    assert refusals(archive, into) == {"archive_unreadable"}


def test_a_tar_with_a_negative_length_ends(archive: Path, into: Path) -> None:
    pack_tar(archive, list(GOOD.items()))
    data = bytearray(archive.read_bytes())
    # Base 256, as GNU tar writes what has no room in octal.
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header = data[:148] + b" " * 8 + data[156:512]
    data[148:156] = f"{sum(header):06o}\0 ".encode()
    archive.write_bytes(data)
    assert refusals(archive, into) <= {"archive_unreadable", "too_many_files", "missing_file"}


def test_the_limit_counts_both_files(pack: Pack, archive: Path, into: Path) -> None:
    pack(archive, list(GOOD.items()))
    size_bytes = sum(map(len, GOOD.values()))
    unpacked(archive, into, max_total_bytes=size_bytes)
    with pytest.raises(TooLarge):
        unpacked(archive, into, max_total_bytes=size_bytes - 1)


def test_a_directory_that_is_itself_a_bomb_is_refused(archive: Path, into: Path) -> None:
    with zipfile.ZipFile(archive, "w") as packed:
        for number in range(20_000):
            packed.writestr(f"{number:060d}", b"")
    assert refusals(archive, into) == {"archive_unreadable"}

    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(WEIGHTS)
        info.pax_headers = {"comment": "x" * (2 << 20)}
        tar.addfile(info)
    assert refusals(archive, into) == {"archive_unreadable"}


def test_an_encrypted_zip_is_refused(archive: Path, into: Path) -> None:
    pack_zip(archive, list(GOOD.items()))
    data = bytearray(archive.read_bytes())
    # The lowest flag bit, in the first entry of the central directory.
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    assert refusals(archive, into) == {"file_refused"}


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x1f\x8b", b"x" * 2000, bytes(2000)])
def test_what_is_no_archive_is_refused(archive: Path, into: Path, data: bytes) -> None:
    archive.write_bytes(data)
    assert refusals(archive, into) <= {"archive_unreadable", "missing_file"}


def test_a_truncated_archive_is_refused(pack: Pack, archive: Path, into: Path) -> None:
    pack(archive, list(GOOD.items()))
    archive.write_bytes(
        archive.read_bytes()[:-1500] if pack is pack_tar else archive.read_bytes()[:60]
    )
    if pack is pack_tar:
        archive.write_bytes(archive.read_bytes()[:3000])
    assert refusals(archive, into) == {"archive_unreadable"}


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spoilt=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6))
def test_a_spoilt_archive_is_unpacked_or_refused_and_nothing_else(
    pack: Pack, archive: Path, into: Path, spoilt: list[tuple[int, int]]
) -> None:
    pack(archive, list(GOOD.items()))
    data = bytearray(archive.read_bytes())
    for place, value in spoilt:
        data[place % len(data)] = value
    archive.write_bytes(data)
    try:
        unpacked(archive, into)
    except (ArchiveRefused, TooLarge):
        assert list(into.iterdir()) == []
        return
    for path in into.iterdir():
        path.unlink()
