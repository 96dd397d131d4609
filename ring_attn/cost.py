"""What a call would take with each exchange, by a formula over cells, bytes, launches and measured links; auto takes the least.

Note [formula]: a rank's visits follow each other. The transfer for the next one starts with the one before it, and while it
runs the compute beside it goes slower, by as much as was measured: NCCL's kernels take multiprocessors, copy engines do not. A
visit starts when its rows are there and the visit before it is done. A backward has 2.5 times the operations, meets KV again,
and sends dK and dV, as if in the dtype of their sums: all but the last transfer beside compute. The slowest rank counts, see
`asked`. Short calls by copy engines are replayed, see Note [replay] of `ring_attn.comm.replay`: no host asks for theirs.

The figures are few and round: they have to order the ways, not to predict a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple

from ring_attn.exchange import EXCHANGES, Exchange, TwoLevelExchange, for_backward, get_exchange, make_plan
from ring_attn.layout import Layout, total_rows
from ring_attn.mask import Mask
from ring_attn.plan import Plan

logger = logging.getLogger("ring_attn")

BACKWARD_OPERATIONS = 2.5
SHORT = 1500.0  # us of a forward; a longer one, and its backward, take a GPU longer than they take a host


@dataclass(frozen=True)
class Link:
    """A way to move rows: a fixed time, a rate, and how much longer compute takes beside it."""

    latency_us: float
    gb_s: float
    slowdown: float = 1.0

    def us(self, size: float) -> float:
        return self.latency_us + size / self.gb_s / 1e3 if size else 0.0


@dataclass(frozen=True)
class Machine:
    """What a rank computes with and moves rows by. `call_us`: the fixed time of one kernel call on a tile, merge included.

    `inside`: what pulls take inside a node, where `ring` is between nodes. `replayed_us`: the fixed time of such a call by
    `pull` where it is replayed; None where none is.
    """

    name: str
    tflops: float
    call_us: float
    ring: Link
    gather: Link
    pull: Link
    inside: Link = Link(180, 280, 1.6)
    replayed_us: float | None = None

    def link(self, exchange: str, step: int) -> Link:
        """What brings the rows of a step."""
        if exchange == "two-level":
            return self.inside if step % 2 else self.ring
        return getattr(self, exchange)


# "gpus": four H200 on NVLink: torch 2.11, NCCL 2.28, flash-attn 4, 1 to 256 MiB; NCCL's messages carry pull as well, but
# for "symmetric", where copy engines do. "nodes": "network" with copy engines inside a host.
# The others are nominal: a 400 Gb/s network card a GPU, gloo over one host's memory, and one process.
_NETWORK = Machine("GPUs of several hosts", 580, 25, Link(200, 45, 1.2), Link(250, 40, 1.2), Link(200, 45, 1.2))
MACHINES = {
    "gpus": Machine("GPUs of one host", 580, 25, Link(180, 280, 1.6), Link(35, 320, 1.6), Link(180, 280, 1.6)),
    "symmetric": Machine(
        "GPUs of one host", 580, 25, Link(180, 280, 1.6), Link(35, 320, 1.6), Link(30, 345, 1.04), replayed_us=10
    ),
    "network": _NETWORK,
    "nodes": replace(_NETWORK, name="GPUs of several hosts with copy engines", inside=Link(30, 345, 1.04)),
    "gloo": Machine("CPU processes over gloo", 0.05, 50, Link(300, 1, 1.5), Link(300, 1, 1.5), Link(300, 1, 1.5)),
    "process": Machine("one process", 0.1, 50, Link(0, 1e6), Link(0, 1e6), Link(0, 1e6)),
}


@dataclass(frozen=True)
class Work:
    """Sizes of a call beside its plan: batch rows, query and KV heads, head dims, bytes of a number and of one of dK and dV."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    itemsize: int
    grad_itemsize: int = 4

    @property
    def row(self) -> int:
        """Numbers in the K and V of one position."""
        return self.batch * self.num_kv_heads * (self.head_dim + self.v_head_dim)

    def us(self, cells: int, tflops: float) -> float:
        return 2 * cells * self.num_heads * (self.head_dim + self.v_head_dim) / tflops / 1e6


@dataclass(frozen=True)
class Estimate:
    """Microseconds of the slowest rank asked, forward and backward together, by what they go to."""

    exchange: str
    compute: float
    calls: float
    slowed: float
    waiting: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self)[1:])

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {getattr(self, field.name):,.0f}" for field in fields(self)[1:])
        return f"{self.exchange:9} {self.total:>12,.0f} us: {parts}"


@dataclass(frozen=True)
class Question:
    """A call whose exchange is to be chosen. `max_rows`: KV rows that a visit may hold. `ranks_per_node`: None on one host.
    `alike`: when it comes again, it does the same, and may be replayed.
    """

    mask: Mask
    layout: Layout
    kv_layout: Layout
    work: Work
    machine: Machine
    max_rows: int | None = None
    ranks_per_node: int | None = None
    alike: bool = True


