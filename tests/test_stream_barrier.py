"""What the front ends of GPUs are told to do in a barrier, done here in any order that their streams allow."""

import ctypes
import random

import pytest

from ring_attn.comm.stream_barrier import _EQUAL, _WAIT, _WRITE, FLAG_BYTES, StreamBarrier, _Operation, flag_bytes


def test_operations_lie_in_memory_as_the_driver_reads_them():
    offsets = [getattr(_Operation, name).offset for name in ("operation", "address", "value", "flags", "alias")]
    assert offsets == [0, 8, 16, 24, 32]
    assert ctypes.sizeof(_Operation) == 48


def barriers_passed(ranks, turns, chance):
    """Whether every rank passes all barriers, and none before all have come to it; flags are all down in the end."""
    bases = [10_000 * (rank + 1) for rank in range(ranks)]
    flags = {base + n: 0 for base in bases for n in range(0, flag_bytes(ranks), FLAG_BYTES)}
    streams = []
    for rank in range(ranks):
        barrier = StreamBarrier(bases, rank)
        streams.append([(number, op) for number, turn in enumerate(turns) for op in barrier._both[turn]])
    come, done = [0] * ranks, [0] * ranks
    while any(at < len(stream) for at, stream in zip(done, streams, strict=True)):
        ready = []
        for rank, stream in enumerate(streams):
            if done[rank] < len(stream):
                _, op = stream[done[rank]]
                assert op.operation in (_WAIT, _WRITE)
                if op.operation == _WRITE or (op.flags == _EQUAL and flags[op.address] == op.value):
                    ready.append(rank)
        if not ready:
            return False
        rank = chance.choice(ready)
        number, op = streams[rank][done[rank]]
        come[rank] = number + 1
        if op.operation == _WRITE:
            flags[op.address] = op.value
        done[rank] += 1
        passed = done[rank] == len(streams[rank]) or streams[rank][done[rank]][0] > number
        if passed and min(come) <= number:
            return False
    return not any(flags.values())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_no_rank_passes_before_all_have_come_and_no_flag_is_lost(ranks):
    for seed in range(50):
        assert barriers_passed(ranks, [0, 1] * 6, random.Random(seed))


def test_one_barrier_that_takes_no_turns_would_lose_flags():
    assert not all(barriers_passed(3, [0] * 12, random.Random(seed)) for seed in range(50))
