"""In which order each rank reads from the others, so that seldom two read from one at a time.

Note [sharing]: a GPU sends no more than its links carry, and copy engines of two that read from it get half of that each (four
H200s: 380 and 190 GB/s). Ranks want more of some than of others, so turns by rank alone run into each other: in a zigzag ring
of four, beginning with the next rank, the first one was seen to wait a third longer than it reads, and as this file reckons the
last one of a contiguous ring waits twice as long. What attention does not hide of it goes on top of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, islice

Orders = list[list[int]]
# What a rank prefers of its sources, the least first: from (rank, source, how many read from it, rows that it sends in all).
Preference = Callable[[int, int, int, int], tuple]

_SWAPS = 768  # divided by the square of the ranks: 2 ms of the host for a new shape with four ranks, 7 with eight, 18 with 16


def reading_orders(rows: Sequence[Sequence[int]]) -> Orders:
    """The sources of each rank, in order, where it wants `rows[rank][source]` rows.

    Of a few ways, and of some that differ from the best of them in two places, that in which the last rank has read first, as
    if ranks began together; the same on every rank.
    """
    size = len(rows)
    ways = [partial(_in_turn, size, 1), partial(_in_turn, size, -1), partial(_least_asked, size)]
    orders, ends = min((played(rows, prefer) for prefer in ways), key=_goodness)
    least = max(map(sum, (*rows, *zip(*rows, strict=True))))
    left, better = _SWAPS // size**2, True
    while left and better and max(ends) > least:
        better = False
        for swapped in islice(_swapped(orders), left):
            left -= 1
            found = played(rows, partial(_in_order, swapped))
            if _goodness(found) < _goodness((orders, ends)):
                (orders, ends), better = found, True
                break
    return orders


def _goodness(found: tuple[Orders, list[float]]) -> tuple[float, float]:
    """The least is the best."""
    _, ends = found
    return max(ends), sum(ends)


def _swapped(orders: Orders) -> Iterator[Orders]:
    """The orders with two sources of one rank exchanged, in every way."""
    for rank, order in enumerate(orders):
        for i, j in combinations(range(len(order)), 2):
            other = [*order[:i], order[j], *order[i + 1 : j], order[i], *order[j + 1 :]]
            yield [*orders[:rank], other, *orders[rank + 1 :]]


def _in_order(orders: Orders, rank: int, source: int, *_: int) -> tuple:
    return (orders[rank].index(source),)


def _in_turn(size: int, direction: int, rank: int, source: int, *_: int) -> tuple:
    return ((source - rank) * direction % size,)


def _least_asked(size: int, rank: int, source: int, readers: int, sends: int) -> tuple:
    """Whom fewest read from, and of these who sends most."""
    return readers, -sends, (rank - source) % size


def played(rows: Sequence[Sequence[int]], prefer: Preference) -> tuple[Orders, list[float]]:
    """The orders in which ranks read that choose by preference, who wants most first, and when each has read, in rows."""
    wanted = [{source: float(count) for source, count in enumerate(of) if count} for of in rows]
    sends = list(map(sum, zip(*rows, strict=True)))
    readers, reading = [0] * len(rows), {}
    orders, ends, now = [[] for _ in rows], [0.0 for _ in rows], 0.0
    while any(wanted):
        free = [rank for rank, sources in enumerate(wanted) if sources and rank not in reading]
        for rank in sorted(free, key=lambda rank: -sum(wanted[rank].values())):
            source = min(wanted[rank], key=lambda source: prefer(rank, source, readers[source], sends[source]))
            reading[rank] = source
            readers[source] += 1
            orders[rank].append(source)
        step = min(wanted[rank][source] * readers[source] for rank, source in reading.items())
        now += step
        read = [(rank, source, step / readers[source]) for rank, source in reading.items()]
        for rank, source, count in read:
            wanted[rank][source] -= count
            if wanted[rank][source] < 1e-6:
                readers[source] -= 1
                del wanted[rank][source], reading[rank]
                ends[rank] = now
    return orders, ends
