"""What ranks tell each other to find out whether they are about to make the same call, and the words where they are not.

A signature is three shapes, then parts with a telling repr. Ranks first tell numbers, its sizes and a checksum a part; where
these differ, they tell the beginning of the words.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence

_PARTS = (
    "dtype or device",
    "mask",
    "score",
    "scale",
    "layout, exchange and wires",
    "the tensors of scores",
    "whether gradients are wanted",
)
_BYTES = 600  # of the words of a part


def compares_every_call() -> bool:
    """Whether this process asks for it, where otherwise the first call of a kind is compared. Raises ValueError where that
    cannot be told.
    """
    asked = os.environ.get("RING_ATTN_COMPARE_CALLS", "0")
    if asked not in ("0", "1"):
        raise ValueError(f"RING_ATTN_COMPARE_CALLS must be 0 or 1, got {asked!r}")
    return asked == "1"


def numbers_of(signature: tuple, refused: bool, rounds: bool) -> list[int]:
    """Whether a rank refuses its call, and rounds in it, then what is alike where signatures are."""
    sizes = [size for shape in signature[:3] for size in (*shape, 0, 0, 0, 0)[:4]]
    return [refused, rounds, *sizes, *(zlib.crc32(_text(part)) for part in signature[3:])]


def words_of(signature: tuple) -> list[list[int]]:
    """[part][byte]: the beginning of each part in words, as many bytes of each."""
    return [list(repr(part).encode()[:_BYTES].ljust(_BYTES)) for part in signature[3:]]


def differences_of(columns: Sequence[Sequence[int]], words: Sequence[Sequence[Sequence[int]]]) -> Iterator[str]:
    """What differs among ranks, in words. `columns`: each number behind the first two, by rank; `words[rank]`: of its parts."""
    shapes, sums = columns[:12], columns[12:]
    if any(len(set(column)) > 1 for column in shapes):
        by_rank = {rank: (row[:4], row[4:8], row[8:]) for rank, row in enumerate(zip(*shapes, strict=True))}
        yield (
            f"q, k, v shapes, by rank: {by_rank}; shard with ring.shard and pad with ring_attn.pad_to, and to decode take the "
            f"same tokens on every process"
        )
    for part, (name, column) in enumerate(zip(_PARTS, sums, strict=True)):
        if len(set(column)) > 1:
            alike = {found: [rank for rank, other in enumerate(column) if other == found] for found in column}
            said = [(bytes(words[ranks[0]][part]).decode(errors="ignore").rstrip(), ranks) for ranks in alike.values()]
            further = " (they differ further on)" if len({text for text, _ in said}) < len(said) else ""
            yield f"{name}: " + ", ".join(f"{text} on ranks {ranks}" for text, ranks in said) + further


def _text(part: object) -> bytes:
    """The same bytes for equal values in every process (the order of a set is not)."""
    return repr(sorted(part) if isinstance(part, frozenset) else part).encode()
