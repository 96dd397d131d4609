"""The order in which the parts of a backward go on, so that what one of them sends and gets travels while another computes."""

from __future__ import annotations

from collections.abc import Generator, Iterable

PartOfBackward = Generator[bool, None, None]
"""Yields when it has asked for the first KV that it needs of others, then before each visit but the first, and once more before
it waits for what travels home; what it yields is whether the next visit is the last.
"""


def overlapping(parts: Iterable[PartOfBackward]) -> None:
    """All of the parts. The KV of one travels during the last visit of the one before, whose dK and dV travel home during the
    first visit of this one.
    """
    ending = None
    for part in parts:
        last = next(part)
        if ending is not None:
            next(ending)
        if not last:
            last = next(part)
        if ending is not None:
            to_its_end(ending)
        while not last:
            last = next(part)
        ending = part
    to_its_end(ending)


def to_its_end(part: PartOfBackward) -> None:
    for _ in part:
        pass
