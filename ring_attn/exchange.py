"""In which order a rank meets each KV shard, and how dK and dV get home.

An exchange answers three questions: whom each rank `meets` at each step (pure integers, so every rank knows every other's
plan), how KV travels on a `tour` over the steps that are needed, and how gradients go `homeward` to the rank that owns the
keys. Attention knows none of this; it walks the visits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ring_attn.comm.transport import Pending, Transport

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

    def meets(self, ring_size: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """`[step][rank]`: the sources whose KV that rank sees at that step, in the order of the visit's rows."""

    def tour(self, transport: Transport, kv: list[KV], steps: tuple[int, ...], *, what: str) -> Iterator[Visit]: ...

    def homeward(self, transport: Transport, steps: tuple[int, ...], dtype: torch.dtype) -> Homeward: ...


class RingExchange:
    """KV shards travel from rank to rank; one source a visit. A step nobody needs is jumped over in one longer shift."""

    name = "ring"

    def meets(self, ring_size: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return tuple(tuple(((rank - step) % ring_size,) for rank in range(ring_size)) for step in range(ring_size))

    def tour(self, transport: Transport, kv: list[KV], steps: tuple[int, ...], *, what: str) -> Iterator[Visit]:
        pending: Pending[list[Tensor]] | None = None
        shapes = [x.shape for x in kv[0]]
        packed: list[Tensor] = []
        for n, step in enumerate(steps):
            if pending is not None:
                packed = pending.wait()
                kv = [_unpack(flat, shapes) for flat in packed]
            last = n + 1 == len(steps)
            if not last:
                packed = packed or [_pack(pair) for pair in kv]
                pending = transport.shift(packed, steps[n + 1] - step, what=f"{what}, KV for step {steps[n + 1]}")
            yield Visit(step, kv, last)

    def homeward(self, transport: Transport, steps: tuple[int, ...], dtype: torch.dtype) -> Homeward:
        return _RingHomeward(transport, steps, dtype)


class _RingHomeward:
    """dK and dV follow the KV they belong to, one visit behind, and go home from the last step in one shift.

    A visit fills buffers of its own, so that what came from the rank before is awaited only after this visit's compute.
    """

    def __init__(self, transport: Transport, steps: tuple[int, ...], dtype: torch.dtype) -> None:
        self.transport, self.steps, self.dtype = transport, steps, dtype
        self.pending: Pending[list[Tensor]] | None = None
        self.own: list[Tensor] = []
        self.flat: list[Tensor] = []
        self.shapes: list[torch.Size] = []

    def buffers(self, visit: Visit) -> list[KV]:
        self.shapes = [x.shape for x in visit.kv[0]]
        size = sum(shape.numel() for shape in self.shapes)
        self.flat = [torch.zeros(size, dtype=self.dtype, device=k.device) for k, _ in visit.kv]
        return [_unpack(flat, self.shapes) for flat in self.flat]

    def add(self, visit: Visit) -> None:
        if visit.step == 0:
            self.own = self.flat
            return
        if self.pending is not None:
            for mine, arrived in zip(self.flat, self.pending.wait(), strict=True):
                mine += arrived
        offset = -visit.step if visit.last else self.steps[self.steps.index(visit.step) + 1] - visit.step
        where = "home" if visit.last else "on"
        self.pending = self.transport.shift(self.flat, offset, what=f"ring backward, dK and dV {where} from step {visit.step}")

    def collect(self) -> list[KV]:
        if self.pending is not None:
            for mine, arrived in zip(self.own, self.pending.wait(), strict=True):
                mine += arrived
        return [_unpack(flat, self.shapes) for flat in self.own]


class GatherExchange:
    """One all-gather, one visit with every rank's KV in rank order, one reduce-scatter: few launches, memory for all KV."""

    name = "gather"

    def meets(self, ring_size: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return (tuple(tuple(range(ring_size)) for _ in range(ring_size)),)

    def tour(self, transport: Transport, kv: list[KV], steps: tuple[int, ...], *, what: str) -> Iterator[Visit]:
        shapes = [x.shape for x in kv[0]]
        packed = [_pack(pair) for pair in kv]
        shards = [_unpack(flat, shapes) for flat in transport.all_gather(packed, what=f"{what}, all KV").wait()]
        everything = torch.cat([k for k, _ in shards], 1), torch.cat([v for _, v in shards], 1)
        yield Visit(0, [everything for _ in kv], True)

    def homeward(self, transport: Transport, steps: tuple[int, ...], dtype: torch.dtype) -> Homeward:
        return _GatherHomeward(transport, dtype)


class _GatherHomeward:
    def __init__(self, transport: Transport, dtype: torch.dtype) -> None:
        self.transport, self.dtype = transport, dtype
        self.grads: list[KV] = []

    def buffers(self, visit: Visit) -> list[KV]:
        self.grads = [tuple(torch.zeros_like(x, dtype=self.dtype) for x in pair) for pair in visit.kv]
        return self.grads

    def add(self, visit: Visit) -> None:
        """All of it goes home at once, in `collect`."""

    def collect(self) -> list[KV]:
        size = self.transport.ring_size
        chunks = [list(zip(dk.chunk(size, 1), dv.chunk(size, 1), strict=True)) for dk, dv in self.grads]
        shapes = [x.shape for x in chunks[0][0]]
        parts = [[_pack(pair) for pair in row] for row in chunks]
        sums = self.transport.reduce_scatter(parts, what="gather backward, dK and dV home").wait()
        return [_unpack(flat, shapes) for flat in sums]


def _pack(pair: KV) -> Tensor:
    """K and V as one flat message, copied: what is sent belongs to the transport."""
    return torch.cat([x.reshape(-1) for x in pair])


def _unpack(flat: Tensor, shapes: list[torch.Size]) -> KV:
    k, v = flat.split([shape.numel() for shape in shapes])
    return k.view(shapes[0]), v.view(shapes[1])


EXCHANGES: dict[str, Exchange] = {exchange.name: exchange for exchange in (RingExchange(), GatherExchange())}
