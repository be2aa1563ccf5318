"""Uploads that are broken or meant to harm, each with the answer that it has to get.

A list of cases and nothing else: how they are sent and what is looked at afterwards is in the test.
"""

import gzip
import hashlib
import io
import json
import pickle
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from tests.gateway.admin_plane import BUNDLE, MODULES, adapter_files
from tests.text_bombs import TEMPLATE_BOMBS, TOKENIZER_BOMBS, Bomb

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of the plane that the cases are sent to.
MAX_UPLOAD_BYTES = 40 << 20
FORM = "multipart/form-data; boundary=between"


@dataclass(frozen=True)
class Sent:
    """The body of one request: files and fields of a form, or bytes as they are."""

    files: dict[str, bytes] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    content_type: str | None = None
    body: bytes = b""


@dataclass(frozen=True)
class Case:
    """`codes` are those of the findings, or of the answer itself where it has none."""

    name: str
    build: Callable[[], Sent]
    status: int
    codes: set[str]


def files(**changes: bytes) -> dict[str, bytes]:
    """A good adapter, but for `config` or `weights`."""
    made = adapter_files()
    names = {"config": CONFIG, "weights": WEIGHTS}
    return made | {names[key]: data for key, data in changes.items()}


GOOD = files()
TENSORS = load(GOOD[WEIGHTS])
FIRST = min(TENSORS)


def weights(data: bytes) -> Callable[[], Sent]:
    return lambda: Sent(files(weights=data))


def config(data: bytes) -> Callable[[], Sent]:
    return lambda: Sent(files(config=data))


def fields_of(**changes: Any) -> Callable[[], Sent]:
    return lambda: Sent(adapter_files(**changes))


def tensors(edit: Callable[[dict[str, np.ndarray[Any, Any]]], object]) -> Callable[[], Sent]:
    def build() -> Sent:
        changed = {name: tensor.copy() for name, tensor in TENSORS.items()}
        edit(changed)
        return Sent(files(weights=save(changed)))

    return build


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> Callable[[], Sent]:
    """A safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return weights(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, *, dtype: str = "F32", shape: list[int] | None = None) -> Any:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def tar(members: list[tuple[tarfile.TarInfo, bytes]], *, mode: Any = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def plain(contents: dict[str, bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(tarfile.TarInfo(name), data) for name, data in contents.items()]


def tarred(*more: tuple[str, bytes], mode: Any = "w:gz", name: str = "a.tgz") -> Callable[[], Sent]:
    return lambda: Sent({name: tar([*plain(GOOD), *plain(dict(more))], mode=mode)})


def odd_member(kind: bytes, *, target: str = "/etc/passwd") -> Callable[[], Sent]:
    def build() -> Sent:
        info = tarfile.TarInfo("adapter_config.json.lnk")
        info.type, info.linkname = kind, target
        return Sent({"a.tar": tar([*plain(GOOD), (info, b"")])})

    return build


def zipped(
    contents: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED, mode: int | None = None
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in contents.items():
            info = zipfile.ZipInfo("placeholder")
            # Set afterwards: the constructor would make a hostile name harmless.
            info.filename, info.compress_type = name, method
            if mode is not None:
                info.external_attr = mode << 16
            archive.writestr(info, data)
    return buffer.getvalue()


def zip_with(*more: tuple[str, bytes], **how: Any) -> Callable[[], Sent]:
    return lambda: Sent({"a.zip": zipped({**GOOD, **dict(more)}, **how)})


def spoilt_zip(place: int, value: bytes, *, entry_number: int = 1) -> Callable[[], Sent]:
    """A zip with other bytes at a place of one of its directory's entries."""

    def build() -> Sent:
        data = bytearray(zipped(GOOD))
        begin = -1
        for _ in range(entry_number + 1):
            begin = data.index(b"PK\x01\x02", begin + 1)
        data[begin + place : begin + place + len(value)] = value
        return Sent({"a.zip": bytes(data)})

    return build


def many_files(number: int) -> Callable[[], Sent]:
    return lambda: Sent({"a.zip": zipped({f"{n}.txt": b"" for n in range(number)})})


def zip_bomb() -> Sent:
    return Sent({"a.zip": zipped(files(weights=bytes(36 << 20)))})


