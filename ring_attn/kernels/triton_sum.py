"""One pass over memory to sum up what came for some rows, out of libraries and of other ranks, and to round it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_attn.kernels.sums import MOST, Addend
from ring_attn.kernels.triton_blocks import padded
from ring_attn.kernels.triton_rows import Call, at_head, block_at, load_rows, rows_of, store_rows

BLOCK = 32


def sum_call(targets: Sequence[Tensor], addends: Sequence[Addend], rows: range, dtype: torch.dtype) -> Call:
    """The launch that writes the rows `rows` of sums to `targets` [b, len(rows), h, *], one tensor or two; sums are made in the
    order of the addends, in `dtype`, fp32 or float64. A target may be an addend of the same rows.
    """
    b, _, h, _ = targets[0].shape
    blocks = -(-len(rows) // BLOCK)
    dims = tuple(x.shape[3] for x in targets)
    arguments = {
        "targets": tuple(map(rows_of, targets)),
        "addends": tuple(tuple(map(rows_of, one.tensors)) for one in addends),
        "places": tuple(one.places for one in addends),
        "start": rows.start,
        "stop": rows.stop,
        "blocks": blocks,
        "heads": h,
        "each": blocks * b * h,
        "COUNTS": tuple(0 if one.places is None else one.places.shape[2] for one in addends),
        "DIMS": dims,
        "WIDTHS": tuple(map(padded, dims)),
        "DOUBLE": dtype == torch.float64,
        "BLOCK": BLOCK,
        "num_warps": 4,
    }
    for n in range(MOST + 1):
        met = addends[n].rows if n < len(addends) else range(0)
        arguments |= {f"start{n}": met.start, f"stop{n}": met.stop}
    return Call(sum_kernel, blocks * b * h * len(targets), arguments)


# Not in tuples, where Triton would look at their values and compile anew.
_SPANS = [f"{side}{n}" for n in range(MOST + 1) for side in ("start", "stop")]


@triton.jit(do_not_specialize=["start", "stop", "blocks", "each", *_SPANS])
def sum_kernel(
    targets, addends, places, start, stop, blocks, heads, each,
    start0, stop0, start1, stop1, start2, stop2, start3, stop3, start4, stop4,
    COUNTS: tl.constexpr, DIMS: tl.constexpr, WIDTHS: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    spans = ((start0, stop0), (start1, stop1), (start2, stop2), (start3, stop3), (start4, stop4))
    place = block_at(number % each, blocks, heads)
    for which in tl.static_range(len(DIMS)):
        if number // each == which:
            sum_block(
                targets[which], addends, places, spans, place, start, stop,
                which, COUNTS, DIMS[which], WIDTHS[which], DOUBLE, BLOCK,
            )  # fmt: skip


@triton.jit
def sum_block(
    target, addends, places, spans, place, start, stop, WHICH: tl.constexpr, COUNTS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head, of the tensors of that number."""
    block, batch, head = place
    rows = start + block * BLOCK + tl.arange(0, BLOCK)
    live = rows < stop
    value = tl.zeros((BLOCK, WIDTH), tl.float64 if DOUBLE else tl.float32)
    for n in tl.static_range(len(COUNTS)):
        at, span = places[n], spans[n]
        value = with_addend(value, addends[n][WHICH], at, span, rows, live, batch, head, COUNTS[n], DIM, WIDTH)
    store_rows(at_head(target, batch, head), value, rows - start, live, DIM, WIDTH)


@triton.jit
def with_addend(
    value, x, places, span, rows, live, batch, head, COUNT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The value with what an addend has for those rows."""
    start, stop = span
    met = live & (rows >= start) & (rows < stop)
    if COUNT == 0:
        value += load_rows(at_head(x, batch, head), rows - start, met, DIM, WIDTH).to(value.dtype)
    for n in tl.static_range(COUNT):
        place = tl.load(places + (batch * (stop - start) + rows - start) * COUNT + n, mask=met, other=-1)
        value += load_rows(at_head(x, batch * 0, head), place, place >= 0, DIM, WIDTH).to(value.dtype)
    return value
