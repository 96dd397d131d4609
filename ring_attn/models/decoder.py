"""A small Llama-like decoder. It is written for one device: the ring is met inside RingSelfAttention and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ring_attn.cache import KVCache
from ring_attn.mask import Causal, Mask, Window
from ring_attn.module import RingSelfAttention
from ring_attn.ring import Ring
from ring_attn.typed import whole


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Attributes:
        dim: Width of the residual stream.
        num_layers: Number of blocks.
        num_heads: Query heads.
        num_kv_heads: KV heads, a divisor of num_heads; default num_heads.
        head_dim: Size of a head; default dim / num_heads.
        hidden_dim: Width inside the SwiGLU; default 8/3 dim, up to the next multiple of 32.
        vocab_size: Number of tokens.
        rope_theta: Base of the rotary embedding.
        norm_eps: Added inside the RMS norms.
        window: How many positions before its own a token sees; default all.
        full_every: Every so many blocks, 2 to num_layers, there is one without a window; default none.
        tie_head: Read logits with the embedding's weights.
        checkpoint_blocks: Keep only each block's input for the backward and run the block again there.
    """

    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_dim: int | None = None
    vocab_size: int = 256
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    window: int | None = None
    full_every: int | None = None
    tie_head: bool = True
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        sizes = "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_dim", "vocab_size", "window", "full_every"
        for name in sizes:
            value = getattr(self, name)
            if value is not None and whole(f"model.{name}", value) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {value}")
        if self.full_every is not None and self.window is None:
            raise ValueError("model.full_every says which blocks have no model.window, and there is none")
        if self.full_every is not None and not 2 <= self.full_every <= self.num_layers:
            raise ValueError(
                f"model.full_every {self.full_every} of {self.num_layers} blocks leaves none with a window or none without; "
                f"take 2 to model.num_layers, or leave model.window or model.full_every out"
            )

    def window_of(self, block: int) -> Window | None:
        """What holds in that block, counted from 0, beside the mask of a call."""
        full = self.window is None or (self.full_every is not None and (block + 1) % self.full_every == 0)
        return None if full else self._window

    @cached_property
    def _window(self) -> Window:
        """One for all blocks: a compiler compiles for each."""
        return Window(self.window, None)


class Decoder(nn.Module):
    """Tokens [b, s] (int64) to logits [b, s, vocab_size]; s the rows this process hosts, the whole sequence without a ring.

    Weights do not depend on the ring: a state dict loads with any ring, or none. Attention's own rules (heads that divide, an
    even head_dim) raise ValueError here.
    """

    def __init__(self, config: DecoderConfig, ring: Ring | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, ring, config.window_of(n)) for n in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_head:
            self.head.weight = self.embed.weight

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan_in; what writes into the residual stream starts with 2 num_layers times less."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                depth = 2 * self.config.num_layers if name.endswith(("o_proj", "down")) else 1
                nn.init.normal_(module.weight, std=(module.in_features * depth) ** -0.5)
        nn.init.normal_(self.embed.weight, std=self.config.dim**-0.5)

    def forward(self, tokens: Tensor, *, mask: Mask = Causal()) -> Tensor:  # noqa: B008 (frozen)
        return self.head(self.hidden(tokens, mask=mask))

    def hidden(self, tokens: Tensor, *, mask: Mask = Causal(), caches: Sequence[KVCache] | None = None) -> Tensor:  # noqa: B008
        """[b, s, dim], which the head reads; empty `caches`, one a block, are filled for `decode` to go on from."""
        x = self.embed(tokens)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            if self.config.checkpoint_blocks and self.training:
                x = checkpoint(block, x, mask, cache, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        return self.norm(x)

    def decode(self, tokens: Tensor, caches: Sequence[KVCache], *, mask: Mask = Causal()) -> Tensor:  # noqa: B008 (frozen)
        """Logits [b, n, vocab_size] of the next tokens [b, n], the same on every process, which enter the caches."""
        x = self.embed(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.decode(x, mask, cache)
        return self.head(self.norm(x))

    def new_caches(self, *, capacity: int = 0) -> list[KVCache]:
        """An empty cache for every block."""
        return [KVCache(block.attention.ring, capacity=capacity) for block in self.blocks]


class Block(nn.Module):
    """Attention, then SwiGLU, each behind its own RMS norm and added to its input [b, s, dim]; always in its `window`."""

    def __init__(self, config: DecoderConfig, ring: Ring | None = None, window: Window | None = None) -> None:
        super().__init__()
        self.window = window
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = RingSelfAttention(
            config.dim, config.num_heads, config.num_kv_heads, config.head_dim, ring=ring, rope_theta=config.rope_theta
        )
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.hidden_dim or -(-8 * config.dim // 96) * 32)

    def forward(self, x: Tensor, mask: Mask, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask=self._mask(mask), cache=cache)
        return x + self.mlp(self.mlp_norm(x))

    def decode(self, x: Tensor, mask: Mask, cache: KVCache) -> Tensor:
        x = x + self.attention.decode(self.attention_norm(x), cache, mask=self._mask(mask))
        return x + self.mlp(self.mlp_norm(x))

    def _mask(self, mask: Mask) -> Mask:
        return mask if self.window is None else mask & self.window


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) on [..., dim] (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
