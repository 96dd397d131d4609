"""The Triton forward: all tiles of a visit in one launch, unnormalised and carried on from visit to visit.

Note [base 2]: scores are scaled by log2(e) so that exp2 serves; m2 is in base 2, and m and lse in memory are natural logs. The
baseline is scale * max of the raw scores, for a scale above 0. What is carried is left relative to m = log-sum-exp - 24 ln 2,
as near as the next visit reads that back: m2 rounds on the way to m and back. The next visit's probabilities are relative to
that or to its own largest score: at the log-sum-exp itself they would be as small as one in all keys so far, and float16 has no
digits left for those.

Note [lanes]: four neighbouring threads share a row of a block of scores, two columns each of every eight, and to add up across
them takes as long as the products leave for it. So each keeps a sum of its own, and they meet once, after the last block.

Note [baseline]: where no score can be larger in size than a bound, as under a softcap or of cosine similarity, one number
serves every row as a constant baseline, without a running maximum and without rescaling in the loop. p = exp(score - baseline)
lies between exp(-bound - baseline) and exp(bound - baseline), which `Chain.baseline` keeps within what numbers can hold. What
was carried joins in the end. A row has met a key iff its sum is not 0.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ring_attn.kernels.triton_blocks import Config, Table, padded
from ring_attn.kernels.triton_rows import (
    LEFT_BELOW,
    LN2,
    LOG2E,
    Call,
    at_head,
    entry_span,
    load_numbers,
    load_rows,
    met_by,
    program_work,
    rows_of,
    store_numbers,
    store_rows,
    visit_arguments,
)
from ring_attn.kernels.triton_scores import PLAIN, Chain, block_cells, entry_cells, modified
from ring_attn.partial import Partial

LANES = tl.constexpr(4)


def forward_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Table,
    config: Config,
    *,
    scale: float,
    chain: Chain = PLAIN,
    carried: Partial | None,
    target: Partial,
    out: Tensor | None,
) -> Call:
    """The launch that brings `target` to the partial of q, k, v over the table's tiles and of `carried`, if any.

    What `carried` has is the target's. The table is placed where the chain is. With `out` it is the last visit: out
    [b, s, h, dv] is written, the final lse to target's m, and target's acc and sum are not.
    """
    visit = visit_arguments(q, k, table, carried, target, out)
    arguments = {
        "q": rows_of(q),
        "k": rows_of(k),
        "v": rows_of(v),
        **visit,
        "V_DIM": v.shape[3],
        "WIDTH": padded(q.shape[3]),
        "V_WIDTH": padded(v.shape[3]),
        "BLOCK_M": config.own,
        "BLOCK_N": config.walk,
        "baseline": chain.baseline(q.dtype),
        **chain.arguments(scale),
        **config.options,
    }
    return Call(forward_kernel, visit["programs"] * q.shape[2], arguments)


@triton.jit
def lane_sums(p):
    """[rows, LANES]: the sums of p [rows, columns] over what each thread holds of a row, see Note [lanes]."""
    return tl.sum(tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // (2 * LANES), LANES, 2)), 3), 1)


@triton.jit
def attend(
    q_rows, k_rows, v_rows, j, partly, low, high, m2, l_lanes, total, scale_log2, chain, cells, baseline,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(m2, l by lanes, sum) of the online softmax after the KV rows from `j` on; `partly`: not every row meets all of them.

    `baseline`: see Note [baseline]; where there is one, m2 is left as it was.
    """
    s = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
    if chain is not None:
        s = modified(s, block_cells(cells, j, BLOCK, True), chain, len(chain.forward))
    if partly:
        s = tl.where(met_by(j, j, low, high, BLOCK), s, float("-inf"))
    if baseline is None:
        m2_next = tl.maximum(m2, tl.max(s, 1) * scale_log2)
        base = tl.where(m2_next == float("-inf"), 0.0, m2_next)
        p = tl.exp2(s * scale_log2 - base[:, None])
        rescale = tl.exp2(m2 - base)
        total = tl.dot(p.to(v_rows.dtype), v_rows, total * rescale[:, None], input_precision="ieee")
        m2, l_lanes = m2_next, l_lanes * rescale[:, None] + lane_sums(p)
    else:
        p = tl.exp2(s * scale_log2 - baseline)
        total = tl.dot(p.to(v_rows.dtype), v_rows, total, input_precision="ieee")
        l_lanes += lane_sums(p)
    return m2, l_lanes, total


