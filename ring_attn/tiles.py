"""The work of a visit as band tiles: rectangles of local rows with a band `lo <= j - i <= hi` of allowed cells.

Note [bands]: for a query range and a KV range with one step s, `q_pos - kv_pos = d + (i - j) * s`. Full, causal and window
masks bound `q_pos - kv_pos`, so in local rows each is a band. Packed documents and key padding are no mask at all: the ranges
are cut at their ends first and only equal documents are paired.

Note [trimming]: a tile keeps only rows and columns with an allowed cell. So no row of a tile is fully masked, and its band is
flash-attention's bottom-right window, `left = Sk - Sq - lo` and `right = hi - (Sk - Sq)`, both at least 0.

Note [two steps]: a query range and a KV range with different steps, as in cross-attention between layouts, have no common band:
the bounds are stairs. The denser range is cut where a bound moves on, and each run of it becomes an open tile.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, islice
from typing import NamedTuple

from ring_attn.layout import Layout, Part, Shard, continued
from ring_attn.mask import Ends, Mask, MaskMod, Rule


class Band(NamedTuple):
    """Cell (i, j) of a tile is allowed iff `lo <= j - i <= hi`, rows counted from the tile's corner; None is open."""

    lo: int | None = None
    hi: int | None = None


@dataclass(frozen=True)
class Tile:
    """Query rows x KV rows of one visit, and the band of allowed cells.

    `q_rows`, `kv_rows`: rows of the rank's query shard and of the visit's KV. `positions`: the global positions of those rows,
    (q, kv), each as ranges in row order. `batch`: the one batch row the tile holds for, None for every row. `predicates`: what
    an allowed cell must satisfy beside the band; `cells` does not count them.
    """

    q_rows: range
    kv_rows: range
    band: Band
    positions: tuple[Shard, Shard]
    batch: int | None = None
    predicates: tuple[MaskMod, ...] = ()

    @property
    def window(self) -> tuple[int | None, int | None]:
        """(left, right) of flash-attention's bottom-right aligned window; None is open."""
        shift = len(self.kv_rows) - len(self.q_rows)
        left = None if self.band.lo is None else shift - self.band.lo
        right = None if self.band.hi is None else self.band.hi - shift
        return left, right

    @property
    def bounds(self) -> tuple[int, int]:
        """(lo, hi) of the band, an open side as a number that hides no cell."""
        lo, hi = self.band
        return -len(self.q_rows) if lo is None else lo, len(self.kv_rows) if hi is None else hi

    @property
    def cells(self) -> int:
        """The number of allowed (query, key) pairs, for one batch row and head."""
        return count_cells(len(self.q_rows), len(self.kv_rows), self.band)


def tiles(q_shard: Shard, kv_shards: Sequence[Shard], mask: Mask) -> tuple[Tile, ...]:
    """The tiles that cover exactly the allowed cells of a query shard against KV shards joined in the order given.

    Tiles are disjoint, trimmed and coalesced.
    """
    queries, keys = _pieces(q_shard), _pieces(r for shard in kv_shards for r in shard)
    rules = mask.rules()
    rows: list[int | None] = [None] if len(set(rules)) == 1 else list(range(len(rules)))
    found: list[Tile] = []
    for row in rows:
        rule = rules[row or 0]
        pairs = _pairs(queries, _keys(keys, rule), rule)
        raw = [tile for q, kv in pairs for tile in _tiles_of(q, kv, rule, row)]
        merged = _coalesce(raw, queries, keys)
        found += [replace(tile, predicates=rule.predicates) for tile in merged] if rule.predicates else merged
    return tuple(found)


def kv_rows_met(q_shard: Shard, kv_layout: Layout, mask: Mask) -> list[range]:
    """The KV rows that the tiles of a query shard hold, in order and as few ranges; of the shards of all ranks joined."""
    queries = _pieces(q_shard)
    found = {
        rows
        for rule in dict.fromkeys(mask.rules())
        for q, kv in _pairs(queries, _keys_of(kv_layout, replace(rule, left=None, right=None, predicates=())), rule)
        for rows in _rows_met(q, kv, rule)
    }
    joined: list[range] = []
    for start, stop in sorted(found):
        if joined and start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, stop))
        else:
            joined.append(range(start, stop))
    return joined