def large_zip() -> Sent:
    """One that shrinks well, and not so well that it could be nothing but a bomb."""
    grain = noise(128 * (MAX_UPLOAD_BYTES // 8192 + 1))
    grains = (grain[begin : begin + 128] for begin in range(0, len(grain), 128))
    data = b"".join(each.ljust(8192, b"\0") for each in grains)
    return Sent({"a.zip": zipped(files(weights=data))})


def gzip_bomb() -> Sent:
    return Sent({"a.tgz": gzip.compress(bytes(36 << 20))})


def sparse_tar() -> Sent:
    info = tarfile.TarInfo(WEIGHTS)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": WEIGHTS,
        "GNU.sparse.realsize": str(1 << 40),
    }
    map_of_it = f"1\n{1 << 40}\n0\n".encode().ljust(512, b"\0")
    return Sent({"a.tar": tar([(info, map_of_it)])})


def tar_with_negative_length() -> Sent:
    data = bytearray(tar(plain(GOOD)))
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header = data[:148] + b" " * 8 + data[156:512]
    data[148:156] = f"{sum(header):06o}\0 ".encode()
    return Sent({"a.tar": bytes(data)})


def form(*parts: bytes, end: bytes = b"--between--\r\n") -> Callable[[], Sent]:
    body = b"".join(b"--between\r\n" + part + b"\r\n" for part in parts) + end
    return lambda: Sent(content_type=FORM, body=body)


def part(filename: str, data: bytes = b"{}") -> bytes:
    head = f'content-disposition: form-data; name="f"; filename="{filename}"\r\n\r\n'
    return head.encode() + data


WIDE_MODULES = {name: (inner * 2, outer) for name, (inner, outer) in MODULES.items()}
DEEP = b"[" * 100_000
A, B = FIRST, FIRST.replace("lora_A", "lora_B")
SIZE = len(GOOD[WEIGHTS])
HEADER_END = 8 + struct.unpack("<Q", GOOD[WEIGHTS][:8])[0]
UNREADABLE, NO_CONFIG = {"weights_unreadable"}, {"config_unreadable"}
BAD_ARCHIVE = {"archive_unreadable"}

CASES = [
    # The weights file is no safetensors file, or not whole.
    Case("a pickle as weights", weights(pickle.dumps([1.0] * 50)), 422, {"pickle_refused"}),
    Case("a torch zip as weights", weights(zipped({"data.pkl": b"x"})), 422, {"pickle_refused"}),
    Case("a pickle by name", lambda: Sent({"adapter_model.bin": b"x"}), 400, {"invalid_request"}),
    Case("empty weights", weights(b""), 422, UNREADABLE),
    Case("seven bytes", weights(bytes(7)), 422, UNREADABLE),
    Case("a GGUF file", weights(b"GGUF" + bytes(100)), 422, UNREADABLE),
    Case("cut in the length", weights(GOOD[WEIGHTS][:5]), 422, UNREADABLE),
    Case("cut after the length", weights(GOOD[WEIGHTS][:8]), 422, UNREADABLE),
    Case("cut in the header", weights(GOOD[WEIGHTS][: HEADER_END // 2]), 422, UNREADABLE),
    Case("cut after the header", weights(GOOD[WEIGHTS][:HEADER_END]), 422, UNREADABLE),
    Case("cut in a tensor", weights(GOOD[WEIGHTS][: SIZE - 7]), 422, UNREADABLE),
    Case("a tail", weights(GOOD[WEIGHTS] + b"tail"), 422, UNREADABLE),
    Case("a header beyond the file", raw({}, length=1 << 40), 422, UNREADABLE),
    Case("a header of 2^64 bytes", raw({}, length=2**64 - 1), 422, UNREADABLE),
    Case("a header of no bytes", raw({}, length=0), 422, UNREADABLE),
    Case(
        "a huge header",
        raw({"__metadata__": {"x": "y" * (17 << 20)}}),
        422,
        UNREADABLE,
    ),
    Case("a header that is a list", raw([]), 422, UNREADABLE),
    Case("a header nested deeply", raw(b'{"a":' + DEEP), 422, UNREADABLE),
    Case("a header that is not UTF-8", raw(b'{"\xff":1}'), 422, UNREADABLE),
    Case(
        "a tensor named twice",
        raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
        422,
        UNREADABLE,
    ),
    Case("overlapping tensors", raw({A: entry(0, 8), B: entry(4, 12)}, bytes(12)), 422, UNREADABLE),
    Case("a gap", raw({A: entry(0, 4), B: entry(8, 12)}, bytes(12)), 422, UNREADABLE),
    Case("negative offsets", raw({A: entry(-8, -4)}, bytes(4)), 422, UNREADABLE),
    Case("offsets past the end", raw({A: entry(0, 4000)}, bytes(4)), 422, UNREADABLE),
    Case("offsets backwards", raw({A: entry(8, 4, shape=[1])}, bytes(8)), 422, UNREADABLE),
    Case("an unknown dtype", raw({A: entry(0, 4, dtype="F7")}, bytes(4)), 422, UNREADABLE),
    Case(
        "a shape that overflows",
        raw({A: entry(0, 4, shape=[1 << 62, 1 << 62])}, bytes(4)),
        422,
        UNREADABLE,
    ),
    Case("an unknown field in the header", raw({A: {**entry(0, 4), "x": 1}}), 422, UNREADABLE),
    Case("a name of a megabyte", raw({"x" * (1 << 20): entry(0, 4)}, bytes(4)), 422, UNREADABLE),
    # The tensors are not those of an adapter for this base model.
    Case(
        "another base model",
        fields_of(modules=WIDE_MODULES),
        422,
        {"shape_mismatch"},
    ),
    Case(
        "modules that the base lacks",
        fields_of(modules={"model.layers.7.mlp.up_proj": (16, 16)}),
        422,
        {"unknown_module", "missing_tensors"},
    ),
    Case("NaN", tensors(lambda t: t[A].fill(np.nan)), 422, {"not_finite"}),
    Case("infinity", tensors(lambda t: t[B].fill(np.inf)), 422, {"not_finite"}),
    Case(
        "no effect at all",
        tensors(lambda t: [x.fill(0) for n, x in t.items() if "lora_B" in n]),
        422,
        {"zero_delta"},
    ),
    Case("half of a pair", tensors(lambda t: t.pop(B)), 422, {"missing_pair", "missing_tensors"}),
    Case(
        "a whole module missing", tensors(lambda t: [t.pop(A), t.pop(B)]), 422, {"missing_tensors"}
    ),
    Case(
        "a tensor that nobody uses",
        tensors(lambda t: t.update(extra=np.ones(3, np.float32))),
        422,
        {"unused_tensor"},
    ),
    Case(
        "integers as weights",
        tensors(lambda t: t.update({A: t[A].astype(np.int32)})),
        422,
        {"dtype_not_served"},
    ),
    Case(
        "doubles as weights",
        tensors(lambda t: t.update({A: t[A].astype(np.float64)})),
        422,
        {"dtype_not_served"},
    ),
    Case("too high a rank", fields_of(rank=16), 422, {"rank_too_large"}),
    Case("a rank that was not trained", fields_of(r=3), 422, {"rank_mismatch"}),
    Case("no alpha", fields_of(lora_alpha=0), 422, {"zero_delta"}),
    # The configuration.
    Case("an empty configuration", config(b""), 422, NO_CONFIG),
    Case("a configuration that is no JSON", config(b"{'r': 8}"), 422, NO_CONFIG),
    Case("a configuration that is a list", config(b"[]"), 422, NO_CONFIG),
    Case("a configuration nested deeply", config(b'{"r":' + DEEP), 422, NO_CONFIG),
    Case("a configuration that is not UTF-8", config(b'{"r": "\xff"}'), 422, NO_CONFIG),
    Case("a field twice", config(b'{"peft_type":"LORA","r":2,"r":4}'), 422, NO_CONFIG),
    Case("a pickle as configuration", config(pickle.dumps({})), 422, NO_CONFIG),
    Case("a huge configuration", config(b" " * (5 << 20)), 413, {"request_too_large"}),
    Case("another kind of adapter", fields_of(peft_type="IA3"), 422, {"peft_type_not_served"}),
    Case("a rank of no number", fields_of(r="eight"), 422, {"config_field_invalid"}),
    Case("a negative rank", fields_of(r=-1), 422, {"config_field_invalid"}),
    Case("a rank beyond all numbers", fields_of(r=10**30), 422, {"config_field_invalid"}),
    Case(
        "a pattern that never ends",
        fields_of(target_modules="(a+)+$" * 200, rank_pattern={"(x+x+)+y": 4}),
        422,
        {"not_targeted"},
    ),
    Case("an unserved field", fields_of(alora_invocation_tokens=[1]), 422, {"field_not_served"}),
    # Archives.
    Case("a path out of a tar", tarred(("../evil", b"x")), 422, {"path_refused"}),
    Case("a path out of a zip", zip_with(("../../evil", b"x")), 422, {"path_refused"}),
    Case("an absolute path", tarred(("/etc/evil", b"x")), 422, {"path_refused"}),
    Case("a Windows path", zip_with(("..\\evil", b"x")), 422, {"path_refused"}),
    Case("a drive", zip_with(("C:evil", b"x")), 422, {"path_refused"}),
    Case("a name with a newline", tarred(("a\nb", b"x")), 422, {"path_refused"}),
    Case("a symbolic link", odd_member(tarfile.SYMTYPE), 422, {"file_refused"}),
    Case("a hard link", odd_member(tarfile.LNKTYPE), 422, {"file_refused"}),
    Case("a character device", odd_member(tarfile.CHRTYPE), 422, {"file_refused"}),
    Case("a block device", odd_member(tarfile.BLKTYPE), 422, {"file_refused"}),
    Case("a pipe", odd_member(tarfile.FIFOTYPE), 422, {"file_refused"}),
    Case("a link in a zip", zip_with(mode=stat.S_IFLNK | 0o777), 422, {"file_refused"}),
    Case("a sparse file", sparse_tar, 422, {"file_refused"}),
    Case("a zip bomb", zip_bomb, 422, {"decompression_bomb"}),
    Case("a gzip bomb", gzip_bomb, 422, {"decompression_bomb"}),
    Case("a zip that grows too large", large_zip, 413, {"request_too_large"}),
    Case("an archive in an archive", tarred(("a.zip", zipped(GOOD))), 422, {"nested_archive"}),
    Case("too many files", many_files(5000), 422, {"too_many_files"}),
    Case("a huge directory", many_files(20_000), 422, BAD_ARCHIVE),
    Case("files that overlap", spoilt_zip(42, bytes(4)), 422, BAD_ARCHIVE),
    Case("a file longer than told", spoilt_zip(24, struct.pack("<I", 9)), 422, BAD_ARCHIVE),
    Case("a file shorter than told", spoilt_zip(24, struct.pack("<I", SIZE + 9)), 422, BAD_ARCHIVE),
    Case("a zip64 that lies", spoilt_zip(20, b"\xff" * 8), 422, BAD_ARCHIVE),
    Case("an encrypted zip", spoilt_zip(8, b"\1"), 422, {"file_refused"}),
    Case("a wrong checksum", spoilt_zip(16, b"\0\0\0\0"), 422, BAD_ARCHIVE),
    Case("bzip2 in a zip", zip_with(method=zipfile.ZIP_BZIP2), 422, {"file_refused"}),
    Case(
        "garbage behind gzip",
        lambda: Sent({"a.tgz": tar(plain(GOOD), mode="w:gz") + b"garbage"}),
        422,
        BAD_ARCHIVE,
    ),
    Case("a tar cut short", lambda: Sent({"a.tar": tar(plain(GOOD))[:3000]}), 422, BAD_ARCHIVE),
    Case(
        "a gzip cut short",
        lambda: Sent({"a.tgz": tar(plain(GOOD), mode="w:gz")[:-20]}),
        422,
        BAD_ARCHIVE,
    ),
    Case("a zip cut short", lambda: Sent({"a.zip": zipped(GOOD)[:-30]}), 422, BAD_ARCHIVE),
    Case("a tar of negative length", tar_with_negative_length, 422, {"missing_file"}),
    Case("an empty archive", lambda: Sent({"a.tar": tar([])}), 422, {"missing_file"}),
    Case("an archive of no bytes", lambda: Sent({"a.tgz": b""}), 422, BAD_ARCHIVE),
    Case("random bytes as zip", lambda: Sent({"a.zip": b"\x07" * 999}), 422, BAD_ARCHIVE),
    Case(
        "two adapters",
        lambda: Sent({"a.zip": zipped({f"{x}/{n}": d for x in "ab" for n, d in GOOD.items()})}),
        422,
        {"several_adapters"},
    ),
    Case("twins but for case", zip_with((CONFIG.upper(), b"{}")), 422, {"duplicate_file"}),
    Case("a file twice", lambda: Sent({"a.tar": tar(plain(GOOD) * 2)}), 422, {"duplicate_file"}),
    Case("a pickle beside", tarred(("adapter_model.bin", b"x")), 422, {"pickle_refused"}),
    Case("a file that nobody knows", tarred(("run.sh", b"rm -rf /")), 422, {"unexpected_file"}),
    Case(
        "a pickle called safetensors in a tar",
        lambda: Sent({"a.tar": tar(plain(files(weights=pickle.dumps([1] * 99))))}),
        422,
        {"pickle_refused"},
    ),
    Case(
        "a tokenizer without end",
        lambda: Sent({"a.tgz": tar(plain({**GOOD, "added_tokens.json": noise(5 << 20)}))}),
        422,
        {"file_too_large"},
    ),
    # The request around the files.
    Case("a wrong sha256", lambda: Sent(GOOD, {"sha256": "0" * 64}), 422, {"sha256_mismatch"}),
    Case("a sha256 that is none", lambda: Sent(GOOD, {"sha256": "x"}), 400, {"invalid_request"}),
    Case("an unknown field", lambda: Sent(GOOD, {"alias": "prod"}), 400, {"invalid_request"}),
    Case("an unknown base", lambda: Sent(GOOD, {"base_model": "gpt"}), 400, {"invalid_request"}),
    Case("a field of 5 kB", lambda: Sent(GOOD, {"sha256": "0" * 5000}), 400, {"invalid_request"}),
    Case("an unknown file", lambda: Sent({**GOOD, "x.txt": b""}), 400, {"invalid_request"}),
    Case("a path as a name", lambda: Sent({f"../{CONFIG}": b"{}"}), 400, {"invalid_request"}),
    Case("no weights", lambda: Sent({CONFIG: b"{}"}), 400, {"invalid_request"}),
    Case("no configuration", lambda: Sent({WEIGHTS: b""}), 400, {"invalid_request"}),
    Case(
        "an archive beside files",
        lambda: Sent({**GOOD, "a.zip": zipped(GOOD)}),
        400,
        {"invalid_request"},
    ),
    Case("a part twice", form(part(CONFIG), part(CONFIG)), 400, {"invalid_request"}),
    Case("twenty parts", form(*(part("x") for _ in range(20))), 400, {"invalid_request"}),
    Case("a form that never ends", form(part(CONFIG), end=b""), 400, {"invalid_request"}),
    Case(
        "another boundary",
        lambda: Sent(content_type=FORM, body=b"--other\r\n\r\n--other--\r\n"),
        400,
        {"invalid_request"},
    ),
    Case(
        "no boundary",
        lambda: Sent(content_type="multipart/form-data", body=b"--x--\r\n"),
        400,
        {"invalid_request"},
    ),
    Case(
        "JSON instead",
        lambda: Sent(content_type="application/json", body=b"{}"),
        400,
        {"invalid_request"},
    ),
    Case("no body", lambda: Sent(content_type=FORM), 400, {"invalid_request"}),
    Case("a part head of a megabyte", form(b"x: " + b"y" * (1 << 20)), 400, {"invalid_request"}),
    Case(
        "a body over the limit",
        lambda: Sent(content_type=FORM, body=bytes(MAX_UPLOAD_BYTES + (1 << 20))),
        413,
        {"request_too_large"},
    ),
]


def noise(size: int) -> bytes:
    """Bytes that do not shrink."""
    return b"".join(
        hashlib.sha256(str(number).encode()).digest() for number in range(size // 32 + 1)
    )


# What else is wrong with some bombs, once one looks.
MORE_CODES = {
    "include": {"template_fails"},
    "import": {"template_fails"},
    "extends": {"template_fails"},
    "another vocabulary": {"token_id_shared", "token_id_taken"},
    "id gap": {"token_without_row"},
    "id taken": {"token_id_shared"},
    "id shared": {"token_id_gap", "token_without_row"},
    "no row": {"token_id_gap"},
}


def bombs(kind: str, made: list[Bomb]) -> list[Case]:
    """Beside a good adapter's files, each."""

    def case(bomb: Bomb) -> Case:
        name = f"{kind}: {bomb.name}"
        if bomb.name == "100 MB":
            status, codes = 413, {"request_too_large"}
        else:
            status, codes = 422, {bomb.code, *MORE_CODES.get(bomb.name, ())}
        return Case(name, lambda: Sent({**GOOD, **bomb.files(BUNDLE)}), status, codes)

    return [case(bomb) for bomb in made]


TEMPLATE_CASES = bombs("template", TEMPLATE_BOMBS)
TOKENIZER_CASES = bombs("tokenizer", TOKENIZER_BOMBS)
