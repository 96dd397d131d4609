"""Host time of a call: how long the host takes to ask for a forward, and for a forward and a backward, waiting for nothing.

    python -m tests.gpu.host [--profile]
    torchrun --standalone --nproc-per-node 2 -m tests.gpu.host [--rows 64] [--kernel auto] [--profile]

Without a GPU: a kernel that does nothing, on a ring of one and on rank 0 of 4, whose memory, messages and peers are stand-ins.
With GPUs: the real kernels, on rings in one process and, under torchrun, by pull over symmetric memory, replayed and asked for
singly, and by messages over NCCL. "at once": calls one after another, never waited for; "from idle": each after the device was
done and the host slept a millisecond. Below, what of a call the host spends in its parts, and with --profile where by function.
Every number is of one process in microseconds; under torchrun rank 0 prints. Symmetric memory needs
TORCH_SYMM_MEM_DISABLE_MULTICAST=1.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import os
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest.mock import patch

import torch
import torch.distributed as dist

import ring_attn as ra
from ring_attn import kernels
from ring_attn.comm import process_group, symmetric
from ring_attn.comm.process_group import ProcessGroupTransport
from ring_attn.comm.stream_flags import Flags
from ring_attn.comm.symmetric import SymmetricTransport
from ring_attn.comm.transport import Pending
from ring_attn.kernels import tilewise
from ring_attn.partial import Partial

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if ON_GPU else torch.device("cpu")
CALLS, ROUNDS = 20, 40


class Nothing:
    """A kernel that does nothing."""

    name = "nothing"

    def supports(self, problem) -> None:
        return None

    def forward(self, q, k, v, tiles, *, scale, score=None, into=None, out=None) -> Partial:
        return Partial(q if out is None else out, self.lse)

    def backward(self, up, q, k, v, tiles, *, scale, score=None, into) -> None:
        pass


class Memory:
    """Symmetric memory whose every rank is this one."""

    def __init__(self, size: int) -> None:
        self.bytes = torch.zeros(size, dtype=torch.uint8)
        self.flags = Flags([self.bytes.data_ptr()] * 4, 0)

    def get_buffer(self, rank, sizes, dtype):
        return self.bytes.view(dtype)[: torch.Size(sizes).numel()].view(sizes)


@contextmanager
def rank_0_of_4() -> Iterator[None]:
    """A process group of which the other processes do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        for owner, name, value in (
            (process_group, "_link", lambda group: ("gpus", 4)),
            (symmetric, "_why_not", lambda processes: None),
            (symmetric, "_on_gpu", lambda x: True),
            (symmetric, "enqueue", lambda operations, stream: None),
            (symmetric, "copy", lambda copies, to, stream: [ctypes.memmove(to + at, source, n) for at, source, n in copies]),
            (symmetric, "rendezvous", lambda size, device, group: Memory(size)),
            (
                ra.Ring,
                "agree",
                lambda self, signature, device, refusal=None, rounds=False: self._agreed.setdefault(signature, rounds),
            ),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


class Problem:
    """A forward, and a forward and backward, on a ring."""

    def __init__(self, ring: ra.Ring, rows: int) -> None:
        self.ring, hosted = ring, len(ring.hosted)
        self.q, self.dout = (self.random(rows * hosted, 8) for _ in range(2))
        self.k, self.v = (self.random(rows * hosted, 2) for _ in range(2))
        Nothing.lse = torch.zeros(1, 8, rows)

    def random(self, rows: int, heads: int) -> torch.Tensor:
        return torch.randn(1, rows, heads, 64, dtype=torch.bfloat16, device=DEVICE).requires_grad_()

    def forward(self) -> None:
        with torch.no_grad():
            ra.ring_attention(self.q, self.k, self.v, ring=self.ring)

    def both(self) -> None:
        inputs = self.q, self.k, self.v
        torch.autograd.grad(ra.ring_attention(*inputs, ring=self.ring), inputs, self.dout)


def settle() -> None:
    """Waits for the device, and for every process."""
    if ON_GPU:
        torch.cuda.synchronize()
    if dist.is_initialized() and ON_GPU:
        dist.barrier()
        torch.cuda.synchronize()


def us(call: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e6 * (time.perf_counter() - start) / calls


def at_once(call: Callable[[], None]) -> float:
    """The least of a call among many."""
    found = []
    for _ in range(ROUNDS):
        settle()
        found.append(us(call, CALLS))
    return min(found)


def from_idle(call: Callable[[], None]) -> float:
    """The median of calls that are each the first after a pause."""
    found = []
    for _ in range(ROUNDS):
        settle()
        time.sleep(1e-3)
        found.append(us(call, 1))
    return statistics.median(found)


def parts_of(call: Callable[[], None]) -> str:
    """What the host spends in the parts of a call, and how often it gets there."""
    spent: dict[str, list[float]] = {}

    def counted(part: str, function: Callable) -> Callable:
        @wraps(function)
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent.setdefault(part, []).append(1e6 * (time.perf_counter() - start))

        return run

    places = [(SymmetricTransport, name, "transfers, asked for") for name in ("pull", "push")]
    places += [(ProcessGroupTransport, name, "messages, asked for") for name in ("shift", "all_gather", "reduce_scatter")]
    places += [(Pending, "wait", "transfers, waited for")]
    calls = tilewise.Dense, tilewise.Packed
    places += [(kind, name, "library calls") for kind in calls for name in ("attend", "differentiate")]
    if ON_GPU:
        from ring_attn.kernels import triton_rows

        places.append((triton_rows.Call, "__call__", "Triton launches"))
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, counted(part, getattr(owner, name))))
        for _ in range(5):
            call()
        spent.clear()
        settle()
        us(call, CALLS)
    found = [f"{part} {len(each) / CALLS:.0f} x {sum(each) / len(each):.0f}" for part, each in spent.items()]
    return ", ".join(found) or "no parts"


