"""What a launch of a Triton kernel takes, from compiling it ahead of time: for any CUDA architecture, on any machine.

The result lands in Triton's cache under the key that the launch itself looks up. Not for a process with TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_attn.kernels.triton_rows import Call


@dataclass(frozen=True)
class Resources:
    """`spills`: bytes of stores and loads ptxas reports; `loop_spills`: instructions for them in the inner loop.

    `shared`: bytes a block; `serialized`: ptxas serialises its wgmma; `bulk_copies`: TMA's instructions.
    """

    registers: int
    spills: int
    loop_spills: int
    shared: int
    serialized: bool
    bulk_copies: int


def resources(call: Call, capability: int) -> Resources:
    """What one launch takes on that architecture."""
    compiled, log = compile_ahead(call, capability)
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    copies = compiled.asm["ptx"].count("cp.async.bulk.tensor")
    return Resources(
        registers, spills, loop_spills(compiled.asm["cubin"]), compiled.metadata.shared, "serialized" in log, copies
    )


def compile_ahead(call: Call, capability: int) -> tuple[Any, str]:
    """(Triton's compiled kernel, ptxas's log) of one launch, through Triton's own specialisation of its arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability, 32)
    backend, kernel = make_backend(target), call.kernel
    arguments = call.arguments | {"debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constexprs, attrs = kernel._pack_args(backend, arguments, bound, specialization, options)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__)
    return compiled, log.getvalue()


def loop_spills(cubin: bytes) -> int:
    """How many instructions of the smallest loop with matrix products store or load a spilled register; -1 if not known."""
    import triton

    try:
        disassembler = triton.knobs.nvidia.nvdisasm.path
    except RuntimeError:
        # This Triton came without one.
        return -1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [disassembler, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    jumps = ((i, re.search(r"\bBRA\b.*`\((\.L\w+)\)", text)) for i, text in enumerate(instructions))
    loops = [instructions[labels[jump[1]] : i + 1] for i, jump in jumps if jump and labels.get(jump[1], i + 1) <= i]
    products = [loop for loop in loops if any("MMA." in instruction for instruction in loop)]
    return sum(bool(re.search(r"\b(STL|LDL)\b", text)) for text in min(products, key=len)) if products else 0
