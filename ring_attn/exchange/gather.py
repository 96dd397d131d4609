"""One all-gather and one reduce-scatter: fewest launches, memory for all KV."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ring_attn.comm.transport import Pending, Transport
from ring_attn.exchange.base import KV, Homeward, HowHome, PackedHomeward, Visit, Widths, pack, visits
from ring_attn.layout import Layout, Part
from ring_attn.mask import Mask
from ring_attn.parts import evenly, in_position_order, span
from ring_attn.plan import Meets, Plan


class GatherExchange:
    """One all-gather, one visit with every rank's KV in position order, one reduce-scatter: few launches, memory for all KV.

    Where `max_rows` allows less, a visit holds the same slice of every shard; what came and its copy in position order live
    beside the next slice for a moment, so a slice is two thirds of what another exchange's visit may be.
    """

    name = "gather"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        ranks, length = range(layout.ring_size), kv_layout.shard_len
        slices = evenly(length, 1 if max_rows is None else self._slices(length, len(ranks), max_rows))
        visits = (in_position_order(kv_layout, [Part(rank, rows) for rank in ranks]) for rows in slices)
        return tuple((parts,) * len(ranks) for parts in visits)

    def _slices(self, length: int, ring_size: int, max_rows: int) -> int:
        """How many slices a shard is cut into."""
        if length * ring_size <= max_rows:
            return 1
        rows = 2 * max_rows // (3 * ring_size)
        if rows < 1:
            raise ValueError(
                f"the gather exchange takes a row of all {ring_size} ranks at a time, three times over, but kv_memory is "
                f"enough for {2 * max_rows} rows; exchange='pull' takes less at a time"
            )
        return -(-length // rows)

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        widths, packed = Widths.of(kv[0]), [pack(pair) for pair in kv]

        def gather(step: int, came: list[Tensor] | None = None) -> Pending[list[Tensor]]:
            rows = _slice(span(plan.meets[step][0]))
            return transport.all_gather([x[:, rows].contiguous() for x in packed], what=f"{what}, KV of all for step {step}")

        def read(step: int, came: list[Tensor]) -> list[KV]:
            parts = plan.meets[step][0]
            first = span(parts).start
            pieces = [came[part.rank][:, part.rows.start - first : part.rows.stop - first] for part in parts]
            return [widths.unpack(torch.cat(pieces, 1))] * len(kv)

        return visits(gather(plan.steps[0]), plan.steps, gather, read)

    def homeward(self, transport: Transport, plan: Plan, how: HowHome) -> Homeward:
        return _GatherHomeward(transport, plan, how)


class _GatherHomeward(PackedHomeward):
    def add(self, visit: Visit) -> None:
        self.own = self.own or self.of_shards(visit)
        parts = self.plan.meets[visit.step][0]
        by_rank = [self._by_rank(one.packed(), parts) for one in self.of_visit]
        sums = self.transport.reduce_scatter(by_rank, what=f"gather backward, dK and dV home from step {visit.step}")
        # One way home at a time: what is kept is bounded as visits are.
        self.add_arrived(self.own)
        self.pending = [(span(parts), sums)]
        self.of_visit = []

    def _by_rank(self, rows: Tensor, parts: tuple[Part, ...]) -> list[Tensor]:
        """The rows of each rank, in the order of its shard."""
        pieces = dict(zip(parts, rows.split([len(part.rows) for part in parts], 1), strict=True))
        own = ([part for part in parts if part.rank == rank] for rank in range(self.transport.ring_size))
        return [torch.cat([pieces[part] for part in sorted(found, key=lambda part: part.rows.start)], 1) for found in own]


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)
