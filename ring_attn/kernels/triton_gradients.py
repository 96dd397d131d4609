"""What runs in the launches of the Triton backward: dk and dv of blocks of KV rows, and dq of blocks of query rows.

A program is the only writer of its rows, so sums have one order.

Note [final lse]: p = exp(scale * s - lse) with the lse over all keys, so every visit's gradients simply add. A row that met no
key anywhere has lse = -inf; it is read as +inf, which makes its p 0. Mathematics and names as in flash attention 2 (Dao,
arXiv 2307.08691): dv = p^T dout, ds = p * (dout v^T - delta), dq = scale * ds k, dk = scale * ds^T q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ring_attn.kernels.triton_rows import (
    at_head,
    entry_span,
    load_block,
    load_number_block,
    load_numbers,
    load_rows,
    met_by,
    program_work,
    store_numbers,
    store_rows,
    whole_block,
)
from ring_attn.kernels.triton_scores import block_cells, distance, entry_cells, modified, power_of_two, pulled_back


@triton.jit
def add_rows(at, value, rows, live, UNWRITTEN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Adds value [rows, WIDTH] to the live rows, or writes it there."""
    if not UNWRITTEN:
        value += load_rows(at, rows, live, DIM, WIDTH)
    store_rows(at, value, rows, live, DIM, WIDTH)


