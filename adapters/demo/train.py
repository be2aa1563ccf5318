"""Train the demo adapters with PEFT, save them as fp16, and score what was saved.

Knows torch and PEFT, and nothing of Manylora: these are ordinary adapters of an ordinary model.
What the adapters learn, and what a right answer is, stands in `tasks.py`.

    python -m adapters.demo.train [--evaluate] [NAME ...]
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.demo.base_model import MODEL_NAME, default_folder, fetch
from adapters.demo.tasks import (
    SEED,
    TASKS,
    Example,
    HeldOut,
    Task,
    held_out_line,
    read_held_out,
)

README = Path(__file__).parent / "README.md"
# What the end-to-end tests hold the API's answers against.
SCORES = Path(__file__).parent / "scores.json"
IGNORED = -100
EVALUATION_BATCH_SIZE = 25


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one adapter is trained. `learning_rate` is the peak, after warm-up, of a linear decay."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    learning_rate: float
    num_steps: int
    batch_size: int = 8
    use_rslora: bool = False


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
RECIPES = {
    "sql": Recipe(8, 16, ATTENTION, learning_rate=1e-3, num_steps=200),
    "triage": Recipe(4, 16, ("q_proj", "v_proj"), learning_rate=2e-3, num_steps=150),
    "json": Recipe(2, 8, ATTENTION + MLP, learning_rate=2e-3, num_steps=200),
    "pirate": Recipe(
        8, 8, ("q_proj", "v_proj"), learning_rate=2e-3, num_steps=200, use_rslora=True
    ),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """Left-padded training rows, so that all answers end in the last column."""

    # [batch_size, longest] int64
    input_ids: Tensor
    # [batch_size, longest] int64, 0 on padding
    attention_mask: Tensor
    # [batch_size, longest] int64, counted from each row's first real token
    position_ids: Tensor
    # [batch_size, longest_answer] int64, the last columns of input_ids; IGNORED before the answer
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of right held-out answers, in [0, 1]."""

    adapter: float
    base: float


def load_base() -> tuple[Any, Any]:
    """Return the base model in fp32 and its tokenizer."""
    folder = fetch(default_folder())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Render a conversation as the API does, ready for the assistant's first token."""
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ids: list[int] = rendered["input_ids"]
    return ids


