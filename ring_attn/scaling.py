"""What becomes of q and k before any rank meets another: their scaled products are the scores."""

from __future__ import annotations

import math
from operator import truediv

import torch
from torch import Tensor

from ring_attn.score import CosineSim
from ring_attn.unit_norm import of_unit_norm


def scaled(q: Tensor, k: Tensor, cosine: CosineSim | None, softmax_scale: float | None) -> tuple[Tensor, Tensor, float]:
    """(q, k, scale) whose scaled products are the scores, scale above 0, of q [b, s, h, d], k [b, skv, g, d]; differentiable.

    `softmax_scale`: d ** -0.5 where it is None; with `cosine`, which has a scale of its own, it must be. Raises ValueError
    where it is not, for a scale that is not finite and for one that would learn.
    """
    if torch.is_grad_enabled() and isinstance(softmax_scale, Tensor) and softmax_scale.requires_grad:
        raise ValueError("softmax_scale must be a number, for it gets no gradient; multiply q by a scale that learns")
    scale = max(1, q.shape[-1]) ** -0.5 if softmax_scale is None else float(softmax_scale)
    if cosine is not None:
        if softmax_scale is not None:
            raise ValueError(f"CosineSim has a scale of its own; leave softmax_scale={softmax_scale} out")
        q, k, scale = _of_cosine(q, k, cosine)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"the scale of scores must be finite, got {scale}")
    if torch.compiler.is_compiling():
        # A number that varies is a symbol until it is taken apart, and kernels have one scale a call.
        scale = truediv(*scale.as_integer_ratio())
    if scale > 0:
        return q, k, scale
    # Libraries scale scores that they have masked with -inf, which such a factor makes inf or NaN.
    return (-q, k, -scale) if scale else (q * 0, k, 1.0)


def _of_cosine(q: Tensor, k: Tensor, cosine: CosineSim) -> tuple[Tensor, Tensor, float]:
    """(q, k, scale) whose scaled products are the scores; differentiable."""
    if q.shape[-1] % cosine.groups:
        raise ValueError(f"CosineSim groups {cosine.groups} must divide head_dim {q.shape[-1]}")
    q, k = (of_unit_norm(x, cosine.groups) for x in (q, k))
    if not isinstance(cosine.scale, Tensor):
        return q, k, float(cosine.scale)
    if tuple(cosine.scale.shape) != (q.shape[2],):
        raise ValueError(f"CosineSim scale must be a number or [num_heads] = [{q.shape[2]}], got {tuple(cosine.scale.shape)}")
    if cosine.scale.device != q.device:
        raise ValueError(f"CosineSim scale must be on the device of q, {q.device}, got {cosine.scale.device}; move it with .to")
    return (q * cosine.scale[:, None]).to(k.dtype), k, 1.0
