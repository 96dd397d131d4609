"""The plan of a whole tour: who meets which KV rows at which step, and the tiles of every visit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from ring_attn.layout import Layout, Part
from ring_attn.mask import Mask
from ring_attn.tiles import Tile, part_positions, tiles

Meets = tuple[tuple[tuple[Part, ...], ...], ...]


@dataclass(frozen=True)
class Plan:
    """The tiles of every visit of a tour. `meets[step][rank]` lists the KV rows that the rank sees at that step, in order."""

    layout: Layout
    kv_layout: Layout
    mask: Mask
    meets: Meets

    def __getitem__(self, rank_step: tuple[int, int]) -> tuple[Tile, ...]:
        cached = self._cache.get(rank_step)
        if cached is None:
            rank, step = rank_step
            parts = self.meets[step][rank]
            cached = self._made.get((rank, parts))
            if cached is None:
                kv_shards = [part_positions(self.kv_layout, part) for part in parts]
                cached = self._made[rank, parts] = tiles(self.layout.shard(rank), kv_shards, self.mask)
            self._cache[rank_step] = cached
        return cached

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps that some rank needs, the same on every rank. Step 0 always stands: it meets the own shard."""
        ranks = range(self.layout.ring_size)
        return tuple(s for s in range(len(self.meets)) if s == 0 or any(self[rank, s] for rank in ranks))

    @cached_property
    def own_rows(self) -> dict[int, slice]:
        """Of each of `steps` that meets the own shard alone, which of its rows; the same on every rank."""
        found = {}
        for step in self.steps:
            parts = next(filter(None, self.meets[step]), ())
            if parts and all(part.rank == rank for rank, of_rank in enumerate(self.meets[step]) for part in of_rank):
                found[step] = slice(parts[0].rows.start, parts[-1].rows.stop)
        return found

    @cached_property
    def steps_away(self) -> tuple[int, ...]:
        """Those of `steps` that meet what comes from other ranks."""
        return tuple(step for step in self.steps if step not in self.own_rows)

    @property
    def begins_at_home(self) -> bool:
        """Whether the first visits need no rows of others."""
        return 0 in self.own_rows

    def cells(self, rank: int, step: int, batch: int = 1) -> int:
        """Allowed cells of a rank's visit, for one head, over `batch` rows."""
        return sum(tile.cells * (batch if tile.batch is None else 1) for tile in self[rank, step])

    @cached_property
    def _cache(self) -> dict[tuple[int, int], tuple[Tile, ...]]:
        return {}

    @cached_property
    def _made(self) -> dict[tuple[int, tuple[Part, ...]], tuple[Tile, ...]]:
        return _made_for(self.layout, self.kv_layout, self.mask)


@lru_cache(maxsize=128)
def _made_for(layout: Layout, kv_layout: Layout, mask: Mask) -> dict[tuple[int, tuple[Part, ...]], tuple[Tile, ...]]:
    """The tiles of a rank's visits, by the rows that it meets: those of a forward and of its backward are mostly alike. As many
    as there are plans, for each of which `kv_memory` or the exchange is another.
    """
    return {}
