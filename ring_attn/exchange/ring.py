"""KV shards travel from rank to rank: memory of two shards, for memory and for slow links."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ring_attn.comm.transport import Pending, Transport
from ring_attn.exchange.base import KV, GradTypes, Homeward, PackedHomeward, Visit, Widths, at_hand, visits
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
                f"the ring exchange holds a whole shard of {len(everything)} KV rows at a time, but kv_memory is enough for "
                f"{max_rows}; exchange='pull' and 'gather' take less at a time"
            )
        return tuple(tuple((Part((rank - step) % size, everything),) for rank in range(size)) for step in range(size))

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        widths, steps = Widths.of(kv[0]), plan.steps

        def shift(step: int, came: list[Tensor]) -> Pending[list[Tensor]]:
            return transport.shift(came, step - steps[steps.index(step) - 1], what=f"{what}, KV for step {step}")

        return visits(at_hand(kv, plan), plan, shift, lambda step, came: list(map(widths.unpack, came)) if step else kv)

    def homeward(self, transport: Transport, plan: Plan, dtypes: GradTypes) -> Homeward:
        return _RingHomeward(transport, plan, dtypes)


class _RingHomeward(PackedHomeward):
    """dK and dV follow the KV they belong to, one visit behind, and go home from the last step in one shift.

    A visit fills buffers of its own, so that what came from the rank before is awaited only after this visit's compute.
    """

    def add(self, visit: Visit) -> None:
        if visit.step == 0:
            self.own = self.rows
            return
        self.add_arrived(self.rows)
        steps = self.plan.steps
        offset = -visit.step if visit.last else steps[steps.index(visit.step) + 1] - visit.step
        where = f"ring backward, dK and dV {'home' if visit.last else 'on'} from step {visit.step}"
        self.pending = [(slice(None), self.transport.shift(self.sent(self.rows), offset, what=where))]
