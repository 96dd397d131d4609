"""Tokens from a decoder: a prompt sharded over its ring, then one token after another over the sharded caches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ring_attn.cache import KVCache
from ring_attn.mask import Causal, Mask
from ring_attn.models.decoder import Decoder
from ring_attn.ring import Ring


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Tensor,
    num_tokens: int,
    *,
    mask: Mask = Causal(),  # noqa: B008 (frozen)
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The prompt [b, t] and `num_tokens` more behind it, [b, t + num_tokens], the same on every process.

    prompt: int64, the same on every process, of any length from 1. `mask` holds beside Causal(), at every length. `temperature`
    0 takes the most likely token; above, tokens are drawn with `generator`, and what rank 0's process draws counts.
    """
    if prompt.dim() != 2 or not prompt.numel():
        raise ValueError(f"the prompt must be [batch, tokens] with at least one token, got {tuple(prompt.shape)}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    mask = Causal() & mask
    caches = model.new_caches(capacity=prompt.shape[1] + num_tokens)
    logits = prefill(model, prompt, caches, mask=mask)
    tokens = [prompt, _choose(logits, temperature, generator, caches[0].ring)]
    while len(tokens) <= num_tokens:
        logits = model.decode(tokens[-1], caches, mask=mask)[:, -1]
        tokens.append(_choose(logits, temperature, generator, caches[0].ring))
    return torch.cat(tokens, 1)


def prefill(model: Decoder, prompt: Tensor, caches: Sequence[KVCache], *, mask: Mask) -> Tensor:
    """Logits [b, vocab_size] behind the prompt [b, t], on every process; the empty caches then hold the prompt.

    As much as the ring can shard evenly goes through it; the rest, one token at least, is decoded.
    """
    ring = caches[0].ring
    sharded = (prompt.shape[1] - 1) // ring.shard_multiple * ring.shard_multiple
    if sharded:
        model.hidden(ring.shard(prompt[:, :sharded]), mask=mask, caches=caches)
    return model.decode(prompt[:, sharded:], caches, mask=mask)[:, -1]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None, ring: Ring) -> Tensor:
    """The next token [b, 1] of logits [b, vocab_size]: rank 0's choice, so no process can take another way."""
    if temperature:
        chosen = torch.multinomial((logits.double() / temperature).softmax(-1), 1, generator=generator)
    else:
        chosen = logits.argmax(-1, keepdim=True)
    return ring.sum_over_processes(chosen if 0 in ring.hosted else torch.zeros_like(chosen))
