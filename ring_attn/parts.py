"""Parts of shards: which KV rows a rank's tiles need, in position order, and cut so that a visit holds no more than it may."""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from itertools import pairwise

from ring_attn.layout import Layout, Part, places, total_rows
from ring_attn.mask import Mask
from ring_attn.tiles import Tile, count_cells, part_positions, tiles


def in_position_order(layout: Layout, parts: list[Part]) -> tuple[Part, ...]:
    """The parts, cut where their positions jump, by their first position."""
    found = []
    for part in parts:
        start = part.rows.start
        for positions in part_positions(layout, part):
            found.append((positions[0], Part(part.rank, range(start, start + len(positions)))))
            start += len(positions)
    return tuple(part for _, part in sorted(found, key=lambda pair: pair[0]))


def needed(layout: Layout, kv_layout: Layout, mask: Mask, rank: int) -> tuple[Part, ...]:
    """The rows of other ranks that a rank's tiles hold, in position order."""
    parts: list[Part] = []
    for source, found in enumerate(_met(layout, kv_layout, mask, rank)):
        for rows in sorted({tile.kv_rows for tile in found}, key=lambda rows: rows.start):
            last = parts[-1] if parts else None
            if last and last.rank == source and rows.start <= last.rows.stop:
                parts[-1] = Part(source, range(last.rows.start, max(last.rows.stop, rows.stop)))
            else:
                parts.append(Part(source, rows))
    return in_position_order(kv_layout, parts)


def evenly(length: int, count: int) -> list[range]:
    """range(length) in `count` runs of almost the same length."""
    return [range(length * n // count, length * (n + 1) // count) for n in range(count)]


def by_cells(layout: Layout, kv_layout: Layout, mask: Mask, rank: int, parts: tuple[Part, ...], count: int) -> list[range]:
    """The rows of a rank's visit that holds the parts, in `count` runs of almost the same number of cells."""
    length = total_rows(parts)
    if count == 1 or length == 0:
        return evenly(length, count)
    # For each part and tile that share rows: where the part begins in the visit, where it begins and ends in its shard.
    found = [
        (place.start, part.rows.start, part.rows.stop, tile)
        for part, place in places(parts)
        for tile in _met(layout, kv_layout, mask, rank)[part.rank]
        if tile.kv_rows.start < part.rows.stop and part.rows.start < tile.kv_rows.stop
    ]

    def cells_before(row: int) -> int:
        """Of the visit's rows before that one."""
        return sum(_cells_within(tile, start, min(start + max(0, row - place), stop)) for place, start, stop, tile in found)

    grain = max(1, length // 64)
    rows, whole = range(0, length, grain), cells_before(length)
    cuts = [min(bisect_left(rows, whole * n / count, key=cells_before) * grain, length) for n in range(1, count)]
    return [range(start, stop) for start, stop in pairwise([0, *cuts, length])]


@lru_cache(maxsize=256)
def _met(layout: Layout, kv_layout: Layout, mask: Mask, rank: int) -> tuple[tuple[Tile, ...], ...]:
    """The tiles of a rank with the whole shard of each rank, none with its own; kept, for it is asked for at each plan."""
    sources = range(layout.ring_size)
    return tuple(() if x == rank else tiles(layout.shard(rank), [kv_layout.shard(x)], mask) for x in sources)


def _cells_within(tile: Tile, start: int, stop: int) -> int:
    """The cells of those of a tile's KV rows that lie from `start` to `stop`."""
    before = (min(max(0, row - tile.kv_rows.start), len(tile.kv_rows)) for row in (start, stop))
    first, last = (count_cells(len(tile.q_rows), rows, tile.band) if rows else 0 for rows in before)
    return last - first


def within(parts: tuple[Part, ...], rows: range) -> tuple[Part, ...]:
    """What of the parts lies in some rows of a visit that holds them in order."""
    kept = []
    for part, place in places(parts):
        start, stop = max(place.start, rows.start) - place.start, min(place.stop, rows.stop) - place.start
        if start < stop:
            kept.append(Part(part.rank, part.rows[start:stop]))
    return tuple(kept)


def span(parts: tuple[Part, ...]) -> range:
    """The rows of a shard from the first that any part holds to the last."""
    return range(min(part.rows.start for part in parts), max(part.rows.stop for part in parts))


def steps_for(rows: int, max_rows: int | None) -> int:
    """How many visits `rows` rows take."""
    return 1 if max_rows is None else max(1, -(-rows // max_rows))
