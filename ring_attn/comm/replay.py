"""Short calls that come again, asked for at once: each is captured as a CUDA graph, and replayed on other tensors.

Note [replay]: a short call is over before a host has asked for all of its kernels and transfers. So the third call of a kind is
made once more for a graph, which is replayed for those that follow. A graph reads and writes memory of its own: inputs are
copied there, and what it made is copied from there, so that callers have it to themselves. Which calls a rank replays is its
own affair: its peers see the same transfers, see Note [flags] of `stream_flags.py`. Symmetric memory made anew, which all ranks
do at once, ends all graphs over it.

The call that is captured is made for real first, on the stream of the capture and on the tensors that the graph will read. So
whatever depends on strides, streams or modes has been made when the capture comes. A capture that fails all the same, for want
of memory, leaves that call as it was.

All graphs over a transport share one pool, in which a graph may write where another has written: they run one behind another,
on whatever streams they are called.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import NamedTuple, Protocol
from weakref import WeakSet, finalize, ref

import torch
from torch import Tensor

from ring_attn.driver import beside_captures
from ring_attn.tables import held

logger = logging.getLogger("ring_attn")

_BEFORE = 2
"""So many calls of a kind go before the one that is captured."""

_MOST = 1 << 30
"""Bytes that graphs over a transport may read and write, and that must be free, beside its inputs, where one is captured."""

_KERNELS = frozenset({"aten", "cudnn", "flash2", "flash4", "gluon", "triton"})
"""Those that go by their arguments alone, and by whether PyTorch is to be deterministic, which tells kinds of calls apart."""

_unended: list[torch.cuda.CUDAGraph] = []
"""Whose capture the driver would not end: PyTorch's allocator of pinned memory goes on asking them."""

Tensors = Sequence[Tensor | None]
Run = Callable[..., Sequence[Tensor]]


class Reached(NamedTuple):
    """That a stream got as far as `event`, for a `Watch`."""

    event: torch.cuda.Event

    def is_completed(self) -> bool:
        return self.event.query()


class Wires(Protocol):
    """A transport whose calls are replayed. `memory_bytes`: of its memory, another number where that is made anew."""

    memory_bytes: int

    def finish(self) -> None:
        """Asks for what was put off, as a replay asks for nothing."""

    def streams(self) -> list[torch.cuda.Stream]:
        """The streams of its own."""

    def watch(self, reached: Reached, what: str) -> None:
        """Names a replay that does not end."""


