"""Exact attention over a sharded sequence: the one file where geometry, kernels and wires meet.

Note [final lse]: with the final out and lse of a row, the gradient of a part of its keys needs nothing from the other parts:
p = exp(s - lse), ds = p * (dp - delta), delta = rowsum(dout * out) - dlse. So backward visits add up in any order, and a
single- device flash backward serves a ring (Liu et al., arXiv 2310.01889; Dao et al., arXiv 2205.14135).

Note [call]: forward and backward are one custom op each, which `torch.compile` and activation checkpointing see as one node.
Ops take tensors and strings, so what else a call needs is a `Call`, handed over by name. An eager graph keeps its calls alive;
a compiled one holds only the name, so calls named while compiling are kept for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from ring_attn.kernels import Grads, Kernel, Problem, Upstream, resolve
from ring_attn.mask import Causal, Mask
from ring_attn.partial import Partial, accumulator_dtype
from ring_attn.tiles import Plan, make_plan

if TYPE_CHECKING:
    from ring_attn.ring import Ring


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ring: Ring,
    mask: Mask = Causal(),  # noqa: B008 (frozen)
    score: object = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention output [b, s, h, dv] of this process's query rows over the keys of all ranks, in q's dtype.

    q [b, s, h, d], k [b, s, g, d], v [b, s, g, dv]: the rows this process hosts, sharded as `ring.shard` does; h a multiple of
    g, and query head i reads KV head i // (h // g). `mask` holds in global positions. `softmax_scale` defaults to d ** -0.5.
    With `return_lse`, also lse [b, h, s] (natural log; fp32, float64 for float64 inputs), differentiable. A row that sees no
    key has output 0, lse -inf and zero gradients. Every process of the ring must make the same calls in the same order. Under
    torch.compile, make masks outside the compiled function.

    Raises ValueError for shapes, dtypes, devices or masks that do not fit, KernelUnavailable (a ValueError) where a kernel
    asked for by name cannot do it, RuntimeError where a transfer failed.
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a ring_attn mask such as Causal() & Window(1024), got {type(mask).__name__}")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if torch.compiler.is_compiling():
        name = _name_kept(ring, mask, score, scale)
    else:
        name, call = _named(Call(ring, mask, score, scale))
        _validate(q, k, v, call)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            resolve(ring.kernel, call.problem(q, k, v, "backward"))
    out, lse = _forward_op(q, k, v, name)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Call:
    """What an attention call needs beside its tensors."""

    ring: Ring
    mask: Mask
    score: object
    scale: float

    def seq_len(self, q: Tensor) -> int:
        return q.shape[1] // len(self.ring.hosted) * self.ring.size

    def plan(self, q: Tensor) -> Plan:
        layout = self.ring.layout(self.seq_len(q))
        return make_plan(layout, self.mask, self.ring.exchange.meets(self.ring.size))

    def problem(self, q: Tensor, k: Tensor, v: Tensor, direction: str, lse_grad: bool = False) -> Problem:
        rules = self.mask.rules()
        left_bounded = any(rule.left is not None for rule in rules)
        documents = any(rule.document_ends is not None for rule in rules)
        full = all(rule.right is None for rule in rules)
        return Problem(
            direction,
            q.device.type,
            q.dtype,
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            head_dim=q.shape[3],
            v_head_dim=v.shape[3],
            left_bounded=left_bounded,
            lse_grad=lse_grad,
            score=self.score,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            kind="documents" if documents else "window" if left_bounded else "full" if full else "causal",
            rows=1 << (q.shape[1] // len(self.ring.hosted)).bit_length() - 1,
        )

    def signature(self, q: Tensor, k: Tensor, v: Tensor) -> tuple:
        """What must be alike on every rank: the three shapes, then everything else."""
        kinds = frozenset((str(x.dtype), x.device.type) for x in (q, k, v))
        return (tuple(q.shape), tuple(k.shape), tuple(v.shape), kinds, self.mask, self.score, self.scale)

    def hosted(self, x: Tensor, dim: int = 1) -> list[Tensor]:
        """The rows of each hosted rank."""
        return list(x.split(x.shape[dim] // len(self.ring.hosted), dim))


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    _validate(q, k, v, call)
    ring, plan = call.ring, call.plan(q)
    kernel: Kernel = resolve(ring.kernel, call.problem(q, k, v, "forward"))
    out = q.new_empty(*q.shape[:3], v.shape[3])
    queries, outs = call.hosted(q), call.hosted(out)
    partials: list[Partial | None] = [None] * len(queries)
    kv = list(zip(call.hosted(k), call.hosted(v), strict=True))
    for visit in ring.exchange.tour(ring.transport, kv, plan.steps, what=f"{ring.exchange.name} forward"):
        for i, rank in enumerate(ring.hosted):
            partials[i] = kernel.forward(
                queries[i],
                *visit.kv[i],
                plan[rank, visit.step],
                scale=call.scale,
                score=call.score,
                into=partials[i],
                out=outs[i] if visit.last else None,
            )
    return out, torch.cat([partial.lse for partial in partials], -1)


def _backward(up: Upstream, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    ring, plan = call.ring, call.plan(q)
    kernel: Kernel = resolve(ring.kernel, call.problem(q, k, v, "backward", up.dlse is not None))
    queries = call.hosted(q)
    dq = torch.zeros_like(q, dtype=up.lse.dtype)
    dqs = call.hosted(dq)
    ups = [Upstream(*parts) for parts in zip(*(_hosted_upstream(up, call)), strict=True)]
    kv = list(zip(call.hosted(k), call.hosted(v), strict=True))
    homeward = ring.exchange.homeward(ring.transport, plan.steps, up.lse.dtype)
    for visit in ring.exchange.tour(ring.transport, kv, plan.steps, what=f"{ring.exchange.name} backward"):
        buffers = homeward.buffers(visit)
        for i, rank in enumerate(ring.hosted):
            kernel.backward(
                ups[i],
                queries[i],
                *visit.kv[i],
                plan[rank, visit.step],
                scale=call.scale,
                score=call.score,
                into=Grads(dqs[i], *buffers[i]),
            )
        homeward.add(visit)
    dk, dv = (torch.cat(parts, 1) for parts in zip(*homeward.collect(), strict=True))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _hosted_upstream(up: Upstream, call: Call) -> tuple[list, list, list, list]:
    lse = [x.contiguous() for x in call.hosted(up.lse, 2)]
    dlse = [None] * len(lse) if up.dlse is None else call.hosted(up.dlse, 2)
    return call.hosted(up.dout), call.hosted(up.out), lse, dlse


_names: WeakKeyDictionary[Call, str] = WeakKeyDictionary()
_calls: WeakValueDictionary[str, Call] = WeakValueDictionary()
_kept: list[Call] = []
_counter = count()


def _named(call: Call) -> tuple[str, Call]:
    """The call and its name, see Note [call]; equal calls share one while any of them lives."""
    name = _names.get(call)
    if name is not None:
        return name, _calls[name]
    name = f"call{next(_counter)}"
    _names[call], _calls[name] = name, call
    return name, call


def _name_kept(ring: Ring, mask: Mask, score: object, scale: float) -> str:
    """The name of a call that a compiled graph may use at any later time. Runs while compiling."""
    name, call = _named(Call(ring, mask, score, scale))
    _kept.append(call)
    return name


# What torch.compiler.assume_constant_result sets; that function imports all of Dynamo, here at import time.
_name_kept._dynamo_marked_constant = True


@torch.library.custom_op("ring_attn::forward", mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor, call: str) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, _calls[call])


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, call: str) -> tuple[Tensor, Tensor]:
    b, s, h, _ = q.shape
    return q.new_empty(b, s, h, v.shape[3]), q.new_empty(b, h, s, dtype=accumulator_dtype(q.dtype))


@torch.library.custom_op("ring_attn::backward", mutates_args=())
def _backward_op(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(Upstream(dout, out, lse, dlse), q, k, v, _calls[call])


@_backward_op.register_fake
def _(dout, dlse, q, k, v, out, lse, call) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, name = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.name, ctx.call = name, _calls.get(name)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dout: Tensor | None, dlse: Tensor | None):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, None
    dout = torch.zeros_like(out) if dout is None else dout
    return *_backward_op(dout, dlse, q, k, v, out, lse, ctx.name), None


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)


def _validate(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
    """Raises unless the call can be done and all ranks make the same one; remembered, so it costs once a signature."""
    signature = call.signature(q, k, v)
    if call.ring.has_agreed(signature):
        return
    _check(q, k, v, call)
    call.mask.check(call.seq_len(q), q.shape[0])
    call.ring.layout(call.seq_len(q))
    resolve(call.ring.kernel, call.problem(q, k, v, "forward"))
    call.ring.agree(signature, q.device)


def _check(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
    """Raises for inputs that break a rule, naming the rule and the values."""
    if call.score is not None:
        raise NotImplementedError(f"score={call.score!r}: no kernel here supports score modifiers yet; pass score=None")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, rows, heads, head_dim], got shape {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must have a floating dtype, got {x.dtype}")
    if len({x.dtype for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    if len({x.device for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    (b, s, h, d), g = q.shape, k.shape[2]
    if k.shape[:2] != (b, s) or v.shape[:2] != (b, s):
        raise ValueError(
            f"q, k and v must have the same batch and rows, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
            f"shard all three with the same ring"
        )
    if k.shape[3] != d or v.shape[2] != g:
        raise ValueError(
            f"k must share q's head_dim and v must share k's heads, got k {tuple(k.shape)}, q head_dim {d}, v {tuple(v.shape)}"
        )
    if min(b, s, h, g, d, v.shape[3]) < 1:
        raise ValueError(f"every dimension must be at least 1, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if h % g:
        raise ValueError(f"num_heads {h} must be a multiple of num_kv_heads {g}: query head i reads KV head i // (h // g)")
    if s % len(call.ring.hosted):
        raise ValueError(f"{s} rows cannot be the equal shards of {len(call.ring.hosted)} hosted ranks; use ring.shard")
