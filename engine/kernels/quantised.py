"""Weights in fewer bits: what their codes stand for, and products with them, in torch.

A format keeps a weight [out_features, in_features] as `codes` and `scales`. This is the definition,
on any device; `quantised_cpu` computes some of it in compiled loops. Nothing here looks at two rows
of an input at once: what a row gives never depends on the rows beside it. Knows tensors. Knows
nothing of modules.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# So many neighbours of a row share a scale, and in int4 a floor: 8.5 bits a weight, and 5.
GROUP_SIZE = 32
# Rows of a weight that are whole at once.
TILE_SIZE = 1024
INT8_MAX, INT4_MAX, FP8_MAX = 127, 15, 448
# What the GEMM of fp8 can be given.
FP8_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Format:
    """How a weight is kept, and what it is multiplied by."""

    name: str
    # A tile of the weight, float32 -> codes and scales, which have a row for each of its rows.
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    # Back again: the weight that the codes stand for.
    decode: Callable[[Tensor, Tensor], Tensor]
    # x [num_rows, in_features], codes, scales -> x Wᵀ [num_rows, out_features], in x's dtype.
    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    # What the product makes of x before it multiplies, in float32; None where it takes x as it is.
    rounded: Callable[[Tensor], Tensor] | None = None
    # in_features and out_features must be multiples of these.
    multiples: tuple[int, int] = (1, 1)
    # So many rows' codes may lie together: a part of them ends where a panel does, or all rows do.
    panel: int = 1

    def codes_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight: [out_features, in_features], of any dtype and order in memory."""
        tiles = (weight[first:end].float().contiguous() for first, end in _tiles(len(weight)))
        codes, scales = zip(*(self.encode(tile) for tile in tiles), strict=True)
        return torch.cat(codes), torch.cat(scales)

    def rows_of(self, codes: Tensor, scales: Tensor, *, first: int, end: int) -> Tensor:
        """float32 [end - first, in_features]: some rows of the weight that the codes stand for."""
        start, stop = first // self.panel * self.panel, -(-end // self.panel) * self.panel
        rows = self.decode(codes[start:stop], scales[start:stop])
        return rows[first - start : end - start]

    def fault_of(self, in_features: int, out_features: int) -> str | None:
        """What of a weight's shape the format cannot have."""
        sizes = {"in_features": in_features, "out_features": out_features}
        for (name, size), multiple in zip(sizes.items(), self.multiples, strict=True):
            if size % multiple:
                return f"its {name}, {size}, are no multiple of {multiple}"
        return None


def _tiles(num_rows: int) -> Iterator[tuple[int, int]]:
    for first in range(0, num_rows, TILE_SIZE):
        yield first, min(first + TILE_SIZE, num_rows)


