"""`ring-attn bench ring`: every exchange and layout beside its bound, one device and peers: right first, then how fast.

Where ring attention is wrong nothing is timed, and a peer that is wrong is not. Times are medians of the slowest process's.
Every run is timed behind another one, as calls are in the midst of a training step: after a pause each GPU would begin when its
host wakes, and wait for what a host that wakes later puts up. So of host and GPU that counts which takes longer.
Floating-point operations count the allowed cells alone: 4 * d a cell and head forward, 3.5 times that forward and backward.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import torch

from ring_attn.bench.contenders import Case, Contender, OnDocuments, OnRing, Shape
from ring_attn.bench.gate import FAILURES, Gate
from ring_attn.bench.kernels import document_lengths, mask_of
from ring_attn.bench.peers import Peer, peers
from ring_attn.bench.results import append, check_folders, machine, software
from ring_attn.bench.ring_report import RingRow, draw, table
from ring_attn.bench.timeline import Timeline, timeline
from ring_attn.bench.timing import Everyone, timed
from ring_attn.by_document import ByDocument
from ring_attn.comm.start import device_of, is_distributed, process_group
from ring_attn.comm.transport import Transport
from ring_attn.comm.two_axes import TwoAxes
from ring_attn.exchange import EXCHANGE_NAMES, EXCHANGES
from ring_attn.layout import LAYOUTS
from ring_attn.ring import Ring

DIRECTIONS = {"forward": 1.0, "forward + backward": 3.5}
BUSY_FLOPS = 1.2e12  # two milliseconds or a little more of a GPU
LENGTHS = {"cuda": (8192, 32768, 131072), "cpu": (256,)}


@dataclass(frozen=True)
class RingBenchOptions:
    """Times ring attention beside its bound, one device and other libraries; under torchrun a ring of all its processes.

    Attributes:
        lengths: Lengths of the whole sequence; none for 8192, 32768 and 131072, on a CPU 256.
        layouts: Which positions each rank holds; by-document is for the documents mask alone, and made for its documents.
        exchanges: How ranks meet each other's KV: auto, or one by name.
        ulysses: How many ranks trade heads for rows, for each of these.
        ranks_per_node: For the exchange that knows nodes, where torchrun does not tell it.
        masks: Of causal, full, window and documents (packed, log-normal lengths); all causal but full.
        window: How many keys back the window reaches, at most half a sequence.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Head dimension of q, k and v.
        dtype: Of the inputs.
        kernel: As for a ring.
        repeats: Timed runs, of which the median counts; each follows one that is not, short ones on a GPU up to eight, and two
            more warm up.
        keep_kv: Where pull is among the exchanges, also with what it brought kept for the backward.
        grad_dtype: Also what auto takes, which must be among the exchanges, with dK and dV travelling in this dtype; empty for
            none.
        singly: On GPUs, also what auto takes, and what is kept, with every call asked for anew, none replayed.
        peers: Other libraries as well, where they are installed.
        device: auto, cpu or cuda.
        simulated: Without torchrun, how many ranks this one process hosts.
        results: A JSONL file that rows are appended to; empty for none.
        plot: A PNG file to draw TFLOP/s over length and a timeline of every exchange's visits to; empty for none.
    """

    lengths: tuple[int, ...] = ()
    layouts: tuple[str, ...] = (*LAYOUTS, ByDocument.name)
    exchanges: tuple[str, ...] = ("auto", *EXCHANGES)
    ulysses: tuple[int, ...] = (1,)
    ranks_per_node: int | None = None
    masks: tuple[str, ...] = ("causal", "documents", "window")
    window: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    kernel: str = "auto"
    repeats: int = 7
    keep_kv: bool = True
    grad_dtype: Literal["", "bfloat16", "float16", "float32"] = ""
    singly: bool = True
    peers: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    simulated: int = 4
    results: str = ""
    plot: str = ""


def main(argv: Sequence[str]) -> int:
    """Prints a table, and to stderr what is in it as it is found; 1 where ring attention is wrong, and then nothing was timed;
    2 where the options break a rule.
    """
    import tyro

    options = tyro.cli(RingBenchOptions, args=list(argv), prog="ring-attn bench ring")
    try:
        device = device_of(options.device)
        options = replace(options, lengths=options.lengths or LENGTHS[device.type])
        with process_group(device):
            make = Ring.from_group if is_distributed() else partial(Ring.simulated, options.simulated)
            return Bench(options, [make(ulysses=ranks).transport for ranks in (1, *options.ulysses)], device).run()
    except ValueError as error:
        print(f"ring-attn bench ring: {error}", file=sys.stderr)
        return 2


@dataclass(frozen=True)
class Entry:
    """A contender at a case. `refusal`: why it cannot do it. `fault`: what the gate found."""

    contender: Contender
    case: Case
    refusal: str | None = None
    fault: str | None = None

    @property
    def why_not(self) -> str | None:
        return self.refusal or self.fault


class Bench:
    """One run, over a transport of one axis and one for each of options.ulysses. Raises ValueError where options do not fit."""

    def __init__(self, options: RingBenchOptions, transports: Sequence[Transport | TwoAxes], device: torch.device) -> None:
        check_folders(options)
        transport, *of_ulysses = transports
        self.options, self.everyone = options, Everyone(transport, device)
        self.shape = Shape(options.heads, options.kv_heads, options.head_dim, getattr(torch, options.dtype), device)
        multiple = 2 * transport.ring_size
        if any(length < 4 * multiple or length % multiple for length in options.lengths):
            raise ValueError(
                f"lengths must be multiples of 2 * ring size = {multiple}, at least {4 * multiple}, got {options.lengths}"
            )
        self.rings = [self.ring(*choices) for choices in product(of_ulysses, options.exchanges, options.layouts)]
        if options.keep_kv:
            self.rings += [one.keeping() for one in self.rings if one.ring.exchange == "pull"]
        if options.grad_dtype:
            if "auto" not in options.exchanges:
                raise ValueError(
                    f"grad_dtype {options.grad_dtype} is for what auto takes, which is not among {options.exchanges}"
                )
            dtype = getattr(torch, options.grad_dtype)
            self.rings += [one.sending(dtype) for one in self.rings if one.ring.exchange == "auto"]
        if options.singly and device.type == "cuda":
            self.rings += [one.singly() for one in self.rings if one.ring.exchange == "auto" or one.ring.keep_kv]
        alone = OnRing("one device", Ring.simulated(1, "contiguous", exchange="ring", kernel=options.kernel))
        self.others: list[Contender] = [alone, *(peers(transport) if options.peers else [])]
        self.machine = machine(device.type)
        self.libraries = tuple(dict.fromkeys(one.distribution for one in self.others if isinstance(one, Peer)))
        self.cases = [self.case(mask, length) for mask, length in product(options.masks, options.lengths)]
        self.gate = Gate(self.everyone, self.case)

    def ring(self, transport: Transport | TwoAxes, exchange: str, layout: str) -> OnRing:
        """Ring attention over that transport, in that way."""
        choices = {name: (OnRing, name) for name in LAYOUTS} | {ByDocument.name: (OnDocuments, ByDocument(lengths=[]))}
        if layout not in choices:
            raise ValueError(f"layout {layout!r} is not one of {', '.join(choices)}")
        nodes = self.options.ranks_per_node if exchange in ("auto", "two-level") else None
        kind, choice = choices[layout]
        ring = Ring(transport, layout=choice, exchange=exchange, kernel=self.options.kernel, ranks_per_node=nodes)
        return kind(exchange if ring.ulysses == 1 else f"Ulysses {ring.ulysses} x {exchange}", ring)

    def case(self, mask: str, length: int) -> Case:
        """The case of that mask at that length. Some two dozen documents, which divide as some peers need it."""
        window, documents = min(self.options.window, length // 2), None
        if mask == "documents":
            multiple = 2 * self.everyone.transport.ring_size
            documents = tuple(document_lengths(length, multiple, scale=min(2.0, length / 65536)))
        found = mask_of(mask, length, window, documents)
        return Case(mask, found, length, self.shape, documents, window if mask == "window" else None)

    def run(self) -> int:
        """The exit status, when all is checked, timed and, by the leader, printed, written and drawn."""
        entries = [[self.entry(contender, case) for contender in (*self.rings, *self.others)] for case in self.cases]
        wrong = any(entry.fault and isinstance(entry.contender, OnRing) for row in entries for entry in row)
        rows: list[RingRow] = []
        for of_case in entries:
            found = list(self.not_timed(of_case) if wrong else self.timed(of_case))
            rows += found
            if self.everyone.leads and self.options.results:
                append(found, self.options, self.machine, self.libraries)
        timelines = self.timelines(entries, rows) if self.options.plot and not wrong else []
        if self.everyone.leads:
            where = f"ring of {self.everyone.transport.ring_size} on {self.machine}, {software(self.libraries)}"
            print(table(rows, self.options, where))
            if self.options.plot and not wrong:
                draw(rows, timelines, self.options)
        return int(wrong)

    def entry(self, contender: Contender, case: Case) -> Entry:
        """The contender as it would be timed at this case, checked."""
        refusal = contender.why_not(case)
        if refusal is not None:
            self.tell(Entry(contender, case, refusal), refusal)
            return Entry(contender, case, refusal)
        if isinstance(contender, OnRing):
            contender = contender.settled(case)
        entry = Entry(contender, case, fault=self.gate.fault(contender, case.name))
        self.tell(entry, entry.fault or "right")
        return entry

    def not_timed(self, entries: Sequence[Entry]) -> Iterator[RingRow]:
        """Rows without numbers, one a contender."""
        for entry in entries:
            yield self.row(entry, why_not=entry.why_not or "not timed: ring attention is wrong, see the other rows")

    def timed(self, entries: Sequence[Entry]) -> Iterator[RingRow]:
        """The rows of a case: rings beside their own bounds, the best of these, and beside that the others."""
        rings, others = entries[: len(self.rings)], entries[len(self.rings) :]
        bounds = []
        for entry in rings:
            rows = self.measured(entry)
            bound = self.measured(replace(entry, contender=entry.contender.without_wires())) if rows[0].ms else rows
            bounds += [bound] if bound[0].ms else []
            yield from map(beside, rows, bound * (len(rows) // len(bound)))
        best = max(bounds, key=lambda rows: rows[-1].tflops, default=[])
        yield from (replace(beside(row, row), name="no communication") for row in best)
        for entry in others:
            rows = self.measured(entry)
            yield from map(beside, rows, best) if best else rows

    def measured(self, entry: Entry) -> list[RingRow]:
        """A row a direction, or one that says why there is none."""
        why_not = entry.why_not
        if why_not is None:
            try:
                speeds = self.speeds(entry.contender, entry.case)
                rows = [self.row(entry, direction, *speed) for direction, speed in zip(DIRECTIONS, speeds, strict=True)]
                for row in rows:
                    self.tell(entry, f"{row.direction} {row.ms:.2f} ms, {row.tflops:.3g} TFLOP/s")
                return rows
            except FAILURES as error:
                why_not = f"it fails at this length: {type(error).__name__}: {error}"
                self.tell(entry, why_not)
        return [self.row(entry, why_not=why_not)]

    def tell(self, entry: Entry, found: str) -> None:
        """What is known before the table is, so that a run that is cut off has not been for nothing."""
        if self.everyone.leads:
            case, contender = entry.case, entry.contender
            print(f"{case.name} {case.length:,}, {contender.name} ({contender.layout}): {found}", file=sys.stderr, flush=True)

    def row(self, entry: Entry, direction: str = "", *speed: float | None, why_not: str | None = None) -> RingRow:
        contender, case = entry.contender, entry.case
        where = contender.name, contender.layout, contender.chosen, self.everyone.transport.ring_size
        return RingRow(*where, case.name, case.length, direction, *speed, why_not=why_not)

    def speeds(self, contender: Contender, case: Case) -> Iterator[tuple[float, float, float | None]]:
        """Median ms of the slowest process, TFLOP/s a process and, on a GPU, the most GiB beside the inputs; by direction."""
        options, everyone = self.options, self.everyone
        q, k, v, dout = case.shape.random(len(contender.positions(case)), seed=everyone.transport.hosted[0])
        with contender.attention(case) as attend:
            forward = torch.no_grad()(partial(attend, q, k, v))
            runs = forward, lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
            for factor, run in zip(DIRECTIONS.values(), runs, strict=True):
                flops = factor * 4 * options.head_dim * options.heads * case.cells / contender.processes
                times, extra = timed(run, options.repeats, everyone.device, everyone.meet, behind(flops, everyone.device))
                gib = None if extra is None else (extra + contender.staging) / 2**30
                slowest = everyone.tell([*times, torch.nan if gib is None else gib]).amax(0).tolist()
                ms = statistics.median(slowest[:-1])
                yield ms, flops / ms / 1e9, None if gib is None else slowest[-1]

    def timelines(self, entries: Sequence[Sequence[Entry]], rows: Sequence[RingRow]) -> list[Timeline]:
        """Of every exchange the fastest ring at the longest case of the first mask."""
        of_case = max(entries[: len(self.options.lengths)], key=lambda row: row[0].case.length)
        of_rings = (entry.contender for entry in of_case[: len(self.rings)])
        rings = {(one.name, one.layout): one for one in of_rings}
        case, found = of_case[0].case, {}
        for row in sorted(rows, key=lambda row: row.ms or 0.0):
            contender = rings.get((row.name, row.layout))
            if row.ms and contender and (row.mask, row.length, row.direction) == (case.name, case.length, list(DIRECTIONS)[-1]):
                found.setdefault(contender.ring.exchange, contender)
        return [timeline(found[name], case, self.everyone) for name in EXCHANGE_NAMES if name in found]


def behind(flops: float, device: torch.device) -> int:
    """How many runs of so much work go before one that is timed: what takes a GPU a few milliseconds, at most eight."""
    return 1 if device.type != "cuda" else max(1, min(8, int(BUSY_FLOPS / flops)))


def beside(row: RingRow, bound: RingRow) -> RingRow:
    """The row with what it reaches of its bound, where both were timed."""
    if not row.tflops or not bound.tflops:
        return row
    return replace(row, bound=bound.tflops, percent=100 * row.tflops / bound.tflops)
