"""Every rank pulls what its tiles need of the others while it attends its own shard.

Note [way home]: of a backward, the last dK and dV to leave would travel while nothing is computed. So where they are many, the
own shard is met in halves of its KV rows: first those that the fewest queries of a causal mask see, while the others' KV comes,
and last the rest, while what was gathered for the others goes home. Where a backward goes by parts of the heads, the KV of
every part but the first comes while the one before is met, so it can begin with the others' KV: what the part before gathered
goes home beside that, and what it gathers itself beside its own shard.

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
from ring_attn.exchange.base import KV, Beside, Homeward, HowHome, PackedHomeward, Visit, Widths, pack, visits
from ring_attn.kernels.sums import RowsOfSum, Sum
from ring_attn.layout import Layout, Part, total_rows
from ring_attn.mask import Mask
from ring_attn.parts import in_visits, needed, steps_for
from ring_attn.tiles import Meets, Plan

HALVES_FROM = 64 << 20  # bytes, from where on a way home takes longer than what more calls of a kernel do


@dataclass(frozen=True)
class PullExchange:
    """The own shard first, while every rank pulls the rows of the others that its tiles need; then one visit with all of them.

    What a mask hides is not moved: under a causal mask the zigzag layout moves three quarters of what a ring does. Where
    `max_rows` allows less, the others' rows come in several visits.

    `halved`: the own shard is met in halves, as a backward may; see Note [way home].
    """

    halved: bool = False
    name = "pull"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        ranks, length = range(layout.ring_size), kv_layout.shard_len
        wanted = [needed(layout, kv_layout, mask, rank) for rank in ranks]
        count = steps_for(max(map(total_rows, wanted)), max_rows)
        by_rank = [in_visits(parts, count) for parts in wanted]
        halves = [range(length // 2, length), range(length // 2)] if self.halved else [range(length)]
        first, *rest = (tuple((Part(rank, rows),) for rank in ranks) for rows in halves)
        return first, *zip(*by_rank, strict=True), *rest

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        return self._tour(plan.steps, transport, kv, plan, what)

    def own_last(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        """A tour that ends with the own shard; by then it has asked for what it begins with. See Note [way home]."""
        own, *others = plan.steps
        return self._tour((*others, own), transport, kv, plan, what)

    def _tour(self, steps: Sequence[int], transport: Transport, kv: list[KV], plan: Plan, what: str) -> Iterator[Visit]:
        widths = Widths.of(kv[0])
        # In one piece where it is put up again and again.
        once = sum(_own_rows(plan, step) is None for step in plan.steps) == 1
        shards = cache(lambda: [Beside.of(pair) if once else Beside((pack(pair),)) for pair in kv])

        def pull(step: int, came: list[Tensor]) -> Pending[list[Tensor]]:
            if _own_rows(plan, step) is not None:
                return _own_kv()
            return transport.pull(shards(), plan.meets[step], what=f"{what}, KV for step {step}")

        def read(step: int, came: list[Tensor]) -> list[KV]:
            rows = _own_rows(plan, step)
            if rows is None:
                return list(map(widths.unpack, came))
            return kv if rows == slice(0, kv[0][0].shape[1]) else [(k[:, rows], v[:, rows]) for k, v in kv]

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
            yield Visit(step, list(map(widths.unpack, came)), False, came)
        yield Visit(0, kv, True)

    def homeward(self, transport: Transport, plan: Plan, how: HowHome) -> Homeward:
        return _PullHomeward(transport, plan, how)


def _own_kv() -> Pending[list[Tensor]]:
    """The pending of a step that meets the own shard: nothing comes."""
    return Pending([], lambda: None, "own KV")


def _own_rows(plan: Plan, step: int) -> slice | None:
    """The rows of the own shard that a step meets, the same on every rank; None where it meets others'."""
    for rank, parts in enumerate(plan.meets[step]):
        for part in parts:
            return slice(part.rows.start, part.rows.stop) if part.rank == rank else None
    return None


class _PullHomeward(PackedHomeward):
    """What others pushed is added to the own rows when it is waited for."""

    def __init__(self, transport: Transport, plan: Plan, how: HowHome) -> None:
        super().__init__(transport, plan, how)
        self.pushed: Pending | None = None

    def meets_traffic(self, plan: Plan) -> bool:
        # A single pull is done before its visit, and so before anything leaves.
        return sum(_own_rows(plan, step) is None for step in plan.steps) > 1

    def sums(self, visit: Visit) -> list[RowsOfSum]:
        self.own = self.own or self.aimed(self.of_shards(visit))
        rows = _own_rows(self.plan, visit.step)
        return super().sums(visit) if rows is None else [RowsOfSum(one.sum, range(rows.start, rows.stop)) for one in self.own]

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
