"""What one consumer of the Gluon forward does with one entry of the block table.

Note [walk]: an entry's span [start, stop) is walked in blocks counted from its end, so the diagonal comes first; what is left
at the start is met by a block moved up to `start`, which meets some rows twice and counts them once. So no block reaches past
the span, where memory may hold anything, unless the whole span is shorter than a block: its V is then cleared past `stop`,
since TMA copied what is there and 0 * NaN is no 0. Blocks that need a mask come first, then those that need none.

Note [held softmax]: nothing that ptxas knows of orders the softmax of block i before the wait for P V of block i - 1, and it
puts the wait first, which undoes the overlap. `_hold` makes a warp barrier, which it moves over no wait, need the softmax's
result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ring_attn.kernels import triton_rows

CONSUMER_ROWS = gl.constexpr(64)
# The first consumer's named barrier, the others' follow. Triton's own take the lowest ids.
TURN = gl.constexpr(9)

_entry_span = gluon.jit(triton_rows.entry_span.fn)


class Shared(NamedTuple):
    """Shared memory: buffers of a block of rows, and the mbarriers that hand them over."""

    q: Any
    k: Any
    v: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any
    v_cleared: Any


class Work(NamedTuple):
    """What a program does: its entries in the table are [first, last), its query rows [block_start, block_stop)."""

    table: Any
    batch: Any
    head: Any
    kv_head: Any
    first: Any
    last: Any
    block_start: Any
    block_stop: Any


class Span(NamedTuple):
    """What `entry_span` of the Triton kernels says of own rows and one entry."""

    low: Any
    high: Any
    start: Any
    stop: Any
    clear_start: Any
    clear_stop: Any


class Walk(NamedTuple):
    """The order of an entry's blocks, see Note [walk]: of `count` blocks the first `masked` need a mask.

    Counted from the end of the span, those are the first `right` and those past the clear ones.
    """

    count: Any
    right: Any
    masked: Any


@gluon.jit
def span_of(work, entry, rows):
    """The span of an entry for `rows` of the program's block."""
    low, high, start, stop, clear_start, clear_stop = _entry_span(work.table + entry, rows, work.block_start, work.block_stop)
    return Span(low, high, start, stop, clear_start, clear_stop)


