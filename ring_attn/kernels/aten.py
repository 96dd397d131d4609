"""Adapters to the attention inside PyTorch: flash attention on CUDA and on the CPU (`aten`), and cuDNN's (`cudnn`).

The operators are called as `torch.ops.aten.…`, by keyword where versions differ; dropout is 0, so the random states that a
backward asks for are never read and empty tensors stand in for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ring_attn.kernels import Problem, Upstream
from ring_attn.kernels.packs import Pack
from ring_attn.kernels.split import squares, strips, windows
from ring_attn.kernels.tilewise import Gradients, Packing, Scaling, Tilewise, refusal
from ring_attn.partial import Partial
from ring_attn.tiles import Tile


@dataclass(frozen=True)
class AtenKernel:
    """PyTorch's own flash attention: its copy of flash-attn 2 on CUDA, its C++ kernel on the CPU."""

    name: str = "aten"

    def supports(self, problem: Problem) -> str | None:
        adapter = _ADAPTERS.get(problem.device)
        if adapter is None:
            return f"PyTorch has no flash attention for device {problem.device!r} that takes part in a ring; use cpu or cuda"
        return adapter.supports(problem)

    def forward(self, q: Tensor, *rest, **options) -> Partial:
        return _ADAPTERS[q.device.type].forward(q, *rest, **options)

    def backward(self, up: Upstream, q: Tensor, *rest, **options) -> None:
        _ADAPTERS[q.device.type].backward(up, q, *rest, **options)

    def rounds(self, device: str, tiles: Sequence[Tile]) -> bool:
        return _ADAPTERS[device].rounds(device, tiles)


@dataclass(frozen=True)
class CudaFlash(Packing):
    """`aten::_flash_attention_forward` and `_backward`: flash-attn 2 with windows, dense [b, s, h, d] or packed [n, h, d]."""

    name: str = "aten"

    def supports(self, problem: Problem) -> str | None:
        if not torch.backends.cuda.is_flash_attention_available():
            return "this PyTorch was built without CUDA flash attention"
        return refusal(problem, (torch.float16, torch.bfloat16), head_dim_step=8, head_dim_max=256)

    def pieces(self, tile: Tile) -> Iterable[Tile]:
        return windows(tile)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> tuple[Tensor, Tensor]:
        return self._forward(q, k, v, (None, None, q.shape[1], k.shape[1]), tile.window, scaling)

    def differentiate(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> Gradients:
        return self._backward(up, q, k, v, (None, None, q.shape[1], k.shape[1]), tile.window, scaling)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, scaling: Scaling) -> tuple[Tensor, Tensor]:
        return self._forward(q, k, v, (pack.cu_q, pack.cu_kv, pack.max_q, pack.max_kv), pack.window, scaling)

    def differentiate_packed(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, pack: Pack, scaling: Scaling) -> Gradients:
        return self._backward(up, q, k, v, (pack.cu_q, pack.cu_kv, pack.max_q, pack.max_kv), pack.window, scaling)

    def _forward(self, q, k, v, lengths: tuple, window: tuple, scaling: Scaling) -> tuple[Tensor, Tensor]:
        left, right = window
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *lengths, 0.0, False, False, scale=scaling.scale, window_size_left=left, window_size_right=right
        )
        return out, lse

    def _backward(self, up: Upstream, q, k, v, lengths: tuple, window: tuple, scaling: Scaling) -> Gradients:
        left, right = window
        state = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            up.dout, q, k, v, up.out, up.lse, *lengths, 0.0, False, *state,
            scale=scaling.scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip


