"""What the front ends of GPUs are told to do about transfers, done here in any order that their streams allow."""

import ctypes
import random

import pytest

from ring_attn.comm.stream_flags import _EQUAL, _WAIT, _WRITE, Flags, Operation, flags_at_first


def test_operations_lie_in_memory_as_the_driver_reads_them():
    offsets = [getattr(Operation, name).offset for name in ("operation", "address", "value", "flags", "alias")]
    assert offsets == [0, 8, 16, 24, 32]
    assert ctypes.sizeof(Operation) == 48


class Rank:
    """Two streams of a rank, as lists of what is still to do: of transfers in which each rank reads from `wanted[rank]`."""

    def __init__(self, rank, transfers, flags, without=()):
        self.current, self.beside = [], []
        for number, wanted in enumerate(transfers):
            signals = flags.signals(wanted[rank])._asdict()
            to_write, to_read, have_read = ([] if name in without else [*signals[name]] for name in signals)
            self.current += [*to_write, ("write", number), ("event", number)]
            self.beside += [("after", number), *to_read, *(("read", source, number) for source in wanted[rank]), *have_read]


def right_in_any_order(transfers, chance, without=()):
    """Whether all is read as it was put up for its transfer, no rank waits for ever, and what is left over is as at first."""
    count = len(transfers[0])
    at = [10_000 * (rank + 1) for rank in range(count)]
    flags = {base + 4 * n: value for base in at for n, value in enumerate(flags_at_first(count))}
    first, there, events = dict(flags), [-1] * count, [-1] * count
    streams = []
    for rank in range(count):
        one = Rank(rank, transfers, Flags(at, rank), without)
        streams += [(rank, one.current), (rank, one.beside)]

    def may_go(rank, todo):
        if isinstance(todo, Operation):
            assert todo.operation == _WRITE or (todo.operation, todo.flags) == (_WAIT, _EQUAL)
            return todo.operation == _WRITE or flags[todo.address] == todo.value
        return todo[0] != "after" or events[rank] >= todo[1]

    while any(stream for _, stream in streams):
        ready = [(rank, stream) for rank, stream in streams if stream and may_go(rank, stream[0])]
        if not ready:
            return False
        rank, stream = chance.choice(ready)
        todo = stream.pop(0)
        if isinstance(todo, Operation):
            if todo.operation == _WRITE:
                flags[todo.address] = todo.value
        elif todo[0] == "read":
            if there[todo[1]] != todo[2]:
                return False
        elif todo[0] != "after":
            (there if todo[0] == "write" else events)[rank] = todo[1]
    return flags == first


def some_transfers(ranks, chance):
    """Every rank reads from some others, or from none."""
    others = [[other for other in range(ranks) if other != rank] for rank in range(ranks)]
    return [[chance.sample(of, chance.randint(0, len(of))) for of in others] for _ in range(6)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_all_is_read_when_it_is_there_and_before_it_is_written_over(ranks):
    for seed in range(40):
        chance = random.Random(seed)
        assert right_in_any_order(some_transfers(ranks, chance), chance)


@pytest.mark.parametrize("without", ["to_write", "to_read", "have_read"])
def test_nothing_of_it_can_be_left_out(without):
    def right(seed):
        chance = random.Random(seed)
        return right_in_any_order(some_transfers(3, chance), chance, [without])

    assert not all(map(right, range(40)))
