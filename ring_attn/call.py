"""`Call`: what an attention call needs beside q, k and v, its name inside the custom ops, and whether it can be done at all.

Note [call]: forward and backward are one custom op each, which `torch.compile` and activation checkpointing see as one node.
Ops take tensors and strings, so what else a call needs is a `Call`, handed over by name. An eager graph keeps its calls alive;
a compiled one holds only the name, so calls named while compiling are kept for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import cast, py_object
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, reduce
from itertools import count
from operator import and_
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from ring_attn.by_document import LayoutChoice
from ring_attn.cost import BACKWARD_OPERATIONS, MACHINES, SHORT, Question, Work, fastest, forward_us, longest_wait
from ring_attn.exchange import Exchange, PullExchange, for_backward, get_exchange, make_plan
from ring_attn.inputs import check_inputs, check_parts, wants_gradients
from ring_attn.kernels import Problem
from ring_attn.layout import Layout, total_rows
from ring_attn.mask import Causal, Mask
from ring_attn.partial import accumulator_dtype
from ring_attn.plan import Plan
from ring_attn.score import Score, Scores, Sinks, sort_scores
from ring_attn.settled import Settled

if TYPE_CHECKING:
    from ring_attn.ring import Ring

_BY_ID = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)  # see `given_to`
_BRIEF = 600.0  # us of a forward that a host takes as long to ask a library for, see Note [brief] of `ring_attn.kernels.order`
_WAIT = 80.0  # us that it takes to launch for two parts of the heads
_SUMS = 350 << 20  # bytes of the sums of dq, dK and dV that a part of the heads may take
_LEAST = 4000.0  # us of a backward in a part of the heads at least: shorter ones cost four H200s 5 to 16 %


class Choices(NamedTuple):
    """What of a ring, and of where the keys lie, must be alike on every rank; named for the words where it is not."""

    layout: LayoutChoice
    kv_layout: LayoutChoice | None
    exchange: str
    ranks_per_node: int | None
    kv_memory: int | None
    keep_kv: bool
    grad_dtype: torch.dtype | None
    link: str
    compares_every_call: bool


@dataclass(frozen=True)
class Call:
    """What an attention call needs beside its tensors. `learns`: a tensor of the score modifiers wants a gradient."""

    ring: Ring
    mask: Mask
    modifiers: Scores
    sinks: bool
    scale: float
    kv_layout: LayoutChoice | None = None
    cosine: tuple[int, bool] | None = None  # groups, and whether the scale is learned, which q then holds
    learns: bool = False

    @classmethod
    def make(
        cls, ring: Ring, mask: Mask, score: Score | Sequence[Score] | None, scale: float, kv_layout: LayoutChoice | None = None
    ) -> Call:
        cosine, modifiers, sinks = sort_scores(score)
        if torch.is_grad_enabled():
            for step in modifiers.steps:
                step.check_gradients()
        of_cosine = None if cosine is None else (cosine.groups, isinstance(cosine.scale, Tensor))
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in modifiers.tensors())
        return cls(ring, mask, modifiers.without_tensors(), sinks is not None, scale, kv_layout, of_cosine, learns)

    def parts(self, num_heads: int) -> tuple[Call, ...]:
        """On a ring of two axes: each hosted Ulysses rank's call on its own ring, for its part of the heads."""
        if num_heads not in self._parts:
            each = num_heads // self.ring.ulysses
            self._parts[num_heads] = tuple(
                replace(self, ring=ring, mask=self.mask.from_head(u * each), modifiers=self.modifiers.from_head(u * each))
                for u, ring in self.ring.of_parts.items()
            )
        return self._parts[num_heads]

    def of_part(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Call, Tensor, Tensor, Tensor]:
        """A rank's part of the call, with tensors of the shapes that it attends to; on one axis all of it."""
        if self.ring.ulysses == 1:
            return self, q, k, v
        ulysses, hosted = self.ring.ulysses, len(self.ring.of_parts)
        shapes = ((b, s // hosted * ulysses, max(1, h // ulysses), d) for b, s, h, d in (x.shape for x in (q, k, v)))
        shaped = (x[:1, :1, :1, :1].expand(shape) for x, shape in zip((q, k, v), shapes, strict=True))
        return self.parts(q.shape[2])[0], *shaped

    @cached_property
    def _parts(self) -> dict[int, tuple[Call, ...]]:
        return {}

    def plan(self, q: Tensor, k: Tensor, v: Tensor) -> Plan:
        return self._plan_by(self.exchange(q, k, v), q, k, v)

    def _plan_by(self, exchange: Exchange, q: Tensor, k: Tensor, v: Tensor) -> Plan:
        return make_plan(exchange, self.mask, *self.layouts(q, k), self._max_rows(k, v))

    def exchange(self, q: Tensor, k: Tensor, v: Tensor) -> Exchange:
        """The one that the ring names, or under auto the fastest by formula."""
        if self.ring.exchange != "auto":
            return get_exchange(self.ring.exchange, self.ring.ranks_per_node)
        machine, rows = MACHINES[self.ring.transport.link], self._max_rows(k, v)
        of_call = self._work(q, k, v), machine, rows, self.ring.ranks_per_node, not self._reads_what_may_change
        return fastest(Question(self.mask, *self.layouts(q, k), *of_call))

    def _work(self, q: Tensor, k: Tensor, v: Tensor) -> Work:
        grad_dtype = self.ring.grad_dtype or accumulator_dtype(q.dtype)
        return Work(q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.element_size(), grad_dtype.itemsize)

    def _max_rows(self, k: Tensor, v: Tensor) -> int | None:
        """How many KV rows a visit may hold while as many for the next are under way."""
        if self.ring.kv_memory is None:
            return None
        row = 2 * sum(x.shape[0] * x.shape[2] * x.shape[3] * x.element_size() for x in (k, v))
        if self.ring.kv_memory < row:
            raise ValueError(f"kv_memory {self.ring.kv_memory} is below the {row} bytes that one KV row at a time takes")
        return self.ring.kv_memory // row

    def layouts(self, q: Tensor, k: Tensor) -> tuple[Layout, Layout]:
        """Of the queries and of the keys."""
        ring = self.ring
        return ring.layout(ring.seq_len(q.shape[1])), ring.layout(ring.seq_len(k.shape[1]), self.kv_layout)

    def problem(self, q: Tensor, k: Tensor, v: Tensor, direction: str, lse_grad: bool = False) -> Problem:
        return Problem(
            direction,
            q.device.type,
            q.dtype,
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            head_dim=q.shape[3],
            v_head_dim=v.shape[3],
            lse_grad=lse_grad,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rows=1 << max(1, q.shape[1] // len(self.ring.hosted)).bit_length() - 1,
            **self._of_mask_and_score,
        )

    @cached_property
    def _of_mask_and_score(self) -> dict[str, Any]:
        """What mask and score say of a problem."""
        rules = self.mask.rules()
        left_bounded = any(rule.left is not None for rule in rules)
        documents = any(rule.documents for rule in rules)
        full = all(rule.right is None for rule in rules)
        predicates = {predicate.triton for rule in rules for predicate in rule.predicates}
        return {
            "left_bounded": left_bounded,
            "score": self.modifiers.kinds or None,
            "predicate": None if not predicates else "python" if None in predicates else "triton",
            "kind": "documents" if documents else "window" if left_bounded else "full" if full else "causal",
        }

    def signature(self, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> tuple:
        """What must be alike on every rank: the three shapes, then everything else. `tensors`: those of the scores."""
        kinds = frozenset((str(x.dtype), x.device.type) for x in (q, k, v))
        r = self.ring
        of_ring = r.layout_choice, self.kv_layout, r.exchange, r.ranks_per_node, r.kv_memory, r.keep_kv, r.grad_dtype
        choices = Choices(*of_ring, r.transport.link, r.compares_every_call)
        shapes = (tuple(x.shape) for x in (q, k, v))
        of_scores = tuple((tuple(x.shape), str(x.dtype), x.device.type) for x in tensors)
        # A backward waits for those of all ranks. What is compiled asks without gradients.
        wanted = r.compares_every_call and wants_gradients(q, k, v, *tensors)
        return (*shapes, kinds, self.mask, self.modifiers, (self.scale, self.cosine), choices, of_scores, wanted)

    def refuse(self, refusal: ValueError, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> NoReturn:
        """Raises it, also on the other ranks, which would wait for one that left alone."""
        self.ring.agree(self.signature(q, k, v, tensors), q.device, refusal)

    def key(self, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> tuple:
        """All of a call on this ring that decides what it comes to, see Settled; quicker to make than a signature."""
        of_scores = tuple([(x.shape, x.dtype, x.device) for x in tensors])
        of_call = self.mask, self.modifiers, self.sinks, self.scale, self.kv_layout, self.cosine
        return q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, of_scores, of_call

    def settle(self, q: Tensor, k: Tensor, v: Tensor, rounded: bool = False) -> Settled:
        """What the call comes to, on two axes that of a part. `rounded`: on every rank `Settled.rounds`."""
        part, *of_part = self.of_part(q, k, v)
        exchange = back = part.exchange(*of_part)
        plan = part._plan_by(exchange, *of_part)
        us = forward_us(plan, part._work(*of_part), MACHINES["gpus"])  # whatever carries KV
        may_be_replayed = isinstance(exchange, PullExchange) and us < SHORT and not self._reads_what_may_change
        replays = part.ring.replays(q.device) if may_be_replayed else None
        head_parts = 1 if self.ring.keep_kv else part._head_parts(plan, *of_part)
        home = self.ring.grad_dtype or (q.dtype if rounded else accumulator_dtype(q.dtype))
        if not self.ring.keep_kv and head_parts == 1:
            row = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in of_part[1:])
            back = for_backward(exchange, plan, row * home.itemsize, replays is not None)
        plan_back, problem = part._plan_by(back, *of_part), part.problem(*of_part, "forward")
        if q.is_cuda and self.ring.kernel == "auto" and replays is None:
            problem = replace(problem, brief=us < _BRIEF)
        forward_parts = part._forward_parts(exchange, plan, *of_part)
        return Settled(exchange, back, plan, plan_back, head_parts, home, problem, self.ring.kernel, forward_parts, replays)

    @cached_property
    def _reads_what_may_change(self) -> bool:
        """Whether functions of masks or scores are called, of which nothing tells whether they do the same again."""
        return bool(self._of_mask_and_score["predicate"]) or any("score_mod" in kind for kind in self.modifiers.kinds)

    @cached_property
    def _heads_are_alike(self) -> bool:
        """No score or mask tells heads apart or learns."""
        return not self.modifiers.tensors() and all(x.from_head(1) == x for x in (self.modifiers, self.mask))

    def _forward_parts(self, exchange: Exchange, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> int:
        """For how many parts of the heads a forward meets what it pulls; see Note [by heads] of `ring_attn.exchange.pull`."""
        pulls_once = isinstance(exchange, PullExchange) and len(plan.steps) == 2 and not self.ring.keep_kv
        if not pulls_once or k.shape[2] % 2 or not self._heads_are_alike:
            return 1
        return 2 if longest_wait(plan, self._work(q, k, v), MACHINES[self.ring.transport.link]) > _WAIT else 1

    def _head_parts(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> int:
        """In how many parts of the heads a backward goes, see Note [parts of a backward] of `ring_attn.attention`."""
        if not self._heads_are_alike:
            return 1
        rows = len(self.ring.hosted) * max(total_rows(parts) for step in plan.meets for parts in step)
        sums = q.numel() + rows * sum(x.shape[0] * x.shape[2] * x.shape[3] for x in (k, v))
        wanted, heads = sums * accumulator_dtype(q.dtype).itemsize / _SUMS, k.shape[2]
        if wanted <= 1:
            return 1
        us = BACKWARD_OPERATIONS * forward_us(plan, self._work(q, k, v), MACHINES[self.ring.transport.link])
        possible = [n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or us / n >= _LEAST)]
        return next((n for n in possible if n >= wanted), possible[-1])

    def kept_shapes(self, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[int, int, int]]:
        """Of what a forward keeps for its backward of what came from other ranks."""
        if not self.ring.keep_kv:
            return []
        # A plan is made for one length, whatever torch.compile would leave open.
        q, k, v = (x.new_empty([int(size) for size in x.shape]) for x in (q, k, v))
        plan, width = self.plan(q, k, v), k.shape[2] * (k.shape[3] + v.shape[3])
        received = (total_rows(plan.meets[step][rank]) for step in plan.steps[1:] for rank in self.ring.hosted)
        return [(k.shape[0], rows, width) for rows in received]

    def keeps_rest(self, q: Tensor) -> bool:
        """Whether a forward of these queries also keeps what Note [rest] of `ring_attn.attention` tells of."""
        return self.learns and q.dtype in (torch.float16, torch.bfloat16)

    def hosted(self, x: Tensor, dim: int = 1) -> list[Tensor]:
        """The rows of each hosted rank."""
        count = len(self.ring.hosted)
        return [x] if count == 1 else list(x.split(x.shape[dim] // count, dim))

    def hosted_modifiers(self, tensors: Sequence[Tensor], rows: int) -> list[Scores]:
        """The score modifiers of each hosted rank's `rows` query rows, with these tensors."""
        modifiers = self.modifiers.with_tensors(tensors)
        return [modifiers.rows(i * rows, (i + 1) * rows) for i in range(len(self.ring.hosted))]

    def hosted_score_grads(
        self, totals: Sequence[Tensor | None], tensors: Sequence[Tensor], rows: int
    ) -> list[tuple[Tensor | None, ...]]:
        """Each hosted rank's part of the modifiers' gradients `totals`, None where there is none."""
        whole = [x if total is None else total for x, total in zip(tensors, totals, strict=True)]
        parts = (modifiers.tensors() for modifiers in self.hosted_modifiers(whole, rows))
        return [tuple(None if total is None else x for x, total in zip(part, totals, strict=True)) for part in parts]

    def check_scores(self, q: Tensor, kv_len: int, tensors: Sequence[Tensor]) -> None:
        """Raises ValueError where the tensors of scores do not fit q [b, rows, h, d] and `kv_len` keys of all ranks."""
        elsewhere = [x for x in tensors if x.device != q.device]
        if elsewhere:
            shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in elsewhere)
            raise ValueError(
                f"the tensors of a score must be on the device of q, {q.device}, got {shapes}; move them with .to(q.device)"
            )
        of_modifiers, sinks = self.split(tensors)
        for score in (*self.modifiers.with_tensors(of_modifiers).steps, *([] if sinks is None else [Sinks(sinks)])):
            score.check(q.shape[2], q.shape[0], q.shape[1], kv_len)

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """(the modifiers' tensors, the sinks)."""
        return (list(tensors[:-1]), tensors[-1]) if self.sinks else (list(tensors), None)


_names: WeakKeyDictionary[Call, str] = WeakKeyDictionary()
_calls: WeakValueDictionary[str, Call] = WeakValueDictionary()
_kept: list[Call] = []
_counter = count()


def named(call: Call) -> tuple[str, Call]:
    """The call and its name, see Note [call]; equal calls share one while any of them lives."""
    name = _names.get(call)
    if name is not None:
        return name, _calls[name]
    name = f"call{next(_counter)}"
    _names[call], _calls[name] = name, call
    return name, call


def name_kept(scale: float, masks: int, *given: Ring | Mask | Score | LayoutChoice | int | None) -> str:
    """The name of a call that a compiled graph may use at any later time: of its ring, kv_layout, so many `masks` whose join is
    its mask, and scores, as `given_to` makes them. Runs while compiling, which takes no list.
    """
    ring, kv_layout, *rest = map(_found, given)
    _refuse_made_inside(ring, ["transport"])
    for one in (kv_layout, *rest):
        _refuse_made_inside(one, [field.name for field in fields(one)] if is_dataclass(one) else [])
    name, call = named(Call.make(ring, reduce(and_, rest[:masks]), rest[masks:], scale, kv_layout))
    _kept.append(call)
    return name


def name_of_ring(ring: Ring) -> str:
    """A name under which a compiled graph finds the ring, that of a call on it."""
    return name_kept(1.0, 1, *map(given_to, (ring, None, _SOME_MASK)))


_SOME_MASK = Causal()
_SOME_SINKS = Sinks(torch.zeros(1, device="cpu"))


def given_to(x: Any) -> Any:
    """x as a compiler hands it to `name_kept`: before PyTorch 2.13 by its `id`, which it takes as a number and guards.

    One sinks for all: a call knows no more of them than that they are there, and their tensor goes to the op.
    """
    x = _SOME_SINKS if isinstance(x, Sinks) else x
    return id(x) if _BY_ID and not isinstance(x, str | None) else x


def _found(x: Any) -> Any:
    return cast(x, py_object).value if _BY_ID and isinstance(x, int) else x


def _refuse_made_inside(x: Any, names: Sequence[str]) -> None:
    """Raises ValueError for what the compiled function made itself, which a compiler hands over without its attributes."""
    if not all(hasattr(x, name) for name in names):
        raise ValueError(
            f"rings, masks, scores and layouts must be made outside of the compiled function, and a {type(x).__name__} was "
            f"made inside; make it where the function is called and hand it over, or keep it"
        )


def part_names(name: str, num_heads: int) -> tuple[str, ...]:
    """The names of that call's parts, which live as long as it does."""
    return tuple(named(part)[0] for part in called(name).parts(num_heads))


def called(name: str) -> Call:
    """The call of that name."""
    return _calls[name]


# What torch.compiler.assume_constant_result sets; that function imports all of Dynamo, here at import time.
name_kept._dynamo_marked_constant = part_names._dynamo_marked_constant = True


def validate(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], call: Call) -> Settled:
    """What the call comes to. Raises unless it can be done and all ranks make the same one.

    That is remembered, so it costs once a signature, unless the ring compares every call.
    """
    key = call.key(q, k, v, tensors)
    settled = call.ring.settled.get(key)
    if settled is None or call.ring.compares_every_call:
        signature = call.signature(q, k, v, tensors)
        if not call.ring.has_agreed(signature):
            refusal, rounds = None, False
            try:
                rounds = _check(q, k, v, tensors, call)
            except ValueError as error:
                # A rank that left here alone would keep the others waiting: they hear of it first.
                refusal = error
            call.ring.agree(signature, q.device, refusal, rounds)
        if settled is None:
            settled = call.ring.settled[key] = call.settle(q, k, v, call.ring.all_round(signature))
    return settled


def _check(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], call: Call) -> bool:
    """Whether it rounds here, see `Settled.rounds`. Raises ValueError for one that cannot be done: the rule and the values."""
    check_inputs(q, k, v)
    check_parts(q.shape[2], k.shape[2], call.ring.ulysses)
    if call.kv_layout is None and k.shape[1] != q.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} rows here and k {k.shape[1]}; shard both with the same ring, or, for cross-attention, name "
            f"the layout of the keys, such as kv_layout='zigzag'"
        )
    layout, kv_layout = call.layouts(q, k)
    call.mask.check(layout.seq_len, kv_layout.seq_len, q.shape[0])
    settled = call.settle(q, k, v)
    call.check_scores(q, kv_layout.seq_len, tensors)
    settled.kernel("forward")
    return call.ring.ulysses == 1 and call.ring.grad_dtype is None and settled.rounds(call.ring.hosted)
