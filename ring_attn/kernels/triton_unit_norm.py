"""Rows over their norm, and the gradient of that: a row is read once, see `ring_attn.unit_norm`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ring_attn.kernels.triton_blocks import padded
from ring_attn.kernels.triton_rows import Call, at_head, block_at, load_rows, rows_of, store_rows

BLOCK = 32


def norm_call(x: Tensor, found: Tensor, dy: Tensor | None = None) -> Call:
    """The launch that writes to `found` [b, s, h, d] the rows of x over their norm, or, given dy, the gradient of x."""
    b, s, heads, dim = x.shape
    blocks = -(-s // BLOCK)
    arguments = {
        "x": rows_of(x),
        "dy": rows_of(x if dy is None else dy),
        "found": rows_of(found),
        "count": s,
        "blocks": blocks,
        "heads": heads,
        "DIM": dim,
        "WIDTH": padded(dim),
        "BLOCK": BLOCK,
        "BACKWARD": dy is not None,
        "num_warps": 4,
    }
    return Call(norm_kernel, b * blocks * heads, arguments)


@triton.jit(do_not_specialize=["count", "blocks"])
def norm_kernel(
    x, dy, found, count, blocks, heads,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    block, batch, head = block_at(tl.program_id(0), blocks, heads)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    live = rows < count
    value = load_rows(at_head(x, batch, head), rows, live, DIM, WIDTH).to(tl.float32)
    largest = tl.max(tl.abs(value), 1)
    zero = largest == 0
    value = value / tl.where(zero, 1.0, largest)[:, None]
    # Both are at least 1 where the row is not zero.
    norm = tl.where(zero, 1.0, tl.sqrt(tl.sum(value * value, 1)))
    value = value / norm[:, None]
    if BACKWARD:
        grad = load_rows(at_head(dy, batch, head), rows, live, DIM, WIDTH).to(tl.float32)
        along = tl.sum(value * grad, 1)
        value = (grad - along[:, None] * value) / norm[:, None] / tl.where(zero, float("inf"), largest)[:, None]
    store_rows(at_head(found, batch, head), value, rows, live, DIM, WIDTH)
