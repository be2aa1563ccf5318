"""Compile kernels for GPUs with Triton.

With TRITON_INTERPRET=1 in the environment, before Triton is first imported, the same kernels run
line by line on a CPU's tensors, for tests. Knows the compiler. Knows nothing of what is computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

Arrays = Sequence[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]
# Bytes; what threads load at once, and what every part of an adapter begins with.
ALIGNMENT_BYTES = 16


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
    # Each begins with a line: where one begins at any place, a kernel is compiled once more.
    line = ALIGNMENT_BYTES // 4
    ends = np.cumsum([-(-array.size // line) * line for array in arrays]).tolist()
    flat = np.zeros(ends[-1], dtype=np.int32)
    places = [slice(end, end + array.size) for end, array in zip([0, *ends], arrays, strict=False)]
    for place, array in zip(places, arrays, strict=True):
        flat[place] = array.ravel()
    whole = torch.from_numpy(flat).to(device, non_blocking=True)
    return [whole[place].view(array.shape) for place, array in zip(places, arrays, strict=True)]
