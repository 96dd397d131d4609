"""Tiles cut into tiles that a library can express, with exactly the same cells.

Here a tile's rows and columns are counted from its corner. All functions take trimmed tiles and return trimmed ones, so no
library ever meets an empty row, whose lse each of them spells differently.

Note [met once]: open tiles may share KV rows, as on a zigzag rank whose first queries see some of the rows that its last ones
see. Cut by KV rows and joined over queries, the same cells are in as many calls, of which no two share any. Then dk and dv of
a row come from one call of a library, which has rounded them: as they are they go home, with nothing to add, in half the bytes
of a sum. A forward is better off with tiles that share no queries, whose results are not merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from ring_attn.tiles import Band, Tile

_OPEN = Band()
_FEW = 32  # tiles, of which it takes little to find out how they are cut


def cut(tile: Tile, rows: range, columns: range) -> Tile:
    """The tile's cells inside a rectangle of it; a bound that is idle there becomes None. Positions are left empty."""
    shift = rows.start - columns.start
    lo = None if tile.band.lo is None else tile.band.lo + shift
    hi = None if tile.band.hi is None else tile.band.hi + shift
    band = Band(
        None if lo is None or lo <= 1 - len(rows) else lo,
        None if hi is None or hi >= len(columns) - 1 else hi,
    )
    q_rows, kv_rows = tile.q_rows[rows.start : rows.stop], tile.kv_rows[columns.start : columns.stop]
    return Tile(q_rows, kv_rows, band, ((), ()), tile.batch)


def squares(tile: Tile) -> Iterator[Tile]:
    """Full rectangles and at most one square with the causal diagonal, which top-left and bottom-right alignment agree on.

    Raises ValueError where the band has a lower bound.
    """
    if tile.band.lo is not None:
        raise ValueError(f"a band with a lower bound, {tile.band}, is not made of full rectangles and a causal square")
    num_q, num_kv, hi = len(tile.q_rows), len(tile.kv_rows), tile.band.hi
    if hi is None or (hi == 0 and num_q == num_kv):
        yield tile
        return
    # Row i sees columns up to i + hi: the first `hi` columns are full, and so is every row past the square.
    side = num_kv - hi
    yield cut(tile, range(side), range(hi, num_kv))
    if hi > 0:
        yield cut(tile, range(side), range(hi))
    if side < num_q:
        yield cut(tile, range(side, num_q), range(num_kv))


def met_once(tiles: Sequence[Tile], calls: Callable[[Sequence[Tile]], int] = len) -> Sequence[Tile]:
    """The tiles of a visit; where they are few, open and hold for every batch row, cut by KV rows if that takes no more
    `calls`, see Note [met once]. What was cut has no positions.
    """
    few = 2 <= len(tiles) <= _FEW
    if not few or any(tile.band != _OPEN or tile.batch is not None for tile in tiles):
        return tiles
    return _met_once(tuple(tiles), calls)


@lru_cache(maxsize=256)
def _met_once(tiles: tuple[Tile, ...], calls: Callable[[Sequence[Tile]], int]) -> tuple[Tile, ...]:
    if share_no_keys(tiles):
        return tiles
    found: list[Tile] = []
    for start, stop in pairwise(sorted({end for t in tiles for end in (t.kv_rows.start, t.kv_rows.stop)})):
        for q_rows in _joined(t.q_rows for t in tiles if t.kv_rows.start <= start and stop <= t.kv_rows.stop):
            first = start
            if found and found[-1].q_rows == q_rows and found[-1].kv_rows.stop == start:
                first = found.pop().kv_rows.start
            found.append(Tile(q_rows, range(first, stop), _OPEN, ((), ())))
    return tuple(found) if share_no_keys(found) and calls(found) <= calls(tiles) else tiles


def share_no_keys(tiles: Iterable[Tile]) -> bool:
    """Whether no KV row is in two of the tiles; in two batch rows it is two."""
    tiles = sorted(tiles, key=lambda t: t.kv_rows.start)
    rows = ([t.kv_rows for t in tiles if t.batch in (None, batch)] for batch in {t.batch for t in tiles})
    return all(a.stop <= b.start for of_batch in rows for a, b in pairwise(of_batch))


def _joined(rows: Iterable[range]) -> list[range]:
    """Disjoint ranges in order, those that continue each other as one."""
    found: list[range] = []
    for one in sorted(rows, key=lambda x: x.start):
        if found and found[-1].stop == one.start:
            found[-1] = range(found[-1].start, one.stop)
        else:
            found.append(one)
    return found


def windows(tile: Tile) -> Iterator[Tile]:
    """Tiles whose `window` flash-attn 2 takes at its word.

    It reads a side of Sk or more as open, and an open side beside a bounded one as Sk. Counted from the bottom-right corner
    that is harmless while Sq <= Sk; with more queries than keys a right side of Sk or more still hides keys from the first
    rows, and an open right side must not.
    """
    num_q, num_kv, (lo, hi) = len(tile.q_rows), len(tile.kv_rows), tile.band
    right = tile.window[1]
    if right is not None and right >= num_kv:
        # The rows up to the first that sees the last key: for them right = 0. No later row is bounded from above.
        yield cut(tile, range(num_kv - hi), range(num_kv))
        yield from windows(_without_columns_left_of(tile, range(num_kv - hi, num_q)))
    elif right is None and lo is not None and num_q > num_kv + 1:
        yield cut(tile, range(1 - lo), range(num_kv))
        yield _without_columns_left_of(tile, range(1 - lo, num_q))
    else:
        yield tile


def strips(tile: Tile, height: int) -> Iterator[Tile]:
    """The tile in strips of at most `height` rows, each with only the columns its rows see."""
    num_q, num_kv = len(tile.q_rows), len(tile.kv_rows)
    for start in range(0, num_q, height):
        rows = range(start, min(start + height, num_q))
        first = 0 if tile.band.lo is None else max(0, rows[0] + tile.band.lo)
        stop = num_kv if tile.band.hi is None else min(num_kv, rows[-1] + tile.band.hi + 1)
        yield cut(tile, rows, range(first, stop))


def _without_columns_left_of(tile: Tile, rows: range) -> Tile:
    """The tile's last rows, without the columns that only earlier rows see."""
    first = 0 if tile.band.lo is None else max(0, rows[0] + tile.band.lo)
    return cut(tile, rows, range(first, len(tile.kv_rows)))
