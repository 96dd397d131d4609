"""Rounds of pulls and pushes over a transport that hosts one rank a process, with delays, on CPUs and GPUs.

What was received or sent is full of NaN as soon as it is the caller's again: so is memory that is handed out another time, and
whoever reads or writes too early or too late shows.
"""

import random
from typing import NamedTuple

import torch

from ring_attn.comm.transport import Pending, Pieces
from ring_attn.layout import Part, places, total_rows
from tests.support import Rows


class Total(Rows):
    """What a push is added to, in a way for which no host waits."""

    def add(self, x, rows, places=None):
        # The last row, which -1 names, is 0.
        self.rows[:, rows.start : rows.stop] += torch.cat([x[0], x.new_zeros(1, x.shape[2])])[places.long()].sum(2)


class Round(NamedTuple):
    """A transfer under way: what this rank sends, what a push is added to, and what must be received or be there in the end."""

    pending: Pending
    sent: torch.Tensor
    total: torch.Tensor | None
    wanted: torch.Tensor

    def went_wrong(self):
        """Afterwards all that is the caller's again is NaN, and with it what is next put in the same memory."""
        received = self.pending.wait()
        found = received[0] if self.total is None else self.total
        assert found.shape == self.wanted.shape
        wrong = (found != self.wanted).any()
        for x in (found, self.sent, self.wanted):
            x.fill_(torch.nan)
        return wrong


def rounds_that_went_wrong(transport, rounds, device="cpu", doze=lambda: None):
    """How many of some rounds went wrong: pulls and pushes at random, up to three under way and waited for in any order, each
    checked against what all ranks know was sent.

    A rank may `doze` before anything that it does. No host waits for a device before the end.
    """
    wrong, under_way = torch.zeros((), dtype=torch.int64, device=device), []
    known = [parts_at_random(random.Random(f"known {number}"), transport.ring_size) for number in range(8)]
    for number in range(rounds):
        chance = random.Random(number)
        met_again = chance.random() < 0.8
        rows, parts = chance.choice(known) if met_again else parts_at_random(chance, transport.ring_size)
        doze()
        under_way.append(ask(transport, number, chance, rows, parts, device, doze))
        doze()
        torch.full((2, rows, 3), torch.nan, device=device, dtype=torch.float64)  # compute, and more memory with NaN in it
        while len(under_way) > chance.randint(0, 2):
            doze()
            wrong += under_way.pop(chance.randrange(len(under_way))).went_wrong()
    for one in under_way:
        doze()
        wrong += one.went_wrong()
    return int(wrong)


def parts_at_random(chance, size):
    """The rows of a shard, and which of them each rank wants: of some others none, of some twice, but somebody some."""
    rows, parts = chance.randint(3, 40), [[] for _ in range(size)]
    for rank in range(size):
        for _ in range(chance.randint(not rank, 2 * size)):
            start = chance.randrange(rows)
            parts[rank].append(Part((rank + chance.randrange(1, size)) % size, range(start, chance.randint(start + 1, rows))))
    return rows, tuple(map(tuple, parts))


def ask(transport, number, chance, rows, parts, device, doze):
    """Pulls or pushes numbers of the place, the rank and the round; whole ones, so that sums are exact in any order."""
    (rank,), b = transport.hosted, chance.randint(1, 2)

    def numbers(of, rows):
        places = torch.arange(b * rows * 3, device=device, dtype=torch.float64).view(b, rows, 3)
        return (7919 * places + 104729 * of + 1299709 * number) % 1048573

    if chance.random() < 0.5:
        sent, total = numbers(rank, rows), None
        pending = transport.pull([Pieces(sent.split([1, 2], -1))], parts, what=f"round {number}")
        doze()
        pieces = [numbers(part.rank, rows)[:, part.rows.start : part.rows.stop] for part in parts[rank]]
        return Round(pending, sent, total, torch.cat([sent[:, :0], *pieces], 1))
    sent, total = numbers(rank, total_rows(parts[rank])), numbers(-1, rows)
    wanted = total.clone()
    pending = transport.push([Rows(sent)], parts, [Total(total)], what=f"round {number}")
    doze()
    for source, theirs in enumerate(parts):
        pushed = numbers(source, total_rows(theirs))
        for part, place in places(theirs):
            if part.rank == rank:
                wanted[:, part.rows.start : part.rows.stop] += pushed[:, place]
    return Round(pending, sent, total, wanted)
