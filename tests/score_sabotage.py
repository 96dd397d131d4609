"""Breaks scores and mask functions on purpose; each sabotage names the scores and masks of tests/scores.py that must notice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import patch

import torch

from ring_attn import attention, mask, scaling, score
from ring_attn.kernels import reference


def positions_inside_the_shard() -> AbstractContextManager:
    cells = reference._Block._cells.func

    def broken(self):
        found = cells(self)
        return replace(found, q_pos=found.q_rows, kv_pos=torch.arange(len(found.kv_pos)))

    return patch.object(reference._Block, "_cells", property(broken))


def steps_in_reverse() -> AbstractContextManager:
    apply = score.Scores.apply
    return patch.object(score.Scores, "apply", lambda self, s, c: apply(replace(self, steps=self.steps[::-1]), s, c))


def softcap_without_its_derivative() -> AbstractContextManager:
    apply = score.SoftCap.apply
    return patch.object(score.SoftCap, "apply", lambda self, s, c: s + (apply(self, s, c) - s).detach())


def alibi_without_the_absolute_value() -> AbstractContextManager:
    apply = lambda self, s, c: s - self.tensor[c.heads][:, None, None] * c.distance  # noqa: E731
    return patch.object(score.Alibi, "apply", apply)


def bias_of_the_first_rank() -> AbstractContextManager:
    rows = lambda self, start, stop: replace(self, tensor=self.tensor[..., : stop - start, :])  # noqa: E731
    return patch.object(score.Bias, "rows", rows)


def bias_of_the_first(dim: str) -> AbstractContextManager:
    apply = score.Bias.apply
    return patch.object(score.Bias, "apply", lambda self, s, c: apply(self, s, replace(c, **{dim: getattr(c, dim) * 0})))


def gradient_of_the_last_block() -> AbstractContextManager:
    before = reference._Block._before_modifiers

    def broken(self, raw, ds, into):
        for total in into.score:
            total.zero_()
        return before(self, raw, ds, into)

    return patch.object(reference._Block, "_before_modifiers", broken)


def gradient_of_scores_past_the_modifiers() -> AbstractContextManager:
    before = reference._Block._before_modifiers

    def broken(self, raw, ds, into):
        before(self, raw, ds, into)
        return ds

    return patch.object(reference._Block, "_before_modifiers", broken)


def no_sinks() -> AbstractContextManager:
    return patch.object(attention, "only_sinks", lambda q, sinks: None)


def sink_of_another_head() -> AbstractContextManager:
    only_sinks = attention.only_sinks
    return patch.object(attention, "only_sinks", lambda q, sinks: only_sinks(q, sinks.roll(1)))


def last_gradient_times(factor: float) -> AbstractContextManager:
    backward = attention._backward

    def broken(*args):
        *grads, last = backward(*args)
        return [*grads, last * factor]

    return patch.object(attention, "_backward", broken)


def no_dropout_in(direction: str) -> AbstractContextManager:
    method = getattr(reference._Block, direction)

    def broken(self, *args):
        return method(replace(self, score=self.score and replace(self.score, dropout=None)), *args)

    return patch.object(reference._Block, direction, broken)


def dropout_unscaled() -> AbstractContextManager:
    keep = score.Dropout.keep
    return patch.object(score.Dropout, "keep", lambda self, cells: keep(self, cells) * (1 - self.p))


def dropout_alike_in(dim: str) -> AbstractContextManager:
    keep = score.Dropout.keep
    return patch.object(score.Dropout, "keep", lambda self, c: keep(self, replace(c, **{dim: getattr(c, dim) * 0})))


def dropout_out_of_the_sum() -> AbstractContextManager:
    """What is dropped leaves the softmax's sum as well, as if its score were -inf."""
    masked = reference._Block._masked

    def broken(self, scores):
        return masked(self, scores).masked_fill(self._dropped(torch.ones_like(scores)) == 0, -torch.inf)

    return patch.object(reference._Block, "_masked", broken)


def norm_of(groups: Callable[[int], int], rows: bool = False) -> AbstractContextManager:
    normalised = scaling.of_unit_norm
    return patch.object(scaling, "of_unit_norm", lambda x, n: x / x.norm() if rows else normalised(x, groups(n)))


