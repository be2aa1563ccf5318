"""transformers' generate() with PEFT, in process: a static batch, mixed by `adapter_names`."""

import contextlib
from collections.abc import Iterator

from benchmarks.peers.peer import FOREIGN, Home, PipeRunning, program
from benchmarks.peers.scene import Scene

# torch by itself and first: the build without CUDA that this machine's pip offers.
RECIPE = [["torch==2.13.0"], ["transformers[serving]==5.23.0", "peft==0.21.2", "accelerate"]]
HOME = Home("transformers")


class Generate:
    name = "generate"
    title = "transformers generate + PEFT, in process"
    precision = "fp32"

    def install(self) -> None:
        HOME.install(RECIPE)

    def versions(self) -> dict[str, str]:
        return HOME.versions("transformers", "peft", "torch")

    def serves(self, scene: Scene) -> bool:
        return True

    @contextlib.contextmanager
    def start(self, scene: Scene) -> Iterator[PipeRunning]:
        command = [str(HOME.python), str(FOREIGN / "generate.py"), str(scene.model)]
        command += map(str, scene.adapters)
        with program(command, scene.model, log=HOME.folder / "generate.log") as running:
            yield running
