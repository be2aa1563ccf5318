"""What is asked of the system that memory comes from, so that no step waits for it.

Each page that a process touches for the first time interrupts it. Knows pages and the C library's
allocator. Knows nothing of what is kept there.
"""

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor

# Of `mallopt`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The most that glibc takes: what is larger goes back to the system as soon as it is freed.
LARGEST_KEPT_BYTES = 32 << 20
# More than this that lies free at the heap's end goes back, too.
MOST_KEPT_BYTES = 256 << 20


def empty_pages(num_elements: int, *, dtype: torch.dtype) -> Tensor:
    """Pages that the system gives as they are first used; large ones, where it has such.

    Of small ones a token's keys and values need a dozen.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, num_elements * dtype.itemsize, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel may be built without them.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def keep_what_is_freed() -> None:
    """Let each step find the pages that the last one freed: logits of 32 rows have 1,500.

    That is for the whole process, and so for whoever starts one.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, MOST_KEPT_BYTES)


def give_back() -> None:
    """Return to the system what the allocator keeps in case."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
