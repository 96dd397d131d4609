"""When each visit of a call runs on each process: what `ring-attn bench ring --plot` draws below the speeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from unittest.mock import patch

import torch

from ring_attn import call
from ring_attn.bench.contenders import Case, OnRing
from ring_attn.bench.timing import Everyone, Mark, mark, ms_between
from ring_attn.comm.transport import Transport
from ring_attn.exchange.base import KV, Exchange, Homeward, HowHome, Visit
from ring_attn.layout import Layout
from ring_attn.mask import Mask
from ring_attn.plan import Meets, Plan
from ring_attn.ring import Ring
from ring_attn.settled import Settled


class Bar(NamedTuple):
    """One visit's kernels on one process, in milliseconds since all processes met."""

    process: int
    direction: str
    step: int
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    title: str
    bars: tuple[Bar, ...]


def timeline(contender: OnRing, case: Case, everyone: Everyone) -> Timeline:
    """One forward and backward of a settled ring, after one to warm up. Every process must call this."""
    q, k, v, dout = case.shape.random(len(contender.positions(case)), seed=everyone.transport.hosted[0])
    with contender.attention(case) as attend, _watched(contender.ring, everyone.device) as seen:
        torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
        seen.clear()
        everyone.meet()
        origin = mark(everyone.device)
        torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
    mine: list[float] = []
    for visit in seen:
        start, stop = (ms_between(origin, at) for at in (visit.start, visit.stop))
        # Where a part of a backward is begun before the last visit of the one before, its own time is what follows that.
        mine += [max([start, *mine[-1:]]), stop]
    bars = tuple(
        Bar(process, visit.direction, visit.step, start, stop)
        for process, numbers in enumerate(everyone.tell(mine))
        for visit, (start, stop) in zip(seen, numbers.view(-1, 2).tolist(), strict=True)
    )
    who = f"{contender.name} ({contender.layout}): {contender.chosen}"
    return Timeline(f"{who}, {case.name} {case.length:,}", bars)


class _Seen(NamedTuple):
    direction: str
    step: int
    start: Mark
    stop: Mark


@dataclass(frozen=True)
class _Watched:
    """An exchange that notes when the loop gets each visit and when it comes back for more. It has the plans of its equals."""

    inner: Exchange
    device: torch.device
    seen: list[_Seen] = field(compare=False)

    @property
    def name(self) -> str:
        return self.inner.name

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        return self.inner.meets(layout, kv_layout, mask, max_rows)

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        return self._noted(self.inner.tour(transport, kv, plan, what=what), what.split()[-1])

    def own_last(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        return self._noted(self.inner.own_last(transport, kv, plan, what=what), what.split()[-1])

    def by_heads(self, transport: Transport, kv: list[KV], plan: Plan, count: int, *, what: str) -> Iterator[Visit]:
        return self._noted(self.inner.by_heads(transport, kv, plan, count, what=what), what.split()[-1])

    def again(self, kv: list[KV], plan: Plan, kept: Sequence[torch.Tensor]) -> Iterator[Visit]:
        return self._noted(self.inner.again(kv, plan, kept), "backward")

    def _noted(self, visits: Iterator[Visit], direction: str) -> Iterator[Visit]:
        for visit in visits:
            start = mark(self.device)
            yield visit
            self.seen.append(_Seen(direction, visit.step, start, mark(self.device)))

    def homeward(self, transport: Transport, plan: Plan, how: HowHome) -> Homeward:
        return self.inner.homeward(transport, plan, how)


@contextmanager
def _watched(ring: Ring, device: torch.device) -> Iterator[list[_Seen]]:
    """Within it the exchanges of calls on that ring are watched."""
    seen: list[_Seen] = []
    settle = call.Call.settle

    def watched(self, *inputs: torch.Tensor) -> Settled:
        settled = settle(self, *inputs)
        there, back = (_Watched(one, device, seen) for one in (settled.exchange, settled.back))
        return replace(settled, exchange=there, back=back)

    with ExitStack() as stack:
        stack.enter_context(patch.object(call.Call, "settle", watched))
        for one in (ring, *ring.of_parts.values()):
            stack.enter_context(patch.dict(one.settled, clear=True))
        yield seen
