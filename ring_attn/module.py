"""A self-attention layer whose sequence is sharded over a ring; without a ring, the same layer on one device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ring_attn.attention import ring_attention
from ring_attn.cache import KVCache
from ring_attn.call import called, name_of_ring
from ring_attn.decode import tree_decode
from ring_attn.mask import Causal, Mask
from ring_attn.ring import Ring
from ring_attn.score import Score
from ring_attn.typed import typed


class RingSelfAttention(nn.Module):
    """Grouped-head self-attention with rotary embeddings by global position, for LLM blocks.

    `ring=None` attends over the local sequence alone, as on one device. Weights are those of four linear layers (q_proj,
    k_proj, v_proj, o_proj) and load the same with or without a ring. `head_dim` defaults to dim // num_heads, `num_kv_heads` to
    num_heads. `rope_theta=None` leaves rotary out.
    """

    @typed
    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        ring: Ring | None = None,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"dim": dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"dim {dim} must be a multiple of num_heads {num_heads}, or name head_dim")
            head_dim = dim // num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"rotary embeddings need an even head_dim, got {head_dim}; pass rope_theta=None to leave them out")
        if rope_theta is not None and not 0 < rope_theta < math.inf:
            raise ValueError(f"rope_theta must be above 0 and finite, got {rope_theta}; None leaves rotary embeddings out")
        self.dim, self.head_dim, self.rope_theta = dim, head_dim, rope_theta
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.ring = Ring.simulated(1, "contiguous") if ring is None else ring
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask = Causal(),  # noqa: B008 (frozen)
        score: Score | Sequence[Score] | None = None,
        cache: KVCache | None = None,
        seq_len: int | None = None,
        ring: Ring | None = None,
    ) -> Tensor:
        """[b, s, dim] -> [b, s, dim], s the rows this process hosts. `mask` and `score` hold in global positions.

        `cache`: an empty one, which is filled with these rows for `decode` to go on from; without gradient. `seq_len`: how many
        positions it is filled with, where the last ones are padding (`ra.pad_to`), which a mask that is not causal must hide.
        `ring`: the layer's own in another layout, for this call alone, as `Ring.with_layout` makes it for the documents of a
        batch.
        """
        self._check(x)
        if ring is not None and ring.transport is not self.ring.transport:
            raise ValueError(
                f"ring must be the layer's in another layout, made by its with_layout; {ring} is of other wires than the "
                f"layer's {self.ring}"
            )
        if seq_len is not None and cache is None:
            raise ValueError(
                f"seq_len={seq_len} says how much goes into a cache, and there is none; mask padding by KeyPadding"
            )
        ring = self.ring if ring is None else ring
        if cache is not None:
            cache.check_ring(self.ring)
        if cache is not None and len(cache):
            raise ValueError(
                f"the cache already holds {len(cache)} positions, which these {x.shape[1]} rows would not see; "
                f"go on with decode, or start with an empty cache"
            )
        q, k, v = self._project(x, row_positions(x, ring))
        out = ring_attention(q, k, v, ring=ring, mask=mask, score=score)
        if cache is not None:
            cache.extend(k, v, seq_len=seq_len, layout=ring.layout_choice)
        return self.o_proj(rearrange(out, "b s h d -> b s (h d)"))

    def decode(
        self,
        x: Tensor,
        cache: KVCache,
        *,
        mask: Mask = Causal(),  # noqa: B008 (frozen)
        score: Score | Sequence[Score] | None = None,
    ) -> Tensor:
        """[b, n, dim] -> [b, n, dim]: the next n tokens, the same on every process, over the cache, which they enter first.

        Where it raises, they are not in the cache.
        """
        self._check(x)
        start = len(cache)
        q, k, v = self._project(x, torch.arange(start, start + x.shape[1], device=x.device))
        with cache.kept_where_refused():
            cache.append(k, v)
            out = tree_decode(q, cache, ring=self.ring, mask=mask, score=score)
            return self.o_proj(rearrange(out, "b n h d -> b n (h d)"))

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x must be [batch, rows, {self.dim}], got {tuple(x.shape)}")

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [b, s, heads, head_dim] of x [b, s, dim] at global positions [s]."""
        q, k, v = (
            rearrange(proj(x), "b s (h d) -> b s h d", d=self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope_theta is None:
            return q, k, v
        cos, sin = rotary_angles(positions, self.head_dim, self.rope_theta)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def row_positions(x: Tensor, ring: Ring) -> Tensor:
    """Global positions, int64 [s], of the rows of x [b, s, ...] that this process hosts."""
    if not torch.compiler.is_compiling():
        return _row_positions(x, ring)
    # One node, in which no length is fixed: ranges and layouts would make a graph of each.
    return _positions_op(x.detach(), name_of_ring(ring))


def _row_positions(x: Tensor, ring: Ring) -> Tensor:
    return ring.positions(ring.seq_len(x.shape[1]), x.device)


@torch.library.custom_op("ring_attn::positions", mutates_args=())
def _positions_op(x: Tensor, call: str) -> Tensor:
    return _row_positions(x, called(call).ring)


@_positions_op.register_fake
def _(x: Tensor, call: str) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.int64)


def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin [s, head_dim / 2], float64, of rotary embeddings (Su et al., arXiv 2104.09864) for int positions [s]."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions.to(torch.float64).unsqueeze(-1) * theta**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, s, h, d] turned by the angles, pairing dimension i with i + d / 2 as Llama does; computed in at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)
    a, b = x.to(dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
