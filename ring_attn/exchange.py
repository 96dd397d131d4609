"""In which order a rank meets which KV rows, and how dK and dV get home.

An exchange answers three questions: what each rank `meets` at each step (pure integers, so every rank knows every other's
plan), how KV travels on a `tour` over the steps that are needed, and how gradients go `homeward` to the rank that owns the
keys. Attention knows none of this; it walks the visits.

Note [position order]: where a visit holds KV of several ranks, its rows are in the order of their positions. A mask is then a
band over all of them, so the tiles of a visit are as few as on one device, and so are the calls and merges of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ring_attn.comm.transport import Pending, Transport
from ring_attn.layout import Layout, Part
from ring_attn.mask import Mask
from ring_attn.tiles import Meets, Plan, part_positions, tiles

KV = tuple[Tensor, Tensor]


class Visit(NamedTuple):
    """What the hosted ranks see at one step: `kv[i]` is hosted rank i's k [b, skv, g, d] and v [b, skv, g, dv]."""

    step: int
    kv: list[KV]
    last: bool


class Homeward(Protocol):
    """Collects dK and dV of a backward tour. Buffers are in the dtype of lse."""

    def buffers(self, visit: Visit) -> list[KV]:
        """Zeroed dk and dv for this visit's keys, one pair a hosted rank."""

    def add(self, visit: Visit) -> None:
        """Takes the buffers of this visit, now filled, on their way home."""

    def collect(self) -> list[KV]:
        """dk and dv of each hosted rank's own keys, from all ranks."""


class Exchange(Protocol):
    name: str

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask) -> Meets:
        """`[step][rank]`: the KV rows that the rank sees at that step, in the order of the visit's rows."""

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]: ...

    def homeward(self, transport: Transport, plan: Plan, dtype: torch.dtype) -> Homeward: ...


@lru_cache(maxsize=128)
def make_plan(exchange: Exchange, mask: Mask, layout: Layout, kv_layout: Layout | None = None) -> Plan:
    """The plan of an exchange, made once and kept: plans fill lazily and are shared between layers and passes.

    `kv_layout`: that of the keys where it is not `layout`, in cross-attention.
    """
    kv_layout = layout if kv_layout is None else kv_layout
    return Plan(layout, kv_layout, mask, exchange.meets(layout, kv_layout, mask))


class _Homeward:
    """What every way home shares: packed buffers of a visit, and the own rows to which the last arrivals are added."""

    def __init__(self, transport: Transport, plan: Plan, dtype: torch.dtype) -> None:
        self.transport, self.plan, self.dtype = transport, plan, dtype
        self.rows: list[Tensor] = []
        self.own: list[Tensor] | None = None
        self.pending: Pending[list[Tensor]] | None = None

    def buffers(self, visit: Visit) -> list[KV]:
        self.widths = Widths.of(visit.kv[0])
        self.rows = [self.widths.zeros(pair, self.dtype) for pair in visit.kv]
        return [self.widths.unpack(rows) for rows in self.rows]

    def collect(self) -> list[KV]:
        if self.own is None:
            self.own = self.pending.wait()
        else:
            _add_arrived(self.own, self.pending)
        return [self.widths.unpack(rows) for rows in self.own]


def _add_arrived(mine: list[Tensor], pending: Pending[list[Tensor]] | None) -> None:
    if pending is not None:
        for rows, arrived in zip(mine, pending.wait(), strict=True):
            rows += arrived


class RingExchange:
    """KV shards travel from rank to rank; one source a visit. A step nobody needs is jumped over in one longer shift."""

    name = "ring"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask) -> Meets:
        size, everything = layout.ring_size, range(kv_layout.shard_len)
        return tuple(tuple((Part((rank - step) % size, everything),) for rank in range(size)) for step in range(size))

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        pending: Pending[list[Tensor]] | None = None
        widths = Widths.of(kv[0])
        packed: list[Tensor] = []
        for n, step in enumerate(plan.steps):
            if pending is not None:
                packed = pending.wait()
                kv = [widths.unpack(rows) for rows in packed]
            last = n + 1 == len(plan.steps)
            if not last:
                packed = packed or [pack(pair) for pair in kv]
                pending = transport.shift(packed, plan.steps[n + 1] - step, what=f"{what}, KV for step {plan.steps[n + 1]}")
            yield Visit(step, kv, last)

    def homeward(self, transport: Transport, plan: Plan, dtype: torch.dtype) -> Homeward:
        return _RingHomeward(transport, plan, dtype)


class _RingHomeward(_Homeward):
    """dK and dV follow the KV they belong to, one visit behind, and go home from the last step in one shift.

    A visit fills buffers of its own, so that what came from the rank before is awaited only after this visit's compute.
    """

    def add(self, visit: Visit) -> None:
        if visit.step == 0:
            self.own = self.rows
            return
        _add_arrived(self.rows, self.pending)
        steps = self.plan.steps
        offset = -visit.step if visit.last else steps[steps.index(visit.step) + 1] - visit.step
        where = "home" if visit.last else "on"
        self.pending = self.transport.shift(self.rows, offset, what=f"ring backward, dK and dV {where} from step {visit.step}")


