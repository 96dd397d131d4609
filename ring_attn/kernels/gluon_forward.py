"""The Gluon forward for sm_90: the visit, table and partial of the Triton forward, scheduled by hand over groups of warps.

Note [schedule]: an item is a block of query rows of one head. A producer warp copies Q, and K and V block by block, into
shared memory with TMA; two or three consumer warpgroups of 64 rows each attend. A consumer issues Q K' of block i and then P V
of block i - 1, waits for the first only, and computes the softmax of block i while the tensor cores still work on the second
(Shah et al., FlashAttention-3, arXiv 2407.08608). Buffers are handed over by mbarriers: `full` counts TMA's bytes, `empty` the
consumers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ring_attn.kernels import triton_rows
from ring_attn.kernels.gluon_attend import attend_overlapped, attend_plainly, lane_sums
from ring_attn.kernels.gluon_work import CONSUMER_ROWS, Queue, Shared, item_of, laps_of, place_of, span_of, walk_of, work_of
from ring_attn.kernels.tilewise import Scaling
from ring_attn.kernels.triton_blocks import Table
from ring_attn.kernels.triton_rows import LEFT_BELOW, LN2, LOG2E, Call, visit_arguments
from ring_attn.partial import Partial

at_head = gluon.jit(triton_rows.at_head.fn)
load_numbers = gluon.jit(triton_rows.load_numbers.fn)
store_numbers = gluon.jit(triton_rows.store_numbers.fn)


@dataclass(frozen=True)
class GluonConfig:
    """One launch: `walk` KV rows are met at a time, in `buffers` buffers, by `consumers` warpgroups, see Note [schedule].

    `overlap`: products are in flight beside the softmax of the same consumer; without it consumers cover each other's waits,
    in fewer registers. `registers`: of each thread of a consumer and of the producer.
    """

    walk: int
    buffers: int
    consumers: int = 2
    overlap: bool = True
    registers: tuple[int, int] = (240, 24)

    @property
    def own(self) -> int:
        """The query rows of a program."""
        return self.consumers * CONSUMER_ROWS.value


# Keyed by head dim; tests/kernels/test_gluon_compile.py holds every line to its registers and shared memory.
_TABLE = {
    64: GluonConfig(128, 3, consumers=3, overlap=False, registers=(160, 32)),
    128: GluonConfig(128, 2),
}


def config_for(head_dim: int) -> GluonConfig:
    """The launch configuration for a head dim of 64 or 128."""
    return _TABLE[head_dim]


def forward_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Table,
    config: GluonConfig,
    *,
    scaling: Scaling,
    carried: Partial | None,
    target: Partial,
    out: Tensor | None,
) -> Call:
    """The launch that brings `target` to the partial of q, k, v over the table's tiles and of `carried`, if any.

    What `carried` has is the target's. With `out` it is the last visit: out [b, s, h, d] is written, the final lse to target's
    m, and target's acc and sum are not.
    """
    visit, heads = visit_arguments(q, k, table, carried, target, out), q.shape[2]
    items = visit["programs"] * heads
    arguments = {
        "q": described(q, CONSUMER_ROWS.value),
        "k": described(k, config.walk),
        "v": described(v, config.walk),
        **visit,
        "factors": factors_of(scaling.scale, scaling.softcap),
        "items": items,
        "heads": heads,
        "CONFIG": config,
        "num_warps": 4,
    }
    return Call(forward_kernel, min(items, multiprocessors(q.device)), arguments)


def factors_of(scale: float, softcap: float) -> tuple[float | None, float]:
    """What is multiplied by before a softcap's tanh, None where it is 0, and what brings scores to base 2.

    See Note [chain] of triton_scores.
    """
    return (scale / softcap, softcap * math.log2(math.e)) if softcap else (None, scale * math.log2(math.e))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """The TMA descriptor of blocks of `rows` rows of one batch row and head of x [b, s, h, d].

    Rows past the last are read as 0. TMA wants addresses and strides in multiples of 16 bytes: x is copied where they are not.
    """
    if x.numel() == 0:
        # Nothing reads it, but a descriptor has no empty dimension.
        x = x.new_zeros([max(1, size) for size in x.shape])
    alike = _alike(x.shape, x.stride(), rows, x.dtype)
    if alike is None or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
        alike = _alike(x.shape, x.stride(), rows, x.dtype)
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(alike.__dict__, base=x)
    return descriptor


@lru_cache(maxsize=1024)
def _alike(shape: torch.Size, strides: tuple[int, ...], rows: int, dtype: torch.dtype) -> TensorDescriptor | None:
    """The descriptor of a tensor like that, None where TMA cannot take its strides; kept, as checking it is slow."""
    # What nothing steps over may have any stride: one that TMA takes.
    over_b, over_s, over_h = (stride if size > 1 else 8 for size, stride in zip(shape[:3], strides[:3], strict=True))
    if any(stride % 8 or not stride for stride in (over_b, over_s, over_h)):
        return None
    b, s, h, d = shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    memory = torch.empty(8, dtype=dtype, device="cpu")
    return TensorDescriptor(memory, [b, h, s, d], [over_b, over_h, over_s, 1], [1, 1, rows, d], layout)


@gluon.jit(do_not_specialize=["num_q", "programs", "items"])
def forward_kernel(
    q,
    k,
    v,
    acc,
    m,
    sums,
    out,
    table,
    factors,
    num_q,
    programs,
    items,
    group,
    heads,
    CARRIED: gl.constexpr,
    ADDING: gl.constexpr,
    LAST: gl.constexpr,
    DIM: gl.constexpr,
    CONFIG: gl.constexpr,
):
    shared = Shared(
        gl.allocate_shared_memory(q.dtype, [CONFIG.consumers, 1, 1, CONSUMER_ROWS, DIM], q.layout),
        gl.allocate_shared_memory(q.dtype, [CONFIG.buffers, 1, 1, CONFIG.walk, DIM], k.layout),
        gl.allocate_shared_memory(q.dtype, [CONFIG.buffers, 1, 1, CONFIG.walk, DIM], v.layout),
        _barriers(CONFIG.consumers, 1),
        _barriers(CONFIG.consumers, 1),
        _barriers(CONFIG.buffers, 1),
        _barriers(CONFIG.buffers, 1),
        _barriers(CONFIG.buffers, CONFIG.consumers),
        _barriers(CONFIG.buffers, CONFIG.consumers),
        _barriers(1, CONFIG.consumers),
    )
    fence_async_shared()
    queue = Queue(table, num_q, programs, items, group, heads)
    memory = (acc, m, sums, out)
    if CONFIG.consumers == 2:
        gl.warp_specialize(
            [
                (_consume, (shared, queue, memory, factors, 0, CARRIED, ADDING, LAST, DIM, CONFIG)),
                (_consume, (shared, queue, memory, factors, 1, CARRIED, ADDING, LAST, DIM, CONFIG)),
                (_produce, (q, k, v, shared, queue, DIM, CONFIG)),
            ],
            [4, 1],
            [CONFIG.registers[0], CONFIG.registers[1]],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (shared, queue, memory, factors, 0, CARRIED, ADDING, LAST, DIM, CONFIG)),
                (_consume, (shared, queue, memory, factors, 1, CARRIED, ADDING, LAST, DIM, CONFIG)),
                (_consume, (shared, queue, memory, factors, 2, CARRIED, ADDING, LAST, DIM, CONFIG)),
                (_produce, (q, k, v, shared, queue, DIM, CONFIG)),
            ],
            [4, 4, 1],
            [CONFIG.registers[0], CONFIG.registers[0], CONFIG.registers[1]],
        )


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT mbarriers, each of which waits for ARRIVALS arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def _produce(q, k, v, shared, queue, DIM: gl.constexpr, CONFIG: gl.constexpr):
    """Copies each item's Q, and the K and V blocks of all its entries in the order in which they are consumed."""
    met = 0
    for lap in range(laps_of(queue)):
        item = item_of(lap)
        if item < queue.items:
            work = work_of(queue, item, CONFIG.own)
            CONSUMERS: gl.constexpr = CONFIG.consumers
            for part in gl.static_range(CONSUMERS):
                # A fresh barrier counts as having completed the phase before its first.
                mbarrier.wait(shared.q_empty.index(part), (lap & 1) ^ 1)
                mbarrier.expect(shared.q_full.index(part), CONSUMER_ROWS * DIM * 2)
                at = [work.batch, work.head, work.block_start + part * CONSUMER_ROWS, 0]
                tma.async_copy_global_to_shared(q, at, shared.q_full.index(part), shared.q.index(part))
            for entry in range(work.first, work.last, 8):
                span = span_of(work, entry, work.block_start)
                walk = walk_of(span, CONFIG.walk)
                for step in range(walk.count):
                    place, _ = place_of(step, span, walk, CONFIG.walk)
                    at = [work.batch, work.kv_head, place, 0]
                    slot, phase = met % CONFIG.buffers, (met // CONFIG.buffers) & 1
                    _copy(
                        k, at, shared.k.index(slot), shared.k_full.index(slot), shared.k_empty.index(slot), phase, DIM, CONFIG
                    )
                    _copy(
                        v, at, shared.v.index(slot), shared.v_full.index(slot), shared.v_empty.index(slot), phase, DIM, CONFIG
                    )
                    met += 1


@gluon.jit
def _copy(x, at, buffer, full, empty, phase, DIM: gl.constexpr, CONFIG: gl.constexpr):
    mbarrier.wait(empty, phase ^ 1)
    mbarrier.expect(full, CONFIG.walk * DIM * 2)
    tma.async_copy_global_to_shared(x, at, full, buffer)


@gluon.jit
def _consume(
    shared,
    queue,
    memory,
    factors,
    PART: gl.constexpr,
    CARRIED: gl.constexpr,
    ADDING: gl.constexpr,
    LAST: gl.constexpr,
    DIM: gl.constexpr,
    CONFIG: gl.constexpr,
):
    """Attends for a consumer's part of each item's query rows."""
    met, cleared = 0, 0
    for lap in range(laps_of(queue)):
        item = item_of(lap)
        if item < queue.items:
            work = work_of(queue, item, CONFIG.own)
            met, cleared = _consume_one(
                shared, work, lap & 1, met, cleared, memory, factors, PART, CARRIED, ADDING, LAST, DIM, CONFIG
            )


@gluon.jit
def _consume_one(
    shared,
    work,
    phase,
    met,
    cleared,
    memory,
    factors,
    PART: gl.constexpr,
    CARRIED: gl.constexpr,
    ADDING: gl.constexpr,
    LAST: gl.constexpr,
    DIM: gl.constexpr,
    CONFIG: gl.constexpr,
):
    """(met, cleared) after an item, from the carried state to memory."""
    acc, m, sums, out = memory
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CONFIG.walk, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    total_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    first_row = work.block_start + PART * CONSUMER_ROWS
    rows = first_row + gl.arange(0, CONSUMER_ROWS, rows_layout)
    live = rows < work.block_stop
    if CARRIED:
        m2 = load_numbers(at_head(m, work.batch, work.head), rows, live, float("-inf")) * LOG2E
        l_whole = load_numbers(at_head(sums, work.batch, work.head), rows, live, 0.0)
    else:
        m2 = gl.full([CONSUMER_ROWS], float("-inf"), gl.float32, rows_layout)
    # A row's sum is kept in parts, by the four lanes that share the row, and added up once at the end.
    l_part = lane_sums(gl.full([CONSUMER_ROWS, CONFIG.walk], 0.0, gl.float32, scores_layout))
    if CARRIED:
        l_part += gl.convert_layout(l_whole * 0.25, gl.SliceLayout(1, l_part.type.layout))[:, None]
    m2_carried = m2
    total = gl.full([CONSUMER_ROWS, DIM], 0.0, gl.float32, total_layout)

    mbarrier.wait(shared.q_full.index(PART), phase)
    mbarrier.arrive(shared.q_empty.index(PART), pred=work.first >= work.last)
    for entry in range(work.first, work.last, 8):
        span = span_of(work, entry, rows)
        free_q = entry + 8 >= work.last
        if CONFIG.overlap:
            m2, l_part, total, met, cleared = attend_overlapped(
                m2, l_part, total, met, cleared, span, free_q, shared, factors, PART, CONFIG
            )
        else:
            m2, l_part, total, met, cleared = attend_plainly(
                m2, l_part, total, met, cleared, span, free_q, shared, factors, PART, CONFIG
            )
    l_row = gl.convert_layout(gl.sum(l_part, 1), rows_layout)

    across: gl.constexpr = gl.SliceLayout(1, total_layout)
    rows_across = first_row + gl.arange(0, CONSUMER_ROWS, across)
    if ADDING:
        # Read only here, where registers are free: in the loop it would only be rescaled from m2_carried to m2.
        factor = gl.exp2(m2_carried - gl.where(m2 == float("-inf"), 0.0, m2))
        at, mask = _row_pointers(acc, work, rows_across, total_layout, DIM)
        total += gl.load(at, mask=mask, other=0.0) * gl.convert_layout(factor, across)[:, None]
    divisor = gl.where(l_row == 0.0, 1.0, l_row)
    lse2 = m2 + gl.log2(divisor)
    m_row = (lse2 if LAST else lse2 - LEFT_BELOW) * LN2
    store_numbers(at_head(m, work.batch, work.head), m_row, rows, live)
    if LAST:
        # By rows, so that neighbouring threads write neighbouring memory.
        wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
        at, mask = _row_pointers(out, work, first_row + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, wide)), wide, DIM)
        total = total / gl.convert_layout(divisor, across)[:, None]
        gl.store(at, gl.convert_layout(total.to(out.ptr.dtype.element_ty), wide), mask=mask)
    else:
        # See Note [base 2] of triton_forward.
        to_read_back = gl.where(m2 == float("-inf"), 1.0, gl.exp2(m2 - m_row * LOG2E))
        store_numbers(at_head(sums, work.batch, work.head), l_row * to_read_back, rows, live)
        at, mask = _row_pointers(acc, work, rows_across, total_layout, DIM)
        gl.store(at, total * gl.convert_layout(to_read_back, across)[:, None], mask=mask)
    return met, cleared


@gluon.jit
def _row_pointers(x, work, rows, LAYOUT: gl.constexpr, DIM: gl.constexpr):
    """(pointers [rows, DIM], which of them exist)."""
    at = at_head(x, work.batch, work.head)
    columns = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    return at[0] + rows.to(gl.int64)[:, None] * at[1] + columns[None, :], (rows < work.block_stop)[:, None]
