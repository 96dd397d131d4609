"""Calls one after another, as training makes them, until GPUs are hot: how fast each is, and what they spend their time on.

    torchrun --standalone --nproc-per-node 4 -m tests.gpu.steady [--length 131072] [--calls 24] [--parts 4]

A forward and backward of a causal zigzag ring by pull, then of the same loop without communication. After four seconds of rest
come the calls, none waited for: TFLOP/s of each, by the slowest process, and on GPUs the watts, MHz and limits that nvidia-smi
saw meanwhile. Then they are made once more under a profiler, and of the last two thirds each process says, in milliseconds a
call, what kernels took, how long it waited, before which of them, and what copies took. Without torchrun, on a simulated ring
of four. Symmetric memory needs TORCH_SYMM_MEM_DISABLE_MULTICAST=1.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import NamedTuple

import torch

import ring_attn as ra
from ring_attn.bench.contenders import Shape, silent
from ring_attn.bench.timing import Everyone, mark, ms_between
from ring_attn.comm.start import device_of, is_distributed, process_group
from tests.gpu.rank import variant

REST = 4.0
KINDS = {"bwd_sm90": "attention backward", "fwd_sm90": "attention forward", "Memcpy": "copies", "Memset": "copies"}
SAMPLED = "index,power.draw,clocks.sm,clocks_event_reasons.active"


class Event(NamedTuple):
    """What a GPU did, in microseconds."""

    start: float
    stop: float
    name: str

    @property
    def kind(self) -> str:
        return next((kind for part, kind in KINDS.items() if part in self.name), "other kernels")


def account(events: Iterable[Event], calls: int) -> str:
    """What kernels and copies took, and how long none of the kernels ran before one of each kind: in the last two thirds of the
    calls, where these have as many kernels each.
    """
    events, early = sorted(events), calls // 3
    kernels = [event for event in events if event.kind != "copies"]
    if len(kernels) % calls:
        return f"{len(kernels)} kernels in {calls} calls are not as many in each, so nothing is said of the last ones"
    kernels = kernels[len(kernels) * early // calls :]
    first = busy = kernels[0].start
    took, waited = Counter(), Counter()
    for event in kernels:
        waited[event.kind] += max(0.0, event.start - busy)
        busy = max(busy, event.stop)
    for event in events:
        if event.start >= first:
            took[event.kind] += event.stop - event.start

    def words(us: Counter) -> str:
        return ", ".join(f"{kind} {one / 1e3 / (calls - early):.2f}" for kind, one in us.most_common() if one) or "none"

    return f"{(busy - first) / 1e3 / (calls - early):.2f} ms a call: {words(took)}; waits before {words(waited)}"


def profiled(run: Callable[[], object], calls: int) -> list[Event]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    on_gpu = (event for event in profile.events() if event.device_type.name == "CUDA")
    return [Event(event.time_range.start, event.time_range.end, event.name) for event in on_gpu]


def sampled(run: Callable[[], object]) -> list[str]:
    """A line a GPU: the median watts and MHz while `run` goes on, in samples near its most watts, and what limits it there, in
    the driver's bits, of which 4 is power. What nvidia-smi says otherwise follows.
    """
    command = ["nvidia-smi", f"--query-gpu={SAMPLED}", "--format=csv,noheader,nounits", "-lms", "250"]
    with tempfile.TemporaryFile("w+") as said:
        watching = subprocess.Popen(command, stdout=said, text=True)
        try:
            run()
        finally:
            watching.terminate()
            watching.wait()
        said.seek(0)
        *whole, _ = said.read().split("\n")
    samples: dict[str, list[tuple[float, float, int]]] = {}
    others = []
    for line in whole:
        try:
            index, watts, mhz, limits = line.split(", ")
            samples.setdefault(index, []).append((float(watts), float(mhz), int(limits, 16)))
        except ValueError:
            others.append(line)
    lines = []
    for index, seen in sorted(samples.items()):
        watts, mhz, limits = zip(*(one for one in seen if one[0] > 0.95 * max(seen)[0]), strict=True)
        drawn = f"{statistics.median(watts):.0f} W, {statistics.median(mhz):.0f} MHz"
        lines.append(f"GPU {index}: {drawn}, limits {sorted({*limits})}")
    return [*lines, *dict.fromkeys(others)]


def speeds(run: Callable[[], object], tflop: float, calls: int, everyone: Everyone) -> list[float]:
    """TFLOP/s of each call, by the slowest process, after a rest."""
    time.sleep(REST)
    everyone.meet()
    marks = [mark(everyone.device)]
    for _ in range(calls):
        run()
        marks.append(mark(everyone.device))
    ms = everyone.tell(list(map(ms_between, marks, marks[1:]))).amax(0)
    return (1e3 * tflop / ms).tolist()


def show(name: str, ring: ra.Ring, everyone: Everyone, options: argparse.Namespace) -> None:
    on_gpu = everyone.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape = Shape(options.heads, options.kv_heads, options.dim, dtype, everyone.device)
    *inputs, dout = shape.random(len(ring.positions(options.length)), seed=ring.hosted[0])
    processes = ring.size / len(ring.hosted)
    tflop = 3.5 * 2 * options.dim * options.heads * options.length * (options.length + 1) / processes / 1e12

    def run() -> None:
        torch.autograd.grad(ra.ring_attention(*inputs, ring=ring), inputs, dout)

    run()
    run()
    found: list[float] = []
    measure = lambda: found.extend(speeds(run, tflop, options.calls, everyone))  # noqa: E731
    drawn = sampled(measure) if on_gpu and everyone.leads else measure() or []
    if everyone.leads:
        print(f"{name}: {' '.join(f'{one:.3g}' for one in found)} TFLOP/s", *drawn, sep="\n    ", flush=True)
    if on_gpu:
        everyone.meet()
        print(f"{name}, process of rank {ring.hosted[0]}: {account(profiled(run, options.calls), options.calls)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131072, help="of the whole sequence")
    parser.add_argument("--calls", type=int, default=24)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--parts", type=int, help="of the heads in a backward; by default what a call would choose")
    options = parser.parse_args()
    calls, heads, parts = options.calls, options.kv_heads, options.parts
    if calls < 1 or (parts is not None and (parts < 1 or heads % parts)):
        parser.error(f"--calls {calls} must be at least 1, and --parts {parts} divide --kv-heads {heads}")
    device = device_of("auto")
    with process_group(device), ExitStack() as stack:
        if parts is not None:
            stack.enter_context(variant(f"parts={parts}"))
        make = ra.Ring.from_group if is_distributed() else ra.Ring.simulated
        ring = make(None if is_distributed() else 4, layout="zigzag", exchange="pull")
        show("pull", ring, Everyone(ring.transport, device), options)
        quiet = ra.Ring(silent(ring.transport), layout="zigzag", exchange="pull")
        show("without communication", quiet, Everyone(ring.transport, device), options)


if __name__ == "__main__":
    main()
