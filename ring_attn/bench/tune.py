"""`ring-attn bench tune`: which launch configurations of the Triton kernel are fastest on this GPU.

Every candidate is compiled ahead, many at a time, then checked at a small length against float64 and timed alone. A launch is
timed in a process of its own, so that one that hangs or breaks the GPU's context costs its own row only.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Literal

import torch

from ring_attn.bench.kernels import GRAD_LIMIT, OUT_LIMIT, KernelBenchOptions, Visit
from ring_attn.bench.results import append, check_folders, machine
from ring_attn.bench.timing import timed
from ring_attn.bench.tune_candidates import LAUNCHES, candidates
from ring_attn.bench.tune_report import Timed, line, report
from ring_attn.check import rel_error
from ring_attn.kernels import Upstream, get_kernel
from ring_attn.kernels.sums import Grads
from ring_attn.kernels.triton_blocks import Config, Configs
from ring_attn.mask import Causal, Documents
from ring_attn.partial import Partial
from ring_attn.score import Alibi, Scores, SoftCap
from ring_attn.tiles import tiles

if TYPE_CHECKING:
    from ring_attn.kernels.triton_ahead import Resources
    from ring_attn.kernels.triton_rows import Call

# No multiple of a block, but of 16: a stride that is none would be a kernel of its own, not the one that is timed.
GATE_ROWS = 1296
# Documents of odd lengths, from any row on, and shorter than a block.
GATE_DOCUMENTS = (1, 2, 67, 129, 63, 300, 255, 7, 401, 33, 38)
GATES = ("full", "causal", "window", "documents")
# Floating-point operations a head dimension and allowed cell, without what is computed twice.
FLOPS = {"forward": 4, "dkdv": 8, "dq": 6}


@dataclass(frozen=True)
class TuneOptions:
    """Times launch configurations of the Triton kernel and prints the fastest as lines for its table.

    Attributes:
        launches: Of forward, dkdv and dq.
        cases: Masks and lengths to time, as mask:length; the first two decide.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Head dimension of q, k and v.
        dtype: Of the inputs.
        score: A modifier of scores, whose launches have a table of their own.
        repeats: Timed runs, of which the median counts.
        rounds: How often all candidates are timed in turn; of each the fastest round counts, as GPUs slow down and recover.
        jobs: Compilations at a time; 0 for the number of processors.
        patience: Seconds without a result after which a candidate counts as hung.
        results: A JSONL file that rows are appended to; empty for none.
    """

    launches: tuple[str, ...] = LAUNCHES
    cases: tuple[str, ...] = ("full:16384", "causal:16384", "window:65536", "documents:16384", "documents:65536", "causal:4096")
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    score: Literal["", "softcap", "alibi"] = ""
    repeats: int = 5
    rounds: int = 3
    jobs: int = 0
    patience: float = 60.0
    results: str = ""

    @property
    def shape(self) -> KernelBenchOptions:
        return KernelBenchOptions(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=self.dtype)


def main(argv: Sequence[str]) -> int:
    """Prints the tables and returns 0, or 1 where a candidate was wrong or did not run."""
    import tyro

    options = tyro.cli(TuneOptions, args=list(argv), prog="ring-attn bench tune")
    if not torch.cuda.is_available():
        print("ring-attn bench tune times GPU kernels, and torch sees no GPU here", file=sys.stderr)
        return 2
    try:
        check_folders(options)
    except ValueError as error:
        print(f"ring-attn bench tune: {error}", file=sys.stderr)
        return 2
    wanted = [(launch, config) for launch in options.launches for config in candidates(launch, options.head_dim, options.score)]
    if not wanted:
        missing = f"there are no candidates for head dim {options.head_dim}; add them to ring_attn/bench/tune_candidates.py"
        print(missing, file=sys.stderr)
        return 2
    rows = tune(wanted, options)
    print(f"\n{machine()}, {report(rows, options)}")
    if options.results:
        append(rows, options, machine())
    return int(any(row.why_not for row in rows))


def tune(wanted: list[tuple[str, Config]], options: TuneOptions) -> list[Timed]:
    """Every candidate, compiled and timed."""
    ahead = compile_all(wanted, options)
    rows = []
    for launch in dict.fromkeys(launch for launch, _ in wanted):
        mine = [config for name, config in wanted if name == launch]
        broken = {config: ahead[launch, config] for config in mine if isinstance(ahead[launch, config], str)}
        rows += [Timed(launch, config, None, {}, reason) for config, reason in broken.items()]
        fit = [config for config in mine if config not in broken]
        best: dict[Config, tuple[dict[str, float], str]] = {config: ({}, "") for config in fit}
        for config, (tflops, reason) in timed_apart(time_all, launch, fit * options.rounds, options):
            before, fault = best[config]
            # One that fails once is no candidate.
            fault = fault or reason
            best[config] = {} if fault else {case: max(x, before.get(case, 0)) for case, x in tflops.items()}, fault
        for config, found in best.items():
            rows.append(Timed(launch, config, ahead[launch, config], *found))
            print(line(rows[-1], options.cases), flush=True)
    return rows


def compile_all(wanted: list[tuple[str, Config]], options: TuneOptions) -> dict[tuple[str, Config], Resources | str]:
    """What each launch takes, or why it does not compile or fit; the results are in Triton's cache."""
    major, minor = torch.cuda.get_device_capability()
    most = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    jobs = options.jobs or min(len(wanted), os.cpu_count() or 1)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        arguments = (
            [*x, options.head_dim, options.heads, options.kv_heads, options.dtype, options.score, 10 * major + minor]
            for x in wanted
        )
        found = dict(zip(wanted, pool.map(_compiled, *zip(*arguments, strict=True)), strict=True))
    too_much = "{} KiB of shared memory, the device has {}"
    return {
        key: too_much.format(x.shared // 1024, most // 1024) if not isinstance(x, str) and x.shared > most else x
        for key, x in found.items()
    }


def _compiled(
    launch: str, config: Config, head_dim: int, heads: int, kv_heads: int, dtype: str, score: str, capability: int
) -> Resources | str:
    from triton.errors import TritonError
    from triton.runtime.errors import TritonError as RuntimeTritonError

    from ring_attn.kernels.triton_ahead import resources

    try:
        return resources(main_call(launch, config, _blank(head_dim, heads, kv_heads, dtype, score)), capability)
    except (TritonError, RuntimeTritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).strip()[-150:]}"


