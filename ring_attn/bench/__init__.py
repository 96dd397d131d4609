"""`ring-attn bench`: which benchmark, then its own options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

BENCHMARKS = {
    "kernels": ("ring_attn.bench.kernels", "every kernel on this GPU, forward and backward"),
    "ring": ("ring_attn.bench.ring", "rings, under torchrun, beside their bound, one device and other libraries"),
    "tune": ("ring_attn.bench.tune", "launch configurations of the Triton kernels on this GPU"),
}


def main(argv: Sequence[str]) -> int:
    """The exit status of the benchmark that argv[0] names."""
    if not argv or argv[0] not in BENCHMARKS:
        if argv and not argv[0].startswith("-"):
            print(f"{argv[0]!r} is not one of the benchmarks {', '.join(BENCHMARKS)}", file=sys.stderr)
        asked = bool(argv) and argv[0] in ("-h", "--help")
        lines = [f"  {name:9}{summary}" for name, (_, summary) in BENCHMARKS.items()]
        usage = ["usage: ring-attn bench BENCHMARK [options]      (ring-attn bench BENCHMARK --help says which)", "", *lines]
        print("\n".join(usage), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return import_module(BENCHMARKS[argv[0]][0]).main(argv[1:])
