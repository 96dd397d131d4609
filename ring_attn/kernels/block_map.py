"""Which blocks of a tile hold cells that its band and its predicates allow: none, some or all.

A predicate is asked about every cell the band allows, on the device and a bounded number of cells at a time. Where it depends
on neither the batch row nor the head it is asked once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from ring_attn.kernels.functions import depends_on
from ring_attn.score_mod import allowed_cells, function_transforms, global_positions
from ring_attn.tiles import Tile

NONE, SOME, ALL = 0, 1, 2
CELLS = 1 << 22  # about as many are asked about at a time, and always a block of every batch row and head that differs


def block_map(tile: Tile, batch: int, num_heads: int, block: int, device: torch.device) -> Tensor:
    """NONE, SOME or ALL for each block of `block` x `block` rows from the tile's corner: int8 [b or 1, h or 1, q, kv blocks].

    The last block of a row or column holds fewer cells. `batch`, `num_heads`: those of the call; the first dimensions are 1
    where the map is the same for all of them, and the first where the tile holds for one batch row.
    """
    strips = list(_Blocks(tile, batch, num_heads, block, device).strips())
    sizes = [max(strip.shape[dim] for strip in strips) for dim in (0, 1)]
    return torch.cat([strip.expand(*sizes, -1, -1) for strip in strips], 2)


def joined_block_map(tile: Tile, batch: int, num_heads: int, block: int, device: torch.device) -> Tensor:
    """The same for all batch rows and heads together, int8 [q blocks, kv blocks]: ALL is all of every one of them."""
    return torch.cat([_joined(strip) for strip in _Blocks(tile, batch, num_heads, block, device).strips()])


def _joined(strip: Tensor) -> Tensor:
    any_cell, every_cell = strip.amax((0, 1)) > NONE, strip.amin((0, 1)) == ALL
    return any_cell.to(torch.int8) + every_cell.to(torch.int8)


@dataclass(frozen=True)
class _Blocks:
    tile: Tile
    batch: int
    num_heads: int
    block: int
    device: torch.device

    def strips(self) -> Iterator[Tensor]:
        """The map, int8 [b or 1, h or 1, some q blocks, kv blocks], from the first q blocks to the last."""
        if not self.tile.predicates:
            yield self._of_band(range(len(self.tile.q_rows)))
            return
        for rows in _pieces(range(len(self.tile.q_rows)), self._most_rows):
            strip = self._of_band(rows)
            for columns in self._entered(rows):
                found = self._asked(rows, columns)
                strip = strip.expand(*found.shape[:2], -1, -1).contiguous()
                strip[..., columns.start // self.block : -(-columns.stop // self.block)] = found
            yield strip

    @cached_property
    def _depends(self) -> list[tuple[bool, bool]]:
        return [depends_on(predicate.fn, self.device) for predicate in self.tile.predicates]

    @cached_property
    def _most_columns(self) -> int:
        """Of rows and columns asked about at a time; both are whole blocks."""
        of_batch = self.batch if self.tile.batch is None and any(b for b, _ in self._depends) else 1
        of_heads = self.num_heads if any(h for _, h in self._depends) else 1
        return max(1, CELLS // (of_batch * of_heads * self.block**2)) * self.block

    @cached_property
    def _most_rows(self) -> int:
        whole = -(-len(self.tile.kv_rows) // self.block) * self.block
        return max(1, self._most_columns // whole) * self.block

    def _entered(self, rows: range) -> Iterator[range]:
        """The columns of blocks that the band enters beside these rows."""
        lo, hi = self.tile.bounds
        start = max(0, rows[0] + lo) // self.block * self.block
        stop = min(len(self.tile.kv_rows), rows[-1] + hi + 1)
        return _pieces(range(start, min(len(self.tile.kv_rows), -(-stop // self.block) * self.block)), self._most_columns)

    def _of_band(self, rows: range) -> Tensor:
        """What the band alone leaves of these rows, [1, 1, q blocks, kv blocks]."""
        (lo, hi), columns = self.tile.bounds, range(len(self.tile.kv_rows))
        (i0, i1), (j0, j1) = (self._ends(x) for x in (rows, columns))
        least, most = j0 - i1.unsqueeze(1) + 1, j1 - 1 - i0.unsqueeze(1)
        some, every = (least <= hi) & (most >= lo), (least >= lo) & (most <= hi)
        return (some.to(torch.int8) + every.to(torch.int8))[None, None]

    def _ends(self, rows: range) -> tuple[Tensor, Tensor]:
        """The first row of each block and the one after its last."""
        starts = torch.arange(rows.start, rows.stop, self.block, device=self.device)
        return starts, (starts + self.block).clamp(max=rows.stop)

    def _asked(self, rows: range, columns: range) -> Tensor:
        """The map of these rows and columns by asking about their cells, [b or 1, h or 1, q blocks, kv blocks]."""
        sides = zip((rows, columns), self.tile.positions, strict=True)
        q_pos, kv_pos = (global_positions(shard, x, self.device) for x, shard in sides)
        i, j = (torch.arange(x.start, x.stop, device=self.device) for x in (rows, columns))
        offset, (lo, hi) = j - i.unsqueeze(1), self.tile.bounds
        first = 0 if self.tile.batch is None else self.tile.batch
        asked = []
        for predicate, (by_batch, by_head) in zip(self.tile.predicates, self._depends, strict=True):
            last = first + (self.batch if by_batch and self.tile.batch is None else 1)
            batches = torch.arange(first, last, device=self.device)
            heads = torch.arange(self.num_heads if by_head else 1, device=self.device)
            with function_transforms():
                asked.append(allowed_cells(predicate, batches, heads, q_pos, kv_pos))
        allowed = reduce(torch.logical_and, asked, (offset >= lo) & (offset <= hi))
        short = [-len(x) % self.block for x in (rows, columns)]
        whole = pad(allowed, (0, short[1], 0, short[0]))
        counts = whole.unflatten(-1, (-1, self.block)).unflatten(-3, (-1, self.block)).sum((-3, -1))
        lengths = [stop - start for start, stop in map(self._ends, (rows, columns))]
        return (counts > 0).to(torch.int8) + (counts == lengths[0].unsqueeze(1) * lengths[1]).to(torch.int8)


def _pieces(rows: range, most: int) -> Iterator[range]:
    return (rows[start : start + most] for start in range(0, len(rows), most))
