"""Compiles the launches of the Gluon kernel for sm_90 without a GPU, and prints what each one takes as JSON.

Run in a process without TRITON_INTERPRET: `python -m tests.kernels.gluon_compile bfloat16:128:last ...`, each argument a dtype,
a head dim and a launch: `first`, `only`, `middle` or `last`, and then `:softcap` for scores with one. The configurations are
those that ship.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

import torch

from ring_attn.kernels.gluon_forward import GluonConfig, config_for, forward_call
from ring_attn.kernels.tilewise import Scaling
from ring_attn.kernels.triton_blocks import query_table
from ring_attn.kernels.triton_rows import Call
from ring_attn.mask import Causal
from ring_attn.partial import empty
from ring_attn.tiles import tiles

_JUMP = re.compile(r"BRA `\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Taken:
    """What a launch takes. `spills`: bytes ptxas reports; `loop_spills`: spilled registers met in the loops over blocks.

    `beside`: the exponentials between the wait that leaves a product in flight and the wait for that product, in each loop.
    """

    spills: int
    loop_spills: int
    shared: int
    serialized: bool
    beside: tuple[int, ...]


def compiled(call: Call):
    """(the compiled kernel, what ptxas said)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", 90, 32)
    backend, kernel = make_backend(target), call.kernel
    arguments = call.arguments | {"debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constexprs, attrs = kernel._pack_args(backend, arguments, bound, specialization, options)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        source = GluonASTSource(kernel, signature, constexprs, attrs)
        return triton.compile(source, target=target, options=options.__dict__), log.getvalue()


def taken(call: Call) -> Taken:
    kernel, log = compiled(call)
    lines = assembly(kernel.asm["cubin"])
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return Taken(spills, _loop_spills(lines), kernel.metadata.shared, "serialized" in log, _beside(lines))


def assembly(cubin: bytes) -> list[str]:
    """The instructions and labels of the machine code, in order."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [found[1] for found in re.finditer(r"^\s*(?:/\*[0-9a-f]+\*/\s+)?(\.L_x_\d+:|@?!?[A-Z][^;\n]*)", text, re.MULTILINE)]


def _turns(lines: list[str]) -> list[int]:
    """Where a wait leaves a product in flight: once in every loop over blocks."""
    return [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR" in line and line.rstrip().endswith("0x1")]


def _loop_spills(lines: list[str]) -> int:
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_x_")}
    count = 0
    for turn in _turns(lines):
        # The first jump back over the wait closes its loop.
        jumps = ((i, labels.get(found[1], i)) for i in range(turn, len(lines)) if (found := _JUMP.search(lines[i])))
        stop, start = next((i, to) for i, to in jumps if to < turn)
        count += sum("STL" in line or "LDL" in line for line in lines[start:stop])
    return count


def _beside(lines: list[str]) -> tuple[int, ...]:
    found = []
    for turn in _turns(lines):
        stop = next(i for i in range(turn + 1, len(lines)) if "WARPGROUP.DEPBAR" in lines[i])
        found.append(sum("MUFU.EX2" in line for line in lines[turn:stop]))
    return tuple(found)


def launch(dtype: torch.dtype, head_dim: int, name: str, config: GluonConfig | None = None, *, softcap: float = 0.0) -> Call:
    """One launch of the forward: fresh or carried, last or not."""
    config = config or config_for(head_dim)
    plan = tuple(tiles((range(512),), [(range(512),)], Causal()))
    q = torch.zeros(1, 512, 8, head_dim, dtype=dtype)
    k = torch.zeros(1, 512, 2, head_dim, dtype=dtype)
    partial = empty(q, head_dim)
    carried = partial if name in ("middle", "last") else None
    out = q if name in ("only", "last") else None
    table = query_table(plan, q, config.own)
    return forward_call(q, k, k, table, config, scaling=Scaling(0.1, softcap), carried=carried, target=partial, out=out)


def main(requests: list[str]) -> None:
    for request in requests:
        dtype, head_dim, name, *score = request.split(":")
        found = taken(launch(getattr(torch, dtype), int(head_dim), name, softcap=50.0 if score else 0.0))
        print(json.dumps({"request": request} | asdict(found)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
