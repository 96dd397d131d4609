"""Exact attention over a sharded sequence: the one file where geometry, kernels and wires meet.

Note [final lse]: with the final out and lse of a row, the gradient of a part of its keys needs nothing from the other parts:
p = exp(s - lse), ds = p * (dp - delta), delta = rowsum(dout * out) - dlse. So backward visits add up in any order, and a
single-device flash backward serves a ring (Liu et al., arXiv 2310.01889; Dao et al., arXiv 2205.14135).

Note [rest]: an out rounded to 16 bits makes delta wrong, by as much for all keys of a row. In dq and dk that drowns in other
rounding, but the gradient of slopes adds it up times the keys' distances, and ends with up to four times the error of plain
PyTorch, whose softmax takes delta from its own products. So where tensors of score modifiers learn, `rest` is kept beside out:
what rounding took from it, again in 16 bits. It is 0 where a library hands back out in 16 bits in one call, as flex may.

Note [parts of a backward]: sums of dq, and of dK and dV of what a visit meets, take more memory than all inputs. Heads
have nothing to do with each other, so where that is much, a backward goes by parts of the heads, for the memory of these and of
what one part before them has on its way home; in no more parts than are work enough to fill a GPU each. Where scores or masks
tell heads apart or learn, and where a ring keeps KV, all go at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ring_attn.by_document import LayoutChoice
from ring_attn.call import Call, called, given_to, name_kept, named, validate
from ring_attn.exchange.base import HowHome
from ring_attn.inputs import check_input, check_tensors, wants_gradients
from ring_attn.kernels import Upstream
from ring_attn.kernels.functions import check_unwritten, written_to
from ring_attn.kernels.sums import Grads, Sum
from ring_attn.mask import Causal, Mask, check_mask, parts_of
from ring_attn.overlap import PartOfBackward, overlapping, to_its_end
from ring_attn.partial import accumulator_dtype, only_sinks
from ring_attn.scaling import scaled
from ring_attn.score import Score, listed, sort_scores
from ring_attn.settled import Settled
from ring_attn.ulysses import over_heads
from ring_attn.watched import watched

if TYPE_CHECKING:
    from ring_attn.ring import Ring

_TAGS = (torch.Tag.cudagraph_unsafe,)  # for compilers: short calls are graphs of their own, messages none
_KEPT = 3
"""So many visits' dq is kept until it is summed up, see Note [late] of `ring_attn.kernels.sums`."""


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ring: Ring,
    mask: Mask = Causal(),  # noqa: B008 (frozen)
    score: Score | Sequence[Score] | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    kv_layout: LayoutChoice | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention output [b, s, h, dv] of this process's query rows over the keys of all ranks, in q's dtype.

    q [b, s, h, d], k [b, s, g, d], v [b, s, g, dv]: the rows this process hosts, sharded as `ring.shard` does; h a multiple of
    g, and query head i reads KV head i // (h // g). Inputs of three dimensions have one head: all three, where batch and heads
    are merged into [b * h, s, d], or k and v alone. `mask` and `score` (one, or a list applied in order) hold in global
    positions. `softmax_scale`, a number, defaults to d ** -0.5. With `return_lse`, also lse [b, h, s] (natural log; fp32,
    float64 for float64 inputs), differentiable. A row that sees no key has output 0, lse -inf and zero gradients. Every process
    of the ring must make the same calls in the same order. Under torch.compile, make masks and scores outside the compiled
    function; inside masks may be joined and Sinks made. Until the backward, a score with tensors that learn takes the memory of
    one more output in 16 bits, Note [rest].

    `kv_layout`: for cross-attention, the layout by which k and v [b, skv, g, ...] are sharded, `ring.shard(k, layout=...)`;
    only where it is named may they come from a sequence of another length than the queries'.

    Raises TypeError for what is no tensor, mask, score or ring, ValueError for shapes, dtypes, devices or masks that are wrong,
    KernelUnavailable (a ValueError) where a kernel asked for by name cannot do it, RuntimeError where a transfer failed,
    NotImplementedError under forward-mode AD.
    """
    check_mask(mask)
    if not hasattr(ring, "transport"):
        raise TypeError(f"ring must be a Ring, on one device Ring.simulated(1, 'contiguous'), got {type(ring).__name__}")
    check_tensors(q=q, k=k, v=v)
    merged = q.dim() == 3
    q, k, v = (x.unsqueeze(2) if x.dim() == 3 else x for x in (q, k, v))
    cosine, modifiers, sinks = sort_scores(score)
    tensors = [*modifiers.tensors(), *([] if sinks is None else [sinks.tensor])]
    try:
        if cosine is not None:
            # Norms are of heads, which must be there.
            check_input("q", q)
            check_input("k", k)
        q, k, scale = scaled(q, k, cosine, softmax_scale)
    except ValueError as refusal:
        if not torch.compiler.is_compiling():
            Call.make(ring, mask, score, math.nan, kv_layout).refuse(refusal, q, k, v, tensors)
        raise
    if torch.compiler.is_compiling():
        name = name_kept(scale, len(parts_of(mask)), *map(given_to, (ring, kv_layout, *parts_of(mask), *listed(score))))
    else:
        if any(unpack_dual(x).tangent is not None for x in (q, k, v, *tensors)):
            raise NotImplementedError("ring_attention has no forward-mode derivative (jvp); take its gradients by backward")
        name, call = named(Call.make(ring, mask, score, scale, kv_layout))
        settled = validate(q, k, v, tensors, call)
        if wants_gradients(q, k, v, *tensors):
            settled.kernel("backward")
    if ring.ulysses > 1:
        with_tensors = (*modifiers.steps, *([] if sinks is None else [sinks]))
        out, lse = over_heads(attend, q, k, v, with_tensors, ring.transport, name, return_lse=return_lse)
    else:
        out, lse = attend(q, k, v, tensors, name)
    out, lse = (out.squeeze(2), lse.squeeze(1)) if merged else (out, lse)
    return (out, lse) if return_lse else out


def attend(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], call: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call of that name; differentiable."""
    if not torch.compiler.is_compiling() and wants_gradients(q, k, v, *tensors):
        return _Attend.apply(call, q, k, v, *tensors)
    return (_forward_op if watched(q, k, v, *tensors) else _forward_of)(q, k, v, tensors, call)[:2]


