"""The Triton backward: dq in one launch and dk and dv in another.

A program is the only writer of its rows, so sums have one order. One launch for all three takes five products in place of
seven, but was slower on an H200.

Note [final lse]: p = exp(scale * s - lse) with the lse over all keys, so every visit's gradients simply add. A row that met no
key anywhere has lse = -inf; it is read as +inf, which makes its p 0. Mathematics and names as in flash attention 2 (Dao,
arXiv 2307.08691): dv = p^T dout, ds = p * (dout v^T - delta), dq = scale * ds k, dk = scale * ds^T q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_attn.kernels import Upstream
from ring_attn.kernels.sums import Grads, Totals
from ring_attn.kernels.triton_blocks import Config, Configs, Table, chosen, kv_table, padded, query_table
from ring_attn.kernels.triton_prepare import prepared
from ring_attn.kernels.triton_rows import (
    Call,
    Rows,
    at_head,
    blocks_of,
    entry_span,
    load_block,
    load_number_block,
    load_numbers,
    load_rows,
    met_by,
    number_blocks_of,
    numbers_of,
    program_work,
    rows_of,
    store_numbers,
    store_rows,
    whole_block,
)
from ring_attn.kernels.triton_scores import Chain, block_cells, distance, entry_cells, modified, power_of_two, pulled_back
from ring_attn.tiles import Tile


@dataclass(frozen=True)
class Visited:
    """The tensors of a visit's backward, and what makes scores of their products."""

    up: Upstream
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    chain: Chain


def backward_calls(x: Visited, into: Grads, tiles: Sequence[Tile], configs: Configs, *, once: bool) -> Iterator[Call]:
    """The launches of one visit; `once`: no others add to its gradients."""
    own_kv, placed = configs.dkdv, x.chain.placed
    by_tma = None not in _walked_queries(x, own_kv).values()
    passes = [(own_kv, kv_table(tiles, x.k, own_kv.own, least=own_kv.walk if by_tma else 0, placed=placed))]
    if by_tma:
        passes.append((configs.short, kv_table(tiles, x.k, configs.short.own, most=own_kv.walk - 1, placed=placed)))
    passes = [one for one in passes if one[1].busy] or passes[:1]
    to = into.totals(once_q=once, once_kv=once and len(passes) == 1)
    for config, table in passes:
        if table.busy or to.unwritten_kv:
            yield dkdv_call(x, to, table, config)
        to = to._replace(unwritten_kv=False)
    own_q, table = chosen(configs.dq, x.q.shape[2], lambda own: query_table(tiles, x.q, own, placed=placed))
    yield dq_call(x, to, table, own_q)


def dkdv_call(x: Visited, to: Totals, table: Table, config: Config) -> Call:
    """The launch that adds into dk and dv, or writes all of their rows; `table` lists blocks of KV rows."""
    blocks = _walked_queries(x, config)
    arguments = _shared(x, table, config, to.unwritten_kv) | blocks | {"dk": rows_of(to.dk), "dv": rows_of(to.dv)}
    arguments |= {"num_kv": x.k.shape[1], "batches": x.q.shape[0], "BLOCK_N": config.own, "BLOCK_M": config.walk}
    arguments |= {"TMA": None not in blocks.values(), "EARLY": config.early}
    return Call(dkdv_kernel, arguments["programs"] * x.k.shape[2], arguments)


def dq_call(x: Visited, to: Totals, table: Table, config: Config) -> Call:
    """The launch that adds into dq, or writes all of its rows; `table` lists blocks of query rows."""
    blocks = (blocks_of(x.k, config.walk), blocks_of(x.v, config.walk)) if config.tma else (None, None)
    slopes, add_slopes = _slopes(x, to)
    arguments = _shared(x, table, config, to.unwritten_q) | {"dq": rows_of(to.dq), "num_q": x.q.shape[1]}
    arguments |= {"k_blocks": blocks[0], "v_blocks": blocks[1], "TMA": None not in blocks}
    arguments |= {"BLOCK_M": config.own, "BLOCK_N": config.walk, "EARLY": config.early, "MIXED": config.mixed}
    arguments |= {"slopes": slopes, "ALIBI": None if slopes is None else x.chain.alibi}
    return Call(dq_kernel, arguments["programs"] * x.q.shape[2], arguments, add_slopes)


def _slopes(x: Visited, to: Totals) -> tuple[Rows | None, Callable[[], None] | None]:
    """Where the dq kernel writes what each row adds to -d slopes, and what then adds that up; None where nobody wants it."""
    total = None if x.chain.alibi is None else to.score[x.chain.slopes]
    if total is None:
        return None, None
    # Where dq is unwritten, programs write all of their rows.
    make = torch.empty if to.unwritten_q else torch.zeros
    parts = make(x.q.shape[0], x.q.shape[2], x.q.shape[1], dtype=torch.float32, device=x.q.device)
    return numbers_of(parts), lambda: total.sub_(parts.sum((0, 2)))


def _shared(x: Visited, table: Table, config: Config, unwritten: bool) -> dict[str, Any]:
    dout, lse2, delta = prepared(x.up)
    return {
        "q": rows_of(x.q),
        "k": rows_of(x.k),
        "v": rows_of(x.v),
        "dout": rows_of(dout),
        "lse": numbers_of(lse2),
        "delta": numbers_of(delta),
        "table": table.ints,
        "scale": float(x.scale),
        "programs": table.programs if unwritten else table.busy,
        "UNWRITTEN": unwritten,
        "group": x.q.shape[2] // x.k.shape[2],
        "DIM": x.q.shape[3],
        "V_DIM": x.v.shape[3],
        "WIDTH": padded(x.q.shape[3]),
        "V_WIDTH": padded(x.v.shape[3]),
        **x.chain.arguments(x.scale),
        **config.options,
    }


_WALKED = "q_blocks", "dout_blocks", "lse_blocks", "delta_blocks"


def _walked_queries(x: Visited, config: Config) -> dict[str, Any]:
    """What the dk, dv kernel walks over by TMA; all None where that is not wanted, or cannot copy one of them."""
    dout, *numbers = prepared(x.up)
    blocks = *(blocks_of(rows, config.walk) for rows in (x.q, dout)), *(number_blocks_of(n, config.walk) for n in numbers)
    return dict(zip(_WALKED, blocks, strict=True)) if config.tma and None not in blocks else dict.fromkeys(_WALKED)


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