@triton.jit(do_not_specialize=["num_q", "programs"])
def forward_kernel(
    q,
    k,
    v,
    acc,
    m,
    sums,
    out,
    table,
    scale_log2,
    chain,
    baseline,
    num_q,
    programs,
    group,
    CARRIED: tl.constexpr,
    ADDING: tl.constexpr,
    LAST: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRY: tl.constexpr,
):
    # The query heads of one KV head are neighbours, and KV heads come one after the other: KV stays in L2.
    kv_head = tl.program_id(0) // (programs * group)
    place = tl.program_id(0) % (programs * group)
    head = kv_head * group + place % group
    block, batch, first, last = program_work(table, place // group)

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < num_q
    block_stop = tl.minimum(block * BLOCK_M + BLOCK_M, num_q)
    k_at, v_at = at_head(k, batch, kv_head), at_head(v, batch, kv_head)
    q_rows = load_rows(at_head(q, batch, head), rows, live, DIM, WIDTH)
    total = tl.zeros((BLOCK_M, V_WIDTH), tl.float32)
    l_lanes = tl.zeros((BLOCK_M, LANES), tl.float32)
    m2 = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if CARRIED:
        m2 = in_base_2(load_numbers(at_head(m, batch, head), rows, live, float("-inf")))
    m2_carried = m2

    for entry in range(first, last, ENTRY):
        low, high, start, stop, clear_start, clear_stop = entry_span(table + entry, rows, block * BLOCK_M, block_stop)
        cells = entry_cells(table + entry, rows, batch, head, ENTRY)
        for j in tl.range(start, stop, BLOCK_N):
            columns = j + tl.arange(0, BLOCK_N)
            # Rows past the entry are not read: they may hold anything, and 0 * NaN is no 0.
            k_rows = load_rows(k_at, columns, columns < stop, DIM, WIDTH)
            v_rows = load_rows(v_at, columns, columns < stop, V_DIM, V_WIDTH)
            partly = (j < clear_start) | (j + BLOCK_N > clear_stop)
            m2, l_lanes, total = attend(
                q_rows, k_rows, v_rows, j, partly, low, high, m2, l_lanes, total, scale_log2, chain, cells, baseline, BLOCK_N
            )

    l_row = tl.sum(l_lanes, 1)
    if baseline is not None:
        m2_here = tl.where(l_row > 0.0, baseline, float("-inf"))
        m2 = tl.maximum(m2_carried, m2_here)
        rescale = tl.exp2(m2_here - tl.where(m2 == float("-inf"), 0.0, m2))
        l_row, total = l_row * rescale, total * rescale[:, None]
    if CARRIED:
        # Read only here, where registers are free: in the loop it would only be rescaled from m2_carried to m2.
        factor = tl.exp2(m2_carried - tl.where(m2 == float("-inf"), 0.0, m2))
        l_row += load_numbers(at_head(sums, batch, head), rows, live, 0.0) * factor
        if ADDING:
            total += load_rows(at_head(acc, batch, head), rows, live, V_DIM, V_WIDTH) * factor[:, None]
    divisor = tl.where(l_row == 0.0, 1.0, l_row)
    lse2 = m2 + tl.log2(divisor)
    m_row = (lse2 if LAST else lse2 - LEFT_BELOW) * LN2
    store_numbers(at_head(m, batch, head), m_row, rows, live)
    if LAST:
        store_rows(at_head(out, batch, head), total / divisor[:, None], rows, live, V_DIM, V_WIDTH)
    else:
        # See Note [base 2].
        to_read_back = tl.where(m2 == float("-inf"), 1.0, tl.exp2(m2 - in_base_2(m_row)))
        store_numbers(at_head(sums, batch, head), l_row * to_read_back, rows, live)
        store_rows(at_head(acc, batch, head), total * to_read_back[:, None], rows, live, V_DIM, V_WIDTH)


@triton.jit
def in_base_2(m_row):
    """A natural log in base 2, rounded: a compiler that fused the product into a difference would make another number of it
    than the next visit does.
    """
    return tl.fma(m_row, tl.full(m_row.shape, LOG2E, tl.float32), tl.zeros_like(m_row))
