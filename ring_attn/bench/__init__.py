"""`ring-attn bench`: which benchmark, then its own options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

BENCHMARKS = {"kernels": "ring_attn.bench.kernels", "ring": "ring_attn.bench.ring", "tune": "ring_attn.bench.tune"}


def main(argv: Sequence[str]) -> int:
    """The exit status of the benchmark that argv[0] names."""
    if not argv or argv[0] not in BENCHMARKS:
        if argv and not argv[0].startswith("-"):
            print(f"{argv[0]!r} is not one of the benchmarks {', '.join(BENCHMARKS)}", file=sys.stderr)
        print(f"usage: ring-attn bench {{{','.join(BENCHMARKS)}}} [options]", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    return import_module(BENCHMARKS[argv[0]]).main(argv[1:])