def _blank(head_dim: int, heads: int, kv_heads: int, dtype: str, score: str) -> Visit:
    """A visit on the CPU whose launches are compiled as those on the GPU are."""
    shapes = ((1, GATE_ROWS, h, head_dim) for h in (heads, kv_heads, kv_heads, heads))
    found = tiles((range(GATE_ROWS),), [(range(GATE_ROWS),)], Causal())
    tensors = (torch.zeros(shape, dtype=getattr(torch, dtype)) for shape in shapes)
    return scored(Visit(*tensors, found, 0.1), score)


def scored(visit: Visit, score: str) -> Visit:
    """The visit with that modifier of its scores."""
    match score:
        case "softcap":
            return replace(visit, score=Scores((SoftCap(30.0),)))
        case "alibi":
            slopes = torch.linspace(0.01, 0.3, visit.q.shape[2], device=visit.q.device)
            return replace(visit, score=Scores((Alibi(slopes),)))
    return visit


def main_call(launch: str, config: Config, visit: Visit) -> Call:
    b, s, h, _ = visit.q.shape
    up = Upstream(visit.dout, visit.dout, torch.zeros(b, h, s))
    return next(iter(calls(launch, config, visit, up, visit.grads())))


def calls(launch: str, config: Config, visit: Visit, up: Upstream, into: Grads) -> list[Call]:
    """The launches to time: the forward writes `up.out` and `up.lse`, the others add to `into`."""
    from ring_attn.kernels.triton_backward import Visited, backward_calls
    from ring_attn.kernels.triton_blocks import query_table
    from ring_attn.kernels.triton_forward import forward_call
    from ring_attn.kernels.triton_scores import chain_of

    tensors, chain = (visit.q, visit.k, visit.v), chain_of(visit.score, visit.tiles, visit.q.dtype)
    if launch == "forward":
        target, table = Partial(up.out, up.lse), query_table(visit.tiles, visit.q, config.own, placed=chain.placed)
        return [forward_call(*tensors, table, config, scale=visit.scale, chain=chain, carried=None, target=target, out=up.out)]
    visited = Visited(up, *tensors, visit.scale, chain)
    found = list(backward_calls(visited, into, visit.tiles, Configs(config, config, config), once=False))
    return found[:-1] if launch == "dkdv" else found[-1:]


