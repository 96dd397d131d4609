"""The rows of a pack out of a tensor: whole rows at the speed of memory, where an index of PyTorch goes number by number."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ring_attn.kernels.triton_blocks import padded
from ring_attn.kernels.triton_rows import Call, at_head, block_at, row_mask, rows_of, store_rows

BLOCK = 32


def taken(x: Tensor, batches: Tensor, numbers: Tensor) -> Tensor:
    """x[batches, numbers]: [n, h, d] of x [b, s, h, d], for int64 batches and numbers [n]."""
    found = x.new_empty(len(numbers), *x.shape[2:])
    take_call(x, batches, numbers, found)()
    return found


def take_call(x: Tensor, batches: Tensor, numbers: Tensor, found: Tensor) -> Call:
    """The launch that writes them to `found`."""
    (count, heads, dim), blocks = found.shape, -(-len(numbers) // BLOCK)
    arguments = {
        "x": rows_of(x),
        "found": rows_of(found.unsqueeze(0)),
        "batches": batches,
        "numbers": numbers,
        "count": count,
        "blocks": blocks,
        "heads": heads,
        "DIM": dim,
        "WIDTH": padded(dim),
        "BLOCK": BLOCK,
        "num_warps": 4,
    }
    return Call(take_kernel, blocks * heads, arguments)


@triton.jit(do_not_specialize=["count", "blocks"])
def take_kernel(
    x, found, batches, numbers, count, blocks, heads,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, nothing, head = block_at(tl.program_id(0), blocks, heads)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    live = rows < count
    batch = tl.load(batches + rows, mask=live, other=0)
    number = tl.load(numbers + rows, mask=live, other=0)
    starts = x.ptr + batch * x.b + number * x.s + head.to(tl.int64) * x.h
    values = tl.load(starts[:, None] + tl.arange(0, WIDTH)[None, :], mask=row_mask(live, DIM, WIDTH), other=0.0)
    store_rows(at_head(found, nothing, head), values, rows, live, DIM, WIDTH)
