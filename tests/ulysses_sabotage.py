"""Breaks the trade of heads against sequence on purpose; tests/test_ulysses.py fails where nothing notices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import patch

from ring_attn import layout, mask, score, score_mod, ulysses
from ring_attn.comm.local import LocalTransport
from ring_attn.comm.transport import Pending


def swap_two_heads(of: tuple[int, ...]) -> AbstractContextManager:
    """The first two parts of the heads, of some of q, k, v on their way to the ranks that attend with them."""
    trade = ulysses._trade

    def broken(shards, axes, *, give, take, what):
        if give == 2:
            shards = [[_swapped(x, axes.ulysses) if n in of else x for n, x in enumerate(rank)] for rank in shards]
        return trade(shards, axes, give=give, take=take, what=what)

    return patch.object(ulysses, "_trade", broken)


def _swapped(x, parts):
    heads = list(x.chunk(parts, 2))
    return ulysses.torch.cat([heads[1], heads[0], *heads[2:]], 2)


def arrive_in_reverse(of: str) -> AbstractContextManager:
    all_to_all = LocalTransport.all_to_all

    def broken(self, parts, *, what="all-to-all"):
        pending = all_to_all(self, parts, what=what)
        received = [row[::-1] for row in pending.received] if what == of else pending.received
        return Pending(received, lambda: pending.wait() and None, what)

    return patch.object(LocalTransport, "all_to_all", broken)


def one_rank_s_gradient_of_a_shared_head() -> AbstractContextManager:
    def broken(ctx, grads):
        return [x[:, :, :: x.shape[2] // h] for x, h in zip(ulysses._to_rows(grads, ctx.name), ctx.heads, strict=True)]

    return patch.object(ulysses, "_grads_of_rows", broken)


def heads_beside_another_kv_head() -> AbstractContextManager:
    """KV heads dealt out one by one where they are shared."""
    repeat = ulysses.Tensor.repeat_interleave
    return patch.object(
        ulysses.Tensor, "repeat_interleave", lambda x, n, dim: x.repeat(1, 1, n, 1) if dim == 2 else repeat(x, n, dim)
    )


def runs_of_rows_in_another_order() -> AbstractContextManager:
    shard = layout.Shared.shard
    return patch.object(layout.Shared, "shard", lambda self, rank: shard(self, rank ^ 1))


def forget_a_wait() -> AbstractContextManager:
    return patch.object(Pending, "wait", lambda self: self.received)


ULYSSES_SABOTAGES: dict[str, Callable[[], AbstractContextManager]] = {
    "swap two heads of q": lambda: swap_two_heads((0,)),
    "swap two heads of k": lambda: swap_two_heads((1,)),
    "swap two heads of q, k and v": lambda: swap_two_heads((0, 1, 2)),
    "rows arrive in reverse": lambda: arrive_in_reverse("rows for heads"),
    "heads arrive in reverse": lambda: arrive_in_reverse("heads for rows"),
    "one rank's gradient of a shared head": one_rank_s_gradient_of_a_shared_head,
    "heads beside another KV head": heads_beside_another_kv_head,
    "runs of rows in another order": runs_of_rows_in_another_order,
    "forget a wait": forget_a_wait,
}


def from_head_0(owner: type) -> AbstractContextManager:
    return patch.object(owner, "from_head", lambda self, first: self)


def numbers_of_another_part(owner: type) -> AbstractContextManager:
    by_part = owner.tensors_by_part
    return patch.object(owner, "tensors_by_part", lambda self, parts: by_part(self, replace(parts, hosted=parts.hosted[::-1])))


def bias_in_reverse() -> AbstractContextManager:
    by_part = score.Bias.tensors_by_part
    return patch.object(
        score.Bias, "tensors_by_part", lambda self, parts: by_part(replace(self, tensor=self.tensor.flip(-3)), parts)
    )


SCORE_SABOTAGES: dict[str, tuple[str, str, Callable[[], AbstractContextManager]]] = {
    "MaskMod counts heads from 0": ("nothing", "blind rows", lambda: from_head_0(mask.MaskMod)),
    "ScoreMod counts heads from 0": ("global mod", "causal", lambda: from_head_0(score_mod.ScoreMod)),
    "Dropout counts heads from 0": ("dropout", "causal", lambda: from_head_0(score.Dropout)),
    "slopes of another part": ("alibi", "causal", lambda: numbers_of_another_part(score._ByHead)),
    "sinks of another part": ("sinks", "causal", lambda: numbers_of_another_part(score._ByHead)),
    "bias of another head": ("bias htt", "causal", bias_in_reverse),
    "a shared bias with one rank's gradient": ("bias tt", "causal", one_rank_s_gradient_of_a_shared_head),
}
