"""A layout made for the documents of a packed sequence: equal rows on every rank, and nearly equal work under their mask.

Note [cut or whole]: a document of n tokens is about n ** 2 / 2 cells of work. One that is cut lies zigzag on all ranks: nearly
even, but its keys travel, and its parts are many. One that stays whole is one tile of one rank, and nothing of it travels. So
the longest are cut, one more at a time while they are few, until no rank has more than `_SLACK` above the average: where
131,072 tokens are 83 log-normal documents, 12% of the rows on 4 ranks and 29% on 8; where they are 22, 50% and 89%. What
stays whole goes, the longest first, where the fewest cells are and where it fits. The short ones are next to no work, and make
the numbers of rows equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from ring_attn.layout import LAYOUTS, EvenLayout, Layout, Recipe, Shard, continued
from ring_attn.mask import Ends, document_ends

_SLACK = 0.02


@dataclass(frozen=True, init=False)
class ByDocument:
    """The layout for packed documents of these lengths; it stands where the name of a layout stands.

    Every rank holds as many rows as any other and, mostly within a few per cent, the same number of cells of
    `Causal() & Documents(lengths)`: long documents are cut over all ranks, each zigzag within itself, and the others stay whole
    on one rank where they fit. Attention is exact under every mask; of one that knows other documents or none, shards of many
    short ranges make many tiles.

    Pass `lengths=[5, 9, 2]` or `cu_seqlens=[0, 5, 14, 16]`, as `Documents` takes them, one packing for all batch rows.
    """

    ends: Ends

    name = "by-document"
    chunks_per_rank = 1

    def __init__(self, lengths: Sequence | None = None, *, cu_seqlens: Sequence | None = None) -> None:
        ends, *more = document_ends("ByDocument", lengths, cu_seqlens)
        if more:
            raise ValueError(
                f"ByDocument takes one packing for all batch rows, of which a rank holds the same positions, got "
                f"{1 + len(more)}; put the rows one behind the other into one with the documents of all, or take another layout"
            )
        object.__setattr__(self, "ends", ends)
        # Asked for at every attention call, of what may be thousands of documents.
        object.__setattr__(self, "_hash", hash(ends))

    def __hash__(self) -> int:
        return self._hash

    def __call__(self, seq_len: int, ring_size: int) -> Layout:
        """The layout over so many ranks; made once. Raises ValueError where the lengths do not add up to `seq_len`."""
        return _layout(seq_len, ring_size, self)


LayoutChoice = str | ByDocument
"""What a layout is asked for by."""


def recipe_of(choice: LayoutChoice) -> Recipe:
    """What makes the layout asked for."""
    if isinstance(choice, ByDocument):
        return choice
    if choice not in LAYOUTS:
        raise ValueError(f"layout {choice!r} is not one of {', '.join(LAYOUTS)}, or a ring_attn.ByDocument(lengths)")
    return LAYOUTS[choice]


@dataclass(frozen=True)
class DocumentLayout(EvenLayout):
    """The positions of each rank, as `ByDocument` says; a shard is in the order of positions."""

    documents: ByDocument

    name = ByDocument.name

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.documents.ends[-1] if self.documents.ends else 0
        if total != self.seq_len:
            raise ValueError(
                f"the documents of the {self.name} layout add up to {total} positions, but seq_len is {self.seq_len}; count "
                f"padding as one more document"
            )

    def shard(self, rank: int) -> Shard:
        self._check(rank)
        return self._shards[rank]

    @cached_property
    def _shards(self) -> tuple[Shard, ...]:
        return tuple(map(_joined, _dealt(self.documents.ends, self.ring_size)))


_layout = lru_cache(maxsize=64)(DocumentLayout)


def _dealt(ends: Ends, ring_size: int) -> list[list[range]]:
    """Of every rank, the runs of positions that it holds, in no order."""
    documents = sorted((range(start, stop) for start, stop in pairwise((0, *ends))), key=len, reverse=True)
    cells = [_causal_cells(len(document)) for document in documents]
    most = (1 + _SLACK) * sum(cells) / ring_size
    cut = sum(n > most for n in cells)
    best = _with_cut(documents, cut, ring_size)
    # Shorter ones have no row for every rank.
    while best.busiest > most and cut < len(documents) and len(documents[cut]) >= ring_size:
        cut += 1 + cut // 4  # in steps that grow, as there may be thousands
        best = min(best, _with_cut(documents, cut, ring_size), key=lambda dealt: dealt.busiest)
    return best.held


def _with_cut(documents: list[range], cut: int, ring_size: int) -> _Dealt:
    """With so many of the documents cut, which are in the order of their lengths, the longest first."""
    dealt, before = _Dealt.of(sum(map(len, documents)) // ring_size, ring_size), 0
    for document in documents[:cut]:
        for rank, run in _zigzag(document, before, ring_size):
            dealt.hold(rank, run, document)
        before += len(document)
    for document in documents[cut:]:
        rest = document
        while rest:
            rank = dealt.rank_for(len(rest))
            run, rest = rest[: dealt.missing[rank]], rest[dealt.missing[rank] :]
            dealt.hold(rank, run, document)
    return dealt


@dataclass
class _Dealt:
    """Of every rank, the runs it holds, how many cells they have, and how many rows it is to take yet."""

    held: list[list[range]]
    cells: list[int]
    missing: list[int]

    @classmethod
    def of(cls, share: int, ring_size: int) -> _Dealt:
        return cls([[] for _ in range(ring_size)], [0] * ring_size, [share] * ring_size)

    @property
    def busiest(self) -> int:
        return max(self.cells)

    def hold(self, rank: int, run: range, document: range) -> None:
        self.held[rank].append(run)
        self.cells[rank] += _causal_cells(run.stop - document.start) - _causal_cells(run.start - document.start)
        self.missing[rank] -= len(run)

    def rank_for(self, rows: int) -> int:
        """With the fewest cells of those that so many rows fit on; where none is, with the most room."""
        fits = [rank for rank, missing in enumerate(self.missing) if missing >= rows]
        if fits:
            return min(fits, key=self.cells.__getitem__)
        return max(range(len(self.missing)), key=self.missing.__getitem__)


def _zigzag(document: range, before: int, ring_size: int) -> Iterator[tuple[int, range]]:
    """The two runs of each rank's part of a document that is cut, `before` rows of others having been.

    A rank's parts add up to its part of one document as long as all, so it never gets more than its share of the rows.
    """
    shares = [(before + len(document) + rank) // ring_size - (before + rank) // ring_size for rank in range(ring_size)]
    early = [(rank, share // 2) for rank, share in enumerate(shares)]
    late = [(rank, share - share // 2) for rank, share in enumerate(shares)]
    rest = document
    for rank, length in (*early, *reversed(late)):
        yield rank, rest[:length]
        rest = rest[length:]


def _causal_cells(rows: int) -> int:
    """Of the first so many rows of a document."""
    return rows * (rows + 1) // 2


def _joined(runs: list[range]) -> Shard:
    """The runs in the order of their positions, those that go on where another ends joined to it."""
    shard = [range(0)]
    for run in sorted(runs, key=lambda run: run.start):
        joined = continued(shard[-1], run)
        shard[-1:] = [shard[-1], run] if joined is None else [joined]
    return tuple(shard)