class Replays:
    """What the graphs of calls over one transport share. `wires`: that transport, None where nothing moves.

    `recording`: whether one of them is captured at the moment.
    """

    def __init__(self, wires: Wires | None = None) -> None:
        self.recording = False
        self._refused = False
        # A transport holds its replays, and goes when nobody else holds it.
        self._wires: Callable[[], Wires | None] = (lambda: None) if wires is None else ref(wires)
        self._memory = 0
        self._captured: WeakSet[Repeated] = WeakSet()
        self._clock = count()
        self._pool: tuple[int, int] | None = None
        self._keeper: Recorded | None = None
        self._aside: torch.cuda.Stream | None = None
        self._stream: torch.cuda.Stream | None = None
        self._over: torch.cuda.Event | None = None

    def serve(self, device: torch.device) -> bool:
        """Whether calls on this device may be replayed."""
        return device.type == "cuda"

    def know(self, kernel: str) -> bool:
        """Whether a call by that kernel does the same every time."""
        return kernel in _KERNELS

    def may_begin(self) -> bool:
        """Whether nothing is being captured here, whose graph this call's kernels belong into."""
        return not torch.cuda.is_current_stream_capturing()

    def look_at_memory(self) -> None:
        """Ends all graphs where the memory that they go over was made anew."""
        wires = self._wires()
        memory = 0 if wires is None else wires.memory_bytes
        if memory != self._memory:
            self._memory = memory
            for one in list(self._captured):
                one.forget()

    def may_capture(self, inputs: Tensors) -> bool:
        """Whether a call with these inputs may be captured: they fit, so much is free beside them, and none was refused."""
        wanted = _bytes(inputs)
        if self._refused or wanted > _MOST:
            return False
        if self.free(_device_of(inputs)) < _MOST + wanted:
            logger.info("a short call is not replayed: less than %d MiB of its device are free", _MOST + wanted >> 20)
            return False
        return True

    def make_room(self, wanted: int) -> bool:
        """Whether so many bytes may be kept for one more graph; those graphs go that were not used for longest."""
        if wanted > _MOST:
            return False
        captured = sorted((one for one in self._captured if one.graph is not None), key=lambda one: one.used)
        taken = sum(one.graph.nbytes for one in captured)
        for one in captured:
            if taken + wanted <= _MOST:
                break
            taken -= one.graph.nbytes
            one.give_way()
        return True

    def free(self, device: torch.device) -> int:
        """Bytes of the device that nobody has."""
        return torch.cuda.mem_get_info(device)[0]

    def capture(self, run: Run, inputs: Tensors) -> tuple[list[Tensor], Graph | None]:
        """What `run` makes of these inputs, and its graph; None where there is no room, or it fails, which is logged."""
        # What inference mode makes could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad(), self.aside(_device_of(inputs)) as hand_over:
            own = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
            _copy(inputs, own)
            found = list(run(*own))
            for x in found:
                hand_over(x)
            if not self.make_room(_bytes(own) + _bytes(found)):
                return found, None
            self.recording = True
            try:
                with held() as tables, _nothing_collected():
                    return found, Graph(own, *self.record(run, own), tables)
            except Exception as error:
                self._refused = True
                # In words: whoever keeps the record would keep, by the error, all that the capture held.
                why = f"{type(error).__name__}: {error}"
                logger.warning("short calls are no longer captured, but asked for anew each time: one failed, %s", why)
                return found, None
            finally:
                self.recording = False

    @contextmanager
    def aside(self, device: torch.device) -> Iterator[Callable[[Tensor], None]]:
        """Inside, a stream is the current one on which nothing but captures and what they need is made. Hands out what is to be
        told of tensors that go to the stream outside.
        """
        here = torch.cuda.current_stream(device)
        if self._aside is None:
            self._aside = torch.cuda.Stream(device)
        self._aside.wait_stream(here)
        try:
            with torch.cuda.stream(self._aside):
                yield lambda x: x.record_stream(here)
        finally:
            here.wait_event(self._ends_on(self._aside))

    def _ends_on(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """The next replay, on whatever stream, waits for what was asked for on this one."""
        self._stream, self._over = stream, stream.record_event()
        return self._over

    def record(self, run: Run, inputs: Tensors) -> tuple[list[Tensor], Callable[[], None]]:
        """What `run` makes of exactly these tensors, unwritten, and what writes it each time it is called."""
        if self._keeper is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on with what a capture does not allow.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            outputs = list(run(*inputs))
        except BaseException:
            with suppress(RuntimeError):
                self._end(graph)
            raise
        self._end(graph)
        # A pool goes with the last of its graphs, and where rings are made anew at every step, so do these.
        self._keeper = Recorded(graph)
        return outputs, self._keeper.replay

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture, in whatever state it is."""
        here, wires = torch.cuda.current_stream(), self._wires()
        try:
            for stream in [] if wires is None else wires.streams():
                with torch.cuda.stream(stream):
                    captured = torch.cuda.is_current_stream_capturing()
                if captured:
                    # Where the driver refused something, also this, until the capture is ended.
                    with suppress(RuntimeError):
                        here.wait_stream(stream)
            graph.capture_end()
        except RuntimeError:
            # Where the driver refuses, PyTorch leaves its allocators, and its random numbers, as they are amid a capture.
            _unended.append(graph)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(here.device_index, self._pool)
            with suppress(RuntimeError):
                another = torch.cuda.CUDAGraph()
                another.capture_begin(capture_error_mode="thread_local")
                another.capture_end()
            raise

    def replay(self, one: Repeated, inputs: Tensors, what: str) -> list[Tensor]:
        """What the captured function makes of these inputs."""
        wires = self._wires()
        if wires is not None:
            wires.finish()
        stream = torch.cuda.current_stream(one.graph.outputs[0].device)
        if self._over is not None and stream != self._stream:
            stream.wait_event(self._over)
        found = one.graph(inputs)
        over = self._ends_on(stream)
        # Where what graphs read is made, and goes to others when they go.
        self._aside.wait_event(over)
        if wires is not None:
            wires.watch(Reached(over), what)
        return found


class Recorded:
    """A CUDA graph that may go at any time, also amid a capture, which destroying one would end."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._held = [graph]
        finalize(self, _let_go, self._held)

    def replay(self) -> None:
        self._held[0].replay()


def _let_go(held: list[torch.cuda.CUDAGraph]) -> None:
    with beside_captures():
        held.clear()


class Graph:
    """A captured function, with the memory that it reads and writes; see Note [tables] of `ring_attn.tables`."""

    def __init__(
        self, inputs: Tensors, outputs: list[Tensor], replay: Callable[[], None], tables: Sequence[object] = ()
    ) -> None:
        self.inputs, self.outputs, self._replay, self._tables = inputs, outputs, replay, tables
        self.nbytes = _bytes(inputs) + _bytes(outputs)

    def __call__(self, inputs: Tensors) -> list[Tensor]:
        _copy(inputs, self.inputs)
        self._replay()
        found = [torch.empty_like(x) for x in self.outputs]
        _copy(self.outputs, found)
        return found


class Repeated:
    """A function that is called again and again with tensors alike in shape, dtype and device, None where they were None.

    `graph`: once it was captured. `used`: when it was last replayed.
    """

    def __init__(self, replays: Replays) -> None:
        self._replays = replays
        self.used, self._before = 0, _BEFORE
        self.forget()

    def forget(self) -> None:
        self.graph: Graph | None = None
        self._calls = 0

    def give_way(self) -> None:
        """Forgets its graph for others, and waits longer for the next: to capture takes longer than a call."""
        self._before *= 2
        self.forget()

    def __call__(self, run: Run, inputs: Tensors, what: str) -> Sequence[Tensor]:
        """`run(*inputs)`, which must do the same every time; `what` it is, for errors."""
        replays = self._replays
        if not replays.may_begin():
            return run(*inputs)
        replays.look_at_memory()
        if self.graph is not None:
            self.used = next(replays._clock)
            return replays.replay(self, inputs, what)
        self._calls += 1
        if self._calls != self._before + 1 or not replays.may_capture(inputs):
            return run(*inputs)
        found, self.graph = replays.capture(run, inputs)
        if self.graph is not None:
            self.used = next(replays._clock)
            replays._captured.add(self)
        return found


def _device_of(tensors: Tensors) -> torch.device:
    return next(x.device for x in tensors if x is not None)


def _bytes(tensors: Tensors) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def _copy(tensors: Tensors, to: Tensors) -> None:
    """Copies tensors, those of a dtype by one launch."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for x, y in zip(tensors, to, strict=True):
        if x is not None:
            sources, targets = by_dtype.setdefault(x.dtype, ([], []))
            sources.append(x)
            targets.append(y)
    for sources, targets in by_dtype.values():
        torch._foreach_copy_(targets, sources)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Cycles let go of during a capture could hold what must not be given back then."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
