"""How long a call takes, and how much memory, on a GPU or a CPU; and what the other processes found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ring_attn.comm.transport import Transport

T = TypeVar("T")
Mark = torch.cuda.Event | float
"""A point in time: where the current stream stands, or, on a CPU, the host's seconds."""


def mark(device: torch.device) -> Mark:
    """This point in time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def ms_between(start: Mark, stop: Mark) -> float:
    """Milliseconds from one mark to another; waits for the later one."""
    if isinstance(stop, float):
        return 1e3 * (stop - start)
    stop.synchronize()
    return start.elapsed_time(stop)


def timed(
    run: Callable[[], object],
    repeats: int,
    device: torch.device,
    ready: Callable[[], None] = lambda: None,
    behind: int = 1,
) -> tuple[list[float], int | None]:
    """(milliseconds of each run, peak bytes beyond what was allocated before), after two runs to warm up.

    Each timed run is the last of `behind + 1`, and `ready` is called before them. The bytes are None on a CPU, where PyTorch
    does not count them.
    """
    for _ in range(2):
        run()
    on_cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        ready()
        times.append(last_of_some(run, device, behind))
    return times, torch.cuda.max_memory_allocated(device) - before if on_cuda else None


def last_of_some(run: Callable[[], object], device: torch.device, behind: int = 1) -> float:
    """The milliseconds of a run behind so many others: a GPU that is busy with these does not wait for the host, which after a
    pause takes more than twice as long as when it is busy.
    """
    for _ in range(behind):
        run()
    start = mark(device)
    run()
    return ms_between(start, mark(device))


def captured(run: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """(a replay of `run` from a CUDA graph, what it writes each time); run before, for what no capture can make."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


@dataclass(frozen=True)
class Everyone:
    """The processes that a transport joins, this one among them."""

    transport: Transport
    device: torch.device

    def tell(self, numbers: Sequence[float]) -> Tensor:
        """[processes, n] float64, on the CPU: the numbers of every process, known to all of them."""
        hosted = self.transport.hosted
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        told = self.transport.all_gather([mine] * len(hosted), what="what every process found").wait()
        return torch.stack(told[:: len(hosted)]).cpu()

    def meet(self) -> None:
        """Returns when every process has come here."""
        self.tell([0.0])

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes what is printed and written once."""
        return self.transport.hosted[0] == 0
