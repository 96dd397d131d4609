"""In which order a rank meets which KV rows, and how dK and dV get home.

An exchange answers three questions: what each rank `meets` at each step (pure integers, so every rank knows every other's
plan), how KV travels on a `tour` over the steps that are needed, and how gradients go `homeward` to the rank that owns the
keys. Attention knows none of this; it walks the visits.

Note [position order]: where a visit holds KV of several ranks, its rows are in the order of their positions. A mask is then a
band over all of them, so the tiles of a visit are as few as on one device, and so are the calls and merges of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ring_attn.comm.transport import Pending, Transport
from ring_attn.layout import Layout, Part, total_rows
from ring_attn.mask import Mask
from ring_attn.parts import evenly, in_position_order, needed, span, within
from ring_attn.tiles import Meets, Plan

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

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        """`[step][rank]`: the KV rows that the rank sees at that step, in the order of the visit's rows; at most `max_rows`."""

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]: ...

    def homeward(self, transport: Transport, plan: Plan, dtype: torch.dtype) -> Homeward: ...


@lru_cache(maxsize=128)
def make_plan(
    exchange: Exchange, mask: Mask, layout: Layout, kv_layout: Layout | None = None, max_rows: int | None = None
) -> Plan:
    """The plan of an exchange, made once and kept: plans fill lazily and are shared between layers and passes.

    `kv_layout`: that of the keys where it is not `layout`, in cross-attention. `max_rows`: how many KV rows a visit may hold.
    """
    kv_layout = layout if kv_layout is None else kv_layout
    return Plan(layout, kv_layout, mask, exchange.meets(layout, kv_layout, mask, max_rows))


def _visits(
    first: Pending[list[Tensor]],
    plan: Plan,
    post: Callable[[int, list[Tensor]], Pending[list[Tensor]]],
    read: Callable[[int, list[Tensor]], list[KV]],
) -> Iterator[Visit]:
    """The visits of a tour, each with the next one under way: `post(step, what came)` asks for a step, `read` makes it KV."""
    pending = first
    for n, step in enumerate(plan.steps):
        came = pending.wait()
        last = n + 1 == len(plan.steps)
        if not last:
            pending = post(plan.steps[n + 1], came)
        yield Visit(step, read(step, came), last)


def _at_hand(kv: list[KV], plan: Plan) -> Pending[list[Tensor]]:
    """The own KV, packed where it is to be sent, as if it had arrived."""
    return Pending([pack(pair) for pair in kv] if len(plan.steps) > 1 else [], lambda: None, "own KV")


class _Homeward:
    """What every way home shares: packed buffers of a visit, and the own rows to which arrivals are added."""

    def __init__(self, transport: Transport, plan: Plan, dtype: torch.dtype) -> None:
        self.transport, self.plan, self.dtype = transport, plan, dtype
        self.rows: list[Tensor] = []
        self.own: list[Tensor] = []
        self.pending: list[tuple[slice, Pending[list[Tensor]]]] = []

    def buffers(self, visit: Visit) -> list[KV]:
        self.widths = Widths.of(visit.kv[0])
        self.rows = [self.widths.zeros(pair, self.dtype) for pair in visit.kv]
        return [self.widths.unpack(rows) for rows in self.rows]

    def collect(self) -> list[KV]:
        self.add_arrived(self.own)
        return [self.widths.unpack(rows) for rows in self.own]

    def add_arrived(self, to: list[Tensor]) -> None:
        for place, pending in self.pending:
            for rows, arrived in zip(to, pending.wait(), strict=True):
                rows[:, place] += arrived
        self.pending = []


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

        return _visits(_at_hand(kv, plan), plan, shift, lambda step, came: list(map(widths.unpack, came)) if step else kv)

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
        self.add_arrived(self.rows)
        steps = self.plan.steps
        offset = -visit.step if visit.last else steps[steps.index(visit.step) + 1] - visit.step
        where = f"ring backward, dK and dV {'home' if visit.last else 'on'} from step {visit.step}"
        self.pending = [(slice(None), self.transport.shift(self.rows, offset, what=where))]


