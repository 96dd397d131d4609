"""KV shards travel both ways at once, half of each to the next rank and half to the one before.

Note [two ways]: every rank sends and receives as many rows as in a ring, but half of them over the wires to either neighbour.
So a visit comes in half the time where these are wires of their own: PCIe, a torus, a ring over hosts, where the link between
two of them then carries both directions. Behind a switch all rows of a rank share its port, and there is nothing to win. Where
a mask hides most, a ring moves less: here the rows that a window reaches come from either side, half of them all the way round.

Note [halves]: of every run of positions in a shard one half goes each way. So under a causal mask ranks are as balanced at
every step as in a ring, also in the zigzag layout, whose two runs weigh differently; but a visit has two tiles for one. By
document ranks have runs of their own, and the halves are those of the first one's: as right, and less balanced.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from ring_attn.comm.transport import Pending, Pieces, Transport
from ring_attn.exchange.ring import RingExchange
from ring_attn.layout import Layout, Part, places
from ring_attn.plan import Plan


@dataclass(frozen=True)
class TwoWayExchange(RingExchange):
    """A ring in both directions: a visit holds half a shard of either side, as many rows as in a ring; see Note [two ways]."""

    name = "two-way"

    def passing(self, kv_layout: Layout, step: int) -> tuple[tuple[Part, ...], ...]:
        return _visited(kv_layout, step)

    def pass_on(
        self, transport: Transport, rows: list[Tensor], plan: Plan, start: int, stop: int, *, what: str
    ) -> Pending[list[Tensor]]:
        # One pull is one batch of messages: both directions go at once.
        return transport.pull([Pieces((x,)) for x in rows], _whereabouts(plan.kv_layout, start, stop), what=what)


@lru_cache
def _halves(kv_layout: Layout) -> tuple[tuple[range, ...], tuple[range, ...]]:
    """The rows of a shard that travel to the next rank, and those that travel to the one before; see Note [halves]."""
    ahead, back, first = [], [], 0
    for run in kv_layout.shard(0):
        middle, stop = first + len(run) // 2, first + len(run)
        ahead.append(range(first, middle))
        back.append(range(middle, stop))
        first = stop
    return tuple(filter(None, ahead)), tuple(filter(None, back))


@lru_cache(maxsize=1024)
def _visited(kv_layout: Layout, step: int) -> tuple[tuple[Part, ...], ...]:
    """By rank, what it visits at a step: what is on its way to the next rank first; of the own shard all in order."""
    size, (ahead, back) = kv_layout.ring_size, _halves(kv_layout)
    if step == 0:
        whole = sorted((*ahead, *back), key=lambda rows: rows.start)
        return tuple(tuple(Part(rank, rows) for rows in whole) for rank in range(size))
    return tuple(
        (*(Part((rank - step) % size, rows) for rows in ahead), *(Part((rank + step) % size, rows) for rows in back))
        for rank in range(size)
    )


@lru_cache(maxsize=1024)
def _whereabouts(kv_layout: Layout, start: int, stop: int) -> tuple[tuple[Part, ...], ...]:
    """By rank, where what it visits at step `stop` lies at step `start`: with which rank, and in which rows of its visit."""
    size, (ahead, _) = kv_layout.ring_size, _halves(kv_layout)
    lies = [{part: range(rows.start, rows.stop) for part, rows in places(parts)} for parts in _visited(kv_layout, start)]
    found = []
    for parts in _visited(kv_layout, stop):
        holders = [(part.rank + (start if part.rows in ahead else -start)) % size for part in parts]
        found.append(tuple(Part(holder, lies[holder][part]) for holder, part in zip(holders, parts, strict=True)))
    return tuple(found)
