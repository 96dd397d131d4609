"""Flags by which GPUs of one host tell each other what may be written and read, without a multiprocessor: their front ends
write flags into each other's memory and wait for those in their own, as stream memory operations of CUDA's driver.

Note [flags]: a rank has two flags for each rank. "There" means that the other has written what it puts up; it is taken down
when this rank has read. "Read" means that the other, or this rank itself, has read what it wanted, also where that was nothing;
it is taken down before this rank writes the next. A rank raises "read" only behind "there" of all, and "there" only behind
"read" of all. So a flag is raised again only when it is down. Between transfers all that is left over is "read", as when the
memory was made, and what a rank does about the next comes behind its own "read" on whatever stream: transfers may be captured
in CUDA graphs, replayed, and mixed with others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from functools import cache
from typing import NamedTuple

import torch

_WAIT, _WRITE, _EQUAL = 1, 2, 1  # CU_STREAM_MEM_OP_WAIT_VALUE_32 and _WRITE_VALUE_32, CU_STREAM_WAIT_VALUE_EQ
_BYTES = 4


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


class Signals(NamedTuple):
    """What a rank does about a transfer, each for `enqueue`: before it writes what it puts up, when that is written, before it
    reads what others put up, and when it has read that.
    """

    to_write: Operations
    written: Operations
    to_read: Operations
    have_read: Operations


class Flags:
    """A rank's flags at all ranks: `at` are the addresses of each rank's, 32 bits a flag and at first as
    `flags_at_first` says, in the addresses of this process.
    """

    def __init__(self, at: Sequence[int], rank: int) -> None:
        self._at, self._rank = at, rank

    def signals(self, sources: Collection[int]) -> Signals:
        """Of a transfer in which this rank reads from `sources`."""
        mine, ranks = self._rank, range(len(self._at))
        others = [rank for rank in ranks if rank != mine]
        to_write = [_wait(self._read(mine, rank)) for rank in ranks] + [_write(self._read(mine, rank), 0) for rank in ranks]
        written = [_write(self._there(rank, mine), 1) for rank in others]
        to_read = [_wait(self._there(mine, rank)) for rank in others if rank in sources]
        have_read = [_wait(self._there(mine, rank)) for rank in others if rank not in sources]
        have_read += [_write(self._there(mine, rank), 0) for rank in others]
        have_read += [_write(self._read(rank, mine), 1) for rank in ranks]
        return Signals(*map(_array, (to_write, written, to_read, have_read)))

    def _there(self, at: int, of: int) -> int:
        return self._at[at] + of * _BYTES

    def _read(self, at: int, of: int) -> int:
        return self._at[at] + (len(self._at) + of) * _BYTES


def flags_at_first(ranks: int) -> list[int]:
    """What a rank's flags must be before anybody uses them."""
    return [0] * ranks + [1] * ranks


def enqueue(operations: Operations, stream: torch.cuda.Stream) -> None:
    """Puts them on the stream, in order. Raises RuntimeError where the driver refuses."""
    if not len(operations):
        return
    status = _driver()(stream.cuda_stream, len(operations), operations, 0)
    if status:
        raise RuntimeError(f"CUDA's driver refused stream memory operations: cuStreamBatchMemOp gave {status}")


def _wait(address: int) -> Operation:
    return Operation(_WAIT, address, 1, _EQUAL)


def _write(address: int, value: int) -> Operation:
    return Operation(_WRITE, address, value)


def _array(operations: Sequence[Operation]) -> Operations:
    return (Operation * len(operations))(*operations)


@cache
def _driver() -> ctypes._CFuncPtr:
    function = ctypes.CDLL("libcuda.so.1").cuStreamBatchMemOp_v2
    function.argtypes = ctypes.c_void_p, ctypes.c_uint, ctypes.POINTER(Operation), ctypes.c_uint
    return function
