"""OpenVINO GenAI's continuous batching, with the adapter that each request names.

    python openvino_batches.py MODEL_IR MAX_SEQUENCES [ADAPTER ...]

Runs in its peer's environment, which knows nothing of the rest of this repository. Says {} once it
is ready, then answers a JSON line with a JSON line: the asks, so many at a time, with the seconds
from each ask's turn to each of its tokens.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai

CACHE_GB = 2


class Request:
    def __init__(self, pipeline, number, ask, adapters, new_tokens):
        config = genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        if adapters:
            own = [] if ask["adapter"] is None else [adapters[ask["adapter"]]]
            config.adapters = genai.AdapterConfig(own)
        prompt = openvino.Tensor(np.array([ask["prompt"]], dtype=np.int64))
        self._started_s = time.perf_counter()
        self._handle = pipeline.add_request(number, prompt, config)
        self.token_ids = []
        self.arrivals_s = []

    def look(self):
        """Take what the last step has made."""
        while self._handle.can_read():
            for output in self._handle.read().values():
                self.token_ids += output.generated_ids
                self.arrivals_s += [time.perf_counter() - self._started_s] * len(
                    output.generated_ids
                )


def read_adapter(folder):
    """With its scaling, which the file of weights does not tell."""
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = genai.Adapter(folder / "adapter_model.safetensors")
    return adapter, config["lora_alpha"] / config["r"]


def open_pipeline(folder, max_sequences, adapters):
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = max_sequences
    properties = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    if adapters:
        properties["adapters"] = genai.AdapterConfig(adapters)
    return genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)


def answer(pipeline, adapters, question):
    waiting = list(enumerate(question["asks"]))[::-1]
    found, running = {}, {}
    while waiting or running:
        while waiting and len(running) < question["concurrency"]:
            number, ask = waiting.pop()
            running[number] = Request(pipeline, number, ask, adapters, question["new_tokens"])
        pipeline.step()
        for number, request in list(running.items()):
            request.look()
            if len(request.token_ids) >= question["new_tokens"]:
                found[number] = running.pop(number)
    return [
        {"arrivals_s": found[number].arrivals_s, "token_ids": found[number].token_ids}
        for number in range(len(found))
    ]


def main():
    folder, max_sequences, *paths = sys.argv[1:]
    adapters = [read_adapter(Path(path)) for path in paths]
    pipeline = open_pipeline(folder, int(max_sequences), adapters)
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps({"answers": answer(pipeline, adapters, json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