def _forward(call: Call, settled: Settled, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> list[Tensor]:
    """[out, lse, what is kept for the backward: what came from other ranks if the ring keeps it, and rest, see Note [rest]]."""
    of_modifiers, sinks = call.split(tensors)
    ring, plan, exchange, kernel = call.ring, settled.plan, settled.exchange, settled.kernel("forward")
    with_rest = call.keeps_rest(q)
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=accumulator_dtype(q.dtype) if with_rest else q.dtype)
    queries, outs = call.hosted(q), call.hosted(out)
    modifiers = call.hosted_modifiers(of_modifiers, queries[0].shape[1])
    partials = [[None if sinks is None else only_sinks(query, sinks)] for query in queries]
    kv, kept = list(zip(call.hosted(k), call.hosted(v), strict=True)), []
    what, parts = f"{exchange.name} forward", settled.forward_parts
    where = ring.transport, kv, plan
    for visit in exchange.by_heads(*where, parts, what=what) if parts > 1 else exchange.tour(*where, what=what):
        part, count = visit.heads
        for i, rank in enumerate(ring.hosted):
            if len(partials[i]) < count:
                partials[i] = partials[i][0].head_parts(count)
            partials[i][part] = kernel.forward(
                _of_part(queries[i], visit.heads),
                *visit.kv[i],
                plan[rank, visit.step],
                scale=call.scale,
                score=modifiers[i],
                into=partials[i][part],
                out=_of_part(outs[i], visit.heads) if visit.last else None,
            )
        if ring.keep_kv and visit.step:
            kept += visit.came
        # Before the tour goes on and asks for the visit after the next.
        del visit
    made = [(x.acc, _of_part(to, (n, len(one)))) for one, to in zip(partials, outs, strict=True) for n, x in enumerate(one)]
    if len(made) == 1:
        out = made[0][0]
    else:
        for acc, to in made:
            if acc.data_ptr() != to.data_ptr():
                to.copy_(acc)
    if with_rest:
        whole, out = out, out.to(q.dtype)
        kept.append((whole - out).to(q.dtype))
    lse = [torch.cat([x.lse for x in one], 1) if len(one) > 1 else one[0].lse for one in partials]
    return [out, torch.cat(lse, -1) if len(lse) > 1 else lse[0].contiguous(), *kept]


