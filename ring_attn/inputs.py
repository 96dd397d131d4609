"""Which shapes, dtypes and devices attention takes, on whatever ring."""

from __future__ import annotations

import torch
from torch import Tensor

MERGED = " or [batch, rows, head_dim]"


def check_input(name: str, x: Tensor, *, merged: str = MERGED) -> None:
    """Raises ValueError for a shape or dtype that no attention takes. `merged`: what else callers take, in words."""
    if x.dim() != 4:
        raise ValueError(f"{name} must be [batch, rows, heads, head_dim]{merged}, got {tuple(x.shape)}")
    if min(x.shape) < 1:
        raise ValueError(f"every dimension of {name} must be at least 1, got {tuple(x.shape)}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} must have dtype float16, bfloat16, float32 or float64, got {x.dtype}; cast it first")


def check_tensors(*, merged: str = MERGED, **inputs: object) -> None:
    """Raises TypeError for what is no tensor, by its name. `merged`: what else callers take, in words."""
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [batch, rows, heads, head_dim]{merged}, got {type(x).__name__}")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, *, merged: str = MERGED) -> None:
    """Raises ValueError for shapes, dtypes or devices that no attention takes. `merged`: what else callers take, in words."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_input(name, x, merged=merged)
    if len({x.dtype for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    if len({x.device for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if q.device.type == "meta":
        raise ValueError("q, k and v are on device meta, where there are no numbers; for shapes alone there is FakeTensorMode")
    (b, _, h, d), (_, skv, g, _) = q.shape, k.shape
    if k.shape[0] != b or v.shape[:2] != (b, skv):
        raise ValueError(
            f"q, k and v must have the same batch, and k and v the same rows, got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}; shard all three with the same ring"
        )
    if k.shape[3] != d or v.shape[2] != g:
        raise ValueError(
            f"k must share q's head_dim and v must share k's heads, got k {tuple(k.shape)}, q head_dim {d}, v {tuple(v.shape)}"
        )
    if h % g:
        raise ValueError(f"num_heads {h} must be a multiple of num_kv_heads {g}: query head i reads KV head i // (h // g)")


def check_parts(num_heads: int, num_kv_heads: int, ulysses: int) -> None:
    """Raises ValueError where so many Ulysses ranks cannot have a part of the heads each."""
    if num_heads % ulysses:
        raise ValueError(
            f"num_heads {num_heads} must be a multiple of ulysses {ulysses}, among whose ranks the heads are split"
        )
    if num_kv_heads % ulysses and ulysses % num_kv_heads:
        raise ValueError(
            f"num_kv_heads {num_kv_heads} must be a multiple of ulysses {ulysses}, or a divisor of it, so that ranks share KV "
            f"heads; choose another ulysses, or repeat the heads of k and v with repeat_interleave(n, 2)"
        )


def wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
