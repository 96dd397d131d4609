"""Symmetric memory on GPUs of one host: copy engines read a peer's rows, and no multiprocessor is taken from attention.

Note [slots]: what others read is copied into one of two slots that take turns, then all ranks meet at one barrier, then each
reads; all three on one stream a rank. A rank writes to a slot again two transfers later, and before that it has passed the
barrier of the transfer between, which a rank reaches only after its reads of the first. So one barrier a transfer is enough,
and none follows the reads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring_attn.comm.process_group import ProcessGroupTransport
from ring_attn.comm.transport import Parts, Pending, check_payloads, sum_dtype
from ring_attn.layout import Part, places, total_rows

SLOTS = 2
_GRAIN = 1 << 20


class Read(NamedTuple):
    """Rows `rows` of what `rank` has put up, and the tensor [b, n, e] that they are copied to."""

    rank: int
    rows: range
    into: Tensor


class SymmetricTransport(ProcessGroupTransport):
    """A ring over GPUs of one host, one rank a process: `pull` and `push` by copy engines, everything else through the group.

    Staging memory is made on first use and grows with the largest message; it is two messages a rank. Raises ValueError where
    the processes are not on GPUs of one host that reach each other, RuntimeError where NVLink multicast is not switched off.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(group)
        if self.link != "gpus":
            raise ValueError(f"symmetric memory is for GPUs of one host over NCCL, but the processes are linked by {self.link}")
        if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") != "1":
            raise RuntimeError(
                "set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 in every process, or memory is bound to NVLink multicast"
            )
        self._memory = _Memory(self.group)
        self._turn = 0
        self._stream: torch.cuda.Stream | None = None

    def pull(self, shards: Sequence[Tensor], parts: Parts, *, what: str = "pull") -> Pending[list[Tensor]]:
        check_payloads(self, shards, what)
        (shard,), (rank,) = shards, self.hosted
        received = shard.new_empty(shard.shape[0], total_rows(parts[rank]), shard.shape[2])
        reads = [Read(part.rank, part.rows, received[:, place]) for part, place in places(parts[rank])]
        return self._transfer(shard, [shard.shape[1]] * self.ring_size, reads, received, what)

    def push(self, grads: Sequence[Tensor], parts: Parts, rows: int, *, what: str = "push") -> Pending[list[Tensor]]:
        (grad,), (rank,) = grads, self.hosted
        total = grad.new_zeros(grad.shape[0], rows, grad.shape[2], dtype=sum_dtype(grad.dtype))
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
        """Puts up `mine`, of which every rank has `rows[rank]`, and reads what others put up; see Note [slots]."""
        b, _, e = mine.shape
        buffers = self._memory.slot(self._turn % SLOTS, max(rows) * b * e * mine.element_size(), mine.device)
        self._turn += 1
        with self._beside(mine, *(read.into for read in reads)) as done:
            buffers.view(self.process, mine.shape, mine.dtype).copy_(mine)
            buffers.barrier()
            for rank, wanted, into in reads:
                theirs = buffers.view(rank, (b, rows[rank], e), mine.dtype)
                # Batch row by batch row both ends are contiguous, as copy engines want it.
                for target, source in zip(into, theirs[:, wanted.start : wanted.stop], strict=True):
                    target.copy_(source)
        if self._watch is not None:
            self._watch.add([done], self._who(what))

        def finish() -> None:
            done.wait()
            if after is not None:
                after()

        return Pending([received], finish, what)

    def _beside(self, *tensors: Tensor) -> AbstractContextManager[_Done]:
        """Work on this transport's own stream, after what the current one has got so far."""
        if tensors[0].device.type != "cuda":
            return _at_once()
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensors[0].device)
        return _on(self._stream, tensors)


class _Done:
    """The end of a transfer on its stream; without a stream it has been reached."""

    def __init__(self) -> None:
        self.event: torch.cuda.Event | None = None

    def is_completed(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> None:
        """Lets the current stream wait, not the host."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


@contextmanager
def _at_once() -> Iterator[_Done]:
    yield _Done()


@contextmanager
def _on(stream: torch.cuda.Stream, tensors: Sequence[Tensor]) -> Iterator[_Done]:
    done = _Done()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield done
        done.event = stream.record_event()
    for x in tensors:
        x.record_stream(stream)


class _Buffers(NamedTuple):
    """One slot: the memory of every rank, and the barrier of all."""

    handle: object
    offset: int

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What a rank has put up, its own memory or a peer's."""
        return self.handle.get_buffer(rank, list(shape), dtype, self.offset // dtype.itemsize)

    def barrier(self) -> None:
        self.handle.barrier()


class _Memory:
    """Symmetric memory of a group for two slots, made by all ranks together and made anew where it is too small."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = 0
        self.handle: object = None

    def slot(self, number: int, size: int, device: torch.device) -> _Buffers:
        """Every rank must ask for the same sizes in the same order."""
        if size > self.size:
            self.size = math.ceil(size * 1.25 / _GRAIN) * _GRAIN
            # Peers may still read the old memory: no rank lets go of its own before all have read.
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            dist.barrier(self.group)
            self.handle = rendezvous(SLOTS * self.size, device, self.group)
        return _Buffers(self.handle, number * self.size)


def rendezvous(size: int, device: torch.device, group: dist.ProcessGroup) -> object:
    """The handle of `size` bytes on every rank. Raises RuntimeError where it has NVLink multicast."""
    import torch.distributed._symmetric_memory as symmetric_memory

    memory = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(memory, group)
    if handle.multicast_ptr:
        raise RuntimeError("the symmetric memory came with NVLink multicast; set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 earlier")
    return handle