def learned_scale_without_gradient() -> AbstractContextManager:
    of_cosine = scaling._of_cosine

    def broken(q, k, cosine):
        return of_cosine(q, k, replace(cosine, scale=cosine.scale.detach() + 0 * cosine.scale))

    return patch.object(scaling, "_of_cosine", broken)


def forget_functions() -> AbstractContextManager:
    return patch.object(mask.MaskMod, "rules", lambda self: (mask.Rule(),))


def batch_for_head() -> AbstractContextManager:
    return _asked_by(lambda fn: lambda b, h, q, k: fn(h, b, q, k))


def query_for_key() -> AbstractContextManager:
    return _asked_by(lambda fn: lambda b, h, q, k: fn(b, h, k, q))


def _asked_by(change: Callable) -> AbstractContextManager:
    allowed = reference.allowed_cells
    return patch.object(reference, "allowed_cells", lambda mod, *cells: allowed(replace(mod, fn=change(mod.fn)), *cells))


def skip_blocks_by_their_first_head() -> AbstractContextManager:
    has_cells = property(lambda self: not self.tile.predicates or bool(self._allowed[:1, :1].any()))
    return patch.object(reference._Block, "has_cells", has_cells)


CAUSAL, ROWS, FUNCTION = ("causal",), ("documents", "blind rows"), ("function", "blind rows")
SABOTAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[], AbstractContextManager]]] = {
    "alibi inside the shard": (("alibi",), CAUSAL, positions_inside_the_shard),
    "dropout inside the shard": (("dropout",), CAUSAL, positions_inside_the_shard),
    "function inside the shard": (("nothing",), FUNCTION, positions_inside_the_shard),
    "score function inside the shard": (("global mod",), CAUSAL, positions_inside_the_shard),
    "steps in reverse": (("alibi, softcap",), CAUSAL, steps_in_reverse),
    "softcap without its derivative": (("softcap",), CAUSAL, softcap_without_its_derivative),
    "alibi without the absolute value": (("alibi",), ("full",), alibi_without_the_absolute_value),
    "bias of the first rank": (("bias tt",), CAUSAL, bias_of_the_first_rank),
    "bias of the first head": (("bias htt",), CAUSAL, lambda: bias_of_the_first("heads")),
    "bias of the first batch row": (("bias b1tt",), ROWS, lambda: bias_of_the_first("batch")),
    "gradient of the last block": (("alibi",), CAUSAL, gradient_of_the_last_block),
    "gradient past the modifiers": (("closure mod",), CAUSAL, gradient_of_scores_past_the_modifiers),
    "no sinks": (("sinks",), CAUSAL, no_sinks),
    "sink of another head": (("sinks",), CAUSAL, sink_of_another_head),
    "sinks' gradient with the other sign": (("sinks",), CAUSAL, lambda: last_gradient_times(-1)),
    "slopes' gradient twice": (("alibi",), CAUSAL, lambda: last_gradient_times(2)),
    "no gradient of a global": (("global mod",), CAUSAL, lambda: last_gradient_times(0)),
    "no dropout in the forward": (("dropout",), CAUSAL, lambda: no_dropout_in("forward")),
    "no dropout in the backward": (("dropout",), CAUSAL, lambda: no_dropout_in("backward")),
    "dropout unscaled": (("dropout",), CAUSAL, dropout_unscaled),
    "dropout alike in every head": (("dropout",), CAUSAL, lambda: dropout_alike_in("heads")),
    "dropout alike in every batch row": (("dropout",), CAUSAL, lambda: dropout_alike_in("batch")),
    "dropout out of the sum": (("dropout",), CAUSAL, dropout_out_of_the_sum),
    "one norm for all groups": (("cosine groups",), CAUSAL, lambda: norm_of(lambda n: 1)),
    "one norm for all rows": (("cosine",), CAUSAL, lambda: norm_of(lambda n: n, rows=True)),
    "learned scale without gradient": (("learned cosine",), CAUSAL, learned_scale_without_gradient),
    "forget functions": (("nothing",), FUNCTION, forget_functions),
    "batch row for head": (("nothing",), FUNCTION, batch_for_head),
    "query for key": (("nothing",), FUNCTION, query_for_key),
    "skip blocks by their first head": (("nothing",), FUNCTION, skip_blocks_by_their_first_head),
}
