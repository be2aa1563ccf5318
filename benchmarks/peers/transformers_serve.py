"""`transformers serve --continuous-batching`. It has no adapters that a request could name."""

import contextlib
import json
from collections.abc import Iterator

from benchmarks.peers.load import HttpRequest, completion
from benchmarks.peers.peer import HttpRunning, free_port, http_server
from benchmarks.peers.scene import Ask, Scene
from benchmarks.peers.transformers_peft import HOME, RECIPE

# Of all memory that is free, for its KV cache; it takes more than half of the machine's by itself.
KV_CACHE_SHARE = 0.1


class TransformersServe:
    name = "transformers-serve"
    title = "transformers serve, continuous batching"
    precision = "fp32"

    def install(self) -> None:
        HOME.install(RECIPE)

    def versions(self) -> dict[str, str]:
        return HOME.versions("transformers", "torch")

    def serves(self, scene: Scene) -> bool:
        return not scene.adapters

    @contextlib.contextmanager
    def start(self, scene: Scene) -> Iterator[HttpRunning]:
        model, port = str(scene.model), free_port()

        def compose(ask: Ask, new_tokens: int) -> HttpRequest:
            # The only way to have no end of text; it knows no prompts of token ids.
            settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": -1}
            return completion(
                model, ask.prompt.text, new_tokens, generation_config=json.dumps(settings)
            )

        command = [str(HOME.folder / "bin" / "transformers"), "serve", model]
        command += ["--continuous-batching", "--device", "cpu", "--dtype", "float32"]
        command += ["--cb-max-memory-percent", str(KV_CACHE_SHARE)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        log = HOME.folder / "serve.log"
        with http_server(command, port, compose, log=log) as running:
            yield running
