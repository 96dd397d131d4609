"""Compiles the launches of the Triton kernel for a CUDA architecture without a GPU, and prints what each one takes as JSON.

Run in a process without TRITON_INTERPRET: `python -m tests.kernels.triton_compile bfloat16:128:large:softcap ...`, each
argument a dtype, a head dim, a device size and a name in `scores`, and after a further colon, if wanted, one launch: `dkdv`,
`forward last` or another name in `calls`. The launches come from the same functions as the real ones, through Triton's own
specialisation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch

from ring_attn.kernels import Upstream
from ring_attn.kernels.sums import Totals
from ring_attn.kernels.triton_ahead import resources
from ring_attn.kernels.triton_blocks import configs, kv_table, query_table
from ring_attn.kernels.triton_rows import Call
from ring_attn.layout import Contiguous
from ring_attn.mask import Causal
from ring_attn.partial import empty
from ring_attn.score import Alibi, Scores, SoftCap, sort_scores
from ring_attn.tiles import tiles

CAPABILITY = {"large": 90, "small": 80}


ROWS, GROUP = 512, 4


def scores(name: str) -> Scores:
    """The score modifiers of a name: what happens to scores, in the order of its words."""
    from tests.kernels.triton_functions import BOW

    steps = {
        "softcap": SoftCap(50.0),
        "alibi": Alibi(torch.ones(2 * GROUP)),
        "function": BOW,
    }
    words = name.split()
    found = tuple(steps[word] for word in words if word in steps)
    return Scores(found, None, 10.0 if words == ["bounded"] else sort_scores(found)[1].bound)


def calls(dtype: torch.dtype, head_dim: int, size: str, score: Scores) -> Iterator[tuple[str, Call]]:
    """Every launch the kernel makes for this dtype, head dim, device size and scores, by name."""
    from ring_attn.kernels.triton_backward import Visited, dkdv_call, dq_call
    from ring_attn.kernels.triton_prepare import prepare_call, prepared
    from ring_attn.kernels.triton_scores import chain_of

    plan = tiles(Contiguous(ROWS, 1).shard(0), [Contiguous(ROWS, 1).shard(0)], Causal())
    q = torch.zeros(1, ROWS, 2 * GROUP, head_dim, dtype=dtype)
    k = torch.zeros(1, ROWS, 2, head_dim, dtype=dtype)
    partial = empty(q, head_dim)
    grads = Totals(q.float(), k.float(), k.float(), score.tensors(), unwritten_q=True, unwritten_kv=True)
    up = Upstream(q, q, partial.lse)
    chain = chain_of(score, plan, dtype)
    config = configs(dtype, head_dim, head_dim, size, chain.kind)
    yield from forward_calls(q, k, partial, plan, config, chain)
    yield "prepare", prepare_call(up, prepared(up))
    visited = Visited(up, q, k, k, 0.1, chain)
    kv, queries = (
        kv_table(plan, k, config.dkdv.own, placed=chain.placed),
        query_table(plan, q, config.dq.own, placed=chain.placed),
    )
    yield "dkdv", dkdv_call(visited, grads, kv, config.dkdv)
    yield "dq", dq_call(visited, grads, queries, config.dq)
    yield "dkdv adding", dkdv_call(visited, grads.written, kv, config.dkdv)
    yield "dq adding", dq_call(visited, grads.written, queries, config.dq)
    rounded = grads._replace(dq=q, dk=k, dv=k)
    yield "dkdv rounded", dkdv_call(visited, rounded, kv, config.dkdv)
    yield "dq rounded", dq_call(visited, rounded, queries, config.dq)
    if config.dkdv.tma:
        short = kv_table(plan, k, config.short.own, placed=chain.placed)
        yield "dkdv short", dkdv_call(visited, grads.written, short, config.short)
    if config.dq.narrow is not None:
        narrow = query_table(plan, q, config.dq.narrow.own, placed=chain.placed)
        yield "dq narrow", dq_call(visited, grads, narrow, config.dq.narrow)


def forward_calls(q, k, partial, plan, config, chain) -> Iterator[tuple[str, Call]]:
    """The forward fresh or carried, last or not."""
    from ring_attn.kernels.triton_forward import forward_call

    table = query_table(plan, q, config.forward.own, placed=chain.placed)
    for name, carried, out in (("first", None, None), ("only", None, q), ("middle", partial, None), ("last", partial, q)):
        options = {"scale": 0.1, "chain": chain, "carried": carried, "target": partial, "out": out}
        yield f"forward {name}", forward_call(q, k, k, table, config.forward, **options)
    if config.forward.narrow is not None:
        narrow = query_table(plan, q, config.forward.narrow.own, placed=chain.placed)
        last = {"scale": 0.1, "chain": chain, "carried": partial, "target": partial, "out": q}
        yield "forward narrow", forward_call(q, k, k, narrow, config.forward.narrow, **last)


def main(requests: list[str]) -> None:
    for request in requests:
        name, head_dim, size, modifiers, *wanted = request.split(":")
        dtype = getattr(torch, name)
        for launch, call in calls(dtype, int(head_dim), size, scores(modifiers)):
            if not wanted or launch in wanted:
                taken = {"request": f"{name}:{head_dim}:{size}:{modifiers}:{launch}"} | asdict(
                    resources(call, CAPABILITY[size])
                )
                print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
