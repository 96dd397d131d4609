"""Compiles the launches of the Triton kernel for a CUDA architecture without a GPU, and prints what each one takes as JSON.

Run in a process without TRITON_INTERPRET: `python -m tests.kernels.triton_compile bfloat16:128:large ...`, each argument a
dtype, a head dim and a device size, and after a further colon, if wanted, one launch: `forward last`, `dkdv` or
another name in `calls`. The launches come from the same functions as the real ones, through Triton's own specialisation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch

from ring_attn.kernels import Grads, Upstream
from ring_attn.kernels.triton_ahead import resources
from ring_attn.kernels.triton_blocks import Configs, configs, kv_table, query_table
from ring_attn.kernels.triton_rows import Call
from ring_attn.layout import Contiguous
from ring_attn.mask import Causal
from ring_attn.partial import empty
from ring_attn.tiles import tiles

CAPABILITY = {"large": 90, "small": 80}


def calls(dtype: torch.dtype, head_dim: int, config: Configs, *, group: int = 4) -> Iterator[tuple[str, Call]]:
    """Every launch the kernel makes for this dtype and head dim, by name."""
    rows = 512
    plan = tiles(Contiguous(rows, 1).shard(0), [Contiguous(rows, 1).shard(0)], Causal())
    q = torch.zeros(1, rows, 2 * group, head_dim, dtype=dtype)
    k = torch.zeros(1, rows, 2, head_dim, dtype=dtype)
    partial = empty(q, head_dim)
    grads = Grads(q.float(), k.float(), k.float())
    up = Upstream(q, q, partial.lse)
    yield from forward_calls(q, k, partial, plan, config)
    from ring_attn.kernels.triton_backward import dkdv_call, dq_call

    yield "dkdv", dkdv_call(up, q, k, k, kv_table(plan, k, config.dkdv.own), config.dkdv, scale=0.1, into=grads)
    yield "dq", dq_call(up, q, k, k, query_table(plan, q, config.dq.own), config.dq, scale=0.1, into=grads)


def forward_calls(q, k, partial, plan, config) -> Iterator[tuple[str, Call]]:
    """The forward fresh or carried, last or not."""
    from ring_attn.kernels.triton_forward import forward_call

    table = query_table(plan, q, config.forward.own)
    for name, carried, out in (("first", None, None), ("only", None, q), ("middle", partial, None), ("last", partial, q)):
        yield (
            f"forward {name}",
            forward_call(q, k, k, table, config.forward, scale=0.1, carried=carried, target=partial, out=out),
        )


def main(requests: list[str]) -> None:
    for request in requests:
        name, head_dim, size, *wanted = request.split(":")
        dtype = getattr(torch, name)
        config = configs(dtype, int(head_dim), int(head_dim), size)
        for launch, call in calls(dtype, int(head_dim), config):
            if not wanted or launch in wanted:
                taken = {"request": f"{name}:{head_dim}:{size}:{launch}"} | asdict(resources(call, CAPABILITY[size]))
                print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
