"""Parts of shards: which KV rows a rank's tiles need, in position order, and cut so that a visit holds no more than it may."""

from __future__ import annotations

from functools import lru_cache

from ring_attn.layout import Layout, Part, places, total_rows
from ring_attn.mask import Mask
from ring_attn.tiles import kv_rows_met, part_positions


def in_position_order(layout: Layout, parts: list[Part]) -> tuple[Part, ...]:
    """The parts, cut where their positions jump, by their first position."""
    found = []
    for part in parts:
        start = part.rows.start
        for positions in part_positions(layout, part):
            found.append((positions[0], Part(part.rank, range(start, start + len(positions)))))
            start += len(positions)
    return tuple(part for _, part in sorted(found, key=lambda pair: pair[0]))


@lru_cache(maxsize=256)
def needed(layout: Layout, kv_layout: Layout, mask: Mask, rank: int) -> tuple[Part, ...]:
    """The rows of other ranks that a rank's tiles hold, in position order; kept, for a forward and a backward both ask."""
    length, parts = kv_layout.shard_len, []
    for rows in kv_rows_met(layout.shard(rank), kv_layout, mask):
        for source in range(rows.start // length, -(-rows.stop // length)):
            start, stop = max(rows.start, source * length), min(rows.stop, (source + 1) * length)
            if source != rank:
                parts.append(Part(source, range(start - source * length, stop - source * length)))
    return in_position_order(kv_layout, parts)


def evenly(length: int, count: int) -> list[range]:
    """range(length) in `count` runs of almost the same length."""
    return [range(length * n // count, length * (n + 1) // count) for n in range(count)]


def in_visits(parts: tuple[Part, ...], count: int) -> list[tuple[Part, ...]]:
    """The parts in order, in so many visits of almost the same number of rows."""
    return [parts] if count == 1 else [_within(parts, rows) for rows in evenly(total_rows(parts), count)]


def _within(parts: tuple[Part, ...], rows: range) -> tuple[Part, ...]:
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
