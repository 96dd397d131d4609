"""What each rank reads of the others in a transfer by copy engines: pure integers, which every rank knows of every other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ring_attn.comm.transport import Parts
from ring_attn.layout import Part, places, total_rows


class Reads(NamedTuple):
    """What this rank reads in a transfer, in the order of what it receives, where every rank puts up `put_up[rank]` rows.

    `homes`: to which own rows each read is to be added, in a push.
    """

    put_up: list[int]
    reads: list[Part]
    homes: list[range]

    def rows_of(self, ranks: int) -> list[int]:
        """How many rows it reads of each rank."""
        return [sum(len(rows) for source, rows in self.reads if source == rank) for rank in range(ranks)]


def pulled(rank: int, parts: Parts, rows: int) -> Reads:
    """The reads of a pull out of shards of `rows` rows: the parts that the rank wants."""
    return Reads([rows] * len(parts), list(parts[rank]), [])


def pushed(rank: int, parts: Parts, _: int) -> Reads:
    """The reads of a push: what others have of the rank's rows."""
    found = [
        (Part(source, range(place.start, place.stop)), part.rows)
        for source, wanted in enumerate(parts)
        for part, place in places(wanted)
        if part.rank == rank
    ]
    return Reads([total_rows(wanted) for wanted in parts], [read for read, _ in found], [home for _, home in found])


def arrivals(homes: Sequence[range], batch: int) -> Tensor:
    """Of each own row, which of those received are to be added to it, int32 [batch, s, k], -1 for none; home by home, and batch
    row after batch row.

    A row's are in the order in which they come.
    """
    columns: list[Tensor] = []
    arrived, rows = 0, max(home.stop for home in homes)
    for home in homes:
        here = slice(home.start, home.stop)
        # Behind all that came for any of its rows before it.
        met = [n for n, column in enumerate(columns) if (column[here] >= 0).any()]
        place = max(met, default=-1) + 1
        if place == len(columns):
            columns.append(torch.full((rows,), -1, dtype=torch.int32, device="cpu"))
        columns[place][here] = torch.arange(arrived, arrived + len(home), dtype=torch.int32, device="cpu")
        arrived += len(home)
    places, first = torch.stack(columns, 1), arrived * torch.arange(batch, dtype=torch.int32, device="cpu")
    return torch.where(places < 0, -1, places + first[:, None, None])
