"""The seams of an exchange, and what all of them share: packed rows, a tour with the next visit under way, the way home.

Note [way home]: of a backward, the last dK and dV to leave would travel while nothing is computed. So where they are many, the
own shard is met in halves of its KV rows: first those that the fewest queries of a causal mask see, while the others' KV comes,
and last the rest, while what was gathered for the others goes home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ring_attn.comm.transport import Pending, Pieces, Transport
from ring_attn.kernels.sums import RowsOfSum, Sum, lay_beside
from ring_attn.layout import Layout, Part
from ring_attn.mask import Mask
from ring_attn.plan import Meets, Plan

KV = tuple[Tensor, Tensor]


class Visit(NamedTuple):
    """What the hosted ranks see at one step: `kv[i]` is hosted rank i's k [b, skv, g, d] and v [b, skv, g, dv].

    `came`: the packed rows that these are views of; only an exchange whose ring may keep them tells. `heads`: which part of the
    heads this is and of how many; `last` is then meant of that part.
    """

    step: int
    kv: list[KV]
    last: bool
    came: Sequence[Tensor] = ()
    heads: tuple[int, int] = (0, 1)


class HowHome(NamedTuple):
    """In what dtype dK and dV are summed here, that of lse, and in what they travel. `busy`: KV of another tour travels too.

    `aim(i)`: the tensors that dk and dv of the i-th hosted rank's own rows are to be written to, made when they are wanted.
    """

    sums: torch.dtype
    wire: torch.dtype
    busy: bool = False
    aim: Callable[[int], KV] | None = None


class Homeward(Protocol):
    """Collects dK and dV of a backward tour."""

    def sums(self, visit: Visit) -> list[RowsOfSum]:
        """What dk and dv of this visit's keys are added to, one a hosted rank."""

    def add(self, visit: Visit) -> None:
        """Takes what this visit added on its way home."""

    def collect(self) -> list[Sum]:
        """dk and dv of each hosted rank's own keys, from all ranks."""


class Exchange(Protocol):
    """`PullExchange` has three more tours, which no other exchange can: `again`, of a backward where the ring keeps KV,
    `own_last`, of a backward of a part of the heads, and `by_heads`, of a forward.
    """

    name: str

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        """`[step][rank]`: the KV rows that the rank sees at that step, in the order of the visit's rows; at most `max_rows`."""

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]: ...

    def homeward(self, transport: Transport, plan: Plan, how: HowHome) -> Homeward: ...


def visits(
    pending: Pending[list[Tensor]],
    steps: Sequence[int],
    post: Callable[[int, list[Tensor]], Pending[list[Tensor]]],
    read: Callable[[int, list[Tensor]], list[KV]],
    *,
    tell: bool = False,
) -> Iterator[Visit]:
    """The visits of these steps, each with the next one under way: `pending` is the first, `post(step, what came)` asks for
    another, `read` makes it KV.

    `tell`: visits tell what came.
    """
    for n, step in enumerate(steps):
        came = pending.wait()
        kv, last = read(step, came), n + 1 == len(steps)
        if not last:
            pending = post(steps[n + 1], came)
        visit = Visit(step, kv, last, came if tell else ())
        # While a visit is attended, nothing lives but it and what is under way.
        del came, kv
        yield visit
        del visit


def at_hand(kv: list[KV], plan: Plan) -> Pending[list[Tensor]]:
    """The own KV, packed where it is to be sent, as if it had arrived."""
    return Pending([pack(pair) for pair in kv] if len(plan.steps) > 1 else [], lambda: None, "own KV")