def within(tile: Tile, rows: range, columns: range) -> Tile | None:
    """The tile of a tile's cells in some rows and columns of it, counted from its corner; None where its band has none."""
    lo, hi = tile.bounds
    shift = rows.start - columns.start
    lo, hi = max(lo + shift, 1 - len(rows)), min(hi + shift, len(columns) - 1)
    own = tile.q_rows[rows.start : rows.stop], tile.kv_rows[columns.start : columns.stop]
    found = _trimmed(*own, lo, hi, tile.batch)
    if found is None:
        return None
    sides = zip(tile.positions, (tile.q_rows, tile.kv_rows), (found.q_rows, found.kv_rows), strict=True)
    positions = tuple(
        _positions(_pieces(shard), range(part.start - whole.start, part.stop - whole.start)) for shard, whole, part in sides
    )
    return replace(found, positions=positions, predicates=tile.predicates)


def part_positions(layout: Layout, part: Part) -> Shard:
    """The global positions of some rows of a shard."""
    return _positions(_pieces_of(layout, part.rank), part.rows)


def count_cells(num_q: int, num_kv: int, band: Band) -> int:
    """The number of cells of a num_q x num_kv rectangle inside the band."""
    below_hi = num_q * num_kv if band.hi is None else _cells_up_to(num_q, num_kv, band.hi)
    below_lo = 0 if band.lo is None else _cells_up_to(num_q, num_kv, band.lo - 1)
    return below_hi - below_lo


def _cells_up_to(num_q: int, num_kv: int, hi: int) -> int:
    """Cells with j - i <= hi: row i holds clip(i + hi + 1, 0, num_kv) of them."""
    first = max(0, -hi)
    full = max(first, min(num_q, num_kv - hi - 1))
    if first >= num_q:
        return 0
    rising = full - first
    return rising * (first + hi + 1) + rising * (rising - 1) // 2 + (num_q - full) * num_kv


class _Piece(NamedTuple):
    row: int
    positions: range


def _pieces(ranges: Iterable[range]) -> list[_Piece]:
    """Ranges laid out row after row; a range that continues the one before it joins it."""
    pieces: list[_Piece] = []
    row = 0
    for r in ranges:
        if not r:
            continue
        last = pieces[-1] if pieces else None
        joined = continued(last.positions, r) if last else None
        if joined is not None:
            pieces[-1] = _Piece(last.row, joined)
        else:
            pieces.append(_Piece(row, r))
        row += len(r)
    return pieces


@lru_cache(maxsize=256)
def _pieces_of(layout: Layout, rank: int) -> tuple[_Piece, ...]:
    """The pieces of a rank's shard, asked for at every part of it."""
    return tuple(_pieces(layout.shard(rank)))


def _cut(piece: _Piece, start: int, stop: int) -> _Piece:
    return _Piece(piece.row + start, piece.positions[start:stop])


def _by_document(pieces: list[_Piece], packings: list[Ends]) -> Iterator[tuple[tuple[int, ...], _Piece]]:
    """The pieces cut at the ends of documents, and for each the number of its document in every packing."""
    for piece in pieces:
        positions, start, length = piece.positions, 0, len(piece.positions)
        while start < length:
            documents = tuple([bisect_right(ends, positions[start]) for ends in packings])
            # Most pieces end where a document does, or before.
            end = min([ends[n] for ends, n in zip(packings, documents, strict=True)], default=None)
            stop = length if end is None or positions[-1] < end else bisect_left(positions, end)
            yield documents, piece if stop - start == length else _cut(piece, start, stop)
            start = stop


_Keys = dict[tuple[int, ...], list[_Piece]]
"""The pieces of each document, by its number in every packing."""


def _keys(pieces: list[_Piece], rule: Rule) -> _Keys:
    pieces = [_cut(piece, *_between(piece.positions, rule.first_key, rule.num_keys)) for piece in pieces]
    found: _Keys = defaultdict(list)
    for documents, piece in _by_document(pieces, [ends for _, ends in rule.documents]):
        found[documents].append(piece)
    return found


@lru_cache(maxsize=64)
def _keys_of(layout: Layout, rule: Rule) -> _Keys:
    """Of the shards of all ranks joined, by a rule's documents and padding; every rank asks, for every packing of a batch."""
    return _keys(_pieces(r for rank in range(layout.ring_size) for r in layout.shard(rank)), rule)


