"""Noise that depends on (seed, position, token id) alone.

A sequence draws the same tokens by itself, in any batch, after a preemption and on another
replica. The words are unsigned 64 bits by definition; int64 wraps like them.
"""

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFFFFFFFFFF


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_STEP = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def mixed_seeds(seeds: list[int], *, device: torch.device) -> Tensor:
    """[num_rows] int64: what `streams` takes, the same for all positions."""
    words = np.array(seeds, dtype=np.uint64).view(np.int64)
    return _mix_(torch.from_numpy(words).to(device))


def streams(mixed: Tensor, positions: Tensor) -> Tensor:
    """[num_rows] int64: where the noise of each row's position starts."""
    return _mix_(mixed + positions)


def gumbel_noise(starts: Tensor, token_ids: Tensor) -> Tensor:
    """As `reference.gumbel_noise`: [num_rows, num_tokens] float32.

    starts: [num_rows] int64 of `streams`; token_ids: [num_rows or 1, num_tokens].
    """
    words = _mix_((token_ids + 1) * _STEP + starts[:, None])
    bits = words.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF)
    # Small u are the large noise, and float32 is finest there. Below 1, or the noise were -inf.
    u = bits.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def _mix_(words: Tensor) -> Tensor:
    """SplitMix64's mixing of each word, in place."""
    for shift, factor in _ROUNDS:
        words ^= (words >> shift) & (_WORD >> shift)
        words *= factor
    words ^= (words >> 31) & (_WORD >> 31)
    return words
