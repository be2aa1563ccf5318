"""Put the keys and values of new tokens into their blocks, in one kernel.

Knows rows and blocks. Knows nothing of who owns them.
"""

from typing import Any

import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import kernel, power_of_two


@kernel(changing=("block_size",))
def _write(
    key: "Any",
    value: "Any",
    key_cache: "Any",
    value_cache: "Any",
    cache_rows: "Any",
    key_row: "Any",
    key_head: "Any",
    value_row: "Any",
    value_head: "Any",
    block_stride: "Any",
    block_size: "Any",
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_ELEMENTS: tl.constexpr,
    VALUE_ELEMENTS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
) -> None:
    """cache[cache_rows[t]] = new[t]; one program for each token, all its heads."""
    token = tl.program_id(0).to(tl.int64)
    cache_row = tl.load(cache_rows + token)
    block = (cache_row // block_size) * block_stride
    place = cache_row % block_size
    columns = tl.arange(0, KEY_COLUMNS)
    source = token * key_row + (columns // KEY_DIM) * key_head + columns % KEY_DIM
    new = tl.load(key + source, mask=columns < KEY_ELEMENTS)
    target = block + place * KEY_ELEMENTS + columns
    tl.store(key_cache + target, new, mask=columns < KEY_ELEMENTS)
    columns = tl.arange(0, VALUE_COLUMNS)
    source = token * value_row + (columns // VALUE_DIM) * value_head + columns % VALUE_DIM
    new = tl.load(value + source, mask=columns < VALUE_ELEMENTS)
    target = block + place * VALUE_ELEMENTS + columns
    tl.store(value_cache + target, new, mask=columns < VALUE_ELEMENTS)


def write_kv(
    key: Tensor, value: Tensor, *, key_cache: Tensor, value_cache: Tensor, cache_rows: Tensor
) -> None:
    """`reference.write_kv` of both."""
    assert key.stride(2) == value.stride(2) == 1
    for cache in (key_cache, value_cache):
        # All heads of a position lie in one piece, as `DeviceMemory` has them.
        assert cache.stride()[1:] == (cache.shape[2] * cache.shape[3], cache.shape[3], 1)
    assert key_cache.stride(0) == value_cache.stride(0)
    key_elements, value_elements = key[0].numel(), value[0].numel()
    _write[(len(cache_rows),)](
        key,
        value,
        key_cache,
        value_cache,
        cache_rows,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        key_cache.shape[1],
        KEY_DIM=key.shape[2],
        VALUE_DIM=value.shape[2],
        KEY_ELEMENTS=key_elements,
        VALUE_ELEMENTS=value_elements,
        KEY_COLUMNS=power_of_two(key_elements),
        VALUE_COLUMNS=power_of_two(value_elements),
    )