@gluon.jit
def walk_of(span, BLOCK: gl.constexpr):
    """The walk over a span in blocks of that many rows."""
    # An empty span is walked as one block of which no row counts.
    count = gl.maximum((span.stop - span.start + BLOCK - 1) // BLOCK, 1)
    right = gl.minimum(gl.maximum((span.stop - span.clear_stop + BLOCK - 1) // BLOCK, 1), count)
    clear = gl.maximum((span.stop - span.clear_start) // BLOCK - right, 0)
    return Walk(count, right, count - clear)


@gluon.jit
def place_of(step, span, walk, BLOCK: gl.constexpr):
    """(place, limit) of the block met at `step`: it holds the rows from `place`, and those before `limit` are new."""
    left = gl.where(step < walk.masked, step + (walk.count - walk.masked), step - (walk.masked - walk.right))
    i = gl.where(step < walk.right, step, left)
    return gl.maximum(span.stop - (i + 1) * BLOCK, span.start), span.stop - i * BLOCK


@gluon.jit
def attend_overlapped(
    m2, l_row, total, met, cleared, span, shared, scale_log2, PART: gl.constexpr, DIM: gl.constexpr, CONFIG: gl.constexpr
):
    """(m2, l, total, met, cleared) after one entry, with products in flight beside the softmax.

    `met`: how many blocks the program has met so far, and `cleared` how many of them had to be cleared.
    """
    walk = walk_of(span, CONFIG.walk)
    slot = met % CONFIG.buffers
    mbarrier.wait(shared.k_full.index(slot), (met // CONFIG.buffers) & 1)
    if CONFIG.ping_pong:
        turn_wait(TURN + PART)
    scores = _issue_scores(shared, slot, PART, DIM, CONFIG)
    if CONFIG.ping_pong:
        turn_arrive(TURN + (PART + 1) % CONFIG.consumers)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(shared.k_empty.index(slot))
    scores = _masked(scores, 0, span, walk, CONFIG)
    p, m2, l_row, rescale = _softmax(scores, m2, l_row, scale_log2, True)
    total = _rescaled(total, rescale)
    p = _operand(p, total, shared)

    for step in range(1, walk.masked):
        p, m2, l_row, total = _turn(step, True, p, m2, l_row, total, met, span, walk, shared, scale_log2, PART, DIM, CONFIG)
        met += 1
    for step in range(walk.masked, walk.count):
        p, m2, l_row, total = _turn(step, False, p, m2, l_row, total, met, span, walk, shared, scale_log2, PART, DIM, CONFIG)
        met += 1

    slot = met % CONFIG.buffers
    mbarrier.wait(shared.v_full.index(slot), (met // CONFIG.buffers) & 1)
    cleared = _clear(shared, slot, span, cleared, PART, DIM, CONFIG)
    total = warpgroup_mma_wait(0, deps=[_issue_total(p, total, shared, slot, DIM, CONFIG)])
    mbarrier.arrive(shared.v_empty.index(slot))
    return m2, l_row, total, met + 1, cleared


@gluon.jit
def _turn(
    step,
    MASK: gl.constexpr,
    p,
    m2,
    l_row,
    total,
    met,
    span,
    walk,
    shared,
    scale_log2,
    PART: gl.constexpr,
    DIM: gl.constexpr,
    CONFIG: gl.constexpr,
):
    """(p, m2, l, total) after the scores and the softmax of the block met at `step`, and the product of the one before it."""
    slot, before = (met + 1) % CONFIG.buffers, met % CONFIG.buffers
    mbarrier.wait(shared.k_full.index(slot), ((met + 1) // CONFIG.buffers) & 1)
    if CONFIG.ping_pong:
        turn_wait(TURN + PART)
    scores = _issue_scores(shared, slot, PART, DIM, CONFIG)
    mbarrier.wait(shared.v_full.index(before), (met // CONFIG.buffers) & 1)
    total = _issue_total(p, total, shared, before, DIM, CONFIG)
    if CONFIG.ping_pong:
        turn_arrive(TURN + (PART + 1) % CONFIG.consumers)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(shared.k_empty.index(slot))
    if MASK:
        scores = _masked(scores, step, span, walk, CONFIG)
    p_next, m2, l_row, rescale = _softmax(scores, m2, l_row, scale_log2, MASK)
    l_row = _hold(l_row)
    total, p = warpgroup_mma_wait(0, deps=[total, p])
    mbarrier.arrive(shared.v_empty.index(before))
    total = _rescaled(total, rescale)
    return _operand(p_next, total, shared), m2, l_row, total


@gluon.jit
def attend_plainly(
    m2, l_row, total, met, cleared, span, shared, scale_log2, PART: gl.constexpr, DIM: gl.constexpr, CONFIG: gl.constexpr
):
    """`attend_overlapped` with every product waited for."""
    walk = walk_of(span, CONFIG.walk)
    for step in range(walk.count):
        slot, phase = met % CONFIG.buffers, (met // CONFIG.buffers) & 1
        mbarrier.wait(shared.k_full.index(slot), phase)
        scores = warpgroup_mma_wait(0, deps=[_issue_scores(shared, slot, PART, DIM, CONFIG)])
        mbarrier.arrive(shared.k_empty.index(slot))
        scores = _masked(scores, step, span, walk, CONFIG)
        p, m2, l_row, rescale = _softmax(scores, m2, l_row, scale_log2, True)
        total = _rescaled(total, rescale)
        mbarrier.wait(shared.v_full.index(slot), phase)
        cleared = _clear(shared, slot, span, cleared, PART, DIM, CONFIG)
        p = _operand(p, total, shared)
        total = warpgroup_mma_wait(0, deps=[_issue_total(p, total, shared, slot, DIM, CONFIG)])
        mbarrier.arrive(shared.v_empty.index(slot))
        met += 1
    return m2, l_row, total, met, cleared


@gluon.jit
def _issue_scores(shared, slot, PART: gl.constexpr, DIM: gl.constexpr, CONFIG: gl.constexpr):
    """Q K' of a buffer, in flight."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CONFIG.walk, 16])
    nothing = gl.full([CONSUMER_ROWS, CONFIG.walk], 0.0, gl.float32, layout)
    q_tile = shared.q.index(PART).reshape([CONSUMER_ROWS, DIM])
    k_tile = shared.k.index(slot).reshape([CONFIG.walk, DIM])
    return warpgroup_mma(q_tile, k_tile.permute([1, 0]), nothing, use_acc=False, is_async=True)


@gluon.jit
def _issue_total(p, total, shared, slot, DIM: gl.constexpr, CONFIG: gl.constexpr):
    """total + P V of a buffer, in flight."""
    return warpgroup_mma(p, shared.v.index(slot).reshape([CONFIG.walk, DIM]), total, is_async=True)


@gluon.jit
def _masked(scores, step, span, walk, CONFIG: gl.constexpr):
    """The scores of the block met at `step`, -inf where a row does not meet a column or has met it before."""
    place, limit = place_of(step, span, walk, CONFIG.walk)
    columns = gl.arange(0, CONFIG.walk, gl.SliceLayout(0, scores.type.layout))[None, :]
    met = (columns >= (span.low - place)[:, None]) & (columns <= (gl.minimum(span.high, limit - 1) - place)[:, None])
    return gl.where(met, scores, float("-inf"))


@gluon.jit
def _softmax(scores, m2, l_row, scale_log2, MASK: gl.constexpr):
    """(p, m2, l, rescale): the online softmax with one more block of raw scores. Without MASK every row has met a key."""
    m2_next = gl.maximum(m2, gl.max(scores, 1) * scale_log2)
    base = m2_next
    if MASK:
        base = gl.where(m2_next == float("-inf"), 0.0, m2_next)
    p = gl.exp2(scores * scale_log2 - base[:, None])
    rescale = gl.exp2(m2 - base)
    return p, m2_next, l_row * rescale + gl.sum(p, 1), rescale


@gluon.jit
def _rescaled(total, rescale):
    return total * gl.convert_layout(rescale, gl.SliceLayout(1, total.type.layout))[:, None]


@gluon.jit
def _operand(p, total, shared):
    """p as the left operand, in registers, of the product that adds to `total`."""
    return gl.convert_layout(p.to(shared.v.dtype), gl.DotOperandLayout(0, total.type.layout, 2))


@gluon.jit
def _hold(l_row):
    """l_row, see Note [held softmax]. The barrier's mask is full, as l is not negative, but ptxas cannot know."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 sign; shr.s32 sign, $1, 31; not.b32 sign, sign; bar.warp.sync sign; mov.b32 $0, $1; }",
        "=r,r",
        [l_row],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _clear(shared, slot, span, cleared, PART: gl.constexpr, DIM: gl.constexpr, CONFIG: gl.constexpr):
    """Zeroes the rows of a V buffer that lie past the entry, see Note [walk]; returns how often that was done so far.

    The consumers share the strips, and wait for each other.
    """
    if span.stop - span.start < CONFIG.walk:
        v_tile = shared.v.index(slot).reshape([CONFIG.walk, DIM])
        STRIPS: gl.constexpr = CONFIG.walk // 16
        for strip in gl.static_range(STRIPS):
            if strip % CONFIG.consumers == PART:
                _clear_strip(v_tile, span.stop - span.start, strip * 16, DIM)
        # What TMA wrote and the tensor cores read goes by another proxy than these stores.
        fence_async_shared()
        mbarrier.arrive(shared.v_cleared.index(0))
        mbarrier.wait(shared.v_cleared.index(0), cleared & 1)
        cleared += 1
    return cleared


@gluon.jit
def _clear_strip(v_tile, rest, FIRST: gl.constexpr, DIM: gl.constexpr):
    """Zeroes those of the 16 rows from FIRST that are not among the first `rest` of the tile."""
    if rest < FIRST + 16:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
        strip = v_tile.slice(FIRST, 16)
        here = FIRST + gl.arange(0, 16, gl.SliceLayout(1, layout)) < rest
        strip.store(gl.where(here[:, None], strip.load(layout), 0.0))


@gluon.constexpr_function
def _named_barrier(operation, identity):
    return f"bar.{operation} {identity}, 256; mov.u32 $0, 0;"


@gluon.jit
def turn_wait(ID: gl.constexpr):
    """Waits for the turn that the consumer before this one hands over."""
    gl.inline_asm_elementwise(_named_barrier("sync", ID), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def turn_arrive(ID: gl.constexpr):
    """Hands the turn to the consumer with that barrier."""
    gl.inline_asm_elementwise(_named_barrier("arrive", ID), "=r", [], dtype=gl.int32, is_pure=False, pack=1)
