"""Compile kernels for GPUs with Triton.

With TRITON_INTERPRET=1 in the environment, before Triton is first imported, the same kernels run
line by line on a CPU's tensors, for tests. Knows the compiler. Knows nothing of what is computed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

Arrays = Sequence[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]
# Bytes; what threads load at once, and what every part of an adapter begins with.
ALIGNMENT_BYTES = 16
# Behind the entries of a list that has room for more.
NOTHING = -1


def kernel(*, changing: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Compile the function when it is first launched.

    `changing`: whole numbers that differ from step to step, for whose values (1, multiples of 16)
    no kernels of their own shall be compiled.
    """
    decorate: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=list(changing))
    return decorate


def power_of_two(number: int) -> int:
    """The smallest that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()


def upload(arrays: Arrays, device: torch.device) -> list[Tensor]:
    """int32 copies on the device, all in one transfer."""
    lists = FixedLists([array.shape for array in arrays], device)
    lists.fill(arrays)
    return lists.tensors


class FixedLists:
    """int32 lists that stay where they are on the device. Mutable; one thread."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        """`shapes`: the largest that each will have."""
        # Each begins with a line: where one begins at any place, a kernel is compiled once more.
        line = ALIGNMENT_BYTES // 4
        sizes = [math.prod(shape) for shape in shapes]
        ends = np.cumsum([-(-size // line) * line for size in sizes]).tolist()
        self._starts = [0, *ends[:-1]]
        self._whole = torch.empty(ends[-1], dtype=torch.int32, device=device)
        self.tensors = [
            self._whole[start : start + size].view(shape)
            for start, size, shape in zip(self._starts, sizes, shapes, strict=True)
        ]

    def clear(self) -> None:
        self._whole.fill_(NOTHING)

    def fill(self, arrays: Arrays) -> None:
        """The first entries of each, in one transfer; NOTHING behind them."""
        flat = np.full(len(self._whole), NOTHING, dtype=np.int32)
        for start, array in zip(self._starts, arrays, strict=True):
            flat[start : start + array.size] = array.ravel()
        self._whole.copy_(torch.from_numpy(flat), non_blocking=True)