def _of_part(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """That part of the heads of x [b, s, h, d]; heads: its number, and how many there are."""
    part, count = heads
    return x if count == 1 else x.chunk(count, 2)[part]


def _backward(
    call: Call,
    settled: Settled,
    wanted: Sequence[bool],
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *others: Tensor,
) -> list[Tensor]:
    """[dq, dk, dv, the gradients of scores' tensors, empty where not `wanted`]. `others`: these tensors, what is kept."""
    tensors, kept = others[: len(wanted)], others[len(wanted) :]
    *kept, rest = kept if call.keeps_rest(q) else (*kept, None)
    up, (of_modifiers, sinks) = Upstream(dout, out, lse, dlse, rest), call.split(tensors)
    totals = [torch.zeros_like(x, dtype=up.lse.dtype) if want else None for x, want in zip(of_modifiers, wanted, strict=False)]
    ups = [_hosted_upstream(part, call) for part in up.head_parts(settled.head_parts)]
    grads: list[Tensor | None] = [None] * 3
    parts = (
        _of_heads(of_heads, n, (q, k, v), grads, kept, (of_modifiers, totals), settled, call) for n, of_heads in enumerate(ups)
    )
    if settled.overlaps:
        overlapping(parts)
    else:
        for part in parts:
            to_its_end(part)
    if sinks is not None:
        # A sink is a key with v = 0, so its dp is 0.
        p = (sinks.to(up.lse.dtype)[:, None] - up.lse.masked_fill(up.lse == -torch.inf, torch.inf)).exp()
        delta = torch.cat([torch.cat([one.delta for one in part], -1) for part in ups], 1)
        totals.append(-delta.mul(p).sum((0, 2)))
    of_tensors = [x.new_empty(0) if total is None else total.to(x.dtype) for total, x in zip(totals, tensors, strict=True)]
    return [*grads, *of_tensors]


def _of_heads(
    ups: Sequence[Upstream],
    part: int,
    inputs: Sequence[Tensor],
    grads: list[Tensor | None],
    kept: Sequence[Tensor],
    learning: tuple[Sequence[Tensor], Sequence[Tensor | None]],
    settled: Settled,
    call: Call,
) -> PartOfBackward:
    """Writes the gradients of a part of the heads of q, k and v, of which each hosted rank has `ups`, to that part of `grads`,
    which are made when they are first wanted, or where it is all of them puts there what was made elsewhere; and adds those of
    modifiers' tensors to their totals, both `learning`.
    """
    heads = part, settled.head_parts
    q, k, v = (_of_part(x, heads) for x in inputs)
    of_modifiers, totals = learning
    ring, plan, exchange, sums = call.ring, settled.plan_back, settled.back, ups[0].lse.dtype
    kernel = settled.kernel("backward", lse_grad=ups[0].dlse is not None)
    queries = call.hosted(q)
    kv = list(zip(call.hosted(k), call.hosted(v), strict=True))
    modifiers = call.hosted_modifiers(of_modifiers, queries[0].shape[1])
    score_grads = call.hosted_score_grads(totals, of_modifiers, queries[0].shape[1])

    # As late as may be: while visits are met, little lives but what they need.
    def of_ranks(*which: int) -> list[tuple[Tensor, ...]]:
        for n in which:
            grads[n] = inputs[n].new_empty(inputs[n].shape) if grads[n] is None else grads[n]
        return list(zip(*(call.hosted(_of_part(grads[n], heads)) for n in which), strict=True))

    how = HowHome(sums, wire=settled.home, busy=settled.overlaps, aim=lambda i: of_ranks(1, 2)[i])
    homeward = exchange.homeward(ring.transport, plan, how)
    what, sums_q = f"{exchange.name} backward", [Sum([x.shape], sums, x.device) for x in queries]
    if len(plan.steps) == 1:
        for i, sum_q in enumerate(sums_q):
            sum_q.aim = lambda i=i: of_ranks(0)[i]
    begun = part > 0 and settled.ends_at_home
    if begun:
        tour = exchange.own_last(ring.transport, kv, plan, what=what)
        yield False
    else:
        tour = exchange.again(kv, plan, kept) if ring.keep_kv else exchange.tour(ring.transport, kv, plan, what=what)
    for visit in tour:
        if not begun:
            yield visit.last
        begun = False
        for i, (rank, sum_q, sum_kv) in enumerate(zip(ring.hosted, sums_q, homeward.sums(visit), strict=True)):
            kernel.backward(
                ups[i],
                queries[i],
                *visit.kv[i],
                plan[rank, visit.step],
                scale=call.scale,
                score=modifiers[i],
                into=Grads(sum_q.all_rows, sum_kv, score_grads[i]),
            )
        homeward.add(visit)
        if len(plan.steps) > _KEPT:
            for sum_q in sums_q:
                sum_q.settle()
        del visit, sum_kv
    if settled.head_parts == 1 and len(ring.hosted) == 1:
        grads[:1] = sums_q[0].made(q.dtype, lambda: of_ranks(0)[0])
        yield True
        grads[1:] = homeward.collect()[0].made(q.dtype, lambda: of_ranks(1, 2)[0])
        return
    for sum_q, of_q in zip(sums_q, of_ranks(0), strict=True):
        sum_q.write(of_q)
    yield True
    for sum_kv, of_kv in zip(homeward.collect(), of_ranks(1, 2), strict=True):
        sum_kv.write(of_kv)


def _hosted_upstream(up: Upstream, call: Call) -> list[Upstream]:
    """What each hosted rank's rows get."""
    lse = [x.contiguous() for x in call.hosted(up.lse, 2)]
    dlse = [None] * len(lse) if up.dlse is None else call.hosted(up.dlse, 2)
    rest = [None] * len(lse) if up.rest is None else call.hosted(up.rest)
    return [Upstream(*of_rank) for of_rank in zip(call.hosted(up.dout), call.hosted(up.out), lse, dlse, rest, strict=True)]


def _forward_of(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], call: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    this, (q, k, v) = called(call), unit_stride(q, k, v)
    settled = validate(q, k, v, tensors, this)
    with as_given(q):
        out, lse, *kept = settled.run(partial(_forward, this, settled), (q, k, v, *tensors), "forward", this.learns)
    return out, lse, kept


_forward_op = torch.library.custom_op("ring_attn::forward", _forward_of, mutates_args=(), tags=_TAGS)


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], call: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    b, s, h, _ = q.shape
    kept = [k.new_empty(shape) for shape in called(call).kept_shapes(q, k, v)]
    if called(call).keeps_rest(q):
        kept.append(q.new_empty(b, s, h, v.shape[3]))
    return q.new_empty(b, s, h, v.shape[3]), q.new_empty(b, h, s, dtype=accumulator_dtype(q.dtype)), kept


