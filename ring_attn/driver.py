"""What CUDA's driver is asked for without PyTorch in between: to write and await numbers on a stream, half of which PyTorch
has, and to copy, for which it wants views of both ends and another current stream. CUDA graphs capture both. And to let this
thread work beside a capture.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

import torch

WAIT, WRITE, EQUAL = 1, 2, 1  # CU_STREAM_MEM_OP_WAIT_VALUE_32 and _WRITE_VALUE_32, CU_STREAM_WAIT_VALUE_EQ
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_AS_IT_IS = nullcontext()


class Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams of CUDA's driver API."""

    _fields_ = (
        ("operation", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("unused", ctypes.c_uint64),
    )


Operations = ctypes.Array  # of Operation


class Copy(NamedTuple):
    """`size` bytes from the address `source` to `place` bytes behind the beginning of what is received."""

    place: int
    source: int
    size: int


def enqueue(operations: Operations, stream: torch.cuda.Stream) -> None:
    """Puts operations on the stream, in order. Raises RuntimeError where the driver refuses."""
    if len(operations):
        with _context_of(stream):
            _ask("cuStreamBatchMemOp_v2", stream.cuda_stream, len(operations), operations, 0)


def copy(copies: Iterable[Copy], to: int, stream: torch.cuda.Stream) -> None:
    """Puts copies to what is received at the address `to` on the stream, in order; what is a peer's comes by a copy engine.

    Raises RuntimeError where the driver refuses.
    """
    handle = stream.cuda_stream
    with _context_of(stream):
        for place, source, size in copies:
            _ask("cuMemcpyAsync", to + place, source, size, handle)


@contextmanager
def beside_captures() -> Iterator[None]:
    """Inside, this thread may wait and allocate, on streams that are not captured, though it captures another one."""
    mode = ctypes.c_int(_RELAXED)
    _ask("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        _ask("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def _context_of(stream: torch.cuda.Stream) -> AbstractContextManager:
    """Inside, the stream's device is the current one, without which the driver refuses. A thread in which CUDA was asked for
    nothing yet has none.
    """
    device = stream.device_index
    return _AS_IT_IS if torch.cuda.current_device() == device else torch.cuda.device(device)


def _ask(function: str, *arguments: object) -> None:
    status = getattr(_driver(), function)(*arguments)
    if status:
        raise RuntimeError(f"CUDA's driver refused: {function} gave {status}")


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuStreamBatchMemOp_v2.argtypes = ctypes.c_void_p, ctypes.c_uint, ctypes.POINTER(Operation), ctypes.c_uint
    driver.cuMemcpyAsync.argtypes = ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
    return driver
