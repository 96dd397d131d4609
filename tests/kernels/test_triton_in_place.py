"""What warps read and one of them overwrites, all have read before: shown on the compiled merge, without a GPU.

The interpreter has no warps, so no run of it could tell.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90)


def order(ptx: str) -> list[str]:
    """The global loads and stores and the barriers of a kernel, as they stand."""
    found = re.findall(r"\b(ld\.global|st\.global|bar\.sync|barrier\.sync)", ptx)
    return ["barrier" if "bar" in name else name[:2] for name in found]


def merges() -> list[list[str]]:
    """Of the merge as it goes on, as it ends and as it ends where it is, for each architecture."""
    import torch

    from ring_attn.kernels.triton_ahead import compile_ahead
    from ring_attn.kernels.triton_merge import Result, merge_call
    from ring_attn.partial import Partial, empty

    out, lse = torch.zeros(1, 96, 4, 128, dtype=torch.bfloat16), torch.zeros(1, 4, 96)
    results = [Result(range(96), out, lse)] * 2
    targets = None, torch.empty_like(out)
    calls = [merge_call(empty(out, 128), results[:count], target) for target, count in product(targets, (1, 2))]
    calls += [merge_call(Partial(out, lse.clone()), results[:count], out) for count in (1, 2)]
    return [order(compile_ahead(call, capability)[0].asm["ptx"]) for call in calls for capability in CAPABILITIES]


def test_a_barrier_lies_between_reads_and_writes():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_triton_in_place"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    for found in json.loads(done.stdout):
        first_write, last_read = found.index("st"), len(found) - 1 - found[::-1].index("ld")
        assert "barrier" in found[last_read:first_write], found


if __name__ == "__main__":
    print(json.dumps(merges()))