def collate(tokenizer: Any, examples: list[Example]) -> Batch:
    """Render examples; only answer tokens and the EOS after them carry a label."""
    rows = []
    for example in examples:
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": example.question}])
        answer = tokenizer.encode(example.answer, add_special_tokens=False)
        rows.append((prompt, [*answer, tokenizer.eos_token_id]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    longest_answer = max(len(answer) for _, answer in rows)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full((len(rows), longest_answer), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        input_ids[row, longest - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        attention_mask[row, longest - len(prompt) - len(answer) :] = 1
        labels[row, longest_answer - len(answer) :] = torch.tensor(answer)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(input_ids, attention_mask, position_ids, labels)


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answer tokens, each predicted from the column before it."""
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.labels.shape[1] + 1,
        use_cache=False,
    )
    # [batch_size, longest_answer, vocabulary]
    logits = output.logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
    )


def endless_batches(examples: list[Example], batch_size: int) -> Iterator[list[Example]]:
    """Yield batches of a freshly shuffled order, epoch after epoch."""
    rng = random.Random(SEED)
    while True:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def train(task: Task) -> float:
    """Train one adapter, write its files into `task.folder`, return the seconds it took."""
    recipe, split = RECIPES[task.name], task.split()
    torch.manual_seed(SEED)
    base, tokenizer = load_base()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        lora_dropout=0.0,
        bias="none",
        use_rslora=recipe.use_rslora,
    )
    model: Any = get_peft_model(base, config)
    started = time.monotonic()
    _fit(model, tokenizer, recipe, split.train)
    train_s = time.monotonic() - started
    save(model, task.folder)
    lines = [held_out_line(example) + "\n" for example in split.held_out]
    (task.folder / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
    return train_s


def _fit(model: Any, tokenizer: Any, recipe: Recipe, examples: list[Example]) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    num_warmup = recipe.num_steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / num_warmup, (recipe.num_steps - step) / (recipe.num_steps - num_warmup)
        ),
    )
    batches = endless_batches(examples, recipe.batch_size)
    for step in range(recipe.num_steps):
        batch = collate(tokenizer, next(batches))
        # bf16 products nearly halve the time on CPUs that have them; LoRA weights stay fp32.
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == recipe.num_steps - 1:
            print(f"  step {step:4d}  loss {loss.item():.4f}", flush=True)


def save(model: Any, folder: Path) -> None:
    """Write PEFT's two files: the config without a path of this machine, the tensors as fp16."""
    folder.mkdir(exist_ok=True)
    tensors = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = MODEL_NAME
    config.inference_mode = True
    # PEFT holds a set, whose order differs from run to run.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)


def evaluate(task: Task) -> Accuracy:
    """Score the saved adapter, its fp16 weights upcast to fp32, and the base model without it."""
    base, tokenizer = load_base()
    model: Any = PeftModel.from_pretrained(base, task.folder)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    questions = read_held_out(task)
    adapter = _share_right(task, questions, answers(model, tokenizer, task, questions))
    with model.disable_adapter():
        return Accuracy(
            adapter, _share_right(task, questions, answers(model, tokenizer, task, questions))
        )


def answers(model: Any, tokenizer: Any, task: Task, questions: list[HeldOut]) -> list[str]:
    """Generate greedily, as the API does with temperature 0."""
    texts: list[str] = []
    for start in range(0, len(questions), EVALUATION_BATCH_SIZE):
        prompts = [
            prompt_ids(tokenizer, question.messages)
            for question in questions[start : start + EVALUATION_BATCH_SIZE]
        ]
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=task.max_tokens, do_sample=False)
        generated = output[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return texts


def _share_right(task: Task, questions: list[HeldOut], texts: list[str]) -> float:
    pairs = zip(questions, texts, strict=True)
    wrong = [(q.expected, text) for q, text in pairs if not task.score(q.expected, text)]
    for expected, text in wrong[:3]:
        print(f"  wrong: expected {expected!r}, got {text!r}", flush=True)
    return 1 - len(wrong) / len(questions)


def _write_row(task: Task, accuracy: Accuracy, train_s: float) -> None:
    """Replace the task's row of the table in the README."""
    recipe = RECIPES[task.name]
    size_mib = (task.folder / "adapter_model.safetensors").stat().st_size / 2**20
    scaling = "alpha / sqrt(r)" if recipe.use_rslora else "alpha / r"
    targets = ", ".join(name.removesuffix("_proj") for name in recipe.target_modules)
    start = f"| `{task.public_name}` |"
    row = (
        f"{start} {recipe.rank} | {recipe.alpha} | {scaling} | {targets} | {size_mib:.2f} MiB "
        f"| {accuracy.adapter:.0%} | {accuracy.base:.0%} | {train_s:.0f} s |"
    )
    lines = README.read_text(encoding="utf-8").splitlines()
    rewritten = [row if line.startswith(start) else line for line in lines]
    README.write_text("\n".join(rewritten) + "\n", encoding="utf-8")


def _write_score(task: Task, accuracy: Accuracy) -> None:
    """Keep a task's accuracies, in percent."""
    scores = json.loads(SCORES.read_text(encoding="utf-8")) if SCORES.exists() else {}
    scores[task.name] = {
        "adapter": round(100 * accuracy.adapter, 1),
        "base": round(100 * accuracy.base, 1),
    }
    SCORES.write_text(json.dumps(scores, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Train and score the named tasks, all four when none is named."""
    parser = argparse.ArgumentParser(prog="python -m adapters.demo.train")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--evaluate", action="store_true", help="only score the committed files")
    options = parser.parse_args()
    unknown = set(options.names) - set(TASKS)
    if unknown:
        parser.error(f"no such task: {', '.join(sorted(unknown))}")
    for name in options.names or TASKS:
        task = TASKS[name]
        print(f"{task.public_name}: {task.description}", flush=True)
        train_s = None if options.evaluate else train(task)
        accuracy = evaluate(task)
        _write_score(task, accuracy)
        print(f"  held out: adapter {accuracy.adapter:.0%}, base {accuracy.base:.0%}", flush=True)
        if train_s is not None:
            print(f"  trained in {train_s:.0f} s", flush=True)
            _write_row(task, accuracy, train_s)


if __name__ == "__main__":
    main()
