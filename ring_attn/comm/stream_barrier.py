"""A barrier among the GPUs of one host that takes no multiprocessor: their front ends write flags and wait for them.

Note [flags]: every rank has a flag for each rank and for each of two barriers, which take turns. In a barrier it raises its
flag at all others, waits until theirs are raised with itself, and takes these down again. A fast rank raises its flag for the
same barrier again only behind the other one, and so when everybody has taken down what will be raised: no flag is lost. A
barrier ends as it began, so it may be replayed in a CUDA graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch

FLAG_BYTES = 4
_WAIT, _WRITE, _EQUAL = 1, 2, 1  # CU_STREAM_MEM_OP_WAIT_VALUE_32 and _WRITE_VALUE_32, CU_STREAM_WAIT_VALUE_EQ


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams of CUDA's driver API."""

    _fields_ = (
        ("operation", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("unused", ctypes.c_uint64),
    )


class StreamBarrier:
    """Two barriers that take turns, see Note [flags].

    `flags`: the address of each rank's flags in the memory of its GPU as this process sees it, `flag_bytes` of them and all 0
    when the first rank calls.
    """

    def __init__(self, flags: Sequence[int], rank: int) -> None:
        self._both = [_operations(flags, rank, turn) for turn in range(2)]

    def __call__(self, turn: int) -> None:
        """Lets the current stream wait until those of all ranks have got so far in barrier `turn`, 0 or 1.

        Raises RuntimeError where the driver refuses.
        """
        operations, stream = self._both[turn], ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = _driver().cuStreamBatchMemOp_v2(stream, len(operations), operations, 0)
        if status:
            raise RuntimeError(f"CUDA's driver refused a barrier by stream memory operations: cuStreamBatchMemOp gave {status}")


def flag_bytes(ranks: int) -> int:
    """Bytes of the flags of each rank."""
    return 2 * ranks * FLAG_BYTES


def _operations(flags: Sequence[int], rank: int, turn: int) -> ctypes.Array[_Operation]:
    """What a rank does in a barrier, in order."""
    others = [other for other in range(len(flags)) if other != rank]

    def flag(at: int, of: int) -> int:
        return flags[at] + (turn * len(flags) + of) * FLAG_BYTES

    raised = [_Operation(_WRITE, flag(other, rank), 1) for other in others]
    waited = [_Operation(_WAIT, flag(rank, other), 1, _EQUAL) for other in others]
    lowered = [_Operation(_WRITE, flag(rank, other), 0) for other in others]
    found = raised + waited + lowered
    return (_Operation * len(found))(*found)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
