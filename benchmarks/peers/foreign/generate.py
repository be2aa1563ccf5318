"""transformers' own generate(), with PEFT where there are adapters: a static batch at a time.

    python generate.py MODEL [ADAPTER ...]

Runs in its peer's environment, which knows nothing of the rest of this repository. Says {} once it
is ready, then answers a JSON line with a JSON line: the asks, so many at a time and each batch to
its end before the next one begins, with the seconds from each ask's turn to each of its tokens.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

BASE = "__base__"


class Arrivals(BaseStreamer):
    """When each step of a batch was over; the first thing that streamers get is the prompt."""

    def __init__(self):
        self._started_s = time.perf_counter()
        self._moments_s = []

    def put(self, value):
        self._moments_s.append(time.perf_counter() - self._started_s)

    def end(self):
        pass

    @property
    def arrivals_s(self):
        return self._moments_s[1:]


def load(folder, adapters):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # The length alone ends an answer.
    model.generation_config.eos_token_id = None
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
        for number, path in enumerate(adapters[1:], start=1):
            model.load_adapter(path, adapter_name=str(number))
    return model.eval()


def answer(model, asks, new_tokens):
    prompts = torch.tensor([ask["prompt"] for ask in asks])
    names = [BASE if ask["adapter"] is None else str(ask["adapter"]) for ask in asks]
    who = {"adapter_names": names} if hasattr(model, "peft_config") else {}
    arrivals = Arrivals()
    with torch.inference_mode():
        made = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=arrivals,
            **who,
        )
    return [
        {"arrivals_s": arrivals.arrivals_s, "token_ids": row[prompts.shape[1] :].tolist()}
        for row in made
    ]


def main():
    folder, *adapters = sys.argv[1:]
    model = load(folder, adapters)
    # What libraries print goes to the log.
    answers, sys.stdout = sys.stdout, sys.stderr
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        asks, at_once = question["asks"], question["concurrency"]
        found = []
        for start in range(0, len(asks), at_once):
            found += answer(model, asks[start : start + at_once], question["new_tokens"])
        print(json.dumps({"answers": found}), file=answers, flush=True)


if __name__ == "__main__":
    main()
