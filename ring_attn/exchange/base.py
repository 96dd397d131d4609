"""The seams of an exchange, and what all of them share: packed rows, a tour with the next visit under way, the way home."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ring_attn.comm.transport import Pending, Transport
from ring_attn.layout import Layout
from ring_attn.mask import Mask
from ring_attn.tiles import Meets, Plan

KV = tuple[Tensor, Tensor]


class Visit(NamedTuple):
    """What the hosted ranks see at one step: `kv[i]` is hosted rank i's k [b, skv, g, d] and v [b, skv, g, dv].

    `came`: the packed rows that these are views of; only an exchange whose ring may keep them tells.
    """

    step: int
    kv: list[KV]
    last: bool
    came: Sequence[Tensor] = ()


class HowHome(NamedTuple):
    """In what dtype dK and dV are summed here, that of lse, and in what they travel. `busy`: KV of another tour travels too."""

    sums: torch.dtype
    wire: torch.dtype
    busy: bool = False


class Homeward(Protocol):
    """Collects dK and dV of a backward tour. Buffers are in the dtype of sums."""

    def buffers(self, visit: Visit) -> tuple[list[KV], bool]:
        """dk and dv for this visit's keys, one pair a hosted rank, and whether they are yet unwritten."""

    def add(self, visit: Visit) -> None:
        """Takes the buffers of this visit, now filled, on their way home."""

    def collect(self) -> list[KV]:
        """dk and dv of each hosted rank's own keys, from all ranks."""


class Exchange(Protocol):
    """`PullExchange.again` is beside these: the visits of a backward where the ring keeps KV, which no other exchange can."""

    name: str

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        """`[step][rank]`: the KV rows that the rank sees at that step, in the order of the visit's rows; at most `max_rows`."""

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]: ...

    def homeward(self, transport: Transport, plan: Plan, how: HowHome) -> Homeward: ...


def visits(
    pending: Pending[list[Tensor]],
    plan: Plan,
    post: Callable[[int, list[Tensor]], Pending[list[Tensor]]],
    read: Callable[[int, list[Tensor]], list[KV]],
    *,
    tell: bool = False,
) -> Iterator[Visit]:
    """The visits of a tour, each with the next one under way: `post(step, what came)` asks for a step, `read` makes it KV.

    `tell`: visits tell what came.
    """
    for n, step in enumerate(plan.steps):
        came = pending.wait()
        kv, last = read(step, came), n + 1 == len(plan.steps)
        if not last:
            pending = post(plan.steps[n + 1], came)
        visit = Visit(step, kv, last, came if tell else ())
        # While a visit is attended, nothing lives but it and what is under way.
        del came, kv
        yield visit
        del visit


def at_hand(kv: list[KV], plan: Plan) -> Pending[list[Tensor]]:
    """The own KV, packed where it is to be sent, as if it had arrived."""
    return Pending([pack(pair) for pair in kv] if len(plan.steps) > 1 else [], lambda: None, "own KV")


class PackedHomeward:
    """What every way home shares: packed buffers of a visit, the own rows to which arrivals are added, and wires beside those
    that KV travels over.
    """

    def __init__(self, transport: Transport, plan: Plan, how: HowHome) -> None:
        self.transport = transport.beside if how.busy or self.meets_traffic(plan) else transport
        self.plan, self.how = plan, how
        self.rows: list[Tensor] = []
        self.own: list[Tensor] = []
        self.pending: list[tuple[slice, Pending[list[Tensor]]]] = []

    def meets_traffic(self, plan: Plan) -> bool:
        """Whether KV is still to travel when the first gradients leave; with two steps the second waits for its KV anyway."""
        return len(plan.steps) > 2

    def buffers(self, visit: Visit) -> tuple[list[KV], bool]:
        self.widths = Widths.of(visit.kv[0])
        self.rows = [self.widths.unwritten(pair, self.how.sums) for pair in visit.kv]
        return [self.widths.unpack(rows) for rows in self.rows], True

    def sent(self, rows: list[Tensor]) -> list[Tensor]:
        """The rows as they travel."""
        return [x.to(self.how.wire) for x in rows]

    def collect(self) -> list[KV]:
        self.add_arrived(self.own)
        return [self.widths.unpack(rows) for rows in self.own]

    def add_arrived(self, to: list[Tensor]) -> None:
        for place, pending in self.pending:
            for rows, arrived in zip(to, pending.wait(), strict=True):
                rows[:, place].add_(arrived)
        self.pending = []


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
        k, v = rows.split_with_sizes([self.heads * self.d, self.heads * self.dv], -1)
        b, n, _ = rows.shape
        return k.view(b, n, self.heads, self.d), v.view(b, n, self.heads, self.dv)

    def unwritten(self, pair: KV, dtype: torch.dtype) -> Tensor:
        """Packed rows that hold nothing yet, as many as the pair has."""
        return pair[0].new_empty(*pair[0].shape[:2], self.heads * (self.d + self.dv), dtype=dtype)


def pack(pair: KV) -> Tensor:
    """K and V of a row side by side, so that any rows are one message; copied: what is sent belongs to the transport."""
    return torch.cat([x.flatten(2) for x in pair], -1)
