"""KV shards travel from rank to rank: memory of two shards, for memory and for slow links."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ring_attn.comm.transport import Pending, Transport
from ring_attn.exchange.base import (
    KV,
    Homeward,
    HowHome,
    OwnApart,
    Visit,
    Widths,
    at_hand,
    no_kv,
    of_own,
    own_visits,
    visits,
)
from ring_attn.layout import Layout, Part
from ring_attn.mask import Mask
from ring_attn.plan import Meets, Plan


@dataclass(frozen=True)
class RingExchange:
    """KV shards travel from rank to rank; one source a visit. A step nobody needs is jumped over in one longer shift.

    `halved`: the own shard is met in halves, as a backward may; see Note [way home] of `ring_attn.exchange.base`.
    """

    halved: bool = False
    name = "ring"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        size, length = layout.ring_size, kv_layout.shard_len
        if max_rows is not None and max_rows < length and size > 1:
            raise ValueError(
                f"the {self.name} exchange holds a whole shard of {length} KV rows at a time, but kv_memory is enough "
                f"for {max_rows}; exchange='pull' and 'gather' take less at a time"
            )
        first, *rest = own_visits(size, length, self.halved)
        return first, *(self.passing(kv_layout, step) for step in range(1, size)), *rest

    def passing(self, kv_layout: Layout, step: int) -> tuple[tuple[Part, ...], ...]:
        """By rank, what passes it at a step."""
        size, everything = kv_layout.ring_size, range(kv_layout.shard_len)
        return tuple((Part((rank - step) % size, everything),) for rank in range(size))

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        widths, away = Widths.of(kv[0]), plan.steps_away

        def onward(step: int, came: list[Tensor]) -> Pending[list[Tensor]]:
            if step not in away:
                return no_kv()
            before = [0, *away][away.index(step)]
            return self.pass_on(transport, came, plan, before, step, what=f"{what}, KV for step {step}")

        def read(step: int, came: list[Tensor]) -> list[KV]:
            rows = plan.own_rows.get(step)
            return list(map(widths.unpack, came)) if rows is None else of_own(kv, rows)

        return visits(at_hand(kv, plan), plan.steps, onward, read)

    def pass_on(
        self, transport: Transport, rows: list[Tensor], plan: Plan, start: int, stop: int, *, what: str
    ) -> Pending[list[Tensor]]:
        """The packed rows of a visit at step `start` on to the ranks that visit them at step `stop`, which is 0 at home."""
        return transport.shift(rows, stop - start, what=what)

    def homeward(self, transport: Transport, plan: Plan, how: HowHome) -> Homeward:
        return _RingHomeward(transport, plan, how, self)


class _RingHomeward(OwnApart):
    """dK and dV follow the KV they belong to, one visit behind, and go home from the last step in one shift.

    A visit has sums of its own, so that what came from the rank before is awaited only after this visit's compute.
    """

    def __init__(self, transport: Transport, plan: Plan, how: HowHome, exchange: RingExchange) -> None:
        super().__init__(transport, plan, how)
        self.exchange, self.away = exchange, plan.steps_away

    def add(self, visit: Visit) -> None:
        if visit.step not in self.away:
            return
        self.add_arrived(self.of_visit)
        to = [*self.away, 0][self.away.index(visit.step) + 1]
        where = f"{self.exchange.name} backward, dK and dV {'on' if to else 'home'} from step {visit.step}"
        sent, rows = [one.packed() for one in self.of_visit], range(self.plan.kv_layout.shard_len)
        self.of_visit = []
        self.pending = [(rows, self.exchange.pass_on(self.transport, sent, self.plan, visit.step, to, what=where))]
