"""What the Triton backward reads of every query row, made in one launch for all visits of a backward.

Note [shifted]: TMA copies blocks of numbers from addresses that are multiples of 16 bytes, four of them in fp32, and blocks
begin at any row. So numbers x [b, h, s] are kept four times, [4 * b, h, s] with x[.., i + r] at [r * b + .., i]: a block from
any row on begins at a multiple of four in one of them. s is rounded up to 16; what is past the last row is 0.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import triton
import triton.language as tl
from torch import Tensor

from ring_attn.kernels import Upstream
from ring_attn.kernels.triton_blocks import padded
from ring_attn.kernels.triton_kernel import interpreted
from ring_attn.kernels.triton_rows import (
    LOG2E,
    Call,
    at_head,
    block_at,
    load_numbers,
    load_rows,
    numbers_of,
    rows_of,
    store_numbers,
)

BLOCK = 64


class Prepared(NamedTuple):
    """dout [b, s, h, dv] with unit stride; lse in base 2, +inf where it was -inf, and delta, both as Note [shifted] says."""

    dout: Tensor
    lse2: Tensor
    delta: Tensor


_once: WeakKeyDictionary[Upstream, Prepared] = WeakKeyDictionary()


def prepared(up: Upstream) -> Prepared:
    """What a backward reads of these rows, kept as long as they are."""
    found = _once.get(up)
    if found is None:
        b, h, s = up.lse.shape
        dout = up.dout if up.dout.stride(-1) == 1 else up.dout.contiguous()
        found = Prepared(dout, *(up.lse.new_empty(4 * b, h, -(-s // 16) * 16) for _ in range(2)))
        # Without a GPU launches are only compiled.
        if dout.is_cuda or interpreted():
            prepare_call(up, found)()
        _once[up] = found
    return found


def prepare_call(up: Upstream, into: Prepared) -> Call:
    """The launch that fills lse2 and delta."""
    b, s, h, dv = up.dout.shape
    rows = into.lse2.shape[2]
    # The last three rows of a copy lie beyond those of the one before.
    blocks = -(-(rows + 3) // BLOCK)
    arguments = {
        "dout": rows_of(into.dout),
        "out": rows_of(up.out),
        "rest": None if up.rest is None else rows_of(up.rest),
        "lse": numbers_of(up.lse),
        "dlse": None if up.dlse is None else numbers_of(up.dlse),
        "lse2": numbers_of(into.lse2),
        "delta": numbers_of(into.delta),
        "num_q": s,
        "rows_kept": rows,
        "blocks": blocks,
        "batches": b,
        "heads": h,
        "V_DIM": dv,
        "V_WIDTH": padded(dv),
        "BLOCK": BLOCK,
        "num_warps": 4,
    }
    return Call(prepare_kernel, b * h * blocks, arguments)


@triton.jit(do_not_specialize=["num_q", "rows_kept", "blocks", "batches"])
def prepare_kernel(
    dout,
    out,
    rest,
    lse,
    dlse,
    lse2,
    delta,
    num_q,
    rows_kept,
    blocks,
    batches,
    heads,
    V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, batch, head = block_at(tl.program_id(0), blocks, heads)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    live = rows < num_q
    out_rows = load_rows(at_head(out, batch, head), rows, live, V_DIM, V_WIDTH).to(tl.float32)
    if rest is not None:
        out_rows += load_rows(at_head(rest, batch, head), rows, live, V_DIM, V_WIDTH).to(tl.float32)
    dout_rows = load_rows(at_head(dout, batch, head), rows, live, V_DIM, V_WIDTH).to(tl.float32)
    delta_row = tl.sum(dout_rows * out_rows, 1)
    if dlse is not None:
        delta_row -= load_numbers(at_head(dlse, batch, head), rows, live, 0.0)
    lse_row = load_numbers(at_head(lse, batch, head), rows, live, 0.0)
    lse2_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row * LOG2E)
    for shift in tl.static_range(4):
        kept = (rows >= shift) & (rows - shift < rows_kept)
        store_numbers(at_head(lse2, shift * batches + batch, head), lse2_row, rows - shift, kept)
        store_numbers(at_head(delta, shift * batches + batch, head), delta_row, rows - shift, kept)