def _pairs(queries: list[_Piece], keys: _Keys, rule: Rule) -> Iterator[tuple[_Piece, _Piece]]:
    for documents, q in _by_document(queries, [ends for ends, _ in rule.documents]):
        for kv in keys.get(documents, ()):
            yield q, kv


def _between(positions: range, start: int, stop: int | None) -> tuple[int, int]:
    """Where in a range the positions from `start` to below `stop` stand."""
    return bisect_left(positions, start), len(positions) if stop is None else bisect_left(positions, stop)


def _rows_met(q: _Piece, kv: _Piece, rule: Rule) -> Iterator[tuple[int, int]]:
    """(start, stop) of the KV rows that queries of a piece see of another: those that its tiles hold, without making them."""
    sees = None if rule.left is None or rule.right is None else rule.left + rule.right + 1
    if sees is not None and sees < q.positions.step:
        # What each query sees may leave gaps between it and what the next one sees.
        yield from ((tile.kv_rows.start, tile.kv_rows.stop) for tile in _tiles_of(q, kv, rule, None))
        return
    start = 0 if rule.left is None else bisect_left(kv.positions, q.positions[0] - rule.left)
    stop = len(kv.positions) if rule.right is None else bisect_right(kv.positions, q.positions[-1] + rule.right)
    if start < stop:
        yield kv.row + start, kv.row + stop


def _tiles_of(q: _Piece, kv: _Piece, rule: Rule, batch: int | None) -> Iterator[Tile]:
    """The trimmed tiles of two pieces: one or none, or many where their steps differ, see Note [two steps]."""
    step = _step(q, kv)
    if step is None and (rule.left is not None or rule.right is not None):
        yield from _stairs(q, kv, rule, batch)
        return
    tile = _tile(q, kv, rule, batch, step or 1)
    if tile is not None:
        yield tile


