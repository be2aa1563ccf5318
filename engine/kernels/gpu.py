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
    flat = np.concatenate([array.ravel() for array in arrays]).astype(np.int32)
    whole = torch.from_numpy(flat).to(device, non_blocking=True)
    ends = np.cumsum([array.size for array in arrays]).tolist()
    return [
        whole[end - array.size : end].view(array.shape)
        for end, array in zip(ends, arrays, strict=True)
    ]