@triton.jit
def scores_gradient(
    q_rows, dout_rows, lse2, delta_row, k_rows, v_rows, dv_rows, place, i, partly, low, high, scale_log2, chain, cells,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(ds transposed, dv) of own KV rows and the query rows from `place` on that are at least `i`.

    `partly`: not every KV row meets all of them.
    """
    st = tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee")
    if EARLY:
        dpt = tl.dot(v_rows, tl.trans(dout_rows), input_precision="ieee")
    score = st
    if chain is not None:
        cells = block_cells(cells, place, BLOCK, False)
        score = modified(st, cells, chain, len(chain.forward))
    pt = tl.exp2(score * scale_log2 - lse2[None, :])
    # What multiplies a gradient is worked out first, and before the branch: only that runs beside dp's product.
    weight = pt if chain is None else pulled_back(pt, st, cells, chain, 0)
    if partly:
        met = met_by(place, i, low, high, BLOCK)
        pt, weight = tl.where(met, pt, 0.0), tl.where(met, weight, 0.0)
    dv_rows = tl.dot(pt.to(dout_rows.dtype), dout_rows, dv_rows, input_precision="ieee")
    if not EARLY:
        dpt = tl.dot(v_rows, tl.trans(dout_rows), input_precision="ieee")
    dst = weight * (dpt - delta_row[None, :])
    return dst.to(q_rows.dtype), dv_rows


@triton.jit(do_not_specialize=["num_kv", "programs", "batches"])
def dkdv_kernel(
    q,
    k,
    v,
    dout,
    q_blocks,
    dout_blocks,
    lse_blocks,
    delta_blocks,
    lse,
    delta,
    dk,
    dv,
    table,
    scale,
    scale_log2,
    chain,
    num_kv,
    programs,
    batches,
    group,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TMA: tl.constexpr,
    EARLY: tl.constexpr,
    UNWRITTEN: tl.constexpr,
    ENTRY: tl.constexpr,
):
    kv_head = tl.program_id(0) // programs
    block, batch, first, last = program_work(table, tl.program_id(0) % programs)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    block_stop = block * BLOCK_N + BLOCK_N
    # Rows of no entry are not read: they may hold anything, and 0 * NaN is no 0.
    some = first < last
    held = (columns >= tl.load(table + first + 6, some, 0)) & (columns < tl.load(table + first + 7, some, 0))
    k_rows = load_rows(at_head(k, batch, kv_head), columns, held, DIM, WIDTH)
    v_rows = load_rows(at_head(v, batch, kv_head), columns, held, V_DIM, V_WIDTH)
    dk_rows = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv_rows = tl.zeros((BLOCK_N, V_WIDTH), tl.float32)

    for member in range(group):
        head = kv_head * group + member
        queries = at_head(q, batch, head), at_head(dout, batch, head), at_head(lse, batch, head), at_head(delta, batch, head)
        for entry in range(first, last, ENTRY):
            low, high, start, stop, clear_start, clear_stop = entry_span(table + entry, columns, block * BLOCK_N, block_stop)
            cells = entry_cells(table + entry, columns, batch, head, ENTRY)
            if TMA:
                for i in tl.range(start, stop, BLOCK_M):
                    place, partly = whole_block(i, table + entry, clear_start, clear_stop, BLOCK_M)
                    q_rows = load_block(q_blocks, batch, head, place, BLOCK_M, WIDTH)
                    dout_rows = load_block(dout_blocks, batch, head, place, BLOCK_M, V_WIDTH)
                    lse2 = load_number_block(lse_blocks, batch, head, place, batches, BLOCK_M)
                    delta_row = load_number_block(delta_blocks, batch, head, place, batches, BLOCK_M)
                    dst, dv_rows = scores_gradient(
                        q_rows, dout_rows, lse2, delta_row, k_rows, v_rows, dv_rows, place, i, partly, low, high, scale_log2,
                        chain, cells, BLOCK_M, EARLY,
                    )  # fmt: skip
                    dk_rows = tl.dot(dst, q_rows, dk_rows, input_precision="ieee")
            else:
                for i in tl.range(start, stop, BLOCK_M):
                    partly = (i < clear_start) | (i + BLOCK_M > clear_stop)
                    dk_rows, dv_rows = meet_rows(
                        queries, i, stop, partly, low, high, k_rows, v_rows, dk_rows, dv_rows, scale_log2, chain, cells,
                        DIM, V_DIM, WIDTH, V_WIDTH, BLOCK_M, EARLY,
                    )  # fmt: skip

    live = columns < num_kv
    add_rows(at_head(dk, batch, kv_head), dk_rows * scale, columns, live, UNWRITTEN, DIM, WIDTH)
    add_rows(at_head(dv, batch, kv_head), dv_rows, columns, live, UNWRITTEN, V_DIM, V_WIDTH)


@triton.jit
def meet_rows(
    queries,
    i,
    end,
    partly,
    low,
    high,
    k_rows,
    v_rows,
    dk_rows,
    dv_rows,
    scale_log2,
    chain,
    cells,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """(dk, dv) of own KV rows and the query rows [i, end), at most BLOCK, through pointers."""
    rows = i + tl.arange(0, BLOCK)
    met = rows < end
    q_rows = load_rows(queries[0], rows, met, DIM, WIDTH)
    dout_rows = load_rows(queries[1], rows, met, V_DIM, V_WIDTH)
    lse2 = load_numbers(queries[2], rows, met, float("inf"))
    delta_row = load_numbers(queries[3], rows, met, 0.0)
    dst, dv_rows = scores_gradient(
        q_rows, dout_rows, lse2, delta_row, k_rows, v_rows, dv_rows, i, i, partly, low, high, scale_log2,
        chain, cells, BLOCK, EARLY,
    )  # fmt: skip
    return tl.dot(dst, q_rows, dk_rows, input_precision="ieee"), dv_rows


@triton.jit(do_not_specialize=["num_q", "programs"])
def dq_kernel(
    q,
    k,
    v,
    dout,
    k_blocks,
    v_blocks,
    lse,
    delta,
    dq,
    slopes,
    table,
    scale,
    scale_log2,
    chain,
    num_q,
    programs,
    group,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    EARLY: tl.constexpr,
    MIXED: tl.constexpr,
    UNWRITTEN: tl.constexpr,
    ENTRY: tl.constexpr,
    ALIBI: tl.constexpr,
):
    kv_head = tl.program_id(0) // (programs * group)
    place = tl.program_id(0) % (programs * group)
    head = kv_head * group + place % group
    block, batch, first, last = program_work(table, place // group)

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < num_q
    block_stop = tl.minimum(block * BLOCK_M + BLOCK_M, num_q)
    k_at, v_at = at_head(k, batch, kv_head), at_head(v, batch, kv_head)
    q_rows = load_rows(at_head(q, batch, head), rows, live, DIM, WIDTH)
    dout_rows = load_rows(at_head(dout, batch, head), rows, live, V_DIM, V_WIDTH)
    lse2 = load_numbers(at_head(lse, batch, head), rows, live, float("inf"))
    delta_row = load_numbers(at_head(delta, batch, head), rows, live, 0.0)
    dq_rows = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    slope_rows = tl.zeros((BLOCK_M,), tl.float32)

    for entry in range(first, last, ENTRY):
        low, high, start, stop, clear_start, clear_stop = entry_span(table + entry, rows, block * BLOCK_M, block_stop)
        cells = entry_cells(table + entry, rows, batch, head, ENTRY)
        whole = TMA
        if TMA:
            whole = tl.load(table + entry + 3) - tl.load(table + entry + 2) >= BLOCK_N
            if whole:
                for i in tl.range(start, stop, BLOCK_N):
                    j, partly = whole_block(i, table + entry, clear_start, clear_stop, BLOCK_N)
                    k_rows = load_block(k_blocks, batch, kv_head, j, BLOCK_N, WIDTH)
                    v_rows = load_block(v_blocks, batch, kv_head, j, BLOCK_N, V_WIDTH)
                    dq_rows, slope_rows = meet_columns(
                        q_rows, dout_rows, lse2, delta_row, k_rows, v_rows, dq_rows, slope_rows, j, i, partly, low, high,
                        scale_log2, chain, cells, BLOCK_N, EARLY, MIXED, ALIBI,
                    )  # fmt: skip
        if not whole:
            for j in tl.range(start, stop, BLOCK_N, num_stages=1 if TMA else None):
                columns = j + tl.arange(0, BLOCK_N)
                k_rows = load_rows(k_at, columns, columns < stop, DIM, WIDTH)
                v_rows = load_rows(v_at, columns, columns < stop, V_DIM, V_WIDTH)
                partly = (j < clear_start) | (j + BLOCK_N > clear_stop)
                dq_rows, slope_rows = meet_columns(
                    q_rows, dout_rows, lse2, delta_row, k_rows, v_rows, dq_rows, slope_rows, j, j, partly, low, high,
                    scale_log2, chain, cells, BLOCK_N, EARLY, MIXED, ALIBI,
                )  # fmt: skip

    add_rows(at_head(dq, batch, head), dq_rows * scale, rows, live, UNWRITTEN, DIM, WIDTH)
    if ALIBI is not None:
        store_numbers(at_head(slopes, batch, head), slope_rows, rows, live)


@triton.jit
def meet_columns(
    q_rows, dout_rows, lse2, delta_row, k_rows, v_rows, dq_rows, slope_rows, j, i, partly, low, high, scale_log2, chain, cells,
    BLOCK: tl.constexpr, EARLY: tl.constexpr, MIXED: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """(dq / scale, -d slope) of own query rows and the KV rows from `j` on that are at least `i`.

    `partly`: not every row meets all. ALIBI: the step of the chain that has slopes, None without.
    """
    s = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
    if EARLY:
        dp = tl.dot(dout_rows, tl.trans(v_rows), input_precision="ieee")
    score = s
    if chain is not None:
        cells = block_cells(cells, j, BLOCK, True)
        score = modified(s, cells, chain, len(chain.forward))
    exponent = score * scale_log2 - lse2[:, None]
    p = power_of_two(exponent, MIXED)
    if partly:
        p = tl.where(met_by(j, i, low, high, BLOCK), p, 0.0)
    # As in `scores_gradient`.
    of_slopes = p if ALIBI is None else pulled_back(p, s, cells, chain, ALIBI + 1) * distance(cells)
    weight = p if chain is None else pulled_back(p, s, cells, chain, 0)
    if not EARLY:
        dp = tl.dot(dout_rows, tl.trans(v_rows), input_precision="ieee")
    dp -= delta_row[:, None]
    if ALIBI is not None:
        slope_rows += tl.sum(of_slopes * dp, 1)
    return tl.dot((weight * dp).to(k_rows.dtype), k_rows, dq_rows, input_precision="ieee"), slope_rows
