"""Tiles cut into tiles that a library can express, with exactly the same cells.

Here a tile's rows and columns are counted from its corner. All functions take a trimmed tile and return trimmed ones, so no
library ever meets an empty row, whose lse each of them spells differently.
"""

from __future__ import annotations

from collections.abc import Iterator

from ring_attn.tiles import Band, Tile


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
