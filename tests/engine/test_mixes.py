"""Rows mixed in compiled loops are what torch says, and none depends on those beside it."""

import numba
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.loops import loop, run
from engine.kernels.mixes import mix

CALL = np.dtype(
    [
        (name, np.int64)
        for name in ("weights", "num_rows", "values", "stride", "count", "width", "out")
    ]
)


def _mix(pointer: numba.types.CPointer) -> None:
    call = numba.carray(pointer, 1)[0]
    mix(
        call.weights,
        call.count,
        call.num_rows,
        call.values,
        call.stride,
        call.count,
        call.width,
        call.out,
        call.width,
        call.values,
        call.stride,
        0,
    )


MIX = loop(_mix, CALL)


def mixed(weights: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """out + weights · values, in one thread."""
    out = out.clone()
    record = np.zeros(1, dtype=CALL)
    call = record[0]
    call["weights"], call["values"], call["out"] = (
        each.data_ptr() for each in (weights, values, out)
    )
    (call["num_rows"], call["count"]), call["width"] = weights.shape, out.shape[1]
    call["stride"] = values.stride(0)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run(MIX, record.ctypes.data)
    finally:
        torch.set_num_threads(num_threads)
    return out


@given(
    num_rows=st.integers(1, 20),
    count=st.integers(0, 33),
    width=st.integers(1, 150),
    gap=st.integers(0, 7),
)
@settings(max_examples=80, deadline=None)
def test_rows_are_mixed_as_torch_mixes_them_and_each_as_if_it_were_alone(
    num_rows: int, count: int, width: int, gap: int
) -> None:
    weights, out = torch.randn(num_rows, count), torch.randn(num_rows, width)
    values = torch.randn(count, width + gap)[:, :width]
    found = mixed(weights, values, out)
    torch.testing.assert_close(found, out + weights @ values, atol=1e-4, rtol=1e-5)
    alone = [mixed(weights[row][None], values, out[row][None]) for row in range(num_rows)]
    assert torch.equal(found, torch.cat(alone))