def _whole_product(
    decode: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Multiply by what the codes stand for, a tile at a time."""

    def product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], codes.shape[0])
        for first, end in _tiles(codes.shape[0]):
            weight = decode(codes[first:end], scales[first:end]).to(x.dtype)
            torch.mm(x, weight.T, out=out[:, first:end])
        return out

    return product


def _steps(largest: Tensor, num_steps: int) -> Tensor:
    """How wide one of `num_steps` is; any width will do where all is zero."""
    steps = largest / num_steps
    return torch.where(steps == 0, 1.0, steps)


# bf16: the upper half of a float32, rounded; all of it where a checkpoint has no more itself


def encode_bf16(rows: Tensor) -> tuple[Tensor, Tensor]:
    """codes [num_rows, in_features] bfloat16, and no scales."""
    return rows.bfloat16(), rows.new_empty(len(rows), 0)


def decode_bf16(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float()


# int8: code · scale of the group, symmetric


def encode_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """codes [num_rows, in_features] int8, scales [num_rows, num_groups] float16.

    The last group is what is left. With one scale a row SmolLM2-135M agreed with itself in 95 % of
    the likeliest tokens.
    """
    groups = _grouped(rows)
    scales = (groups.abs().amax(dim=-1) / INT8_MAX).half()
    steps = torch.where(scales == 0, 1.0, scales.float())
    codes = (groups / steps[..., None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return codes.flatten(1)[:, : rows.shape[1]].contiguous(), scales


def decode_int8(codes: Tensor, scales: Tensor) -> Tensor:
    rows = _grouped(codes.float()) * scales.float()[..., None]
    return rows.flatten(1)[:, : codes.shape[1]]


def _grouped(rows: Tensor) -> Tensor:
    """[num_rows, num_groups, GROUP_SIZE], with zeros where there is nothing left."""
    padding = -rows.shape[1] % GROUP_SIZE
    padded = torch.nn.functional.pad(rows, (0, padding)) if padding else rows
    return padded.view(rows.shape[0], -1, GROUP_SIZE)


# int4: code · step + floor of the group


def encode_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """codes [num_rows, in_features / 2] uint8, scales [num_rows, num_groups, 2] float16.

    A group's byte i holds its number i in the lower half, number i + 16 in the upper one. A group's
    scales are its step and its floor; the codes make up for what these lose in float16.
    """
    groups = _grouped(rows)
    floors = groups.amin(dim=-1).half().float()
    steps = ((groups.amax(dim=-1) - floors) / INT4_MAX).half().float()
    widths = torch.where(steps == 0, 1.0, steps)
    codes = ((groups - floors[..., None]) / widths[..., None]).round().clamp(0, INT4_MAX)
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return (low | high << 4).flatten(1), torch.stack([steps, floors], dim=-1).half()


def decode_int4(codes: Tensor, scales: Tensor) -> Tensor:
    halves = codes.view(codes.shape[0], -1, GROUP_SIZE // 2)
    groups = torch.cat([halves & 15, halves >> 4], dim=-1).float()
    steps, floors = scales.float().unbind(dim=-1)
    return (groups * steps[..., None] + floors[..., None]).flatten(1)


# int8, dynamic: x in groups too, and what a group adds is a sum of integers


def encode_int8_input(rows: Tensor) -> tuple[Tensor, Tensor]:
    """As `encode_int8`, with scales in float32."""
    groups = _grouped(rows)
    scales = _steps(groups.abs().amax(dim=-1), INT8_MAX)
    codes = (groups / scales[..., None]).round().to(torch.int8)
    return codes.flatten(1)[:, : rows.shape[1]], scales


def product_int8_dynamic(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Group by group: sum · scale of x · scale of the weight, each rounded, and added in order."""
    own_codes, own_scales = encode_int8_input(x.float())
    own_groups = _grouped(own_codes.float())
    out = torch.zeros(x.shape[0], codes.shape[0], device=x.device)
    for first, end in _tiles(codes.shape[0]):
        groups, tile = _grouped(codes[first:end].float()), out[:, first:end]
        for group, own_scale in enumerate(own_scales.unbind(dim=1)):
            # Floats hold every sum of so few.
            sums = own_groups[:, group] @ groups[:, group].T
            tile += sums * own_scale[:, None] * scales[first:end, group].float()
    return out.to(x.dtype)


# fp8: e4m3 · scale of the row, weight and x alike


def encode_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """codes [num_rows, in_features] float8_e4m3fn, scales [num_rows] float32."""
    scales = _steps(rows.abs().amax(dim=1), FP8_MAX)
    return (rows / scales[:, None]).to(torch.float8_e4m3fn), scales


def decode_fp8(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * scales[:, None]


def product_fp8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    own_codes, own_scales = encode_fp8(x.float())
    product: Tensor = torch._scaled_mm(
        own_codes,
        codes.T,
        scale_a=own_scales[:, None],
        scale_b=scales[None, :],
        out_dtype=x.dtype,
    )
    return product


BF16 = Format("bf16", encode_bf16, decode_bf16, _whole_product(decode_bf16))
INT8 = Format("int8", encode_int8, decode_int8, _whole_product(decode_int8))
INT4 = Format(
    "int4", encode_int4, decode_int4, _whole_product(decode_int4), multiples=(GROUP_SIZE, 1)
)
INT8_DYNAMIC = Format(
    "int8-dynamic",
    encode_int8,
    decode_int8,
    product_int8_dynamic,
    rounded=lambda x: decode_int8(*encode_int8_input(x.float())),
)
FP8 = Format(
    "fp8",
    encode_fp8,
    decode_fp8,
    product_fp8,
    rounded=lambda x: decode_fp8(*encode_fp8(x.float())),
    multiples=(FP8_MULTIPLE, FP8_MULTIPLE),
)
