"""KV shards travel from rank to rank: memory of two shards, for memory and for slow links."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ring_attn.comm.transport import Pending, Transport
from ring_attn.exchange.base import KV, Homeward, HowHome, PackedHomeward, Visit, Widths, at_hand, visits
from ring_attn.kernels.sums import RowsOfSum
from ring_attn.layout import Layout, Part
from ring_attn.mask import Mask
from ring_attn.tiles import Meets, Plan


class RingExchange:
    """KV shards travel from rank to rank; one source a visit. A step nobody needs is jumped over in one longer shift."""

    name = "ring"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        size, everything = layout.ring_size, range(kv_layout.shard_len)
        if max_rows is not None and max_rows < len(everything):
            raise ValueError(
                f"the {self.name} exchange holds a whole shard of {len(everything)} KV rows at a time, but kv_memory is enough "
                f"for {max_rows}; exchange='pull' and 'gather' take less at a time"
            )
        return tuple(tuple((Part((rank - step) % size, everything),) for rank in range(size)) for step in range(size))

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        widths, steps = Widths.of(kv[0]), plan.steps

        def onward(step: int, came: list[Tensor]) -> Pending[list[Tensor]]:
            before = steps[steps.index(step) - 1]
            return self.pass_on(transport, came, plan, before, step, what=f"{what}, KV for step {step}")

        return visits(at_hand(kv, plan), plan.steps, onward, lambda step, came: list(map(widths.unpack, came)) if step else kv)

    def pass_on(
        self, transport: Transport, rows: list[Tensor], plan: Plan, start: int, stop: int, *, what: str
    ) -> Pending[list[Tensor]]:
        """The packed rows of a visit at step `start` on to the ranks that visit them at step `stop`, which is 0 at home."""
        return transport.shift(rows, stop - start, what=what)

    def homeward(self, transport: Transport, plan: Plan, how: HowHome) -> Homeward:
        return _RingHomeward(transport, plan, how, self)


class _RingHomeward(PackedHomeward):
    """dK and dV follow the KV they belong to, one visit behind, and go home from the last step in one shift.

    A visit has sums of its own, so that what came from the rank before is awaited only after this visit's compute.
    """

    def __init__(self, transport: Transport, plan: Plan, how: HowHome, exchange: RingExchange) -> None:
        super().__init__(transport, plan, how)
        self.exchange = exchange

    def sums(self, visit: Visit) -> list[RowsOfSum]:
        found = super().sums(visit)
        self.aimed(self.of_visit)
        return found

    def add(self, visit: Visit) -> None:
        if visit.step == 0:
            self.own = self.of_visit
            return
        self.add_arrived(self.of_visit)
        steps = self.plan.steps
        to = 0 if visit.last else steps[steps.index(visit.step) + 1]
        where = f"{self.exchange.name} backward, dK and dV {'home' if visit.last else 'on'} from step {visit.step}"
        sent, rows = [one.packed() for one in self.of_visit], range(self.plan.kv_layout.shard_len)
        self.pending = [(rows, self.exchange.pass_on(self.transport, sent, self.plan, visit.step, to, what=where))]
