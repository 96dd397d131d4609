"""Packs: rectangles of a visit in one variable-length call.

Note [packs]: rectangles with one window and no row in common can go in one variable-length call, as packed documents do. The
rows of a pack are taken batch row after batch row, so the batch rows of a dense tile are documents too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ring_attn.tables import kept_tables
from ring_attn.tiles import Tile

# Row numbers as an index of [b, s, ...]: one batch row's slice, or the two coordinates of every row.
Rows = tuple[int, slice] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pack:
    """Rectangles with one window (left, right): `q_rows` and `kv_rows` index [b, s, ...]; `cu_q`, `cu_kv` int32 [count + 1].

    `q_places`, `kv_places`: int32 [b, s], where in the pack each row is, -1 where it is not.
    """

    q_rows: Rows
    kv_rows: Rows
    q_places: Tensor
    kv_places: Tensor
    cu_q: Tensor
    cu_kv: Tensor
    max_q: int
    max_kv: int
    window: tuple[int | None, int | None]


@kept_tables(64)
def make_pack(tiles: tuple[Tile, ...], batch: int, num_q: int, num_kv: int, device: torch.device) -> Pack:
    """The pack of tiles with one window; a tile for all batch rows counts once for each. Kept: layers share their plans."""
    segments = [(b, t) for b in range(batch) for t in tiles if t.batch in (None, b)]
    of_q, of_kv = [(b, t.q_rows) for b, t in segments], [(b, t.kv_rows) for b, t in segments]
    lengths_q, lengths_kv = ([len(rows) for _, rows in of] for of in (of_q, of_kv))
    return Pack(
        _rows(of_q, device),
        _rows(of_kv, device),
        _places(of_q, batch, num_q).to(device),
        _places(of_kv, batch, num_kv).to(device),
        torch.tensor([0, *accumulate(lengths_q)], dtype=torch.int32, device=device),
        torch.tensor([0, *accumulate(lengths_kv)], dtype=torch.int32, device=device),
        max(lengths_q),
        max(lengths_kv),
        tiles[0].window,
    )


def _rows(segments: list[tuple[int, range]], device: torch.device) -> Rows:
    """Segments in order as one index: a slice where each continues the one before it."""
    (batch, first), (last_batch, last) = segments[0], segments[-1]
    if batch == last_batch and all(a.stop == b.start for (_, a), (_, b) in pairwise(segments)):
        return batch, slice(first.start, last.stop)
    batches = torch.cat([torch.full((len(rows),), b, device="cpu") for b, rows in segments])
    numbers = torch.cat([torch.arange(rows.start, rows.stop, device="cpu") for _, rows in segments])
    return batches.to(device), numbers.to(device)


def _places(segments: list[tuple[int, range]], batch: int, num_rows: int) -> Tensor:
    """Of every row, where segments in order have it."""
    places, row = torch.full((batch, num_rows), -1, dtype=torch.int32, device="cpu"), 0
    for b, rows in segments:
        places[b, rows.start : rows.stop] = torch.arange(row, row + len(rows), device="cpu")
        row += len(rows)
    return places


def all_rows(rows: Rows, x: Tensor) -> bool:
    """Whether they are every row of x, in order."""
    return x.shape[0] == 1 and isinstance(rows[1], slice) and rows[1] == slice(0, x.shape[1])


def groups(tiles: Iterable[Tile]) -> Iterator[tuple[Tile, ...]]:
    """Tiles with one window and neither query rows nor KV rows in common, put together."""
    found: dict[tuple, list[list[Tile]]] = {}
    for tile in sorted(tiles, key=lambda t: (t.batch or 0, t.q_rows.start, t.kv_rows.start)):
        open_groups = found.setdefault((tile.window, tile.batch is None), [])
        group = next((g for g in open_groups if _follows(g[-1], tile)), None)
        if group is None:
            open_groups.append([tile])
        else:
            group.append(tile)
    for open_groups in found.values():
        yield from map(tuple, open_groups)


def _follows(before: Tile, tile: Tile) -> bool:
    """Whether a tile shares no row with the one before it, nor, in a sorted group, with any earlier one."""
    apart = before.q_rows.stop <= tile.q_rows.start and before.kv_rows.stop <= tile.kv_rows.start
    return apart or before.batch != tile.batch
