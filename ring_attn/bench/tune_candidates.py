"""The launch configurations that `ring-attn bench tune` tries: what ptxas compiles without many spills in the inner loop."""

from __future__ import annotations

from ring_attn.kernels.triton_blocks import Config

LAUNCHES = ("forward", "dkdv", "dq")


def candidates(launch: str, head_dim: int, score: str = "") -> list[Config]:
    """The configurations to try for a launch of 16-bit inputs, the plainest first. Empty where none are known.

    `score`: a modifier of scores, for which those stand behind that keep fewer numbers, or mix units for them.
    """
    return _CANDIDATES.get((launch, head_dim), []) + (_MODIFIED.get((launch, head_dim), []) if score else [])


# Four warps with 255 registers leave room for a second program on a multiprocessor.
_CANDIDATES = {
    ("forward", 128): [
        Config(128, 64, 8, 3),
        Config(128, 64, 8, 4),
        Config(128, 128, 8, 2),
        Config(64, 64, 4, 2),
        Config(64, 64, 4, 3),
        Config(64, 32, 4, 3),
    ],
    ("dkdv", 128): [
        Config(128, 64, 8, 2),
        Config(128, 64, 8, 2, tma=True),
        Config(128, 64, 8, 3, tma=True),
        Config(128, 64, 8, 2, tma=True, early=True),
        Config(128, 32, 8, 3, tma=True),
        Config(64, 64, 4, 1, tma=True),
        Config(64, 64, 4, 2, tma=True),
        Config(64, 64, 4, 2, tma=True, early=True),
    ],
    ("dq", 128): [
        Config(128, 64, 8, 3),
        Config(128, 64, 8, 3, tma=True),
        Config(128, 64, 8, 3, tma=True, early=True),
        Config(128, 64, 8, 2, tma=True),
        Config(128, 128, 8, 2, tma=True),
        Config(64, 64, 4, 2),
        Config(64, 64, 4, 2, tma=True),
        Config(64, 64, 4, 2, tma=True, early=True),
        Config(64, 128, 4, 1, tma=True),
    ],
    ("forward", 64): [
        Config(128, 128, 8, 2),
        Config(128, 64, 4, 3),
        Config(64, 64, 4, 3),
    ],
    ("dkdv", 64): [
        Config(128, 64, 8, 2),
        Config(128, 64, 8, 2, tma=True),
        Config(64, 64, 4, 2, tma=True),
        Config(64, 64, 4, 2, tma=True, early=True),
    ],
    ("dq", 64): [
        Config(128, 64, 8, 2),
        Config(128, 64, 8, 2, tma=True),
        Config(128, 128, 8, 2, tma=True),
        Config(64, 64, 4, 2, tma=True),
        Config(64, 64, 4, 3, tma=True),
        Config(64, 64, 4, 3, tma=True, early=True),
    ],
}

_MODIFIED = {
    ("dkdv", 128): [Config(64, 64, 8, 2, tma=True), Config(64, 32, 4, 2, tma=True)],
    ("dq", 128): [Config(128, 32, 8, 3, tma=True), Config(128, 64, 8, 3, tma=True, early=True, mixed=True)],
}
