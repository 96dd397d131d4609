"""In which order each rank reads from the others, so that seldom two read from one at a time.

Note [sharing]: a GPU sends no more than its links carry, and copy engines of two that read from it get half of that each (four
H200s: 380 and 190 GB/s). Ranks want more of some than of others, so turns by rank alone run into each other: in a contiguous
causal ring of four, beginning with the next rank, the last one waits twice as long as it reads, and in a zigzag ring the first
one a third longer; what is left of that goes on top of the time of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

Orders = list[list[int]]
# What a rank prefers of its sources, the least first: from (rank, source, how many read from it, rows it is still to send).
Preference = Callable[[int, int, int, float], tuple]


def reading_orders(rows: Sequence[Sequence[int]]) -> Orders:
    """The sources of each rank, in order, where it wants `rows[rank][source]` rows.

    Of a few ways that in which the last rank has read first, as if ranks began together; the same on every rank.
    """
    size = len(rows)
    ways = [partial(_in_turn, size, 1), partial(_in_turn, size, -1), partial(_least_asked, size)]
    orders, _ = min((played(rows, prefer) for prefer in ways), key=lambda found: (max(found[1]), sum(found[1])))
    return orders


def _in_turn(size: int, direction: int, rank: int, source: int, *_: float) -> tuple:
    return ((source - rank) * direction % size,)


def _least_asked(size: int, rank: int, source: int, readers: int, to_send: float) -> tuple:
    """Whom fewest read from, and of these who has most to send."""
    return readers, -to_send, (rank - source) % size


def played(rows: Sequence[Sequence[int]], prefer: Preference) -> tuple[Orders, list[float]]:
    """The orders in which ranks read that choose by preference, who wants most first, and when each has read, in rows."""
    ranks = range(len(rows))
    wanted = [{source: float(count) for source, count in enumerate(of) if count} for of in rows]
    reading: dict[int, int] = {}
    orders, ends, now = [[] for _ in ranks], [0.0 for _ in ranks], 0.0
    while any(wanted):
        for rank in sorted(ranks, key=lambda rank: -sum(wanted[rank].values())):
            if wanted[rank] and rank not in reading:
                sources = list(reading.values())
                to_send = [sum(of.get(source, 0.0) for of in wanted) for source in ranks]
                reading[rank] = min(wanted[rank], key=lambda x: prefer(rank, x, sources.count(x), to_send[x]))
                orders[rank].append(reading[rank])
        sharing = {rank: list(reading.values()).count(source) for rank, source in reading.items()}
        step = min(wanted[rank][source] * sharing[rank] for rank, source in reading.items())
        now += step
        for rank, source in list(reading.items()):
            wanted[rank][source] -= step / sharing[rank]
            if wanted[rank][source] < 1e-6:
                del wanted[rank][source], reading[rank]
                ends[rank] = now
    return orders, ends