@dataclass(frozen=True)
class CpuFlash(Tilewise):
    """`aten::_scaled_dot_product_flash_attention_for_cpu`: no mask, the causal diagonal of a square, or an additive mask.

    A band with a lower bound goes in strips of `strip` rows, so that no mask grows with the square of the shard.
    """

    strip: int = 512
    name: str = "aten"

    def supports(self, problem: Problem) -> str | None:
        return refusal(problem, (torch.float64, torch.float32, torch.bfloat16, torch.float16))

    def pieces(self, tile: Tile) -> Iterable[Tile]:
        return squares(tile) if tile.band.lo is None else strips(tile, self.strip)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> tuple[Tensor, Tensor]:
        causal, mask = _causal_or_mask(tile, q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = attend(q, k, v, 0.0, causal, attn_mask=mask, scale=scaling.scale)
        return out.transpose(1, 2), lse

    def differentiate(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> Gradients:
        causal, mask = _causal_or_mask(tile, q.dtype)
        q, k, v, dout, out = (x.transpose(1, 2) for x in (q, k, v, up.dout, up.out))
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = differentiate(dout, q, k, v, out, up.lse, 0.0, causal, attn_mask=mask, scale=scaling.scale)
        return tuple(x.transpose(1, 2) for x in grads)


@dataclass(frozen=True)
class CudnnKernel(Tilewise):
    """`aten::_scaled_dot_product_cudnn_attention`: full rectangles and causal squares. It builds a graph a shape, once."""

    name: str = "cudnn"

    def supports(self, problem: Problem) -> str | None:
        if problem.device != "cuda":
            return f"cuDNN attention runs on CUDA, not on {problem.device!r}"
        if problem.deterministic and problem.direction == "backward":
            return "cuDNN's backward is not deterministic; triton's is"
        if problem.left_bounded:
            return "cuDNN attention has no lower bound on the band, as sliding windows need; triton, flash2 and aten have"
        if not torch.backends.cudnn.is_available():
            return "this PyTorch was built without cuDNN"
        return refusal(problem, (torch.float16, torch.bfloat16), head_dim_step=8, head_dim_max=128, any_v_head_dim=True)

    def pieces(self, tile: Tile) -> Iterable[Tile]:
        return squares(tile)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> tuple[Tensor, Tensor]:
        if k.shape[1] == 1:
            return _attend_one_key(q, k, v, scaling.scale)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default
        out, lse, *_ = attend(q, k, v, None, True, 0.0, tile.band.hi is not None, False, scale=scaling.scale)
        return out.transpose(1, 2), lse.reshape(q.shape[:3])

    def differentiate(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> Gradients:
        if k.shape[1] == 1:
            return _differentiate_one_key(up, q, k, v, scaling.scale)
        q, k, v, dout, out = (x.transpose(1, 2) for x in (q, k, v, up.dout, up.out))
        lse = up.lse.reshape(*up.lse.shape, *(1,) * (_cudnn_lse_dims(q.device) - 3))
        # This pair's lengths: the operator takes them at their word.
        lengths, causal = (q.shape[2], k.shape[2]), tile.band.hi is not None
        seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
        differentiate = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
        grads = differentiate(
            dout, q, k, v, out, lse, seed, offset, None, None, None, *lengths, 0.0, causal, scale=scaling.scale
        )
        return tuple(x.transpose(1, 2) for x in grads)


@lru_cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """How many dimensions this PyTorch gives cuDNN's lse, and so wants back: it is [b, h, s, 1] or [b, h, s] by version."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()


def _attend_one_key(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to a single key, which PyTorch does not give to cuDNN: out is that key's v and lse its score."""
    group = q.shape[2] // k.shape[2]
    scores = (q.float() * k.float().repeat_interleave(group, 2)).sum(-1) * scale
    out = v.repeat_interleave(group, 2).expand(-1, q.shape[1], -1, -1)
    return out, scores.transpose(1, 2).contiguous()


def _differentiate_one_key(up: Upstream, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Gradients:
    """Its gradients, dq [b, i, h, d] in fp32, dk and dv [b, 1, g, d]; p is below 1 where the rows have met other keys."""
    groups = k.shape[2]
    keys, values = (x.float().repeat_interleave(q.shape[2] // groups, 2) for x in (k, v))
    p = ((q.float() * keys).sum(-1) * scale - up.lse.transpose(1, 2)).exp().unsqueeze(-1)
    dout = up.dout.float()
    ds = p * (dout * (values - up.out.float())).sum(-1, keepdim=True) * scale
    dk, dv = (x.sum(1, keepdim=True).unflatten(2, (groups, -1)).sum(3) for x in (ds * q.float(), p * dout))
    return ds * keys, dk.to(q.dtype), dv.to(q.dtype)


def _causal_or_mask(tile: Tile, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """(is_causal, additive mask [i, j] or None) of a tile; the operator's causal mask is top-left aligned."""
    num_q, num_kv, (lo, hi) = len(tile.q_rows), len(tile.kv_rows), tile.band
    if lo is None and (hi is None or (hi == 0 and num_q == num_kv)):
        return hi is not None, None
    offset = torch.arange(num_kv, device="cpu") - torch.arange(num_q, device="cpu").unsqueeze(1)
    lo, hi = tile.bounds
    hidden = (offset < lo) | (offset > hi)
    return False, torch.zeros(num_q, num_kv, dtype=dtype, device="cpu").masked_fill_(hidden, -torch.inf)


_ADAPTERS = {"cpu": CpuFlash(), "cuda": CudaFlash()}
KERNELS = {"aten": AtenKernel(), "cudnn": CudnnKernel()}