def timed_apart(
    worker: Callable, launch: str, wanted: list[Config], options: TuneOptions
) -> Iterator[tuple[Config, tuple[dict[str, float], str]]]:
    """(config, what `worker` sends for it) for each in turn, from processes that are replaced when they end or hang; see
    `time_all`. One that does is left out from then on.
    """
    context = multiprocessing.get_context("spawn")
    left = list(wanted)
    while left:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_announced, args=(worker, there, launch, left, options), daemon=True)
        process.start()
        there.close()
        # Starting, which imports PyTorch, is not the first candidate's time.
        with suppress(EOFError):
            here.recv()
        reason = ""
        while left and not reason:
            try:
                result = here.recv() if here.poll(options.patience) else None
            except EOFError:
                process.join()
                reason = f"its process ended with status {process.exitcode}"
            else:
                reason = "" if result else f"hung for {options.patience:g} s"
            config = left.pop(0)
            yield config, ({}, reason) if reason else result
            if reason:
                left = [one for one in left if one != config]
        process.kill()
        process.join()


def _announced(worker: Callable, to: Connection, *rest) -> None:
    to.send("started")
    worker(to, *rest)


def time_all(to: Connection, launch: str, wanted: list[Config], options: TuneOptions) -> None:
    """Sends (TFLOP/s by case, why there are none) of each candidate in turn."""
    for config in wanted:
        wrong = next(filter(None, (_gate(launch, config, gate, options) for gate in GATES)), "")
        to.send(({} if wrong else {case: _tflops(launch, config, case, options) for case in options.cases}, wrong))


@cache
def _gate_visit(gate: str, options: TuneOptions) -> tuple[Visit, list, list]:
    """(visit, exact, plain): out, dq, dk, dv in float64 and by plain PyTorch in the inputs' dtype."""
    visit = Visit.random("full" if gate == "documents" else gate, GATE_ROWS, options.shape)
    if gate == "documents":
        rows = range(GATE_ROWS)
        visit = replace(visit, tiles=tiles((rows,), [(rows,)], Causal() & Documents(lengths=GATE_DOCUMENTS)))
    visit = scored(visit, options.score)
    visit.out = visit.forward(get_kernel("triton"))
    return visit, visit.dense(torch.float64), visit.dense(visit.q.dtype)


def _gate(launch: str, config: Config, gate: str, options: TuneOptions) -> str:
    """What is wrong with the launch's results at a small length; empty where nothing is."""
    visit, exact, plain = _gate_visit(gate, options)
    into, out = visit.grads(), visit.out if launch != "forward" else torch.full_like(visit.dout, torch.nan)
    for call in calls(launch, config, visit, Upstream(visit.dout, out, visit.lse.clone()), into):
        call()
    grads = [torch.empty_like(x, dtype=torch.float32) for x in (visit.q, visit.k, visit.v)]
    into.write(*grads)
    for number, name in {"forward": [(0, "out")], "dq": [(1, "dq")], "dkdv": [(2, "dk"), (3, "dv")]}[launch]:
        found = (out, *grads)[number]
        ratio = rel_error(found, exact[number]) / rel_error(plain[number], exact[number])
        if not ratio <= (OUT_LIMIT if name == "out" else GRAD_LIMIT):
            return f"wrong under {gate}: {name} has {ratio:.3g} times the error of plain PyTorch"
    return ""


@cache
def _case(case: str, options: TuneOptions) -> tuple[Visit, Upstream]:
    mask, length = case.split(":")
    visit = scored(Visit.random(mask, int(length), options.shape), options.score)
    out = visit.forward(get_kernel("triton"))
    return visit, Upstream(visit.dout, out, visit.lse)


def _tflops(launch: str, config: Config, case: str, options: TuneOptions) -> float:
    visit, up = _case(case, options)
    found = calls(launch, config, visit, up, visit.grads())
    flops = FLOPS[launch] * options.head_dim * options.heads * visit.cells
    # So many that what the host takes to begin does not count.
    times = max(1, round(_AT_A_TIME / flops))
    ms = statistics.median(timed(_all(found * times), options.repeats, visit.q.device)[0])
    return times * flops / ms / 1e9


# Some milliseconds of a GPU.
_AT_A_TIME = 2e12


def _all(found: list[Call]) -> Callable[[], None]:
    def run() -> None:
        for call in found:
            call()

    return run
