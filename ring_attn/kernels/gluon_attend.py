"""What one consumer of the Gluon forward does with one entry of the block table.

Note [held softmax]: nothing that ptxas knows of orders the softmax of block i before the wait for P V of block i - 1, and it
puts the wait first, which undoes the overlap. `_hold` makes a warp barrier, which it moves over no wait, need the softmax's
result.

Note [packed weights]: a loop carries 16-bit values a register each, and takes them apart and together again at every turn. So
the weights P are carried as int32, two of a row's neighbours each, which is what the tensor cores read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ring_attn.kernels.gluon_work import CONSUMER_ROWS, place_of, walk_of


@gluon.jit
def attend_overlapped(m2, l_part, total, met, cleared, span, free_q, shared, factors, PART: gl.constexpr, CONFIG: gl.constexpr):
    """(m2, l, total, met, cleared) after one entry, with products in flight beside the softmax.

    `met`: how many blocks the consumer has met so far, and `cleared` how many of them had to be cleared. `free_q`: the entry is
    the last one that reads Q.
    """
    walk = walk_of(span, CONFIG.walk)
    slot = met % CONFIG.buffers
    mbarrier.wait(shared.k_full.index(slot), (met // CONFIG.buffers) & 1)
    scores = warpgroup_mma_wait(0, deps=[_issue_scores(shared, slot, PART, CONFIG)])
    mbarrier.arrive(shared.k_empty.index(slot))
    scores = _masked(_bent(scores, factors), 0, span, walk, CONFIG)
    p, m2, l_part, rescale = _softmax(scores, m2, l_part, factors, True)
    p = _packed(p, shared)

    total = _rescaled(total, rescale)
    for step in range(1, walk.masked):
        p, m2, l_part, total = _turn(step, True, p, m2, l_part, total, met, span, walk, shared, factors, PART, CONFIG)
        met += 1
    for step in range(walk.masked, walk.count):
        p, m2, l_part, total = _turn(step, False, p, m2, l_part, total, met, span, walk, shared, factors, PART, CONFIG)
        met += 1
    mbarrier.arrive(shared.q_empty.index(PART), pred=free_q)

    slot = met % CONFIG.buffers
    mbarrier.wait(shared.v_full.index(slot), (met // CONFIG.buffers) & 1)
    cleared = _clear(shared, slot, span, cleared, PART, CONFIG)
    total = warpgroup_mma_wait(0, deps=[_issue_total(p, total, shared, slot, CONFIG)])
    mbarrier.arrive(shared.v_empty.index(slot))
    return m2, l_part, total, met + 1, cleared


@gluon.jit
def _turn(
    step,
    MASK: gl.constexpr,
    p,
    m2,
    l_part,
    total,
    met,
    span,
    walk,
    shared,
    factors,
    PART: gl.constexpr,
    CONFIG: gl.constexpr,
):
    """(p, m2, l, total) after the scores and the softmax of the block met at `step`, and the product of the one before it."""
    slot, before = (met + 1) % CONFIG.buffers, met % CONFIG.buffers
    mbarrier.wait(shared.k_full.index(slot), ((met + 1) // CONFIG.buffers) & 1)
    scores = _issue_scores(shared, slot, PART, CONFIG)
    mbarrier.wait(shared.v_full.index(before), (met // CONFIG.buffers) & 1)
    total = _issue_total(p, total, shared, before, CONFIG)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(shared.k_empty.index(slot))
    scores = _bent(scores, factors)
    if MASK:
        scores = _masked(scores, step, span, walk, CONFIG)
    p_next, m2, l_part, rescale = _softmax(scores, m2, l_part, factors, MASK)
    l_part = _hold(l_part)
    total, p = warpgroup_mma_wait(0, deps=[total, p])
    mbarrier.arrive(shared.v_empty.index(before))
    return _packed(p_next, shared), m2, l_part, _rescaled(total, rescale)


@gluon.jit
def attend_plainly(m2, l_part, total, met, cleared, span, free_q, shared, factors, PART: gl.constexpr, CONFIG: gl.constexpr):
    """`attend_overlapped` with every product waited for: fewer registers, for more consumers."""
    walk = walk_of(span, CONFIG.walk)
    for step in range(walk.masked):
        m2, l_part, total, cleared = _plain_turn(
            step, True, m2, l_part, total, met, cleared, span, walk, shared, factors, PART, CONFIG
        )
        met += 1
    for step in range(walk.masked, walk.count):
        m2, l_part, total, cleared = _plain_turn(
            step, False, m2, l_part, total, met, cleared, span, walk, shared, factors, PART, CONFIG
        )
        met += 1
    mbarrier.arrive(shared.q_empty.index(PART), pred=free_q)
    return m2, l_part, total, met, cleared


@gluon.jit
def _plain_turn(
    step,
    MASK: gl.constexpr,
    m2,
    l_part,
    total,
    met,
    cleared,
    span,
    walk,
    shared,
    factors,
    PART: gl.constexpr,
    CONFIG: gl.constexpr,
):
    slot, phase = met % CONFIG.buffers, (met // CONFIG.buffers) & 1
    mbarrier.wait(shared.k_full.index(slot), phase)
    scores = warpgroup_mma_wait(0, deps=[_issue_scores(shared, slot, PART, CONFIG)])
    mbarrier.arrive(shared.k_empty.index(slot))
    scores = _bent(scores, factors)
    if MASK:
        scores = _masked(scores, step, span, walk, CONFIG)
    p, m2, l_part, rescale = _softmax(scores, m2, l_part, factors, MASK)
    total = _rescaled(total, rescale)
    mbarrier.wait(shared.v_full.index(slot), phase)
    if MASK:
        cleared = _clear(shared, slot, span, cleared, PART, CONFIG)
    total = warpgroup_mma_wait(0, deps=[_issue_total(_packed(p, shared), total, shared, slot, CONFIG)])
    mbarrier.arrive(shared.v_empty.index(slot))
    return m2, l_part, total, cleared


@gluon.jit
def _issue_scores(shared, slot, PART: gl.constexpr, CONFIG: gl.constexpr):
    """Q K' of a buffer, in flight."""
    DIM: gl.constexpr = shared.q.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CONFIG.walk, 16])
    nothing = gl.full([CONSUMER_ROWS, CONFIG.walk], 0.0, gl.float32, layout)
    q_tile = shared.q.index(PART).reshape([CONSUMER_ROWS, DIM])
    k_tile = shared.k.index(slot).reshape([CONFIG.walk, DIM])
    return warpgroup_mma(q_tile, k_tile.permute([1, 0]), nothing, use_acc=False, is_async=True)


