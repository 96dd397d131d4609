"""One pass over memory to merge a library's normalised output into a partial, and to normalise where it is the last.

Note [in place]: m and sum are written where they were read, and a program's warps read them twice, once as factors of their own
rows and once for the warp that writes them. Without a barrier the one that writes may be ahead of the others' reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ring_attn.kernels.triton_blocks import padded
from ring_attn.kernels.triton_rows import (
    LN2,
    LOG2E,
    Call,
    at_head,
    block_at,
    load_numbers,
    load_rows,
    numbers_of,
    rows_of,
    store_numbers,
    store_rows,
)
from ring_attn.partial import Partial

BLOCK = 32


def merge_call(
    into: Partial, rows: range | Tensor, out: Tensor, lse: Tensor, target: Tensor | None, walked: range | None = None
) -> Call:
    """The launch that merges out [b, i, h, dv] and lse [b, h, i] into those `rows` of `into` [b, s, h, dv], in place.

    `rows` as a tensor, int32 [b, s] and contiguous: which of the rows of out [1, n, h, dv] and lse [1, h, n] is for each of
    `into`, -1 where none is.

    With `target` [b, s, h, dv] it is the last merge of the rows `walked`, `rows` among them (None: of all): their normalised
    output goes there and their final lse to `into.m`, while acc and sum are left as they were, so that they may be an output
    in 16 bits and None.
    """
    packed, everything = isinstance(rows, Tensor), range(into.acc.shape[1])
    given = everything if packed else rows
    walked = given if target is None else walked or everything
    blocks = -(-len(walked) // BLOCK)
    b, _, h, dim = into.acc.shape
    arguments = {
        "acc": rows_of(into.acc),
        "m": numbers_of(into.m),
        "sums": None if into.sum is None else numbers_of(into.sum),
        "part": rows_of(out),
        "part_lse": numbers_of(lse),
        "target": None if target is None else rows_of(target),
        "start": walked.start,
        "stop": walked.stop,
        "places": rows if packed else None,
        "num_rows": len(everything),
        "part_start": given.start,
        "part_stop": given.stop,
        "blocks": blocks,
        "heads": h,
        "LAST": target is not None,
        "DIM": dim,
        "WIDTH": padded(dim),
        "BLOCK": BLOCK,
        "num_warps": 4,
    }
    return Call(merge_kernel, blocks * b * h, arguments)


@triton.jit(do_not_specialize=["num_rows", "start", "stop", "part_start", "part_stop", "blocks"])
def merge_kernel(
    acc,
    m,
    sums,
    part,
    part_lse,
    target,
    places,
    num_rows,
    start,
    stop,
    part_start,
    part_stop,
    blocks,
    heads,
    LAST: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, batch, head = block_at(tl.program_id(0), blocks, heads)
    rows = start + block * BLOCK + tl.arange(0, BLOCK)
    live = rows < stop
    if places is None:
        part_batch, part_rows = batch, rows - part_start
        met = live & (rows >= part_start) & (rows < part_stop)
    else:
        part_batch, part_rows = batch * 0, tl.load(places + batch * num_rows + rows, mask=live, other=-1)
        met = part_rows >= 0

    m_row = load_numbers(at_head(m, batch, head), rows, live, float("-inf"))
    part_lse_row = load_numbers(at_head(part_lse, part_batch, head), part_rows, met, float("-inf"))
    m_new = tl.maximum(m_row, part_lse_row)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    kept, weight = tl.exp2((m_row - base) * LOG2E), tl.exp2((part_lse_row - base) * LOG2E)
    l_row = weight + (kept if sums is None else load_numbers(at_head(sums, batch, head), rows, live, 0.0) * kept)
    total = load_rows(at_head(acc, batch, head), rows, live, DIM, WIDTH).to(tl.float32) * kept[:, None]
    total += load_rows(at_head(part, part_batch, head), part_rows, met, DIM, WIDTH).to(tl.float32) * weight[:, None]
    # See Note [in place].
    tl.debug_barrier()
    if LAST:
        divisor = tl.where(l_row == 0.0, 1.0, l_row)
        store_numbers(at_head(m, batch, head), m_new + tl.log2(divisor) * LN2, rows, live)
        store_rows(at_head(target, batch, head), total / divisor[:, None], rows, live, DIM, WIDTH)
    else:
        store_numbers(at_head(m, batch, head), m_new, rows, live)
        store_numbers(at_head(sums, batch, head), l_row, rows, live)
        store_rows(at_head(acc, batch, head), total, rows, live, DIM, WIDTH)
