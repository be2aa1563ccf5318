"""Rule out the tokens that a row's grammar does not allow.

Masks are computed on the host, by several threads where there are many, once a step. Knows
sequences and logits. Knows nothing of what a grammar says.
"""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Self

import numpy as np
import torch
from torch import Tensor

from engine.errors import SequenceError
from engine.grammar import GrammarWalk
from engine.sequence import Sequence

# Rows that a thread takes at least: handing them over costs as much as two of their masks.
MIN_ROWS_OF_A_THREAD = 8
MAX_THREADS = 8

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
# Row within the batch, and why it has no mask.
Fault = tuple[int, SequenceError]

# [256, 8] float32: of the bits of each byte, the lowest first, the most that a logit may be. The
# least of two is taken 5 times as fast as a mask is filled.
_LIMITS = torch.where(
    torch.arange(256)[:, None].bitwise_and(2 ** torch.arange(8)) > 0, math.inf, -math.inf
)


class Masks:
    """Of those of some sequences that have a grammar, while the rows stay the same. Mutable."""

    @classmethod
    def of(cls, sequences: list[Sequence], *, vocab_size: int, device: torch.device) -> Self | None:
        """None where no sequence has a grammar."""
        own = [(row, s, s.walk) for row, s in enumerate(sequences) if s.walk is not None]
        return cls(own, vocab_size=vocab_size, device=device) if own else None

    def __init__(
        self,
        own: list[tuple[int, Sequence, GrammarWalk]],
        *,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._own = own
        # Where each row's mask is.
        self.places = {row: place for place, (row, _, _) in enumerate(self._own)}
        self._vocab_size = vocab_size
        num_bytes = max(-(-vocab_size // 8), *(walk.num_mask_bytes for _, _, walk in own))
        # [num_own, num_bytes], a bit a token. What a tokenizer does not know stays zero.
        self._host = torch.zeros(
            (len(self._own), num_bytes), dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        self._limits = _LIMITS.to(device)
        # The same on the device. Filled by `fill`.
        self._masks = self._host

    def fill(self) -> list[Fault]:
        """Compute the masks of the next tokens; a row whose mask fails may have any token."""
        places = range(len(self._own))
        num_parts = min(-(-len(places) // MIN_ROWS_OF_A_THREAD), _num_threads())
        if num_parts <= 1:
            faults = self._fill_some(places)
        else:
            parts = [places[part::num_parts] for part in range(num_parts)]
            faults = list(chain.from_iterable(_threads().map(self._fill_some, parts)))
        self._masks = self._host.to(self._limits.device, non_blocking=True)
        return faults

    def apply_(self, logits: Tensor, places: Tensor) -> None:
        """-inf for what may not come next; logits: [num_rows, vocab_size], masks at `places`."""
        bits = self._masks.index_select(0, places).flatten().int()
        limits = self._limits.index_select(0, bits).view(len(places), -1)
        torch.minimum(logits, limits[:, : self._vocab_size], out=logits)

    def _fill_some(self, places: range) -> list[Fault]:
        masks, faults = self._host.numpy(), []
        for place in places:
            row, sequence, walk = self._own[place]
            try:
                walk.catch_up(sequence.token_ids, first=sequence.num_prompt_tokens)
                walk.write_mask(self._host.data_ptr() + place * self._host.stride(0))
            except SequenceError as error:
                masks[place] = 0xFF
                faults.append((row, error))
            else:
                if sequence.num_generated_tokens < sequence.sampling.min_tokens:
                    _put_off_the_end(masks[place], sequence.sampling.stop_token_ids)
        return faults


def _put_off_the_end(mask: Bytes, stop_token_ids: tuple[int, ...]) -> None:
    """Take the stop tokens away, unless nothing else may come."""
    ids = np.array([i for i in stop_token_ids if 0 <= i < 8 * len(mask)], dtype=np.int64)
    rest = mask.copy()
    np.bitwise_and.at(rest, ids // 8, ~(1 << ids % 8).astype(np.uint8))
    if rest.any():
        mask[:] = rest


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_num_threads(), thread_name_prefix="mask")


@functools.cache
def _num_threads() -> int:
    return min(MAX_THREADS, os.cpu_count() or 1)
