"""What PEFT answers, and whether a peer answers that.

    python -m benchmarks.peers.truth QUESTION.json ANSWER.json

An answer follows PEFT's as far as its text has the same tokens. Where it leaves it, PEFT's own
logits say whether that was a tie for arithmetic of the peer's precision: then nobody is wrong. And
it must follow its own adapter's answer further than any other's. Knows nothing of servers.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.peers.scene import Ask, Prompt, Scene, cache_folder, fingerprint

NUM_TOKENS = 24
NUM_LIKELIEST = 5
# How far below PEFT's likeliest token the one that a peer took instead may be, in logits, and what
# share of its answers must be right by that. Rounded weights may lose a close call here and there.
TOLERANCE = {"fp32": (0.02, 1.0)}
ROUNDED_TOLERANCE = (1.0, 0.9)


@dataclass(frozen=True, slots=True)
class Reference:
    """A greedy answer of PEFT's."""

    token_ids: tuple[int, ...]
    # Of each step, the likeliest tokens and their logits, the likeliest first.
    likeliest: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One answer beside PEFT's. At most one of the two is true."""

    num_tokens_followed: int
    # To the last token.
    is_equal: bool
    # It leaves it where PEFT saw a tie.
    is_tie: bool
    # It follows another model's answer to this prompt further, and no tie says why.
    is_of_another: bool

    @property
    def is_right(self) -> bool:
        return (self.is_equal or self.is_tie) and not self.is_of_another


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of asking a peer what PEFT has answered, everybody mixed in one batch.

    Counts are of the adapters' answers, for these are what is measured then; the base model's are
    counted where there are no adapters.
    """

    is_right: bool
    num_answers: int
    num_equal: int
    num_ties: int
    num_of_another: int
    mean_tokens_followed: float
    # The base model's, asked for in the same batch as adapters.
    num_wrong_of_base: int
    why: str


class Truth:
    """PEFT's answers to some prompts, from the base model (None) and each adapter."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        references: Mapping[tuple[int | None, int], Reference],
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._references = references
        adapters = {model for model, _ in references if model is not None}
        self._models: list[int | None] = [None, *sorted(adapters)]
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token for token, each in added if each.special}

    def asks(self) -> list[Ask]:
        """Neighbours in a batch have different adapters."""
        return [Ask(self._prompts[place], model) for model, place in self._keys()]

    def _keys(self) -> list[tuple[int | None, int]]:
        return [(model, place) for place in range(len(self._prompts)) for model in self._models]

    def judge(self, texts: Sequence[str], *, precision: str) -> Verdict:
        """Texts are in the order of the asks."""
        tolerance, share = TOLERANCE.get(precision, ROUNDED_TOLERANCE)
        found = {
            key: self._compare(text, key, tolerance)
            for key, text in zip(self._keys(), texts, strict=True)
        }
        asked = {key: each for key, each in found.items() if key[0] is not None} or found
        wrong = [key for key, each in asked.items() if not each.is_right]
        of_another = sum(each.is_of_another for each in asked.values())
        followed = [each.num_tokens_followed for each in asked.values()]
        return Verdict(
            is_right=len(wrong) <= (1 - share) * len(asked) and of_another == 0,
            num_answers=len(asked),
            num_equal=sum(each.is_equal for each in asked.values()),
            num_ties=sum(each.is_tie for each in asked.values()),
            num_of_another=of_another,
            mean_tokens_followed=round(sum(followed) / len(followed), 2),
            num_wrong_of_base=sum(
                not each.is_right for key, each in found.items() if key not in asked
            ),
            why="; ".join(
                f"adapter {key[0]}, prompt {key[1]}, token {found[key].num_tokens_followed}"
                for key in wrong[:3]
            ),
        )

    def check_distinct(self) -> None:
        """Raises SystemExit where two models answer all prompts alike: nothing tells them apart."""
        places = range(len(self._prompts))
        said = {
            tuple(self._references[model, place].token_ids for place in places)
            for model in self._models
        }
        if len(said) < len(self._models):
            raise SystemExit("some adapters' answers do not differ: make them stronger")

    def _compare(self, text: str, key: tuple[int | None, int], tolerance: float) -> Comparison:
        own = self._references[key]
        length, is_tie = self._follow(text, own, tolerance)
        others = (self._references[model, key[1]] for model in self._models if model != key[0])
        return Comparison(
            num_tokens_followed=length,
            is_equal=length == self._length(own),
            is_tie=is_tie,
            # Behind a tie that was called otherwise, likeness is chance.
            is_of_another=not is_tie
            and any(self._follow(text, other, 0.0)[0] > length for other in others),
        )

    def _follow(self, text: str, reference: Reference, tolerance: float) -> tuple[int, bool]:
        """How many tokens of the reference the text begins with, and whether a tie ends that."""
        ids = reference.token_ids
        whole = self._length(reference)
        length = 0
        while length < whole and text.startswith(self._text(ids[: length + 1])):
            length += 1
        if length == whole:
            return length, False
        (_, most), *others = reference.likeliest[length]
        near = (token for token, logit in others if most - logit <= tolerance)
        return length, any(text.startswith(self._text([*ids[:length], token])) for token in near)

    def _text(self, ids: Sequence[int]) -> str:
        """Without the half of a character that further tokens would complete."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).rstrip("\ufffd")

    def _length(self, reference: Reference) -> int:
        """Up to a special token: what peers do about those differs."""
        for place, token in enumerate(reference.token_ids):
            if token in self._special:
                return place
        return len(reference.token_ids)


# Asking PEFT


def ask_peft(scene: Scene, prompts: Sequence[Prompt]) -> Truth:
    """Once for the same adapters and prompts: the answers are kept. In a process of its own, whose
    threads and memory are gone when somebody else is measured."""
    folder = cache_folder() / "truth"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{fingerprint(scene, prompts)}-{NUM_TOKENS}.json"
    if not kept.exists():
        question = {
            "model": str(scene.model),
            "adapters": [str(path) for path in scene.adapters],
            "prompts": [prompt.token_ids for prompt in prompts],
        }
        asked = kept.with_suffix(".question")
        asked.write_text(json.dumps(question))
        command = [sys.executable, "-m", "benchmarks.peers.truth", str(asked), str(kept)]
        subprocess.run(command, check=True)
    references = {
        (each["model"], each["prompt"]): Reference(
            tuple(each["token_ids"]),
            tuple(tuple((token, logit) for token, logit in step) for step in each["likeliest"]),
        )
        for each in json.loads(kept.read_text())
    }
    tokenizer = Tokenizer.from_file(str(scene.model / "tokenizer.json"))
    truth = Truth(tokenizer, prompts, references)
    truth.check_distinct()
    return truth


def _answers(question: dict[str, Any]) -> list[dict[str, Any]]:
    # Only in the process that asks PEFT.
    import torch

    from benchmarks.peers.foreign.generate import load

    # Answers go on behind an end of text, as everybody's do here.
    model: Any = load(question["model"], question["adapters"])
    prompts = torch.tensor(question["prompts"])
    found = []
    for each in [None, *range(len(question["adapters"]))]:
        if each is None:
            with model.disable_adapter() if question["adapters"] else torch.inference_mode():
                found += _greedy(model, prompts, each)
        else:
            model.set_adapter(str(each))
            found += _greedy(model, prompts, each)
    return found


def _greedy(model: Any, prompts: Any, adapter: int | None) -> list[dict[str, Any]]:
    import torch

    with torch.inference_mode():
        made = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    # [prompts, steps, NUM_LIKELIEST]
    likeliest = torch.stack(made.logits, dim=1).topk(NUM_LIKELIEST)
    return [
        {
            "model": adapter,
            "prompt": row,
            "token_ids": made.sequences[row, prompts.shape[1] :].tolist(),
            "likeliest": [
                list(zip(tokens, logits, strict=True))
                for tokens, logits in zip(
                    likeliest.indices[row].tolist(), likeliest.values[row].tolist(), strict=True
                )
            ],
        }
        for row in range(len(prompts))
    ]


def main() -> None:
    asked, kept = map(Path, sys.argv[1:])
    answers = _answers(json.loads(asked.read_text()))
    # Whole or not at all.
    half = kept.with_suffix(".half")
    half.write_text(json.dumps(answers))
    half.rename(kept)
    asked.unlink()


if __name__ == "__main__":
    main()
