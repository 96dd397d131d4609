"""What the front ends of GPUs are told to do about transfers, done here in any order that their streams allow."""

import random

import pytest

from ring_attn.comm.stream_flags import Flags, flags_at_first
from ring_attn.driver import EQUAL, WAIT, WRITE, Operation


def streams_of(rank, transfers, graphs, flags, without=()):
    """The streams of a rank, as lists of what is still to do: of transfers in which each rank reads from `wanted[rank]`.

    Those in a graph are replayed: what they do beside has a stream of its own, and what follows waits for all of it.
    """
    current, beside, branches = [], [], []
    for number, (wanted, graph) in enumerate(zip(transfers, graphs, strict=True)):
        signals = flags.signals(wanted[rank])._asdict()
        to_write, written, to_read, have_read = ([] if name in without else [*ops] for name, ops in signals.items())
        current += [*to_write, ("write", number), *written, ("mark", "put up", number)]
        reads = [("after", "put up", number), *to_read, *(("read", source, number) for source in wanted[rank])]
        if graph:
            branches.append([*reads, *have_read, ("mark", "received", number)])
        else:
            beside += [*reads, ("mark", "received", number), *have_read]
        current.append(("after", "received", number))
    return [current, beside, *branches]


def right_in_any_order(transfers, graphs, chance, without=()):
    """Whether all is read as it was put up for its transfer, no rank waits for ever, and what is left over is as at first."""
    count = len(transfers[0])
    at = [10_000 * (rank + 1) for rank in range(count)]
    flags = {base + 4 * n: value for base in at for n, value in enumerate(flags_at_first(count))}
    first, there, marks = dict(flags), [-1] * count, set()
    streams = [
        # Some are a hundred times as slow as others.
        (rank, todo, 10 ** chance.uniform(-2, 0))
        for rank in range(count)
        for todo in streams_of(rank, transfers, graphs, Flags(at, rank), without)
    ]

    def may_go(rank, todo):
        if isinstance(todo, Operation):
            assert todo.operation == WRITE or (todo.operation, todo.flags) == (WAIT, EQUAL)
            return todo.operation == WRITE or flags[todo.address] == todo.value
        return todo[0] != "after" or (rank, *todo[1:]) in marks

    while any(stream for _, stream, _ in streams):
        ready = [one for one in streams if one[1] and may_go(one[0], one[1][0])]
        if not ready:
            return False
        ((rank, stream, _),) = chance.choices(ready, [speed for *_, speed in ready])
        todo = stream.pop(0)
        if isinstance(todo, Operation):
            if todo.operation == WRITE:
                flags[todo.address] = todo.value
        elif todo[0] == "read":
            if there[todo[1]] != todo[2]:
                return False
        elif todo[0] == "write":
            there[rank] = todo[1]
        elif todo[0] == "mark":
            marks.add((rank, *todo[1:]))
    return flags == first


def some_transfers(ranks, chance, count=8):
    """Every rank reads from some others, or from none; some transfers are in graphs."""
    others = [[other for other in range(ranks) if other != rank] for rank in range(ranks)]
    wanted = [[chance.sample(of, chance.randint(0, len(of))) for of in others] for _ in range(count)]
    return wanted, [chance.random() < 0.5 for _ in range(count)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_all_is_read_when_it_is_there_and_before_it_is_written_over(ranks):
    for seed in range(300 if ranks == 3 else 30):
        chance = random.Random(seed)
        assert right_in_any_order(*some_transfers(ranks, chance), chance), seed


@pytest.mark.parametrize("without", ["to_write", "written", "to_read", "have_read"])
def test_nothing_of_it_can_be_left_out(without):
    def right(seed):
        chance = random.Random(seed)
        return right_in_any_order(*some_transfers(3, chance), chance, [without])

    assert not all(map(right, range(40)))