def own_visits(ring_size: int, length: int, halved: bool) -> list[tuple[tuple[Part, ...], ...]]:
    """What meets the own shard of `length` rows, by rank: one visit, or its halves in the order of Note [way home]."""
    rows = [range(length // 2, length), range(length // 2)] if halved else [range(length)]
    return [tuple((Part(rank, half),) for rank in range(ring_size)) for half in rows]


def of_own(kv: list[KV], rows: slice) -> list[KV]:
    """Those rows of the own shard."""
    return kv if rows == slice(0, kv[0][0].shape[1]) else [(k[:, rows], v[:, rows]) for k, v in kv]


def no_kv() -> Pending[list[Tensor]]:
    """The pending of a step that meets the own shard: nothing comes."""
    return Pending([], lambda: None, "own KV")


class PackedSum:
    """dK and dV of some KV rows as they add up; for transports rows [b, n, g * d + g * dv] that are `Unpacked`, and `Sums`."""

    def __init__(self, pair: KV, rows: int, how: HowHome) -> None:
        self.widths, self.device, self.dtype = Widths.of(pair), pair[0].device, how.wire
        b, _, heads, _ = pair[0].shape
        self.shape = b, rows, heads * (self.widths.d + self.widths.dv)
        make = partial(_unwritten, self.widths, self.shape, how.sums, self.device)
        self.sum = Sum([(b, rows, *x.shape[2:]) for x in pair], how.sums, self.device, make)

    def add(self, x: Tensor, rows: range, places: Tensor | None = None) -> None:
        self.sum.add(self.widths.unpack(x), rows, places)

    def write(self, to: Tensor) -> None:
        self.sum.write(self.widths.unpack(to))

    def packed(self) -> Tensor:
        # A total in the dtype of the wire can go as it is.
        _, n, e = self.shape
        if self.sum.total is not None and self.sum.dtype == self.dtype:
            rows = self.sum.total[0].as_strided(self.shape, (n * e, e, 1))
        else:
            rows = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.write(rows)
        return rows


def _unwritten(widths: Widths, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> KV:
    """A total of dK and dV whose rows lie side by side."""
    return widths.unpack(torch.empty(shape, dtype=dtype, device=device))


class PackedHomeward:
    """What every way home shares: sums of a visit, those of the own rows, to which arrivals are added, and wires beside those
    that KV travels over.
    """

    def __init__(self, transport: Transport, plan: Plan, how: HowHome) -> None:
        self.transport = transport.beside if how.busy or self.meets_traffic(plan) else transport
        self.plan, self.how = plan, how
        self.of_visit: list[PackedSum] = []
        self.own: list[PackedSum] = []
        self.pending: list[tuple[range, Pending[list[Tensor]]]] = []

    def meets_traffic(self, plan: Plan) -> bool:
        """Whether KV is still to travel when the first gradients leave; with two steps the second waits for its KV anyway."""
        return len(plan.steps) > 2

    def sums(self, visit: Visit) -> list[RowsOfSum]:
        self.of_visit = [PackedSum(pair, pair[0].shape[1], self.how) for pair in visit.kv]
        return [one.sum.all_rows for one in self.of_visit]

    def collect(self) -> list[Sum]:
        self.add_arrived(self.own)
        return [one.sum for one in self.own]

    def add_arrived(self, to: list[PackedSum]) -> None:
        for rows, pending in self.pending:
            for one, arrived in zip(to, pending.wait(), strict=True):
                one.add(arrived, rows)
        self.pending = []

    def of_shards(self, visit: Visit) -> list[PackedSum]:
        """Sums of whole shards, to which nothing has been added."""
        return [PackedSum(pair, self.plan.kv_layout.shard_len, self.how) for pair in visit.kv]


class OwnApart(PackedHomeward):
    """The way home where the own shard has visits of its own: what these add goes to the sums of the own rows at once."""

    def meets_traffic(self, plan: Plan) -> bool:
        # A single visit of others has its KV before anything leaves.
        return len(plan.steps_away) > 1

    def sums(self, visit: Visit) -> list[RowsOfSum]:
        self.own = self.own or self._aimed(self.of_shards(visit))
        rows = self.plan.own_rows.get(visit.step)
        return super().sums(visit) if rows is None else [RowsOfSum(one.sum, range(rows.start, rows.stop)) for one in self.own]

    def _aimed(self, own: list[PackedSum]) -> list[PackedSum]:
        """Sums that are handed back as they are: where one visit makes them, it may write where they go."""
        if len(self.plan.steps) == 1 and self.how.aim is not None:
            for i, one in enumerate(own):
                one.sum.aim = partial(self.how.aim, i)
        return own


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


def pack(pair: KV) -> Tensor:
    """K and V of a row side by side, so that any rows are one message; copied: what is sent belongs to the transport."""
    return Beside.of(pair).packed()


class Beside(Pieces):
    """`Pieces` that a pass of ours lays beside each other where that is faster."""

    @classmethod
    def of(cls, pair: KV) -> Beside:
        return cls(x.flatten(2) for x in pair)

    def write(self, to: Tensor) -> None:
        lay_beside(self, to)

    def packed(self) -> Tensor:
        if len(self) == 1:
            return self[0]
        rows = self[0].new_empty(*self[0].shape[:2], sum(x.shape[2] for x in self))
        self.write(rows)
        return rows
