"""The Triton kernel: one source that compiles for CUDA and runs on the CPU in Triton's interpreter.

Triton is imported when a kernel first runs, so this module can be imported, and asked what it supports, without it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ring_attn.kernels import Problem, Upstream, modifier_refusal
from ring_attn.kernels.cleared import cleared
from ring_attn.kernels.sums import Grads
from ring_attn.kernels.triton_blocks import Configs, chosen, configs, device_size, query_table
from ring_attn.partial import Partial
from ring_attn.score import Scores
from ring_attn.tiles import Tile

if TYPE_CHECKING:
    from ring_attn.kernels.triton_scores import Chain

MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TritonKernel:
    """`configs`: the launch configurations to use whatever the problem; None takes them from the table.

    `block`: the rows of blocks that a mask's functions hide or keep whole, see `cleared`.
    """

    configs: Configs | None = None
    block: int = 128
    name: str = "triton"

    def supports(self, problem: Problem) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed"
        if problem.dtype not in _DTYPES:
            return f"it takes float16, bfloat16 and float32, not {problem.dtype}"
        refused = _score_refusal(problem)
        if refused is not None:
            return refused
        if max(problem.head_dim, problem.v_head_dim) > MAX_HEAD_DIM:
            return f"it takes head dims up to {MAX_HEAD_DIM}, not {problem.head_dim} and {problem.v_head_dim}"
        return _device_refusal(problem)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        *,
        scale: float,
        score: Scores | None = None,
        into: Partial | None = None,
        out: Tensor | None = None,
    ) -> Partial:
        *before, last = cleared(tiles, q, self.block)
        for part in before:
            into = self._forward(q, k, v, part, scale, score, into, None)
        return self._forward(q, k, v, last, scale, score, into, out)

    def backward(
        self,
        up: Upstream,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        *,
        scale: float,
        score: Scores | None = None,
        into: Grads,
    ) -> None:
        from ring_attn.kernels.triton_backward import Visited, backward_calls
        from ring_attn.kernels.triton_scores import chain_of

        parts = cleared(tiles, q, self.block)
        for part in parts:
            chain = chain_of(score, part, q.dtype)
            visited, once = Visited(up, q, k, v, scale, chain), len(parts) == 1
            for call in backward_calls(visited, into, part, self._configs(q, v, chain), once=once):
                call()

    def _forward(self, q, k, v, tiles: Sequence[Tile], scale, score, into: Partial | None, out: Tensor | None) -> Partial:
        """One launch, of tiles with the same predicates."""
        from ring_attn.kernels.triton_forward import forward_call
        from ring_attn.kernels.triton_scores import chain_of

        chain = chain_of(score, tiles, q.dtype)
        config, table = chosen(
            self._configs(q, v, chain).forward, q.shape[2], lambda own: query_table(tiles, q, own, placed=chain.placed)
        )
        target = target_of(q, v, into, out)
        forward_call(q, k, v, table, config, scale=scale, chain=chain, carried=into, target=target, out=out)()
        return target if out is None else Partial(out, target.m)

    def _configs(self, q: Tensor, v: Tensor, chain: Chain) -> Configs:
        return self.configs or configs(q.dtype, q.shape[-1], v.shape[-1], device_size(q.device), chain.kind)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter; Triton reads the environment when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _score_refusal(problem: Problem) -> str | None:
    kinds = problem.score or ()
    if "score_mod" in kinds:
        return "it runs a ScoreMod by Triton functions beside it, ScoreMod(fn, triton=(forward, backward)), not by fn alone"
    if problem.predicate == "python":
        return "it takes masks that are bands, or MaskMod(fn, triton=predicate), not functions alone"
    if kinds.count("alibi") > 1:
        return "it adds up the gradient of one Alibi's slopes, not of two"
    return modifier_refusal(replace(problem, predicate=None), ("softcap", "alibi", "triton_score_mod"))


def _device_refusal(problem: Problem) -> str | None:
    if interpreted():
        # Its dot multiplies the bit patterns of bfloat16 as integers.
        return "Triton's interpreter computes wrong bfloat16 dots" if problem.dtype == torch.bfloat16 else None
    if problem.device == "cpu":
        return "it runs on the CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
    if problem.device != "cuda":
        return f"it runs on CUDA devices, not on {problem.device}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0, this device has {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return None


def target_of(q: Tensor, v: Tensor, into: Partial | None, out: Tensor | None) -> Partial:
    """Where a visit's result goes: to `into`, and to memory yet unwritten in place of what that lacks; acc may be `out`."""
    if into is not None and into.acc is not None:
        return into
    b, s, h, _ = q.shape
    acc = torch.empty(b, s, h, v.shape[-1], dtype=torch.float32, device=q.device) if out is None else out
    if into is not None:
        return into._replace(acc=acc)
    m = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    return Partial(acc, m, torch.empty_like(m) if out is None else None)


KERNELS = {"triton": TritonKernel()}