def _backward_of(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    wanted: Sequence[bool],
    call: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    this, (dout, q, k, v) = called(call), unit_stride(dout, q, k, v)
    settled = this.ring.settled.get(this.key(q, k, v, tensors)) or this.settle(q, k, v)
    backward, given = partial(_backward, this, settled, wanted), (dout, dlse, q, k, v, out, lse, *tensors, *kept)
    with as_given(q):
        dq, dk, dv, *of_tensors = settled.run(backward, given, "backward", this.learns, *wanted, lse_grad=dlse is not None)
    return dq, dk, dv, of_tensors


_backward_op = torch.library.custom_op("ring_attn::backward", _backward_of, mutates_args=(), tags=_TAGS)


def as_given(q: Tensor) -> AbstractContextManager:
    """Kernels choose their own precision: autocast would round what they hold in fp32."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def unit_stride(*tensors: Tensor) -> list[Tensor]:
    """The tensors with unit stride in the last dimension, as kernels read them."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@_backward_op.register_fake
def _(dout, dlse, q, k, v, out, lse, tensors, kept, wanted, call) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    of_tensors = [x.new_empty(x.shape if want else 0) for x, want in zip(tensors, wanted, strict=True)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), of_tensors


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, tensors, name = inputs
    out, lse, kept = output
    ctx.save_for_backward(q, k, v, out, lse, *tensors, *kept)
    ctx.name, ctx.call, ctx.num_tensors = name, called(name), len(tensors)
    ctx.written = written_to(ctx.call.mask)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dout: Tensor | None, dlse: Tensor | None, _):
    *grads, of_tensors = _gradients(ctx, dout, dlse, ctx.needs_input_grad[3])
    return *grads, of_tensors, None


def _gradients(ctx, dout: Tensor | None, dlse: Tensor | None, wanted: Sequence[bool]) -> tuple:
    """(dq, dk, dv, the gradients of those tensors for which they are `wanted`), None where there is none."""
    q, k, v, out, lse, *others = ctx.saved_tensors
    tensors, kept = others[: ctx.num_tensors], others[ctx.num_tensors :]
    if dout is None and dlse is None:
        return None, None, None, [None] * len(tensors)
    check_unwritten(ctx.call.mask, ctx.written)
    dout = torch.zeros_like(out) if dout is None else dout
    # Where a gradient is to be differentiated, which the operator refuses.
    backward = _backward_op if torch.is_grad_enabled() or watched(dout, q, k, v, *tensors) else _backward_of
    *grads, of_tensors = backward(dout, dlse, q, k, v, out, lse, tensors, kept, wanted, ctx.name)
    return *grads, [grad if want else None for grad, want in zip(of_tensors, wanted, strict=True)]


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)


class _Attend(torch.autograd.Function):
    """The forward op, differentiable as it is itself: in eager mode PyTorch takes long over an op's lists of tensors."""

    @staticmethod
    def forward(ctx, call: str, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        output = (_forward_op if watched(q, k, v, *tensors) else _forward_of)(q, k, v, tensors, call)
        _setup_context(ctx, (q, k, v, tensors, call), output)
        return output[:2]

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        *grads, of_tensors = _gradients(ctx, dout, dlse, ctx.needs_input_grad[4:])
        return None, *grads, *of_tensors
