"""Attention of the newest tokens over a cache that is sharded over a ring: every rank its own shard, then one exchange.

Note [one exchange]: the queries are few and on every rank, so nothing travels round. Each rank attends to the keys it holds;
what it has gathered is one `Partial`, of a size that does not depend on the cache; all partials go to all ranks in one
all-gather and merge there, in rank order and so to the same bits (tree attention, Shyam et al., arXiv 2408.04093).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ring_attn.attention import as_given, unit_stride
from ring_attn.cache import KVCache, refuse_gradients
from ring_attn.call import Call
from ring_attn.inputs import check_input, check_inputs, check_tensors
from ring_attn.kernels import Problem, resolve
from ring_attn.mask import Causal, Mask, check_mask
from ring_attn.partial import Partial, empty, merge_all, normalize, only_sinks, to_add_to, to_merge_into
from ring_attn.ring import Ring
from ring_attn.scaling import scaled
from ring_attn.score import Score, sort_scores
from ring_attn.tiles import tiles
from ring_attn.watched import between_graphs


@between_graphs
def tree_decode(
    q: Tensor,
    cache: KVCache,
    *,
    ring: Ring,
    mask: Mask = Causal(),  # noqa: B008 (frozen)
    score: Score | Sequence[Score] | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention output [b, n, h, dv] of the newest n positions over the whole cache, in q's dtype, alike on every process.

    q [b, n, h, d], the same on every process: the queries at positions len(cache) - n ... len(cache) - 1, whose keys the cache
    already holds. Masks, scores, scale and lse [b, h, n] are those of `ring_attention` at these positions of a sequence of
    len(cache); a `Bias` has these n rows. No gradient is passed on.

    One small all-gather, the first time for a cache, finds out whether all ranks make the same call; other shapes, masks or
    scores take another, and so do, at every token, those that go by the length, such as Documents.

    Raises TypeError for what is no tensor, mask or score, ValueError for shapes, dtypes, devices or masks that do not fit,
    NotImplementedError where a gradient is asked for.
    """
    check_mask(mask)
    cache.check_ring(ring)
    check_tensors(merged="", q=q)
    cosine, modifiers, sinks = sort_scores(score)
    tensors = [*modifiers.tensors(), *([] if sinks is None else [sinks.tensor])]
    whole = cache.whole()
    try:
        if cosine is not None:
            check_input("q", q, merged="")
        shards = [(*scaled(q, shard.k, cosine, softmax_scale), shard) for shard in cache.shards]
    except ValueError as refusal:
        Call.make(ring, mask, score, math.nan).refuse(refusal, q, *whole, tensors)
    refuse_gradients("tree_decode", *tensors, *(query for query, *_ in shards))
    call = Call.make(ring, mask, score, shards[0][2])
    _validate(q, *whole, tensors, call, cache)
    kernel, newest = resolve(ring.kernel, _problem(q, *whole, call)), (range(len(cache) - q.shape[1], len(cache)),)
    with as_given(q):
        partials = []
        for query, k, scale, shard in shards:
            found = _tiles(newest, (shard.positions,), mask)
            inputs = unit_stride(query, k, shard.v)
            nothing = empty(q, shard.v.shape[3])
            met = to_merge_into(kernel.forward(*inputs, found, scale=scale, score=modifiers)) if found else nothing
            partials.append(met)
        partials = _all_gather(partials, ring)
        if sinks is not None:
            # Here and once: a rank that started from the sinks would count them again.
            partials.append(to_add_to(only_sinks(q, sinks.tensor), q, whole[1].shape[3]))
        total = merge_all(partials)
        out = normalize(total, q.dtype)
    return (out, total.lse) if return_lse else out


def _problem(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Problem:
    return replace(call.problem(q, k, v, "forward"), kind="decode")


def _all_gather(partials: list[Partial], ring: Ring) -> list[Partial]:
    """The partials of all ranks, from those of the hosted ones."""
    packed = [torch.cat([acc, *(x.transpose(1, 2).unsqueeze(-1) for x in (m, total))], -1) for acc, m, total in partials]
    everyone = ring.transport.all_gather(packed, what="decoding, all-gather of partials").wait()
    return [Partial(x[..., :-2], x[..., -2].transpose(1, 2), x[..., -1].transpose(1, 2)) for x in everyone]


def _validate(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], call: Call, cache: KVCache) -> None:
    """Raises unless the call can be done and all ranks make the same one on caches of one length.

    That they do is remembered without the length, which changes with every token: what was alike stays so while all append the
    same tokens. Whether it can be done is asked every time.
    """
    everything = call.signature(q, k, v, tensors)
    known, refusal = (everything[0], *everything[3:]), None
    try:
        _check(q, k, v, tensors, call)
    except ValueError as error:
        refusal = error
    if known not in cache.agreed or call.ring.compares_every_call:
        call.ring.agree(everything, q.device, refusal)
        if len(cache.agreed) >= _REMEMBERED:
            cache.agreed.clear()
        cache.agreed.add(known)
    elif refusal is not None:
        raise refusal


_REMEMBERED = 64


def _check(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], call: Call) -> None:
    """Raises ValueError for a call that cannot be done, naming the rule and the values."""
    check_inputs(q, k, v, merged="")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} rows, but the cache {k.shape[1]} positions; append their keys before decoding")
    call.mask.check(k.shape[1], k.shape[1], q.shape[0])
    call.check_scores(q, k.shape[1], tensors)
    resolve(call.ring.kernel, _problem(q, k, v, call))


# Layers ask for the same tiles, token after token.
_tiles = lru_cache(maxsize=128)(tiles)
