"""Every rank pulls what its tiles need of the others while it attends its own shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ring_attn.comm.transport import Pending, Transport
from ring_attn.exchange.base import KV, GradTypes, Homeward, PackedHomeward, Visit, Widths, at_hand, visits
from ring_attn.layout import Layout, Part, total_rows
from ring_attn.mask import Mask
from ring_attn.parts import evenly, needed, steps_for, within
from ring_attn.tiles import Meets, Plan


class PullExchange:
    """The own shard first, while every rank pulls the rows of the others that its tiles need; then one visit with all of them.

    What a mask hides is not moved: under a causal mask the zigzag layout moves three quarters of what a ring does. Where
    `max_rows` allows less, the others' rows come in several visits.
    """

    name = "pull"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        ranks, everything = range(layout.ring_size), range(kv_layout.shard_len)
        own = tuple((Part(rank, everything),) for rank in ranks)
        wanted = [needed(layout, kv_layout, mask, rank) for rank in ranks]
        steps = steps_for(max(map(total_rows, wanted)), max_rows)
        by_rank = [[within(parts, rows) for rows in evenly(total_rows(parts), steps)] for parts in wanted]
        return own, *zip(*by_rank, strict=True)

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        widths, own = Widths.of(kv[0]), at_hand(kv, plan)

        def pull(step: int, came: list[Tensor]) -> Pending[list[Tensor]]:
            return transport.pull(own.received, plan.meets[step], what=f"{what}, KV for step {step}")

        return visits(own, plan, pull, lambda step, came: list(map(widths.unpack, came)) if step else kv, tell=True)

    def again(self, kv: list[KV], plan: Plan, kept: Sequence[Tensor]) -> Iterator[Visit]:
        """The visits of a backward whose forward `kept` all that came: the others' first, so that their dK and dV go home
        while the own shard is attended.
        """
        widths, remote = Widths.of(kv[0]), plan.steps[1:]
        for n, step in enumerate(remote):
            came = kept[n * len(kv) : (n + 1) * len(kv)]
            yield Visit(step, list(map(widths.unpack, came)), False, came)
        yield Visit(0, kv, True)

    def homeward(self, transport: Transport, plan: Plan, dtypes: GradTypes) -> Homeward:
        return _PullHomeward(transport, plan, dtypes)


class _PullHomeward(PackedHomeward):
    pushed: Pending | None = None

    def buffers(self, visit: Visit) -> tuple[list[KV], bool]:
        if visit.step or not self.own:
            return super().buffers(visit)
        # What was pushed is added to the same rows.
        return [self.widths.unpack(rows) for rows in self.own], False

    def add(self, visit: Visit) -> None:
        if visit.step == 0:
            self.own = self.own or self.rows
            return
        if not self.own:
            b, _, e = self.rows[0].shape
            self.own = [rows.new_zeros(b, self.plan.kv_layout.shard_len, e) for rows in self.rows]
        what = f"pull backward, dK and dV home from step {visit.step}"
        # One way home at a time: what is kept is bounded as visits are.
        self._arrive()
        self.pushed = self.transport.push(self.sent(self.rows), self.plan.meets[visit.step], self.own, what=what)
        self.rows = []

    def collect(self) -> list[KV]:
        self._arrive()
        return super().collect()

    def _arrive(self) -> None:
        """Adds what was pushed to the own rows."""
        if self.pushed is not None:
            self.pushed.wait()
