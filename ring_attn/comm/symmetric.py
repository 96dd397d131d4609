"""Symmetric memory on GPUs of one host: copy engines read a peer's rows, and no multiprocessor is taken from attention.

Note [barriers]: one piece of memory a rank, and two barriers a transfer. Before the first a rank has read all that it wanted of
the transfer before, so behind it all may write; behind the second all have written, so all may read. Nothing is left over
between transfers, so they may be captured in CUDA graphs, replayed, and mixed with others.

Note [streams]: a barrier is a kernel, small as it is, and would wait for a place beside one that fills the GPU, as attention
does. So writing and both barriers are on the current stream, before what it does next; only the copies, which need no
multiprocessor, are on a stream of their own.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring_attn.comm.process_group import ProcessGroupTransport
from ring_attn.comm.transport import Parts, Pending, check_payloads
from ring_attn.layout import Part, places, total_rows

logger = logging.getLogger("ring_attn")

_GRAIN = 1 << 20


class Read(NamedTuple):
    """Rows `rows` of what `rank` has put up, and the tensor [b, n, e] that they are copied to."""

    rank: int
    rows: range
    into: Tensor


class SymmetricTransport(ProcessGroupTransport):
    """A ring over GPUs of one host, one rank a process: `pull` and `push` by copy engines, everything else through the group.

    Memory is made on first use and grows with the largest message: one message a rank. Raises ValueError where the processes
    are not on GPUs of one host that reach each other, and where NVLink multicast is not switched off.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(group)
        if self.link != "gpus":
            raise ValueError(f"symmetric memory is for GPUs of one host over NCCL, but the processes are linked by {self.link}")
        reason = _why_not(self.num_processes)
        if reason is not None:
            raise ValueError(f"symmetric memory cannot be had: {reason}")
        self.link = "symmetric"
        self._memory = _Memory(self.group)
        self._last: _Copies | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def memory_bytes(self) -> int:
        """Bytes of symmetric memory on each rank."""
        return self._memory.size

    def pull(self, shards: Sequence[Tensor], parts: Parts, *, what: str = "pull") -> Pending[list[Tensor]]:
        check_payloads(self, shards, what)
        (shard,), (rank,) = shards, self.hosted
        received = shard.new_empty(shard.shape[0], total_rows(parts[rank]), shard.shape[2])
        reads = [Read(part.rank, part.rows, received[:, place]) for part, place in places(parts[rank])]
        return self._transfer(shard, [shard.shape[1]] * self.ring_size, reads, received, what)

    def push(
        self, grads: Sequence[Tensor], parts: Parts, into: Sequence[Tensor], *, what: str = "push"
    ) -> Pending[Sequence[Tensor]]:
        (grad,), (total,), (rank,) = grads, into, self.hosted
        arrivals: list[tuple[Part, Tensor]] = []
        reads = []
        for source, wanted in enumerate(parts):
            for part, place in places(wanted):
                if part.rank == rank:
                    arrivals.append((part, grad.new_empty(grad.shape[0], len(part.rows), grad.shape[2])))
                    reads.append(Read(source, range(place.start, place.stop), arrivals[-1][1]))

        def add_up() -> None:
            for part, arrived in arrivals:
                total[:, part.rows.start : part.rows.stop] += arrived

        return self._transfer(grad, [total_rows(wanted) for wanted in parts], reads, total, what, after=add_up)

    def _transfer(
        self, mine: Tensor, rows: list[int], reads: list[Read], received: Tensor, what: str, after: Callable | None = None
    ) -> Pending[list[Tensor]]:
        """Puts up `mine`, of which every rank has `rows[rank]`, and reads what others put up; see Note [barriers]."""
        b, _, e = mine.shape
        memory = self._memory.of_size(max(rows) * b * e * mine.element_size(), mine.device)
        # An event of a capture means nothing outside of it, and the other way round.
        if self._last is not None and self._last.captured == _capturing(mine.device):
            self._last.wait()
        memory.barrier()
        memory.get_buffer(self.process, list(mine.shape), mine.dtype).copy_(mine)
        memory.barrier()
        copies = self._last = _Copies(reads, _capturing(mine.device))
        with self._beside(mine.device, copies):
            # From the next rank on, so that not all read the same one's memory at a time.
            for rank, wanted, into in sorted(reads, key=lambda read: (read.rank - self.process) % self.ring_size):
                theirs = memory.get_buffer(rank, [b, rows[rank], e], mine.dtype)
                wanted_rows = theirs[:, wanted.start : wanted.stop]
                # Batch row by batch row both ends are contiguous, as copy engines want it.
                for target, source in [(into, wanted_rows)] if b == 1 else zip(into, wanted_rows, strict=True):
                    target.copy_(source)
        if self._watch is not None:
            self._watch.add([copies], self._who(what))

        def finish() -> None:
            copies.wait()
            copies.reads = ()
            if after is not None:
                after()

        return Pending([received], finish, what)

    @contextmanager
    def _beside(self, device: torch.device, copies: _Copies) -> Iterator[None]:
        """Work on this transport's own stream, after what the current one has got so far; see Note [streams]."""
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
            copies.done = self._stream.record_event()


