"""One pass over memory to merge one or two normalised outputs of a library into a partial, and to normalise it at the end.

Note [in place]: m and sum are written where they were read, and a program's warps read them twice, once as factors of their own
rows and once for the warp that writes them. Without a barrier the one that writes may be ahead of the others' reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Result(NamedTuple):
    """A library's normalised out [b, i, h, dv] and lse [b, h, i] of those `rows` of a partial.

    `rows` as a tensor, int32 [b, s] and contiguous: which of the rows of out [1, n, h, dv] and lse [1, h, n] is for each of the
    partial's, -1 where none is.
    """

    rows: range | Tensor
    out: Tensor
    lse: Tensor


def merge_call(into: Partial, results: Sequence[Result], target: Tensor | None, *, met_only: bool = False) -> Call:
    """The launch that merges one or two results into `into` [b, s, h, dv], in place.

    With `target` [b, s, h, dv] it is the last merge of all rows, or, with `met_only`, of those from the first to the last that
    a result has: their normalised output goes there and their final lse to `into.m`, while acc and sum are left as they were,
    so that they may be an output in 16 bits and None. Where `target` is that acc, rows that no result has stay what they are.
    """
    everything, in_place = range(into.acc.shape[1]), target is into.acc
    met = [one.rows if isinstance(one.rows, range) else everything for one in results]
    walked = range(min(x.start for x in met), max(x.stop for x in met))
    if target is not None and not (met_only or in_place):
        walked = everything
    blocks = -(-len(walked) // BLOCK)
    b, _, h, dim = into.acc.shape
    first, second = (*results, None)[:2]
    arguments = {
        "acc": rows_of(into.acc),
        "m": numbers_of(into.m),
        "sums": None if into.sum is None else numbers_of(into.sum),
        **_part(first, "first"),
        **_part(second, "second"),
        "target": None if target is None else rows_of(target),
        "start": walked.start,
        "stop": walked.stop,
        "num_rows": len(everything),
        "blocks": blocks,
        "heads": h,
        "LAST": target is not None,
        "IN_PLACE": in_place,
        "DIM": dim,
        "WIDTH": padded(dim),
        "BLOCK": BLOCK,
        "num_warps": 4,
    }
    return Call(merge_kernel, blocks * b * h, arguments)


def _part(result: Result | None, name: str) -> dict:
    """The kernel's arguments about a result, which may be missing."""
    if result is None:
        return {name: None, f"{name}_lse": None, f"{name}_places": None, f"{name}_start": 0, f"{name}_stop": 0}
    rows, out, lse = result
    places, within = (rows, range(0)) if isinstance(rows, Tensor) else (None, rows)
    found = {name: rows_of(out), f"{name}_lse": numbers_of(lse), f"{name}_places": places}
    return found | {f"{name}_start": within.start, f"{name}_stop": within.stop}


@triton.jit(
    do_not_specialize=["num_rows", "start", "stop", "first_start", "first_stop", "second_start", "second_stop", "blocks"]
)
def merge_kernel(
    acc,
    m,
    sums,
    first,
    first_lse,
    first_places,
    first_start,
    first_stop,
    second,
    second_lse,
    second_places,
    second_start,
    second_stop,
    target,
    start,
    stop,
    num_rows,
    blocks,
    heads,
    LAST: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, batch, head = block_at(tl.program_id(0), blocks, heads)
    rows = start + block * BLOCK + tl.arange(0, BLOCK)
    live = rows < stop

    in_first = place_in(first_places, first_start, first_stop, num_rows, rows, live, batch)
    met = in_first[2]
    if second is not None:
        in_second = place_in(second_places, second_start, second_stop, num_rows, rows, live, batch)
        met = met | in_second[2]
    if IN_PLACE:
        live = met
    m_row = load_numbers(at_head(m, batch, head), rows, live, float("-inf"))
    lse_of_first = numbers_in(first_lse, in_first, head)
    m_new = tl.maximum(m_row, lse_of_first)
    if second is not None:
        lse_of_second = numbers_in(second_lse, in_second, head)
        m_new = tl.maximum(m_new, lse_of_second)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)

    kept, weight = tl.exp2((m_row - base) * LOG2E), tl.exp2((lse_of_first - base) * LOG2E)
    l_row = weight + (kept if sums is None else load_numbers(at_head(sums, batch, head), rows, live, 0.0) * kept)
    total = load_rows(at_head(acc, batch, head), rows, live, DIM, WIDTH).to(tl.float32) * kept[:, None]
    total += rows_in(first, in_first, head, DIM, WIDTH) * weight[:, None]
    if second is not None:
        weight = tl.exp2((lse_of_second - base) * LOG2E)
        l_row += weight
        total += rows_in(second, in_second, head, DIM, WIDTH) * weight[:, None]
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


@triton.jit
def place_in(places, start, stop, num_rows, rows, live, batch):
    """(batch row, rows, which are there) of a result that are for those rows."""
    if places is None:
        of, at, there = batch, rows - start, live & (rows >= start) & (rows < stop)
    else:
        of, at = batch * 0, tl.load(places + batch * num_rows + rows, mask=live, other=-1)
        there = at >= 0
    return of, at, there


@triton.jit
def numbers_in(x, place, head):
    """The numbers of a result at such a place, -inf where it has none."""
    return load_numbers(at_head(x, place[0], head), place[1], place[2], float("-inf"))


@triton.jit
def rows_in(x, place, head, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Its rows there, 0 where it has none."""
    return load_rows(at_head(x, place[0], head), place[1], place[2], DIM, WIDTH).to(tl.float32)