def profile(call: Callable[[], None], lines: int = 15) -> None:
    """Where by function, own time first; a profiler makes many short calls look longer than they are."""
    profiler = cProfile.Profile()
    settle()
    # A thread of its own would not be seen.
    with torch.autograd.set_multithreading_enabled(False):
        profiler.enable()
        us(call, 100)
        profiler.disable()
    stats = pstats.Stats(profiler).stats
    rows = sorted(((own, total, count, where) for where, (_, count, own, total, _) in stats.items()), reverse=True)
    for own, total, count, (path, line, name) in rows[:lines]:
        print(
            f"      {1e4 * own:7.1f} own {1e4 * total:7.1f} total {count / 100:5.1f} x  {os.path.basename(path)}:{line} {name}"
        )


def show(name: str, ring: ra.Ring, options: argparse.Namespace) -> None:
    problem = Problem(ring, options.rows)
    for direction, call in (("forward", problem.forward), ("both", problem.both)):
        for _ in range(10):
            call()
        line = f"{name:34s} {direction:8s} {at_once(call):8.1f} at once {from_idle(call):8.1f} from idle"
        parts = parts_of(call)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{line}\n    {parts}", flush=True)
            if options.profile:
                profile(call)
        elif options.profile:
            settle()
            us(call, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="of a rank")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if not ON_GPU:
        torch.set_num_threads(1)
        with patch.object(kernels, "get_kernel", lambda name: Nothing()), rank_0_of_4():
            show("ring of 1, no kernel", ra.Ring.simulated(1, exchange="ring", kernel="reference"), options)
            for name, transport in (("pull", SymmetricTransport()), ("ring", ProcessGroupTransport())):
                show(f"rank 0 of 4, {name}, no kernel", ra.Ring(transport, exchange=name, kernel="reference"), options)
        return
    torch.cuda.set_device(DEVICE)
    if "RANK" not in os.environ:
        for size in (1, 4):
            ring = ra.Ring.simulated(size, exchange="pull", kernel=options.kernel)
            show(f"{size} ranks in one process, pull", ring, options)
        return
    dist.init_process_group("nccl", device_id=DEVICE)
    for exchange, replay in (("pull", True), ("pull", False), ("ring", False)):
        ring = ra.Ring.from_group(None, exchange=exchange, kernel=options.kernel, replay=replay)
        show(f"{ring.size} processes, {exchange}, {ring.transport.link}{', replayed' * replay}", ring, options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
