"""Ranks on two axes: on one they trade heads for rows (Ulysses), on the other they stand in rings.

With U ranks on the first and R on the second there are U * R. Rank r * U + u is the u-th of the U that hold the shard of ring
rank r together, and rank r of the ring that attends with the u-th part of the heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ring_attn.comm.transport import Pending, Transport, check_parts, check_payloads


class TwoAxes:
    """All U * R ranks together, made of the transports along each axis.

    `traders`: one for each ring rank hosted here, among the U that trade heads. `rings`: one for each Ulysses rank hosted here.
    """

    def __init__(self, traders: Sequence[Transport], rings: Sequence[Transport]) -> None:
        self.traders, self.rings = tuple(traders), tuple(rings)
        self.ulysses = traders[0].ring_size
        self.ulysses_hosted, ring_hosted = traders[0].hosted, rings[0].hosted
        self.ring_size = self.ulysses * rings[0].ring_size
        self.link = rings[0].link
        on_node = rings[0].ranks_per_node
        self.ranks_per_node = None if on_node is None else on_node * self.ulysses
        self.hosted = tuple(r * self.ulysses + u for r in ring_hosted for u in self.ulysses_hosted)

    def all_gather(self, shards: Sequence[Tensor], *, what: str = "all-gather") -> Pending[list[Tensor]]:
        check_payloads(self, shards, what)
        by_ring_rank = zip(self.traders, self.by_ring_rank(shards), strict=True)
        groups = [torch.stack(traders.all_gather(row, what=what).wait()) for traders, row in by_ring_rank]
        # Every ring would carry the same: what each group holds together.
        everything = self.rings[0].all_gather(groups, what=what).wait()
        return Pending([x for group in everything for x in group], lambda: None, what)

    def reduce_scatter(self, parts: Sequence[Sequence[Tensor]], *, what: str = "reduce-scatter") -> Pending[list[Tensor]]:
        check_parts(self, parts, what)
        groups = [[torch.stack(tuple(row[i : i + self.ulysses])) for i in range(0, len(row), self.ulysses)] for row in parts]
        by_ulysses_rank = zip(self.rings, zip(*self.by_ring_rank(groups), strict=True), strict=True)
        sums = [ring.reduce_scatter(rows, what=what).wait() for ring, rows in by_ulysses_rank]
        by_ring_rank = zip(self.traders, zip(*sums, strict=True), strict=True)
        found = [traders.reduce_scatter([list(x) for x in row], what=what).wait() for traders, row in by_ring_rank]
        return Pending([x for row in found for x in row], lambda: None, what)

    def by_ring_rank(self, of_hosted: Sequence) -> list[Sequence]:
        """What every hosted rank has, those of one ring rank together."""
        each = len(self.ulysses_hosted)
        return [of_hosted[i : i + each] for i in range(0, len(of_hosted), each)]