class GatherExchange:
    """One all-gather, one visit with every rank's KV in position order, one reduce-scatter: few launches, memory for all KV.

    Where `max_rows` allows less, a visit holds the same slice of every shard.
    """

    name = "gather"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        ranks, length = range(layout.ring_size), kv_layout.shard_len
        slices = evenly(length, min(length, _steps(length * len(ranks), max_rows)))
        visits = (in_position_order(kv_layout, [Part(rank, rows) for rank in ranks]) for rows in slices)
        return tuple((parts,) * len(ranks) for parts in visits)

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        widths, packed = Widths.of(kv[0]), [pack(pair) for pair in kv]

        def gather(step: int, came: list[Tensor] | None = None) -> Pending[list[Tensor]]:
            rows = _slice(span(plan.meets[step][0]))
            return transport.all_gather([x[:, rows].contiguous() for x in packed], what=f"{what}, KV of all for step {step}")

        def read(step: int, came: list[Tensor]) -> list[KV]:
            parts = plan.meets[step][0]
            first = span(parts).start
            pieces = [came[part.rank][:, part.rows.start - first : part.rows.stop - first] for part in parts]
            return [widths.unpack(torch.cat(pieces, 1))] * len(kv)

        return _visits(gather(plan.steps[0]), plan, gather, read)

    def homeward(self, transport: Transport, plan: Plan, dtype: torch.dtype) -> Homeward:
        return _GatherHomeward(transport, plan, dtype)


class _GatherHomeward(_Homeward):
    def add(self, visit: Visit) -> None:
        parts = self.plan.meets[visit.step][0]
        by_rank = [self._by_rank(rows, parts) for rows in self.rows]
        sums = self.transport.reduce_scatter(by_rank, what=f"gather backward, dK and dV home from step {visit.step}")
        self.pending.append((_slice(span(parts)), sums))
        if not self.own:
            b, _, e = self.rows[0].shape
            self.own = [rows.new_zeros(b, self.plan.kv_layout.shard_len, e) for rows in self.rows]

    def _by_rank(self, rows: Tensor, parts: tuple[Part, ...]) -> list[Tensor]:
        """The rows of each rank, in the order of its shard."""
        pieces = dict(zip(parts, rows.split([len(part.rows) for part in parts], 1), strict=True))
        own = ([part for part in parts if part.rank == rank] for rank in range(self.transport.ring_size))
        return [torch.cat([pieces[part] for part in sorted(found, key=lambda part: part.rows.start)], 1) for found in own]


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
        steps = _steps(max(map(total_rows, wanted)), max_rows)
        by_rank = [[within(parts, rows) for rows in evenly(total_rows(parts), steps)] for parts in wanted]
        return own, *zip(*by_rank, strict=True)

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        widths, own = Widths.of(kv[0]), _at_hand(kv, plan)

        def pull(step: int, came: list[Tensor]) -> Pending[list[Tensor]]:
            return transport.pull(own.received, plan.meets[step], what=f"{what}, KV for step {step}")

        return _visits(own, plan, pull, lambda step, came: list(map(widths.unpack, came)) if step else kv)

    def homeward(self, transport: Transport, plan: Plan, dtype: torch.dtype) -> Homeward:
        return _PullHomeward(transport, plan, dtype)


class _PullHomeward(_Homeward):
    def add(self, visit: Visit) -> None:
        if visit.step == 0:
            self.own = self.rows
            return
        what = f"pull backward, dK and dV home from step {visit.step}"
        parts, rows = self.plan.meets[visit.step], self.plan.kv_layout.shard_len
        self.pending.append((slice(None), self.transport.push(self.rows, parts, rows, what=what)))


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def _steps(rows: int, max_rows: int | None) -> int:
    """How many visits `rows` rows take."""
    return 1 if max_rows is None else max(1, -(-rows // max_rows))


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
