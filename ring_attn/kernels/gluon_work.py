"""What there is to do in the Gluon forward, and in which order: items of a launch, entries of an item, blocks of an entry.

Note [laps]: as many programs run as there are multiprocessors. They take items in laps over the list, which holds the heaviest
first: back and forth, so that who had the heaviest of one lap has the lightest of the next. At an item's end the producer
copies while consumers write. All heads of a block of rows stand side by side in the list.

Note [walk]: an entry's span [start, stop) is walked in blocks counted from its end, so the diagonal comes first; what is left
at the start is met by a block moved up to `start`, which meets some rows twice and counts them once. So no block reaches past
the span, where memory may hold anything, unless the whole span is shorter than a block: its V is then cleared past `stop`,
since TMA copied what is there and 0 * NaN is no 0. Blocks that need a mask come first, then those that need none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ring_attn.kernels import triton_rows

CONSUMER_ROWS = gl.constexpr(64)

_entry_span = gluon.jit(triton_rows.entry_span.fn)
_program_work = gluon.jit(triton_rows.program_work.fn)


class Shared(NamedTuple):
    """Shared memory: buffers of a block of rows, and the mbarriers that hand them over."""

    q: Any
    k: Any
    v: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any
    v_cleared: Any


class Queue(NamedTuple):
    """All that the programs of a launch do: an item is a program of the table at one head, see Note [laps].

    `heads`: the query heads; `group`: those of one KV head.
    """

    table: Any
    num_q: Any
    programs: Any
    items: Any
    group: Any
    heads: Any


class Work(NamedTuple):
    """An item: its entries in the table are [first, last), its query rows [block_start, block_stop)."""

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
    """The span of an entry for `rows` of the item's block."""
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
def laps_of(queue):
    """How many items a program may do: all programs' laps together are the items, and less than a lap too many."""
    return (queue.items + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def item_of(lap):
    """The program's item in a lap, see Note [laps]; past the last for no item."""
    place = gl.program_id(0)
    return lap * gl.num_programs(0) + gl.where(lap % 2 == 0, place, gl.num_programs(0) - 1 - place)


@gluon.jit
def work_of(queue, item, OWN: gl.constexpr):
    """What an item asks for, in blocks of OWN query rows."""
    head = item % queue.heads
    block, batch, first, last = _program_work(queue.table, item // queue.heads)
    start = block * OWN
    return Work(queue.table, batch, head, head // queue.group, first, last, start, gl.minimum(start + OWN, queue.num_q))