def _stairs(q: _Piece, kv: _Piece, rule: Rule, batch: int | None) -> Iterator[Tile]:
    """The open tiles of two pieces with different steps."""
    dense, sparse = sorted((q, kv), key=lambda piece: piece.positions.step)
    # A query at x sees keys from x - left up to x + right; a key at x is seen from query x - right up to x + left.
    below, above = (rule.left, rule.right) if dense is q else (rule.right, rule.left)
    step, length = sparse.positions.step, len(sparse.positions)

    def met(position: int) -> tuple[int, int]:
        """Which rows of the sparse piece a position of the dense one meets."""
        x = position - sparse.positions[0]
        start = 0 if below is None else max(0, -((below - x) // step))
        return start, length if above is None else min(length, (x + above) // step + 1)

    row = dense.row
    for (start, stop), run in groupby(dense.positions, key=met):
        rows, row = row, row + sum(1 for _ in run)
        if start < stop:
            sides = (rows, row), (sparse.row + start, sparse.row + stop)
            (q0, q1), (k0, k1) = sides if dense is q else reversed(sides)
            yield _with_band(q0, q1, k0, k1, q0 - q1 + 1, k1 - k0 - 1, batch)


def _step(q: _Piece, kv: _Piece) -> int | None:
    """The step of two pieces, of which one with a single position may have any; None where they differ."""
    steps = {piece.positions.step for piece in (q, kv) if len(piece.positions) > 1}
    return None if len(steps) > 1 else max(steps, default=1)


def _tile(q: _Piece, kv: _Piece, rule: Rule, batch: int | None, step: int) -> Tile | None:
    """The trimmed tile of two pieces with that step, which without bounds does not matter; None where no cell is allowed."""
    num_q, num_kv = len(q.positions), len(kv.positions)
    distance = q.positions[0] - kv.positions[0]
    lo = -(num_q - 1) if rule.left is None else max(-((rule.left - distance) // step), -(num_q - 1))
    hi = num_kv - 1 if rule.right is None else min((distance + rule.right) // step, num_kv - 1)
    return _trimmed(range(q.row, q.row + num_q), range(kv.row, kv.row + num_kv), lo, hi, batch)


def _trimmed(q_rows: range, kv_rows: range, lo: int, hi: int, batch: int | None) -> Tile | None:
    """The tile of a rectangle's cells inside a band, counted from its corner, without positions; None where it has none."""
    num_q, num_kv = len(q_rows), len(kv_rows)
    i0, i1 = max(0, -hi), min(num_q, num_kv - lo)
    j0, j1 = max(0, lo), min(num_kv, num_q + hi)
    if lo > hi or i0 >= i1 or j0 >= j1:
        return None
    (q0, q1), (k0, k1) = ((rows[a], rows[b - 1] + 1) for rows, a, b in ((q_rows, i0, i1), (kv_rows, j0, j1)))
    return _with_band(q0, q1, k0, k1, lo + i0 - j0, hi + i0 - j0, batch)


def _with_band(q0: int, q1: int, k0: int, k1: int, lo: int, hi: int, batch: int | None) -> Tile:
    """A tile whose band is open wherever its corner makes the bound idle; positions are filled in by `_coalesce`."""
    band = Band(None if lo <= q0 - q1 + 1 else lo, None if hi >= k1 - k0 - 1 else hi)
    return Tile(range(q0, q1), range(k0, k1), band, ((), ()), batch)


def _coalesce(found: list[Tile], queries: list[_Piece], keys: list[_Piece]) -> list[Tile]:
    """The same cells in fewer tiles, first those with the same query rows: each that a query row is in is one more to merge."""
    merged = _joined(_joined(found, lambda a, b: a.q_rows == b.q_rows), lambda a, b: True)
    return [
        Tile(t.q_rows, t.kv_rows, t.band, (_positions(queries, t.q_rows), _positions(keys, t.kv_rows)), t.batch) for t in merged
    ]


def _joined(found: list[Tile], may: Callable[[Tile, Tile], bool]) -> list[Tile]:
    """The same cells in fewer tiles. Only near neighbours in row order are tried: the cost stays linear in the tiles."""
    merged: list[Tile] = []
    for tile in sorted(found, key=lambda t: (t.q_rows.start, t.kv_rows.start)):
        at = len(merged) - 1
        while at >= max(0, len(merged) - _NEIGHBOURS):
            union = _union(merged[at], tile) if may(merged[at], tile) else None
            if union is None:
                at -= 1
            else:
                del merged[at]
                tile, at = union, len(merged) - 1
        merged.append(tile)
    return merged


_NEIGHBOURS = 8


def _union(a: Tile, b: Tile) -> Tile | None:
    """One tile with exactly the cells of two disjoint ones, or None where no band tile has them."""
    if not (_touch(a.q_rows, b.q_rows) and _touch(a.kv_rows, b.kv_rows)):
        return None
    q0, q1 = min(a.q_rows.start, b.q_rows.start), max(a.q_rows.stop, b.q_rows.stop)
    k0, k1 = min(a.kv_rows.start, b.kv_rows.start), max(a.kv_rows.stop, b.kv_rows.stop)
    los = {t.band.lo + t.kv_rows.start - t.q_rows.start for t in (a, b) if t.band.lo is not None}
    his = {t.band.hi + t.kv_rows.start - t.q_rows.start for t in (a, b) if t.band.hi is not None}
    if len(los) > 1 or len(his) > 1:
        return None
    lo = los.pop() + q0 - k0 if los else q0 - q1 + 1
    hi = his.pop() + q0 - k0 if his else k1 - k0 - 1
    union = _with_band(q0, q1, k0, k1, lo, hi, a.batch)
    inside = all(t.cells == _cells_within(t, lo - q0 + k0, hi - q0 + k0) for t in (a, b))
    return union if inside and union.cells == a.cells + b.cells else None


def _touch(a: range, b: range) -> bool:
    return a.start <= b.stop and b.start <= a.stop


def _cells_within(tile: Tile, lo: int, hi: int) -> int:
    """Cells of the tile's rectangle inside a band given in shard rows."""
    shift = tile.q_rows.start - tile.kv_rows.start
    return count_cells(len(tile.q_rows), len(tile.kv_rows), Band(lo + shift, hi + shift))


def _positions(pieces: list[_Piece], rows: range) -> Shard:
    """The global positions of `rows`, as ranges."""
    first = max(0, bisect_left(pieces, (rows.start + 1,)) - 1)
    found = []
    for piece in islice(pieces, first, None):
        if piece.row >= rows.stop:
            break
        found.append(piece.positions[max(0, rows.start - piece.row) : rows.stop - piece.row])
    return tuple(positions for positions in found if positions)
