"""Every rank pulls what its tiles need of the others while it attends its own shard.

Note [parts]: where a backward goes by parts of the heads, the KV of every part but the first comes while the one before is met,
so it can begin with the others' KV: what the part before gathered goes home beside that, and what it gathers itself beside its
own shard.

Note [by heads]: with many KV heads what the others' rows take to come is longer than what the own ones take to be attended. So
they may come and be attended for one part of the heads after the other: only the first part can be waited for, and nothing more
is merged, for heads have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from ring_attn.comm.transport import Pending, Transport
from ring_attn.exchange.base import (
    KV,
    Beside,
    Homeward,
    HowHome,
    OwnApart,
    Visit,
    Widths,
    no_kv,
    of_own,
    own_visits,
    pack,
    visits,
)
from ring_attn.kernels.sums import Sum
from ring_attn.layout import Layout, total_rows
from ring_attn.mask import Mask
from ring_attn.parts import in_visits, needed, steps_for
from ring_attn.plan import Meets, Plan


@dataclass(frozen=True)
class PullExchange:
    """The own shard first, while every rank pulls the rows of the others that its tiles need; then one visit with all of them.

    What a mask hides is not moved: under a causal mask the zigzag layout moves three quarters of what a ring does. Where
    `max_rows` allows less, the others' rows come in several visits.

    `halved`: the own shard is met in halves, as a backward may; see Note [way home] of `ring_attn.exchange.base`.
    """

    halved: bool = False
    name = "pull"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        wanted = [needed(layout, kv_layout, mask, rank) for rank in range(layout.ring_size)]
        count = steps_for(max(map(total_rows, wanted)), max_rows)
        by_rank = [in_visits(parts, count) for parts in wanted]
        first, *rest = own_visits(layout.ring_size, kv_layout.shard_len, self.halved)
        return first, *zip(*by_rank, strict=True), *rest

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        return self._tour(plan.steps, transport, kv, plan, what)

    def own_last(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        """A tour that ends with the own shard; by then it has asked for what it begins with. See Note [parts]."""
        own, *others = plan.steps
        return self._tour((*others, own), transport, kv, plan, what)

    def _tour(self, steps: Sequence[int], transport: Transport, kv: list[KV], plan: Plan, what: str) -> Iterator[Visit]:
        widths = Widths.of(kv[0])
        # In one piece where it is put up again and again.
        once = len(plan.steps_away) == 1
        shards = cache(lambda: [Beside.of(pair) if once else Beside((pack(pair),)) for pair in kv])

        def pull(step: int, came: list[Tensor]) -> Pending[list[Tensor]]:
            if step in plan.own_rows:
                return no_kv()
            return transport.pull(shards(), plan.meets[step], what=f"{what}, KV for step {step}")

        def read(step: int, came: list[Tensor]) -> list[KV]:
            rows = plan.own_rows.get(step)
            if rows is None:
                return list(map(widths.unpack, came))
            return of_own(kv, rows)

        return visits(pull(steps[0], []), steps, pull, read, tell=True)

    def by_heads(self, transport: Transport, kv: list[KV], plan: Plan, count: int, *, what: str) -> Iterator[Visit]:
        """A tour of two steps whose second is made for so many parts of the heads, one after another; see Note [by heads]."""
        _, step = plan.steps
        parts = [[(k.chunk(count, 2)[n], v.chunk(count, 2)[n]) for k, v in kv] for n in range(count)]

        def pull(n: int) -> Pending[list[Tensor]]:
            shards = list(map(Beside.of, parts[n]))
            return transport.pull(shards, plan.meets[step], what=f"{what}, KV for step {step}, part {n} of the heads")

        pending = pull(0)
        yield Visit(0, kv, False)
        for n in range(count):
            came = pending.wait()
            if n + 1 < count:
                pending = pull(n + 1)
            yield Visit(step, list(map(Widths.of(parts[n][0]).unpack, came)), True, heads=(n, count))
            del came

    def again(self, kv: list[KV], plan: Plan, kept: Sequence[Tensor]) -> Iterator[Visit]:
        """The visits of a backward whose forward `kept` all that came by this plan: the others' first, so that their dK and dV
        go home while the own shard is attended.
        """
        widths, remote = Widths.of(kv[0]), plan.steps[1:]
        for n, step in enumerate(remote):
            came = kept[n * len(kv) : (n + 1) * len(kv)]
            yield Visit(step, list(map(widths.unpack, came)), False)
        yield Visit(0, kv, True)

    def homeward(self, transport: Transport, plan: Plan, how: HowHome) -> Homeward:
        return _PullHomeward(transport, plan, how)


class _PullHomeward(OwnApart):
    """What others pushed is added to the own rows when it is waited for."""

    def __init__(self, transport: Transport, plan: Plan, how: HowHome) -> None:
        super().__init__(transport, plan, how)
        self.pushed: Pending | None = None

    def add(self, visit: Visit) -> None:
        if not self.of_visit:
            return
        what = f"pull backward, dK and dV home from step {visit.step}"
        if self.pushed is not None:
            # One way home at a time: what is kept is bounded as visits are.
            self._arrive()
            for one in self.own:
                one.sum.settle()
        self.pushed = self.transport.push(self.of_visit, self.plan.meets[visit.step], self.own, what=what)
        self.of_visit = []

    def collect(self) -> list[Sum]:
        self._arrive()
        return super().collect()

    def _arrive(self) -> None:
        """Adds what was pushed to the own rows."""
        if self.pushed is not None:
            self.pushed.wait()
            self.pushed = None