class GatherExchange:
    """One all-gather, one visit with every rank's KV in position order, one reduce-scatter: few launches, memory for all KV."""

    name = "gather"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask) -> Meets:
        everything = range(kv_layout.shard_len)
        parts = in_position_order(kv_layout, [Part(rank, everything) for rank in range(layout.ring_size)])
        return (tuple(parts for _ in range(layout.ring_size)),)

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        shards = transport.all_gather([pack(pair) for pair in kv], what=f"{what}, all KV").wait()
        parts = plan.meets[0][0]
        everything = torch.cat([shards[part.rank][:, part.rows.start : part.rows.stop] for part in parts], 1)
        yield Visit(0, [Widths.of(kv[0]).unpack(everything)] * len(kv), True)

    def homeward(self, transport: Transport, plan: Plan, dtype: torch.dtype) -> Homeward:
        return _GatherHomeward(transport, plan, dtype)


class _GatherHomeward(_Homeward):
    def add(self, visit: Visit) -> None:
        by_rank = [self._by_rank(rows) for rows in self.rows]
        self.pending = self.transport.reduce_scatter(by_rank, what="gather backward, dK and dV home")

    def _by_rank(self, rows: Tensor) -> list[Tensor]:
        """The rows of each rank, in the order of its shard."""
        parts = self.plan.meets[0][0]
        pieces = dict(zip(parts, rows.split([len(part.rows) for part in parts], 1), strict=True))
        own = ([part for part in parts if part.rank == rank] for rank in range(self.transport.ring_size))
        return [torch.cat([pieces[part] for part in sorted(found, key=lambda part: part.rows.start)], 1) for found in own]


class PullExchange:
    """The own shard first, while every rank pulls the rows of the others that its tiles need; then one visit with all of them.

    What a mask hides is not moved: under a causal mask the zigzag layout moves three quarters of what a ring does.
    """

    name = "pull"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask) -> Meets:
        ranks, everything = range(layout.ring_size), range(kv_layout.shard_len)
        own = tuple((Part(rank, everything),) for rank in ranks)
        return own, tuple(_needed(layout, kv_layout, mask, rank) for rank in ranks)

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        alone = len(plan.steps) == 1
        if not alone:
            pending = transport.pull([pack(pair) for pair in kv], plan.meets[1], what=f"{what}, KV of the others")
        yield Visit(0, kv, alone)
        if not alone:
            yield Visit(1, [Widths.of(kv[0]).unpack(rows) for rows in pending.wait()], True)

    def homeward(self, transport: Transport, plan: Plan, dtype: torch.dtype) -> Homeward:
        return _PullHomeward(transport, plan, dtype)


class _PullHomeward(_Homeward):
    def add(self, visit: Visit) -> None:
        if visit.step == 0:
            self.own = self.rows
            return
        shard_len = self.plan.kv_layout.shard_len
        self.pending = self.transport.push(
            self.rows, self.plan.meets[visit.step], shard_len, what="pull backward, dK and dV home"
        )


def in_position_order(layout: Layout, parts: list[Part]) -> tuple[Part, ...]:
    """The parts cut where their positions jump, by their first position; see Note [position order]."""
    found = []
    for part in parts:
        start = part.rows.start
        for positions in part_positions(layout, part):
            found.append((positions[0], Part(part.rank, range(start, start + len(positions)))))
            start += len(positions)
    return tuple(part for _, part in sorted(found, key=lambda pair: pair[0]))


def _needed(layout: Layout, kv_layout: Layout, mask: Mask, rank: int) -> tuple[Part, ...]:
    """The rows of other ranks that a rank's tiles hold."""
    parts: list[Part] = []
    for source in range(layout.ring_size):
        if source == rank:
            continue
        found = tiles(layout.shard(rank), [kv_layout.shard(source)], mask)
        for rows in sorted({tile.kv_rows for tile in found}, key=lambda rows: rows.start):
            last = parts[-1] if parts else None
            if last and last.rank == source and rows.start <= last.rows.stop:
                parts[-1] = Part(source, range(last.rows.start, max(last.rows.stop, rows.stop)))
            else:
                parts.append(Part(source, rows))
    return in_position_order(kv_layout, parts)


class Widths(NamedTuple):
    """How K and V lie side by side in packed rows [b, rows, g * d + g * dv]."""

    heads: int
    d: int
    dv: int

    @classmethod
    def of(cls, pair: KV) -> Widths:
        return cls(pair[0].shape[2], pair[0].shape[3], pair[1].shape[3])

    def unpack(self, rows: Tensor) -> KV:
        """k [b, rows, g, d] and v [b, rows, g, dv], views."""
        k, v = rows.split([self.heads * self.d, self.heads * self.dv], -1)
        return k.unflatten(-1, (self.heads, self.d)), v.unflatten(-1, (self.heads, self.dv))

    def zeros(self, pair: KV, dtype: torch.dtype) -> Tensor:
        """Packed rows of zeros for as many rows as the pair has."""
        return pair[0].new_zeros(*pair[0].shape[:2], self.heads * (self.d + self.dv), dtype=dtype)


def pack(pair: KV) -> Tensor:
    """K and V of a row side by side, so that any rows are one message; copied: what is sent belongs to the transport."""
    return torch.cat([x.flatten(2) for x in pair], -1)


EXCHANGES: dict[str, Exchange] = {exchange.name: exchange for exchange in (RingExchange(), GatherExchange(), PullExchange())}
