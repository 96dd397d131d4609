"""Symmetric memory on GPUs of one host: copy engines read a peer's rows, and no multiprocessor is taken from attention.

Note [streams]: a transport has one piece of memory a rank. What is put up is written there on the current stream, before what
that does next; there it waits only until all have read what was put up before. Copies, which need no multiprocessor, and the
flags that they wait for (`stream_flags.py`) are on a stream of their own: attention waits for slower ranks where it needs what
they send, or would write what they still read, and makes no transfer wait for a place beside it.

Note [host]: the host takes longer over a transfer's copies than the GPU over what it did before. So those of a pull are asked
for when it is waited for, or another transfer begins, with a visit launched in between. Others may read what was put up before
that, and the copies run beside the visit all the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from itertools import accumulate, permutations
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring_attn.comm.process_group import ProcessGroupTransport
from ring_attn.comm.reading_order import reading_orders
from ring_attn.comm.reads import Reads, arrivals, pulled, pushed
from ring_attn.comm.replay import Reached, Replays
from ring_attn.comm.stream_flags import Flags, Signals, flags_at_first
from ring_attn.comm.transport import Parts, Pending, Pieces, Sums, Unpacked
from ring_attn.driver import Copy, copy, enqueue
from ring_attn.tables import hold, made_beside

_GRAIN = 1 << 20
_ROUTES = 256


class Shared(NamedTuple):
    """Memory of all ranks: `get_buffer(rank, sizes, dtype)` is a rank's from the beginning on; flags about it; and what keeps
    this rank's, to whose addresses peers hold on.
    """

    get_buffer: Callable[..., Tensor]
    flags: Flags
    own: Tensor


class Route(NamedTuple):
    """What is the same in all transfers of a shape: `own`, the memory that is written, and the `copies` that read others'.

    `rows`: how many are received. `places`, in a push: int32 [b, s, k], which of these, batch row after batch row, are to be
    added to each own one, -1 for none.
    """

    own: Tensor
    copies: list[Copy]
    rows: int
    places: Tensor | None
    signals: Signals
    memory: Shared


class SymmetricTransport(ProcessGroupTransport):
    """A ring over GPUs of one host, one rank a process: `pull` and `push` by copy engines, everything else through the group.

    Memory is made on first use and grows with the largest message: one message a rank, and one more for `beside`. Raises
    ValueError where the processes are not on GPUs of one host that reach each other, and where NVLink multicast is not switched
    off.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, among: str = "") -> None:
        super().__init__(group, among=among)
        if self.link != "gpus":
            raise ValueError(f"symmetric memory is for GPUs of one host over NCCL, but the processes are linked by {self.link}")
        reason = _why_not(self.num_processes)
        if reason is not None:
            raise ValueError(f"symmetric memory cannot be had: {reason}")
        self.link = "symmetric"
        self._memory = _Memory()
        self._last: _Copies | None = None
        self._places: dict[tuple, tuple[Tensor, Parts]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._beside_this: SymmetricTransport | None = None
        self.replays = Replays(self)

    @property
    def beside(self) -> SymmetricTransport:
        """The same with memory of its own: transfers over one memory wait for each other."""
        if self._beside_this is None:
            self._beside_this = SymmetricTransport(self.group, among=self.among)
            self._beside_this._beside_this, self._beside_this.replays = self._beside_this, self.replays
        return self._beside_this

    @property
    def memory_bytes(self) -> int:
        """Bytes of symmetric memory on each rank."""
        beside = self._beside_this
        return self._memory.size + (0 if beside is None or beside is self else beside.memory_bytes)

    def finish(self) -> None:
        for one in self._both():
            one._end_last(captured=False)

    def streams(self) -> list[torch.cuda.Stream]:
        return [one._stream for one in self._both() if one._stream is not None]

    def watch(self, reached: Reached, what: str) -> None:
        if self._watch is not None:
            self._watch.add([reached], self._who(what), self._roll)

    def _both(self) -> list[SymmetricTransport]:
        return [self] if self._beside_this in (None, self) else [self, self._beside_this]

    def _end_last(self, *, captured: bool) -> None:
        """What was put off begins, and has its end, where it was asked for in a capture as this is, or neither was."""
        last, self._last = self._last, None
        # An event of a capture means nothing outside of it, and the other way round.
        if last is not None and last.captured == captured:
            last.wait()

    def pull(self, shards: Sequence[Pieces], parts: Parts, *, what: str = "pull") -> Pending[list[Tensor]]:
        (shard,) = shards
        if not _on_gpu(shard[0]):
            return super().pull(shards, parts, what=what)
        shape = *shard[0].shape[:2], sum(x.shape[2] for x in shard)
        route = self._route(pulled, parts, shape, shard[0])
        received, copies = self._put_up(shard.write, route, what)
        # See Note [host].
        return Pending([received], copies.wait, what)

    def push(self, grads: Sequence[Unpacked], parts: Parts, into: Sequence[Sums], *, what: str = "push") -> Pending[None]:
        (grad,), (total,) = grads, into
        if not _on_gpu(grad):
            return super().push(grads, parts, into, what=what)
        route = self._route(pushed, parts, grad.shape, grad)
        received, copies = self._put_up(grad.write, route, what)
        copies.begin()

        def add_up() -> None:
            copies.wait()
            if route.places is not None:
                total.add(received.flatten(0, 1).unsqueeze(0), range(route.places.shape[1]), route.places)

        return Pending(None, add_up, what)

    def _route(
        self, of: Callable[[int, Parts, int], Reads], parts: Parts, shape: tuple[int, int, int], like: Tensor | Unpacked
    ) -> Route:
        """The route of a transfer of rows of that shape; kept for parts that are a tuple, as plans have them, while the memory
        stays. `like` has their dtype and device.

        Every rank must ask in the same order, see `_Memory.of_size`. What is put off begins, for a stream and flags have one
        order and memory may be made anew, and has its end: what it writes may be forgotten by now.
        """
        capturing = _capturing(like.device)
        self._end_last(captured=capturing)
        # What is kept holds the parts, so their number stays theirs; to hash them takes longer.
        key = of, id(parts), *shape, like.dtype
        route, _ = self._memory.routes.get(key, (None, None))
        if route is None:
            b, s, e = shape
            by_rank = [of(rank, parts, s) for rank in range(self.ring_size)]
            memory = self._memory.of_size(max(by_rank[0].put_up) * b * e * like.dtype.itemsize, like.device, self.group)
            route = self._new_route(by_rank, shape, like, memory, parts)
            if isinstance(parts, tuple):
                self._memory.keep(key, route, parts)
        if capturing:
            if route.places is not None:
                hold(route.places)
            if not self.replays.recording:
                hold(route.memory)
        return route

    def _new_route(
        self, by_rank: Sequence[Reads], shape: tuple[int, int, int], like: Tensor | Unpacked, memory: Shared, parts: Parts
    ) -> Route:
        (put_up, reads, homes), (b, _, e) = by_rank[self.process], shape
        sources = reading_orders([found.rows_of(self.ring_size) for found in by_rank])[self.process]
        # What inference mode makes could not be written to outside of it.
        with torch.inference_mode(False):
            own = memory.get_buffer(self.process, list(shape), like.dtype)
            places = self._places_of(homes, b, parts, like.device) if homes else None
        row, (*starts, rows) = e * like.dtype.itemsize, accumulate((len(read.rows) for read in reads), initial=0)
        copies = []
        for (rank, of), start in sorted(zip(reads, starts, strict=True), key=lambda x: sources.index(x[0].rank)):
            theirs = memory.get_buffer(rank, [b, put_up[rank], e], like.dtype).data_ptr()
            # Batch row by batch row both ends are contiguous.
            for i in range(b):
                place, source = i * rows + start, i * put_up[rank] + of.start
                copies.append(Copy(place * row, theirs + source * row, len(of) * row))
        return Route(own, copies, rows, places, memory.flags.signals(sources), memory)

    def _places_of(self, homes: Sequence[range], batch: int, parts: Parts, device: torch.device) -> Tensor:
        """Where what comes home belongs; kept, as a memory that is made anew changes nothing of it."""
        key = id(parts), batch, device
        places, _ = self._places.get(key, (None, None))
        if places is None:
            with made_beside():
                places = arrivals(homes, batch).to(device)
            if isinstance(parts, tuple):
                self._places[key] = places, parts
            if len(self._places) > _ROUTES:
                del self._places[next(iter(self._places))]
        return places

    def _put_up(self, write: Callable[[Tensor], object], route: Route, what: str) -> tuple[Tensor, _Copies]:
        """Puts up for the others what `write` writes: what is to be received, and the copies that do it."""
        own = route.own
        received = own.new_empty(own.shape[0], route.rows, own.shape[2])
        here = _stream_here(own)
        enqueue(route.signals.to_write, here)
        write(own)
        enqueue(route.signals.written, here)
        put_up = _event_on(here)
        self._last = _Copies(received, _capturing(own.device), lambda copies: self._read(copies, route, put_up, what))
        return received, self._last

    def _read(self, copies: _Copies, route: Route, put_up: torch.cuda.Event | None, what: str) -> None:
        """Reads what others put up, beside the current stream."""
        stream = self._stream_after(put_up, copies.received.device)
        enqueue(route.signals.to_read, stream)
        copy(route.copies, copies.received.data_ptr(), stream)
        copies.done = _event_on(stream)
        enqueue(route.signals.have_read, stream)
        copies.over = _event_on(stream)
        if self._watch is not None and not self.replays.recording:
            self._watch.add([copies], self._who(what), self._roll)

    def _stream_after(self, event: torch.cuda.Event | None, device: torch.device) -> torch.cuda.Stream | None:
        """This transport's own stream, see Note [streams], behind an event; None where there is none."""
        if event is None:
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_event(event)
        return self._stream


class _Copies:
    """The copies of a transfer, for which `read` asks. What they write, `received`, lives until they are waited for; `done`:
    their end on a stream; `over`: that of the flags behind them.
    """

    def __init__(self, received: Tensor, captured: bool, read: Callable[[_Copies], None]) -> None:
        self.received: Tensor | None = received
        self.captured = captured
        self.done: torch.cuda.Event | None = None
        self.over: torch.cuda.Event | None = None
        self._read: Callable[[_Copies], None] | None = read

    def begin(self) -> None:
        read, self._read = self._read, None
        if read is not None:
            read(self)

    def is_completed(self) -> bool:
        return self.over is None or self.over.query()

    def wait(self) -> None:
        """Lets the current stream wait, not the host; the first time."""
        if self.received is None:
            return
        self.begin()
        if self.done is not None:
            # All of a graph's work must be waited for in it.
            _stream_here(self.received).wait_event(self.over if self.captured else self.done)
        self.received = None


class _Memory:
    """Symmetric memory of a group, made by all ranks together and made anew where it is too small.

    `routes`: what was kept of transfers over it, by their shape; with the parts that each is for.
    """

    def __init__(self) -> None:
        self.size = 0
        self.shared: Shared | None = None
        self.routes: dict[tuple, tuple[Route, Parts]] = {}

    def of_size(self, size: int, device: torch.device, group: dist.ProcessGroup) -> Shared:
        """Memory of the group with at least that many bytes. Every rank must ask for the same sizes in the same order.

        Raises RuntimeError where it would have to be made while a CUDA graph is captured.
        """
        if size > self.size:
            if _capturing(device):
                raise RuntimeError(
                    f"symmetric memory has {self.size} bytes and {size} are needed, which cannot be made while a CUDA graph is "
                    f"captured; make the same call once before"
                )
            wanted = math.ceil(size * 1.25 / _GRAIN) * _GRAIN
            # Peers may still read the old memory: no rank lets go of its own before all have read.
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            dist.barrier(group)
            self.routes.clear()
            try:
                self.shared = rendezvous(wanted, device, group)
            except RuntimeError as error:
                error.add_note(
                    "copy engines need such memory on all ranks; exchange='ring' and 'gather' do not, nor does a pull by "
                    "messages, Ring(ProcessGroupTransport(group), exchange='pull')"
                )
                raise
            self.size = wanted
        return self.shared

    def keep(self, key: tuple, route: Route, parts: Parts) -> None:
        self.routes[key] = route, parts
        if len(self.routes) > _ROUTES:
            del self.routes[next(iter(self.routes))]


def _why_not(processes: int) -> str | None:
    """None, or why so many processes of one host cannot have symmetric memory. Asks no other process: where one differs, its
    first call is refused on all, see `Ring.agree`.
    """
    if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") != "1":
        return "set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 in every process, or it is bound to NVLink multicast"
    if torch.version.hip:
        return "it goes by stream memory operations of CUDA's driver"
    seen = torch.cuda.device_count()
    if seen < processes:
        return f"each of {processes} processes must see the GPUs of all, but this one sees {seen}"
    apart = [pair for pair in permutations(range(seen), 2) if not torch.cuda.can_device_access_peer(*pair)]
    return f"of these pairs of GPUs one does not reach the other: {apart}" if apart else None


def _on_gpu(x: Tensor | Unpacked) -> bool:
    """Others, in a group that carries both kinds, go as messages."""
    return x.device.type == "cuda"


def _stream_here(x: Tensor) -> torch.cuda.Stream | None:
    """The current stream; None where x is on no GPU."""
    # By number: to find out which device is the current one takes the host as long as the rest.
    return torch.cuda.current_stream(x.get_device()) if x.is_cuda else None


def _event_on(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """When the stream has got so far."""
    return None if stream is None else stream.record_event()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def rendezvous(size: int, device: torch.device, group: dist.ProcessGroup) -> Shared:
    """`size` bytes on every rank. Raises RuntimeError where they have NVLink multicast."""
    import torch.distributed._symmetric_memory as symmetric_memory

    at_first = torch.tensor(flags_at_first(group.size()), dtype=torch.int32, device=device).view(torch.uint8)
    # PyTorch makes the pool of such memory on the current device.
    with torch.cuda.device(device):
        memory = symmetric_memory.empty(size + at_first.numel(), dtype=torch.uint8, device=device)
    memory[size:] = at_first
    # Others raise their flags here as soon as they know of this memory.
    torch.cuda.synchronize(device)
    handle = symmetric_memory.rendezvous(memory, group)
    if handle.multicast_ptr:
        raise RuntimeError("the symmetric memory came with NVLink multicast; set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 earlier")
    ranks = range(group.size())
    at = [handle.get_buffer(rank, [at_first.numel()], torch.uint8, size).data_ptr() for rank in ranks]
    return Shared(handle.get_buffer, Flags(at, handle.rank), memory)
