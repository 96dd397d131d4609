"""One launch to add a library's dq, dk and dv into the sums of a visit, where PyTorch takes three, two of them strided.

What is unwritten yet is written in its place; where a pack leaves rows out, with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ring_attn.kernels import Grads
from ring_attn.kernels.triton_blocks import padded
from ring_attn.kernels.triton_rows import Call, at_head, block_at, load_rows, rows_of, store_rows

BLOCK = 32


def add_call(into: Grads, q_rows: range | Tensor, kv_rows: range | Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Call:
    """The launch that adds dq [b, i, h, d], dk [b, j, g, d] and dv [b, j, g, dv] into those rows of the sums, in place.

    Rows as tensors, int32 [b, s] and contiguous: which of the rows of dq, dk and dv [1, n, ...] is for each of the sums', -1
    where none is. What is unwritten is then written in all rows.
    """
    b, (_, _, h, d), (_, _, g, dv_dim) = into.dq.shape[0], dq.shape, dv.shape
    q_places, kv_places = (rows if isinstance(rows, Tensor) else None for rows in (q_rows, kv_rows))
    q_rows, kv_rows = (range(rows.shape[1]) if isinstance(rows, Tensor) else rows for rows in (q_rows, kv_rows))
    q_blocks, kv_blocks = -(-len(q_rows) // BLOCK), -(-len(kv_rows) // BLOCK)
    arguments = {
        "dq": rows_of(into.dq),
        "dk": rows_of(into.dk),
        "dv": rows_of(into.dv),
        "dq_part": rows_of(dq),
        "dk_part": rows_of(dk),
        "dv_part": rows_of(dv),
        "q_places": q_places,
        "kv_places": kv_places,
        "q_start": q_rows.start,
        "q_count": len(q_rows),
        "kv_start": kv_rows.start,
        "kv_count": len(kv_rows),
        "q_blocks": q_blocks,
        "kv_blocks": kv_blocks,
        "batches": b,
        "heads": h,
        "kv_heads": g,
        "Q_UNWRITTEN": into.unwritten_q,
        "KV_UNWRITTEN": into.unwritten_kv,
        "DIM": d,
        "V_DIM": dv_dim,
        "WIDTH": padded(d),
        "V_WIDTH": padded(dv_dim),
        "BLOCK": BLOCK,
        "num_warps": 4,
    }
    return Call(add_kernel, b * (q_blocks * h + 2 * kv_blocks * g), arguments)


@triton.jit
def add_block(
    into, part, places, number, start, count, blocks, heads, UNWRITTEN: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds or writes one block of rows of one head, the one of that number among all blocks, heads and batch rows."""
    block, batch, head = block_at(number, blocks, heads)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    live = rows < count
    if places is None:
        part_batch, part_rows, met = batch, rows, live
    else:
        part_batch, part_rows = batch * 0, tl.load(places + batch * count + rows, mask=live, other=-1)
        met = part_rows >= 0
    to = at_head(into, batch, head)
    sums = load_rows(at_head(part, part_batch, head), part_rows, met, DIM, WIDTH).to(tl.float32)
    if UNWRITTEN:
        store_rows(to, sums, start + rows, live, DIM, WIDTH)
    else:
        sums += load_rows(to, start + rows, met, DIM, WIDTH)
        store_rows(to, sums, start + rows, met, DIM, WIDTH)


@triton.jit(do_not_specialize=["q_start", "q_count", "kv_start", "kv_count", "q_blocks", "kv_blocks", "batches"])
def add_kernel(
    dq,
    dk,
    dv,
    dq_part,
    dk_part,
    dv_part,
    q_places,
    kv_places,
    q_start,
    q_count,
    kv_start,
    kv_count,
    q_blocks,
    kv_blocks,
    batches,
    heads,
    kv_heads,
    Q_UNWRITTEN: tl.constexpr,
    KV_UNWRITTEN: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0)
    of_q, of_kv = batches * q_blocks * heads, batches * kv_blocks * kv_heads
    if number < of_q:
        add_block(dq, dq_part, q_places, number, q_start, q_count, q_blocks, heads, Q_UNWRITTEN, DIM, WIDTH, BLOCK)
    elif number < of_q + of_kv:
        number -= of_q
        add_block(dk, dk_part, kv_places, number, kv_start, kv_count, kv_blocks, kv_heads, KV_UNWRITTEN, DIM, WIDTH, BLOCK)
    else:
        number -= of_q + of_kv
        add_block(dv, dv_part, kv_places, number, kv_start, kv_count, kv_blocks, kv_heads, KV_UNWRITTEN, V_DIM, V_WIDTH, BLOCK)
