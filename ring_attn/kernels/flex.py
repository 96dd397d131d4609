"""torch's flex_attention, compiled: masks and scores that are users' functions of cells, at the speed of a fused kernel.

Every tile is one call. Blocks without an allowed cell are skipped, and the mask is asked about only in those that have both.

Note [backward of a tile]: flex_attention differentiates only what it computed itself, with the lse of that tile's keys alone.
With w = exp(lse_tile - lse), a row's p is w times the tile's own, and ds = p * (dp - delta) is what the tile's backward makes
of dout * w and of the gradient rowsum(dout * w * out_tile) - w * delta of its lse. So a tile is computed once more, and its
gradients are exact for a part of the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from ring_attn.kernels import Problem, Upstream, modifier_refusal
from ring_attn.kernels.flex_call import KINDS, Work, compiled, work_of
from ring_attn.kernels.functions import outside_of_ops
from ring_attn.kernels.sums import Grads
from ring_attn.kernels.tilewise import Tilewise, refusal
from ring_attn.score import Scores
from ring_attn.tiles import Tile

_HALF_AND_FLOAT = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Scoring:
    """How scores are made: products times `scale`, then the steps of `score`. `wanted`: which tensors' gradients are."""

    scale: float
    score: Scores
    wanted: tuple[int, ...] = ()


@contextmanager
def _compiling() -> Iterator[None]:
    """Inside, nothing is recorded, compilers work, and what cannot be compiled says what else runs it."""
    try:
        with outside_of_ops(), torch.no_grad():
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        error.add_note("torch's flex_attention cannot compile this for kernel 'flex'; kernel='reference' runs any function")
        raise


@dataclass(frozen=True)
class FlexKernel(Tilewise):
    """`call(q, k, v, work)`: (out, lse) of one tile, all [b, h, rows, ...], differentiable where grad is on."""

    call: Callable[[Tensor, Tensor, Tensor, Work], tuple[Tensor, Tensor]] = compiled
    name: str = "flex"

    def supports(self, problem: Problem) -> str | None:
        return _refusal_here(problem.device) or _refusal(problem)

    def pieces(self, tile: Tile) -> Iterable[Tile]:
        return (tile,)

    def scaling(self, scale: float, score: Scores | None) -> Scoring:
        return Scoring(scale, score or Scores(()))

    forward = _compiling()(Tilewise.forward)

    @_compiling()
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
        wanted = tuple(n for n, total in enumerate(into.score) if total is not None)
        scoring = replace(self.scaling(scale, score), wanted=wanted)
        for call in self.calls(tiles, q, k):
            dq, dk, dv, *of_tensors = call.differentiate(self, up, q, k, v, scoring)
            call.add(into, dq, dk, dv)
            for n, grad in zip(wanted, of_tensors, strict=True):
                into.score[n].add_(grad)

    def rounds(self, device: str, tiles: Sequence[Tile]) -> bool:
        return False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scoring) -> tuple[Tensor, Tensor]:
        work = work_of(tile, q, scaling.score.steps, scaling.scale)
        out, lse = self.call(*(x.transpose(1, 2) for x in (q, k, v)), work)
        return out.transpose(1, 2), lse

    def differentiate(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scoring) -> tuple[Tensor, ...]:
        """See Note [backward of a tile]; after dq, dk, dv the gradients of the wanted tensors."""
        tensors = [x.detach() for x in scaling.score.tensors()]
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        for n in scaling.wanted:
            # As wide as the call will read them: their gradients are of a tile, and rounded when all tiles are there.
            tensors[n] = tensors[n].to(up.lse.dtype).requires_grad_()
        with torch.enable_grad():
            work = work_of(tile, q, scaling.score.with_tensors(tensors).steps, scaling.scale)
            out, lse = self.call(*(x.transpose(1, 2) for x in leaves), work)
        weight = torch.where(lse == -torch.inf, 0.0, (lse - up.lse).exp())
        dout = (up.dout.transpose(1, 2) * weight.unsqueeze(-1)).to(out.dtype)
        dlse = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - weight * up.delta
        learning = [n for n in scaling.wanted if work.learns[n]]
        grads = torch.autograd.grad((out, lse), [*leaves, *(tensors[n] for n in learning)], (dout, dlse))
        of_scores = dict(zip(learning, grads[3:], strict=True))
        return *grads[:3], *(of_scores.get(n, torch.zeros_like(tensors[n])) for n in scaling.wanted)


def _refusal_here(device: str) -> str | None:
    if device != "cuda":
        return f"torch's flex_attention has no backward and no fused forward with lse on {device!r}; it runs on CUDA"
    return "triton is not installed" if find_spec("triton") is None else None


def _refusal(problem: Problem) -> str | None:
    if min(problem.head_dim, problem.v_head_dim) < 16:
        return f"it takes head dims from 16 on, not {min(problem.head_dim, problem.v_head_dim)}"
    unknown = modifier_refusal(replace(problem, predicate=None), KINDS)
    if unknown is not None:
        return unknown
    if problem.deterministic and problem.direction == "backward" and set(problem.score or ()) - {"softcap"}:
        return "the gradients of its scores' tensors add up in no fixed order; reference's do"
    plain = replace(problem, score=None, predicate=None)
    return refusal(plain, _HALF_AND_FLOAT, head_dim_max=256, any_v_head_dim=True, takes_lse_grad=True)


KERNELS = {"flex": FlexKernel()}
