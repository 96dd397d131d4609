"""Rows of unit norm, for cosine similarity: in one pass over memory each way where Triton runs.

Of y = x / |x| the gradient is dx = (dy - (y . dy) y) / |x|. Rows are first divided by their largest entry, or the squares of
large and of small numbers would leave the range of fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_attn.watched import watched


def of_unit_norm(x: Tensor, groups: int) -> Tensor:
    """x [b, s, h, d] with each of `groups` parts of every row's d of unit l2 norm, in the dtype of x; differentiable.

    A part that is all zero stays so, and so does its gradient.
    """
    parts = x.unflatten(-1, (groups, -1)).flatten(2, 3)
    return (_plain(parts) if watched(x) or not _fuses(x) else _Fused.apply(parts)).reshape(x.shape)


def _fuses(x: Tensor) -> bool:
    from ring_attn.kernels.sums import fused

    return fused(x.device) and x.dtype != torch.float64


def _plain(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.detach().abs().amax(-1, keepdim=True)
    wide = wide / torch.where(largest > 0, largest, 1)
    norm = wide.norm(dim=-1, keepdim=True)
    return (wide * torch.where(norm > 0, norm, torch.inf).reciprocal()).to(x.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        from ring_attn.kernels.triton_unit_norm import norm_call

        x = x if x.stride(-1) == 1 else x.contiguous()
        ctx.save_for_backward(x)
        found = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        norm_call(x, found)()
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        from ring_attn.kernels.triton_unit_norm import norm_call

        (x,) = ctx.saved_tensors
        found = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        norm_call(x, found, dy if dy.stride(-1) == 1 else dy.contiguous())()
        return found