class _Copies:
    """The copies of a transfer. `reads` keeps what they write alive until that is waited for; `done`: their end on a stream."""

    def __init__(self, reads: Sequence[Read], captured: bool) -> None:
        self.reads, self.captured = reads, captured
        self.done: torch.cuda.Event | None = None

    def is_completed(self) -> bool:
        return self.done is None or self.done.query()

    def wait(self) -> None:
        """Lets the current stream wait, not the host."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)


class _Memory:
    """Symmetric memory of a group, made by all ranks together and made anew where it is too small."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = 0
        self.handle: object = None
        self.in_graphs: list[object] = []

    def of_size(self, size: int, device: torch.device) -> object:
        """A handle of at least that many bytes. Every rank must ask for the same sizes in the same order.

        Raises RuntimeError where it would have to be made while a CUDA graph is captured.
        """
        capturing = _capturing(device)
        if size > self.size:
            if capturing:
                raise RuntimeError(
                    f"symmetric memory has {self.size} bytes and {size} are needed, which cannot be made while a CUDA graph is "
                    f"captured; make the same call once before"
                )
            wanted = math.ceil(size * 1.25 / _GRAIN) * _GRAIN
            # Peers may still read the old memory: no rank lets go of its own before all have read.
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            dist.barrier(self.group)
            self.handle = rendezvous(wanted, device, self.group)
            self.size = wanted
        if capturing and self.handle not in self.in_graphs:
            self.in_graphs.append(self.handle)
        return self.handle


def with_copy_engines(messages: ProcessGroupTransport, exchange: str) -> ProcessGroupTransport:
    """Copy engines in place of messages where an exchange could use them and the GPUs allow it. All processes must call this.

    Raises ValueError where "pull" was asked for by name on GPUs of one host that do not allow it.
    """
    if messages.link != "gpus" or messages.ranks_per_process > 1 or exchange not in ("auto", "pull"):
        return messages
    try:
        return SymmetricTransport(messages.group)
    except ValueError as reason:
        if exchange == "pull":
            raise ValueError(
                f"{reason}; or pull by messages, Ring(ProcessGroupTransport(group), exchange='pull'), or take exchange='auto'"
            ) from None
        logger.info("exchange: pull goes by messages, not by copy engines: %s", reason)
        return messages


def _why_not(processes: int) -> str | None:
    """None, or why so many processes of one host cannot have symmetric memory. Asks no other process: where one differs, its
    first call is refused on all, see `Ring.agree`.
    """
    if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") != "1":
        return "set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 in every process, or it is bound to NVLink multicast"
    seen = torch.cuda.device_count()
    if seen < processes:
        return f"each of {processes} processes must see the GPUs of all, but this one sees {seen}"
    apart = [pair for pair in permutations(range(seen), 2) if not torch.cuda.can_device_access_peer(*pair)]
    return f"of these pairs of GPUs one does not reach the other: {apart}" if apart else None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def rendezvous(size: int, device: torch.device, group: dist.ProcessGroup) -> object:
    """The handle of `size` bytes on every rank. Raises RuntimeError where it has NVLink multicast."""
    import torch.distributed._symmetric_memory as symmetric_memory

    memory = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(memory, group)
    if handle.multicast_ptr:
        raise RuntimeError("the symmetric memory came with NVLink multicast; set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 earlier")
    return handle
