"""In which order `kernel="auto"` tries kernels: by speed measured on a GPU of this kind, elsewhere in a fixed order; a forward
that takes hosts longer than GPUs, and is not replayed, by what it takes hosts.

`measured.json` is written by `ring-attn bench kernels --table`: for a compute capability, direction, mask kind, head dim and
length the kernels, fastest first. A problem goes by the nearest length and head dim; what was not measured comes last.

Note [brief]: those are times of a GPU. A forward of little work takes a host longer, and Gluon's asks less of it: one launch
for all tiles, with what Triton found out the first time kept, where flash-attn 4 goes through all its options again. Two H200s
at 8,192 causal positions, head dim 128, one forward after another: 483 TFLOP/s for 344, four: 105 for 71. Replayed from a CUDA
graph, which leaves the host out, it takes 9 % longer. So what is not replayed takes it before flash-attn 4, unless Triton's,
which asks as little, is faster.

"flex" is not among them: whether torch can compile a user's function shows only when it does, and "auto" takes nothing that may
fail.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import torch

MEASURED = Path(__file__).with_name("measured.json")

# Where nothing was measured. Where flash-attn 2 is the best there is, that is the Triton forward and flash-attn's backward.
_FIXED = {
    ("cuda", "forward"): ("flash4", "cudnn", "gluon", "triton", "flash2", "aten", "reference"),
    ("cuda", "backward"): ("flash4", "cudnn", "flash2", "triton", "aten", "reference"),
    ("cpu", "forward"): ("aten", "reference"),
    ("cpu", "backward"): ("aten", "reference"),
}

TAKEN_BY_AUTO = frozenset().union(*_FIXED.values())


def order_for(device: str, direction: str, kind: str, head_dim: int, rows: int, *, brief: bool = False) -> tuple[str, ...]:
    """Kernel names, the first to try in front. `kind` and `brief`: those of a Problem; `rows`: a rank's queries."""
    found = dict.fromkeys(_FIXED.get((device, direction), ("reference",)))
    capability = torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else None
    entries = [e for e in _entries(capability) if (e["direction"], e["mask"]) == (direction, kind)]
    if entries:
        nearest = min(entries, key=lambda e: (_apart(e["head_dim"], head_dim), _apart(e["length"], rows)))
        found = dict.fromkeys([*(name for name in nearest["order"] if name in found), *found])
    if kind in ("documents", "decode") and "cudnn" in found:
        # It builds a graph a shape, and these bring new shapes every step: milliseconds that the table does not show.
        found = [name for name in found if name not in ("cudnn", "reference")] + ["cudnn", "reference"]
    names = list(found)
    if brief and (device, direction) == ("cuda", "forward"):
        gluon, triton, flash4 = map(names.index, ("gluon", "triton", "flash4"))
        if flash4 < gluon < triton:
            names.insert(flash4, names.pop(gluon))
    return tuple(names)


def _apart(a: int, b: int) -> float:
    return abs(math.log2(a / b))


@cache
def _entries(capability: tuple[int, int] | None) -> list[dict]:
    if capability is None:
        return []
    return json.loads(MEASURED.read_text()).get(".".join(map(str, capability)), [])
