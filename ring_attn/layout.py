"""Which global positions each rank holds.

A shard is a tuple of ranges: the global positions of a rank's rows, in local row order. Everything else that depends on
the layout (permutations, rotary positions, masks, label order) is derived from `shard`, so the mapping stands once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

Shard = tuple[range, ...]


class Part(NamedTuple):
    """Some rows of a rank's shard, counted from its first."""

    rank: int
    rows: range


def places(parts: Sequence[Part]) -> list[tuple[Part, slice]]:
    """Every part, and where it lies in rows that hold them in order."""
    stops = list(accumulate(len(part.rows) for part in parts))
    return [(part, slice(stop - len(part.rows), stop)) for part, stop in zip(parts, stops, strict=True)]


def total_rows(parts: Sequence[Part]) -> int:
    """How many rows the parts have together."""
    return sum(len(part.rows) for part in parts)


def continued(before: range, after: range) -> range | None:
    """The one range of two of which the second goes on where the first ends; None where it does not."""
    if not after or not before:
        return before or after
    goes_on = before.step == after.step and before[-1] + before.step == after[0]
    return range(before[0], after[-1] + after.step, after.step) if goes_on else None


class Layout(Protocol):
    """A partition of `range(seq_len)` into one shard of equal length a rank. Frozen and hashable."""

    seq_len: int
    ring_size: int

    @property
    def shard_len(self) -> int: ...

    def shard(self, rank: int) -> Shard: ...


class Recipe(Protocol):
    """What makes the layout of a sequence: a layout class, or a choice that knows more than its name."""

    name: str
    chunks_per_rank: int

    def __call__(self, seq_len: int, ring_size: int) -> Layout: ...


@dataclass(frozen=True)
class EvenLayout:
    """What every layout shares: a length that divides evenly, and a rank that exists."""

    seq_len: int
    ring_size: int

    name = ""
    chunks_per_rank = 1

    def __post_init__(self) -> None:
        if self.ring_size < 1:
            raise ValueError(f"ring_size must be at least 1, got {self.ring_size}")
        multiple = self.chunks_per_rank * self.ring_size
        if self.seq_len < 0 or self.seq_len % multiple:
            factor = f"{self.chunks_per_rank} * " if self.chunks_per_rank > 1 else ""
            raise ValueError(
                f"seq_len {self.seq_len} must be a multiple of {factor}ring_size = {multiple} for the {self.name} layout; "
                f"pad with ring_attn.pad_to"
            )

    @property
    def shard_len(self) -> int:
        return self.seq_len // self.ring_size

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.ring_size:
            raise ValueError(f"rank {rank} is not in a ring of {self.ring_size}; ranks are 0 to {self.ring_size - 1}")


class Contiguous(EvenLayout):
    """Rank r holds the r-th run of seq_len / ring_size positions. Under a causal mask the last rank works hardest."""

    name = "contiguous"

    def shard(self, rank: int) -> Shard:
        self._check(rank)
        return (range(rank * self.shard_len, (rank + 1) * self.shard_len),)


class Striped(EvenLayout):
    """Rank r holds positions r, r + ring_size, r + 2 ring_size, ... (striped attention, arXiv 2311.09431)."""

    name = "striped"

    def shard(self, rank: int) -> Shard:
        self._check(rank)
        return (range(rank, self.seq_len, self.ring_size),)


class Zigzag(EvenLayout):
    """Rank r holds chunks r and 2 ring_size - 1 - r of 2 ring_size chunks: equal causal work on every rank and step."""

    name = "zigzag"
    chunks_per_rank = 2

    def shard(self, rank: int) -> Shard:
        self._check(rank)
        chunk = self.shard_len // 2
        early, late = rank, 2 * self.ring_size - 1 - rank
        return range(early * chunk, (early + 1) * chunk), range(late * chunk, (late + 1) * chunk)


@dataclass(frozen=True)
class Shared:
    """A layout whose every shard is held by `parts` ranks together: rank r * parts + u has the u-th run of rank r's rows."""

    layout: Layout
    parts: int

    def __post_init__(self) -> None:
        if self.seq_len % self.ring_size:
            raise ValueError(
                f"seq_len {self.seq_len} must be a multiple of {self.layout.ring_size} * {self.parts} = {self.ring_size}: each "
                f"shard of {self.layout.ring_size} ring ranks is held by {self.parts} ranks; pad with ring_attn.pad_to"
            )

    @property
    def seq_len(self) -> int:
        return self.layout.seq_len

    @property
    def ring_size(self) -> int:
        return self.layout.ring_size * self.parts

    @property
    def shard_len(self) -> int:
        return self.seq_len // self.ring_size

    def shard(self, rank: int) -> Shard:
        owner, part = divmod(rank, self.parts)
        start, stop, found = part * self.shard_len, (part + 1) * self.shard_len, []
        for positions in self.layout.shard(owner):
            found.append(positions[max(0, start) : max(0, stop)])
            start, stop = start - len(positions), stop - len(positions)
        return tuple(positions for positions in found if positions)


LAYOUTS = {layout.name: layout for layout in (Contiguous, Striped, Zigzag)}
