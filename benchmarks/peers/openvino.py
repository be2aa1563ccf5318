"""OpenVINO GenAI's continuous batching, in process: it has no server of its own."""

import contextlib
from collections.abc import Iterator

from benchmarks.peers.peer import FOREIGN, Home, PipeRunning, program
from benchmarks.peers.scene import Scene

# What the exporter lists for pictures would bring another torch along.
RECIPE = [
    ["torch==2.13.0"],
    ["--no-deps", "optimum-intel==2.2.0", "optimum==2.3.0", "nncf==3.4.0"],
    ["openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"],
    ["transformers==5.5.4", "scipy", "scikit-learn", "tabulate", "ninja", "pydot", "psutil"],
    ["rich", "requests", "cloudpickle", "natsort", "jsonschema", "networkx"],
]
HOME = Home("openvino")
MAX_SEQUENCES = 32


class OpenVino:
    name = "openvino"
    title = "OpenVINO GenAI, in process"
    precision = "fp32"

    def install(self) -> None:
        HOME.install(RECIPE)

    def versions(self) -> dict[str, str]:
        return HOME.versions("openvino-genai", "openvino", "optimum-intel")

    def serves(self, scene: Scene) -> bool:
        return True

    @contextlib.contextmanager
    def start(self, scene: Scene) -> Iterator[PipeRunning]:
        exported = HOME.folder / "model"
        if not exported.exists():
            half = HOME.folder / "model.half"
            script = str(FOREIGN / "openvino_export.py")
            HOME.run(str(HOME.python), script, str(scene.model), str(half))
            half.rename(exported)
        command = [str(HOME.python), str(FOREIGN / "openvino_batches.py")]
        command += [str(exported), str(MAX_SEQUENCES), *map(str, scene.adapters)]
        with program(command, scene.model, log=HOME.folder / "batches.log") as running:
            yield running
