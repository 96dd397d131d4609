"""Heads against sequence: ranks trade their rows of all heads for all rows of some heads, attend, and trade back.

Note [two axes]: U ranks hold one ring rank's shard together, each a run of its rows. After an all-to-all among them each has
the whole shard for one U-th of the heads, and its ring attends as if there were no other (DeepSpeed-Ulysses, Jacobs et al.,
arXiv 2309.14509; beside a ring, Fang and Zhao, arXiv 2405.07719). The trade back is the inverse, so each is the other's
gradient.

Note [shared heads]: with more ranks than KV heads, each KV head goes to the U // g ranks whose query heads read it, and its
gradient is the sum of theirs. Likewise a bias without a head dimension goes to every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ring_attn.call import called, part_names, validate
from ring_attn.comm.two_axes import TwoAxes
from ring_attn.score import HeadParts, Score

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], str], tuple[Tensor, Tensor]]


def over_heads(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Sequence[Score],
    axes: TwoAxes,
    call: str,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the rows this process hosts, as `attend` gives them, where every rank attends with a part of the heads.

    `scores`: those whose tensors `attend` takes, in order. lse is None where it is not asked for: it would be one more trade.
    """
    traded = _enter(q, k, v, [x for score in scores for x in score.tensors()], call)
    parts = HeadParts(axes.ulysses, axes.ulysses_hosted, lambda x: _to_heads([x], call))
    by_score = [score.tensors_by_part(parts) for score in scores]
    found = []
    for i, name in enumerate(part_names(call, q.shape[2])):
        tensors = [x for of_score in by_score for x in of_score[i]]
        found.append(attend(*traded[3 * i : 3 * i + 3], tensors, name))
    (out,) = _to_rows([out for out, _ in found], call)
    if not return_lse:
        return out, None
    (lse,) = _to_rows([lse.transpose(1, 2).unsqueeze(-1) for _, lse in found], call)
    return out, lse.squeeze(-1).transpose(1, 2)


@torch.library.custom_op("ring_attn::enter", mutates_args=())
def _enter(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], call: str) -> list[Tensor]:
    """`_to_heads` of q, k and v, once all ranks have agreed on the call."""
    validate(q, k, v, tensors, called(call))
    return _rows_for_heads([q, k, v], _axes(call))


@torch.library.custom_op("ring_attn::to_heads", mutates_args=())
def _to_heads(xs: Sequence[Tensor], call: str) -> list[Tensor]:
    """From [b, s, h, d] with this process's rows, for each hosted part and x: [b, U * s, h // U, d], the rows of its group."""
    return _rows_for_heads(xs, _axes(call))


@torch.library.custom_op("ring_attn::to_rows", mutates_args=())
def _to_rows(xs: Sequence[Tensor], call: str) -> list[Tensor]:
    """The inverse of `_to_heads`."""
    axes = _axes(call)
    each, ring_hosted = len(xs) // len(axes.ulysses_hosted), len(axes.traders)
    pieces = [x.chunk(ring_hosted, 1) for x in xs]
    shards = [[x[r] for x in pieces[i : i + each]] for r in range(ring_hosted) for i in range(0, len(xs), each)]
    return [_joined(column) for column in zip(*_trade(shards, axes, give=1, take=2, what="heads for rows"), strict=True)]


def _rows_for_heads(xs: Sequence[Tensor], axes: TwoAxes) -> list[Tensor]:
    enough = [x if x.shape[2] >= axes.ulysses else x.repeat_interleave(axes.ulysses // x.shape[2], 2) for x in xs]
    shards = list(zip(*(x.chunk(len(axes.hosted), 1) for x in enough), strict=True))
    traded = _trade(shards, axes, give=2, take=1, what="rows for heads")
    return [_joined(column) for part in zip(*axes.by_ring_rank(traded), strict=True) for column in zip(*part, strict=True)]


def _trade(shards: Sequence[Sequence[Tensor]], axes: TwoAxes, *, give: int, take: int, what: str) -> list[list[Tensor]]:
    """Every hosted rank's tensors cut along `give`, a cut to each rank it trades with, and what it gets joined along `take`."""
    traded = []
    for traders, ranks in zip(axes.traders, axes.by_ring_rank(shards), strict=True):
        cuts = [[x.chunk(axes.ulysses, give) for x in tensors] for tensors in ranks]
        shapes = [x[0].shape for x in cuts[0]]
        parts = [[_pack(part) for part in zip(*rank, strict=True)] for rank in cuts]
        for got in traders.all_to_all(parts, what=what).wait():
            traded.append([torch.cat(x, take) for x in zip(*(_unpack(flat, shapes) for flat in got), strict=True)])
    return traded


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one dtype as one flat message, copied: what is sent belongs to the transport."""
    return torch.cat([x.reshape(-1) for x in tensors])


def _unpack(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _joined(shards: Sequence[Tensor]) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(shards, 1)


def _axes(call: str) -> TwoAxes:
    return called(call).ring.transport


@_enter.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], call: str) -> list[Tensor]:
    return _fake_to_heads([q, k, v], call)


@_to_heads.register_fake
def _fake_to_heads(xs: Sequence[Tensor], call: str) -> list[Tensor]:
    axes = _axes(call)
    hosted, ulysses = len(axes.ulysses_hosted), axes.ulysses
    shapes = [(b, s // hosted * ulysses, max(1, h // ulysses), d) for b, s, h, d in (x.shape for x in xs)]
    return [x.new_empty(shape) for _ in range(hosted) for x, shape in zip(xs, shapes, strict=True)]


@_to_rows.register_fake
def _(xs: Sequence[Tensor], call: str) -> list[Tensor]:
    axes = _axes(call)
    hosted, ulysses = len(axes.ulysses_hosted), axes.ulysses
    shapes = [(b, s // ulysses * hosted, h * ulysses, d) for b, s, h, d in (x.shape for x in xs[: len(xs) // hosted])]
    return [x.new_empty(shape) for x, shape in zip(xs, shapes, strict=False)]


def _setup_context(ctx, inputs, output) -> None:
    *xs, ctx.name = inputs
    ctx.call, ctx.heads = called(ctx.name), [x.shape[2] for x in xs[0]]


def _setup_enter(ctx, inputs, output) -> None:
    *qkv, tensors, ctx.name = inputs
    ctx.call, ctx.heads, ctx.num_tensors = called(ctx.name), [x.shape[2] for x in qkv], len(tensors)


def _grads_of_rows(ctx, grads: list[Tensor]) -> list[Tensor]:
    """Gradients of what was given to `_to_heads`: see Note [shared heads] for the sum."""
    rows = zip(_to_rows(grads, ctx.name), ctx.heads, strict=True)
    return [x if x.shape[2] == heads else x.unflatten(2, (heads, -1)).sum(3) for x, heads in rows]


_enter.register_autograd(
    lambda ctx, grads: (*_grads_of_rows(ctx, grads), [None] * ctx.num_tensors, None), setup_context=_setup_enter
)
_to_heads.register_autograd(lambda ctx, grads: (_grads_of_rows(ctx, grads), None), setup_context=_setup_context)
_to_rows.register_autograd(lambda ctx, grads: (_to_heads(grads, ctx.name), None), setup_context=_setup_context)