@lru_cache(maxsize=256)
def fastest(question: Question) -> Exchange:
    """The exchange that auto takes; logged, once for a question."""
    found = estimates(question)
    logger.info("exchange: %s, as on %s; %s", found[0].exchange, question.machine.name, "; ".join(map(str, found)))
    return get_exchange(found[0].exchange, question.ranks_per_node)


def estimates(question: Question) -> tuple[Estimate, ...]:
    """One for every exchange that fits into `max_rows`, the fastest first. Raises ValueError where none does.

    "two-level" is a choice only where nodes are known. "two-way" is none: what it wins over "ring" are wires between
    neighbours that can be used at once, of which a Link says nothing, and behind a switch it is "ring" with more calls.
    """
    found, refused = [], []
    for name in EXCHANGES if question.ranks_per_node is None else (*EXCHANGES, TwoLevelExchange.name):
        exchange = get_exchange(name, question.ranks_per_node)
        where = question.mask, question.layout, question.kv_layout, question.max_rows
        try:
            plan = make_plan(exchange, *where)
            back = for_backward(exchange, plan, question.work.row * question.work.grad_itemsize)
            plans = plan, make_plan(back, *where)
        except ValueError as reason:
            refused.append(str(reason))
            continue
        machine = _machine(name, plan, question)
        ranks = (_of_rank(name, *plans, rank, question.work, machine) for rank in asked(question.layout.ring_size))
        found.append(max(ranks, key=_total))
    if not found:
        raise ValueError("; ".join(refused))
    return tuple(sorted(found, key=_total))


def _machine(name: str, plan: Plan, question: Question) -> Machine:
    """The machine with the fixed time that calls of that exchange take."""
    machine = question.machine
    if name != "pull" or not question.alike or machine.replayed_us is None:
        return machine
    return replace(machine, call_us=machine.replayed_us) if forward_us(plan, question.work, machine) < SHORT else machine


def longest_wait(plan: Plan, work: Work, machine: Machine) -> float:
    """Microseconds that the slowest rank asked waits for what is pulled for a second visit, when the first is done."""
    waits = []
    for rank in asked(plan.layout.ring_size):
        own, others = _visits("pull", plan, rank, work, machine, 1.0)
        waits.append(others.link.us(others.rows * work.row * work.itemsize) - own.us - own.calls_us)
    return max(waits)


def forward_us(plan: Plan, work: Work, machine: Machine) -> float:
    """Microseconds that the slowest rank asked computes in a forward by that plan."""
    cells = (sum(plan.cells(rank, step, work.batch) for step in plan.steps) for rank in asked(plan.layout.ring_size))
    return work.us(max(cells), machine.tflops)


def asked(ring_size: int) -> tuple[int, ...]:
    """The ranks of which the slowest counts: of a ring of more than four its first, its last and two between.

    The tiles of one rank's visits with packed documents take milliseconds, and every batch brings new documents.
    """
    return tuple(sorted({n * (ring_size - 1) // 3 for n in range(4)}))


def _total(estimate: Estimate) -> float:
    return estimate.total


def _of_rank(name: str, forward: Plan, backward: Plan, rank: int, work: Work, machine: Machine) -> Estimate:
    compute = calls = slowed = waiting = 0.0
    for plan, operations, grad_bytes in ((forward, 1.0, 0), (backward, BACKWARD_OPERATIONS, work.grad_itemsize)):
        visits = list(_visits(name, plan, rank, work, machine, operations))
        kv = [visit.link.us(visit.rows * work.row * work.itemsize) for visit in visits]
        home = [visit.link.us(visit.rows * work.row * grad_bytes) for visit in visits]
        waiting += kv[0] + home[-1]
        for n, visit in enumerate(visits):
            under_way = (kv[n + 1] if n + 1 < len(visits) else 0.0) + (home[n - 1] if n else 0.0)
            slower = min(under_way, visit.us * visit.link.slowdown) * (1 - 1 / visit.link.slowdown)
            compute, calls, slowed = compute + visit.us, calls + visit.calls_us, slowed + slower
            waiting += max(0.0, under_way - visit.us - visit.calls_us - slower)
    return Estimate(name, compute, calls, slowed, waiting)


class _Visited(NamedTuple):
    """A visit's compute and calls in us, the rows that came from others, and what brought them."""

    us: float
    calls_us: float
    rows: int
    link: Link


def _visits(name: str, plan: Plan, rank: int, work: Work, machine: Machine, operations: float) -> Iterator[_Visited]:
    for step in plan.steps:
        time = operations * work.us(plan.cells(rank, step, work.batch), machine.tflops)
        rows = total_rows([part for part in plan.meets[step][rank] if part.rank != rank])
        calls = machine.call_us * max(1, len(plan[rank, step])) * operations
        yield _Visited(time, calls, rows, machine.link(name, step))
