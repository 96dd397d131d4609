"""The Triton backward: dq in one launch, dk and dv in another. A program is the only writer of its rows: one order of sums.

Note [final lse]: p = exp(scale * s - lse) with the lse over all keys, so every visit's gradients simply add. A row that met no
key anywhere has lse = -inf; it is read as +inf, which makes its p 0. Mathematics and names as in flash attention 2 (Dao,
arXiv 2307.08691): dv = p^T dout, ds = p * (dout v^T - delta), dq = scale * ds k, dk = scale * ds^T q.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ring_attn.kernels import Grads, Upstream
from ring_attn.kernels.triton_blocks import Config, Table, padded
from ring_attn.kernels.triton_rows import (
    LOG2E,
    Call,
    at_head,
    entry_span,
    load_numbers,
    load_rows,
    numbers_of,
    program_work,
    rows_of,
    store_rows,
)


def dkdv_call(
    up: Upstream, q: Tensor, k: Tensor, v: Tensor, table: Table, config: Config, *, scale: float, into: Grads
) -> Call:
    """The launch that adds into dk and dv; `table` lists blocks of KV rows."""
    arguments = _shared(up, q, k, v, table, config, scale)
    arguments |= {"dk": rows_of(into.dk), "dv": rows_of(into.dv), "num_kv": k.shape[1]}
    arguments |= {"BLOCK_N": config.own, "BLOCK_M": config.walk}
    return Call(dkdv_kernel, table.busy * k.shape[2], arguments)


def dq_call(up: Upstream, q: Tensor, k: Tensor, v: Tensor, table: Table, config: Config, *, scale: float, into: Grads) -> Call:
    """The launch that adds into dq; `table` lists blocks of query rows."""
    arguments = _shared(up, q, k, v, table, config, scale)
    arguments |= {"dq": rows_of(into.dq), "num_q": q.shape[1]}
    arguments |= {"BLOCK_M": config.own, "BLOCK_N": config.walk}
    return Call(dq_kernel, table.busy * q.shape[2], arguments)


def _shared(up: Upstream, q: Tensor, k: Tensor, v: Tensor, table: Table, config: Config, scale: float) -> dict[str, Any]:
    dout = up.dout if up.dout.stride(-1) == 1 else up.dout.contiguous()
    return {
        "q": rows_of(q),
        "k": rows_of(k),
        "v": rows_of(v),
        "dout": rows_of(dout),
        "lse": numbers_of(up.lse),
        "delta": numbers_of(up.delta),
        "table": table.ints,
        "scale": float(scale),
        "scale_log2": scale * math.log2(math.e),
        "programs": table.busy,
        "group": q.shape[2] // k.shape[2],
        "DIM": q.shape[3],
        "V_DIM": v.shape[3],
        "WIDTH": padded(q.shape[3]),
        "V_WIDTH": padded(v.shape[3]),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


@triton.jit
def load_lse2(at, rows, live):
    """lse in base 2, +inf for rows that met no key: see Note [final lse]."""
    lse = load_numbers(at, rows, live, float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def add_rows(at, value, rows, live, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Adds value [rows, WIDTH] to the live rows."""
    store_rows(at, load_rows(at, rows, live, DIM, WIDTH) + value, rows, live, DIM, WIDTH)


@triton.jit(do_not_specialize=["num_kv", "programs"])
def dkdv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    table,
    scale,
    scale_log2,
    num_kv,
    programs,
    group,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    kv_head = tl.program_id(0) // programs
    block, batch, first, last = program_work(table, tl.program_id(0) % programs)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    live = columns < num_kv
    block_stop = tl.minimum(block * BLOCK_N + BLOCK_N, num_kv)
    k_rows = load_rows(at_head(k, batch, kv_head), columns, live, DIM, WIDTH)
    v_rows = load_rows(at_head(v, batch, kv_head), columns, live, V_DIM, V_WIDTH)
    dk_rows = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv_rows = tl.zeros((BLOCK_N, V_WIDTH), tl.float32)

    for member in range(group):
        head = kv_head * group + member
        q_at, dout_at = at_head(q, batch, head), at_head(dout, batch, head)
        lse_at, delta_at = at_head(lse, batch, head), at_head(delta, batch, head)
        for entry in range(first, last, 8):
            low, high, start, stop, clear_start, clear_stop = entry_span(table + entry, columns, block * BLOCK_N, block_stop)
            for i in tl.range(start, stop, BLOCK_M):
                rows = i + tl.arange(0, BLOCK_M)
                met = rows < stop
                q_rows = load_rows(q_at, rows, met, DIM, WIDTH)
                st = tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee")
                pt = tl.exp2(st * scale_log2 - load_lse2(lse_at, rows, met)[None, :])
                if (i < clear_start) | (i + BLOCK_M > clear_stop):
                    pt = tl.where((rows[None, :] >= low[:, None]) & (rows[None, :] <= high[:, None]), pt, 0.0)
                dout_rows = load_rows(dout_at, rows, met, V_DIM, V_WIDTH)
                dv_rows = tl.dot(pt.to(dout_rows.dtype), dout_rows, dv_rows, input_precision="ieee")
                dpt = tl.dot(v_rows, tl.trans(dout_rows), input_precision="ieee")
                dst = pt * (dpt - load_numbers(delta_at, rows, met, 0.0)[None, :])
                dk_rows = tl.dot(dst.to(q_rows.dtype), q_rows, dk_rows, input_precision="ieee")

    add_rows(at_head(dk, batch, kv_head), dk_rows * scale, columns, live, DIM, WIDTH)
    add_rows(at_head(dv, batch, kv_head), dv_rows, columns, live, V_DIM, V_WIDTH)


@triton.jit(do_not_specialize=["num_q", "programs"])
def dq_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
    table,
    scale,
    scale_log2,
    num_q,
    programs,
    group,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    lse2 = load_lse2(at_head(lse, batch, head), rows, live)
    delta_row = load_numbers(at_head(delta, batch, head), rows, live, 0.0)
    dq_rows = tl.zeros((BLOCK_M, WIDTH), tl.float32)

    for entry in range(first, last, 8):
        low, high, start, stop, clear_start, clear_stop = entry_span(table + entry, rows, block * BLOCK_M, block_stop)
        for j in tl.range(start, stop, BLOCK_N):
            columns = j + tl.arange(0, BLOCK_N)
            met = columns < stop
            k_rows = load_rows(k_at, columns, met, DIM, WIDTH)
            s = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
            p = tl.exp2(s * scale_log2 - lse2[:, None])
            if (j < clear_start) | (j + BLOCK_N > clear_stop):
                p = tl.where((columns[None, :] >= low[:, None]) & (columns[None, :] <= high[:, None]), p, 0.0)
            v_rows = load_rows(v_at, columns, met, V_DIM, V_WIDTH)
            ds = p * (tl.dot(dout_rows, tl.trans(v_rows), input_precision="ieee") - delta_row[:, None])
            dq_rows = tl.dot(ds.to(k_rows.dtype), k_rows, dq_rows, input_precision="ieee")

    add_rows(at_head(dq, batch, head), dq_rows * scale, rows, live, DIM, WIDTH)
