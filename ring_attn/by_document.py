"""A layout made for the documents of a packed sequence: equal rows on every rank, and nearly equal work under their mask.

Note [cut or whole]: a document of n tokens is about n ** 2 of work. One that is cut lies zigzag on all ranks: nearly even, but
its keys travel, and its parts are many. One that stays whole is one tile of one rank, and nothing of it travels. So documents
are cut that have more than `1 / _CUT` of a rank's fair share of the work. Log-normal lengths on 4 and 8 ranks left the busiest
rank up to 2.2% above the average with 1/16, 4.3% with 1/8 and 6.9% with 1/4. Each cuts fewer, so that less travels in fewer
parts: by the formula of `cost.py` 1/8 takes less time than 1/16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

from ring_attn.layout import LAYOUTS, EvenLayout, Layout, Recipe, Shard, continued
from ring_attn.mask import Ends, document_ends

_CUT = 8


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
    documents = [range(start, stop) for start, stop in pairwise((0, *ends))]
    work, share = sum(len(document) ** 2 for document in documents), sum(map(len, documents)) // ring_size
    held: list[list[range]] = [[] for _ in range(ring_size)]
    cells, cut, whole = [0] * ring_size, 0, []

    def hold(rank: int, run: range, document: range) -> None:
        held[rank].append(run)
        cells[rank] += _causal_cells(run.stop - document.start) - _causal_cells(run.start - document.start)

    for document in documents:
        if _CUT * ring_size * len(document) ** 2 <= work:
            whole.append(document)
            continue
        for rank, run in _zigzag(document, cut, ring_size):
            hold(rank, run, document)
        cut += len(document)
    # The first has the most rows to take yet, of such ranks the fewest cells; rows are counted from a full share downwards.
    ranks = [((cut + rank) // ring_size - share, cells[rank], rank) for rank in range(ring_size)]
    heapify(ranks)
    for document in sorted(whole, key=len, reverse=True):
        rest = document
        while rest:
            missing, _, rank = heappop(ranks)
            run, rest = rest[:-missing], rest[-missing:]
            hold(rank, run, document)
            heappush(ranks, (missing + len(run), cells[rank], rank))
    return held


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