@gluon.jit
def _issue_total(p, total, shared, slot, CONFIG: gl.constexpr):
    """total + P V of a buffer, in flight."""
    DIM: gl.constexpr = shared.q.shape[4]
    return warpgroup_mma(_operand(p, total, shared), shared.v.index(slot).reshape([CONFIG.walk, DIM]), total, is_async=True)


@gluon.jit
def _masked(scores, step, span, walk, CONFIG: gl.constexpr):
    """The scores of the block met at `step`, -inf where a row does not meet a column or has met it before.

    Column 8 a + 2 b + c is a thread's own for one b alone: bounds that b is taken from are compared with constants.
    """
    place, limit = place_of(step, span, walk, CONFIG.walk)
    apart = scores.reshape([CONSUMER_ROWS, CONFIG.walk // 8, 4, 2])
    layout: gl.constexpr = apart.type.layout
    eighths = gl.arange(0, CONFIG.walk // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    pair = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    lanes = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))[None, None, :, None] * 2
    columns = eighths[None, :, None, None] * 8 + pair[None, None, None, :]
    low = _over_apart(span.low - place, layout) - lanes
    high = _over_apart(gl.minimum(span.high, limit - 1) - place, layout) - lanes
    masked = gl.where((columns >= low) & (columns <= high), apart, float("-inf"))
    return gl.convert_layout(masked.reshape([CONSUMER_ROWS, CONFIG.walk]), scores.type.layout)


@gluon.jit
def _over_apart(x, LAYOUT: gl.constexpr):
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    return gl.convert_layout(x, rows)[:, None, None, None]


@gluon.jit
def _bent(scores, factors):
    """What a softcap makes of products, its last factor left to do; products where there is none."""
    if factors[0] is not None:
        scores = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [scores * factors[0]], dtype=gl.float32, is_pure=True, pack=1
        )
    return scores


@gluon.jit
def _softmax(scores, m2, l_part, factors, MASK: gl.constexpr):
    """(p, m2, l, rescale): the online softmax with one more block of scores. Without MASK every row has met a key."""
    scale_log2 = factors[1]
    m2_next = gl.maximum(m2, gl.max(scores, 1) * scale_log2)
    base = m2_next
    if MASK:
        base = gl.where(m2_next == float("-inf"), 0.0, m2_next)
    p = gl.exp2(scores * scale_log2 - base[:, None])
    rescale = gl.exp2(m2 - base)
    l_part = l_part * _over_lanes(rescale, l_part) + lane_sums(p)
    return p, m2_next, l_part, rescale


@gluon.jit
def lane_sums(p):
    """[rows, 4]: the sums of p [rows, walk] over what each thread holds of a row, so that no threads need to meet."""
    return gl.sum(gl.sum(p.reshape([CONSUMER_ROWS, p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _over_lanes(x, l_part):
    return gl.convert_layout(x, gl.SliceLayout(1, l_part.type.layout))[:, None]


@gluon.jit
def _rescaled(total, rescale):
    return total * gl.convert_layout(rescale, gl.SliceLayout(1, total.type.layout))[:, None]


@gluon.jit
def _packed(p, shared):
    """p rounded to the dtype of V, two neighbours to an int32: see Note [packed weights]."""
    low, high = gl.split(p.reshape([CONSUMER_ROWS, p.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(_packing(shared.v.dtype), "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.constexpr_function
def _packing(dtype):
    return f"cvt.rn.{'bf16x2' if dtype == gl.bfloat16 else 'f16x2'}.f32 $0, $2, $1;"


@gluon.jit
def _operand(packed, total, shared):
    """What was packed as the left operand, in registers, of the product that adds to `total`."""
    low = packed.to(gl.int16).to(shared.v.dtype, bitcast=True)
    high = (packed >> 16).to(gl.int16).to(shared.v.dtype, bitcast=True)
    p = gl.join(low, high).reshape([CONSUMER_ROWS, packed.shape[1] * 2])
    return gl.convert_layout(p, gl.DotOperandLayout(0, total.type.layout, 2))


@gluon.jit
def _hold(l_part):
    """l_part, see Note [held softmax]. The barrier's mask is full, as l is not negative, but ptxas cannot know."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 sign; shr.s32 sign, $1, 31; not.b32 sign, sign; bar.warp.sync sign; mov.b32 $0, $1; }",
        "=r,r",
        [l_part],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _clear(shared, slot, span, cleared, PART: gl.constexpr, CONFIG: gl.constexpr):
    """Zeroes the rows of a V buffer that lie past the entry, see Note [walk] of gluon_work; returns how often it has so far.

    The consumers share the strips, and wait for each other.
    """
    if span.stop - span.start < CONFIG.walk:
        DIM: gl.constexpr = shared.q.shape[4]
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
