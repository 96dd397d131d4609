"""Tiles under a mask's functions, cut so that kernels skip what the functions hide and ask them only where they decide.

Of the blocks of a tile, see `block_map`, those that keep no cell in any batch row and head are left out, and those that keep
every cell in all of them become tiles without predicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from ring_attn.kernels.block_map import ALL, NONE, joined_block_map
from ring_attn.kernels.functions import versions
from ring_attn.tiles import Tile, within


@dataclass(frozen=True)
class _Key:
    """What the cut depends on. Tiles count as the same only if they are the same tuple, as for the tables of launches."""

    tiles: Sequence[Tile] = field(compare=False)
    batch: int
    num_heads: int
    block: int
    device: torch.device
    written: tuple[tuple[int, ...], ...]
    number: int


def cleared(tiles: Sequence[Tile], q: Tensor, block: int) -> tuple[tuple[Tile, ...], ...]:
    """The same cells for queries q [b, s, h, d] as lists of tiles, those of a list with the same predicates; never no list.

    `block`: the rows of blocks; for fewer queries, as in decoding, nothing is asked. Else the functions are asked once, see
    Note [kept] in `functions`, and the host waits for the device.
    """
    predicates = dict.fromkeys(predicate for tile in tiles for predicate in tile.predicates)
    if not predicates or q.shape[1] < block:
        return (tuple(tiles),)
    written = tuple([versions(predicate.fn) for predicate in predicates])
    return _cut(_Key(tiles, q.shape[0], q.shape[2], block, q.device, written, id(tiles)))


@lru_cache(maxsize=64)
def _cut(key: _Key) -> tuple[tuple[Tile, ...], ...]:
    found = [part for tile in key.tiles for part in _parts(tile, key)]
    asked = tuple(part for part in found if part.predicates)
    free = tuple(part for part in found if not part.predicates)
    return tuple(filter(None, (asked, free))) or ((),)


def _parts(tile: Tile, key: _Key) -> Iterator[Tile]:
    """The tile without its hidden blocks: runs of blocks of one kind, as tall as the next rows of blocks have the same."""
    kinds = joined_block_map(tile, key.batch, key.num_heads, key.block, key.device).tolist()
    height, width = len(tile.q_rows), len(tile.kv_rows)
    row = 0
    for line, same in groupby(kinds):
        rows = range(row * key.block, min((row := row + len(list(same))) * key.block, height))
        column = 0
        for kind, run in groupby(line):
            columns = range(column * key.block, min((column := column + len(list(run))) * key.block, width))
            part = None if kind == NONE else within(tile, rows, columns)
            if part is not None:
                yield replace(part, predicates=()) if kind == ALL else part
