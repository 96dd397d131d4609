"""What happens to a score before the softmax, and beside it: a list of scores is applied in order, in global positions.

Note [where a score acts]: `CosineSim` changes q and k before any rank meets another, so it is done outside the loops.
`SoftCap`, `Alibi`, `RelativeBias`, `Bias` and `ScoreMod` (in `score_mod.py`) change each score at its (batch row, head, query
and key position). `Dropout` acts on the probabilities that multiply v. `Sinks` is one more key with a given score and v = 0:
the partial every row starts from.

Note [tensors]: the tensors of a score (slopes, bias, captured ones) get gradients, so they enter the custom op as inputs of
their own. `without_tensors` is the rest of a score, hashable; `with_tensors` puts them back.

Note [parts of the heads]: where ranks attend to a part of the heads each (Ulysses), the heads of a call are counted from 0 and
are heads `first`, `first + 1`, ... of the caller's. A tensor with a head dimension is cut to the part, `tensors_by_part`; what
is a function of the head keeps where the part begins, `from_head`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from numbers import Real

import torch
from torch import Tensor

from ring_attn.typed import whole


@dataclass(frozen=True)
class Cells:
    """Which scores a block holds: batch rows [b], heads [h], global query positions [i], their rows [i], key positions [j]."""

    batch: Tensor
    heads: Tensor
    q_pos: Tensor
    q_rows: Tensor
    kv_pos: Tensor

    @property
    def distance(self) -> Tensor:
        """q_pos - kv_pos, [i, j]."""
        return self.q_pos.unsqueeze(1) - self.kv_pos


@dataclass(frozen=True)
class HeadParts:
    """The heads of a call in `count` parts, `hosted` of them in this process, see Note [parts of the heads].

    `trade`: from [b, rows, h, d] with the rows of this process, or h = 1 for all heads, each hosted part's heads with the rows
    that it attends from.
    """

    count: int
    hosted: tuple[int, ...]
    trade: Callable[[Tensor], list[Tensor]]


class Score:
    """Base of all scores. `kind` is the name that kernels know it by."""

    kind = ""

    def tensors(self) -> tuple[Tensor, ...]:
        """What may need a gradient, in a fixed order."""
        return ()

    def without_tensors(self) -> Score:
        return self

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Score:
        return self

    def rows(self, start: int, stop: int) -> Score:
        """The score of some of the query rows that this process hosts."""
        return self

    def from_head(self, first: int) -> Score:
        """The score, but for its tensors, of a call whose head 0 is this one's head `first`."""
        return self

    def tensors_by_part(self, parts: HeadParts) -> list[tuple[Tensor, ...]]:
        """`tensors()` for each hosted part of the heads."""
        return [self.tensors() for _ in parts.hosted]

    def apply(self, scores: Tensor, cells: Cells) -> Tensor:
        """Scores [b, h, i, j] after this one; differentiable in the scores and in `tensors()`."""
        return scores

    def bound(self, size: float) -> float:
        """The largest size of a score after this one, of scores of at most that `size`; inf where there is none."""
        return math.inf

    def check(self, num_heads: int, batch: int, rows: int, kv_len: int) -> None:
        """Raises ValueError where its tensors do not fit a call."""

    def check_gradients(self) -> None:
        """Raises ValueError where it holds a tensor that needs a gradient and is not in `tensors()`; asked while grad is on."""


def _number(name: str, x: float | Tensor) -> float:
    """x as a number of Python, for what a tensor holds may change. Raises TypeError where it is none, or learns."""
    try:
        if not ((isinstance(x, Tensor) and x.requires_grad) or isinstance(x, str)):
            return float(x)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a number, for it gets no gradient, got {type(x).__name__}")


@dataclass(frozen=True)
class SoftCap(Score):
    """cap * tanh(score / cap): no score leaves (-cap, cap). Before masking, as in Gemma 2 and flash-attn."""

    cap: float
    kind = "softcap"

    def __post_init__(self) -> None:
        object.__setattr__(self, "cap", _number("SoftCap cap", self.cap))
        if not 0 < self.cap < float("inf"):
            raise ValueError(f"SoftCap cap must be above 0 and finite, got {self.cap}; leave SoftCap out for no cap")

    def apply(self, scores: Tensor, cells: Cells) -> Tensor:
        return self.cap * torch.tanh(scores / self.cap)

    def bound(self, size: float) -> float:
        return self.cap * math.tanh(size / self.cap)


@dataclass(frozen=True, eq=False, repr=False)
class _WithTensor(Score):
    """A score with one tensor. Without it, all of a class and options are equal."""

    tensor: Tensor | None

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor | None):
            raise TypeError(f"{self!r} takes a tensor, got {type(self.tensor).__name__}")
        if self.tensor is not None and not self.tensor.is_floating_point():
            by_mask = "which cells are seen is said by a mask, such as MaskMod(lambda b, h, q, k: table[q, k])"
            way_out = by_mask if self.tensor.dtype == torch.bool else "cast it with .float()"
            raise TypeError(f"{self!r} takes a tensor of floating dtype, got {self.tensor.dtype}; {way_out}")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def without_tensors(self) -> Score:
        return replace(self, tensor=None)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Score:
        return replace(self, tensor=tensors[0])

    def __repr__(self) -> str:
        return type(self).__name__

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return hash((type(self), id(self.tensor)))


class _ByHead(_WithTensor):
    """A score with one tensor, [h] unless its class says otherwise, `called` so in errors."""

    called = ""

    def tensors_by_part(self, parts: HeadParts) -> list[tuple[Tensor, ...]]:
        return [(self.tensor.chunk(parts.count)[part],) for part in parts.hosted]

    def check(self, num_heads: int, batch: int, rows: int, kv_len: int) -> None:
        if tuple(self.tensor.shape) != (num_heads,):
            raise ValueError(f"{self.called} must be [num_heads] = [{num_heads}], got {tuple(self.tensor.shape)}")


class Alibi(_ByHead):
    """score - slope[h] * |q_pos - kv_pos| (Press et al., arXiv 2108.12409). `tensor` [h]: the slopes, learnable."""

    kind = "alibi"
    called = "Alibi slopes"

    def apply(self, scores: Tensor, cells: Cells) -> Tensor:
        slopes = self.tensor[cells.heads].to(scores.dtype)
        return scores - slopes[:, None, None] * cells.distance.abs()


class RelativeBias(_ByHead):
    """score + tensor[h, reach + distance] of distance = q_pos - kv_pos, beyond `reach` as at it. `tensor` [h, 2 * reach + 1].

    The buckets of T5 are a tensor made from a smaller table: `table[:, bucket(distances)]`, where gradients flow on.
    """

    kind = "relative_bias"

    def apply(self, scores: Tensor, cells: Cells) -> Tensor:
        reach = self.tensor.shape[1] // 2
        # In the dtype of scores: a gradient is a sum over many cells.
        by_distance = self.tensor.to(scores.dtype)[cells.heads]
        return scores + by_distance[:, cells.distance.clamp(-reach, reach) + reach]

    def check(self, num_heads: int, batch: int, rows: int, kv_len: int) -> None:
        shape = tuple(self.tensor.shape)
        if len(shape) != 2 or shape[0] != num_heads or shape[1] % 2 == 0:
            raise ValueError(f"RelativeBias must be [num_heads, 2 * reach + 1] = [{num_heads}, an odd number], got {shape}")


class Bias(_WithTensor):
    """score + bias. `tensor` [rows, t], [h or 1, rows, t] or [b or 1, h or 1, rows, t]: whole in its last dimension, in global
    order, and in the one before it the query rows this process hosts, `ring.shard(bias, dim=-2)`; so is its gradient.
    """

    kind = "bias"

    def rows(self, start: int, stop: int) -> Score:
        return replace(self, tensor=self.tensor[..., start:stop, :])

    def tensors_by_part(self, parts: HeadParts) -> list[tuple[Tensor, ...]]:
        whole = self.tensor[(None,) * (4 - self.tensor.dim())]
        return [(part.transpose(1, 2),) for part in parts.trade(whole.transpose(1, 2))]

    def apply(self, scores: Tensor, cells: Cells) -> Tensor:
        bias = self.tensor[(None,) * (4 - self.tensor.dim())]
        bias = bias[cells.batch] if bias.shape[0] > 1 else bias
        bias = bias[:, cells.heads] if bias.shape[1] > 1 else bias
        return scores + bias[:, :, cells.q_rows][..., cells.kv_pos].to(scores.dtype)

    def check(self, num_heads: int, batch: int, rows: int, kv_len: int) -> None:
        shape = tuple(self.tensor.shape)
        full = (1,) * (4 - len(shape)) + shape
        if (
            len(shape) > 4
            or len(shape) < 2
            or full[0] not in (1, batch)
            or full[1] not in (1, num_heads)
            or full[2:] != (rows, kv_len)
        ):
            raise ValueError(
                f"Bias must be [{batch} or 1, {num_heads} or 1, rows {rows}, keys {kv_len}], leading dimensions may be "
                f"left out, got {shape}; shard the whole bias with ring.shard(bias, dim=-2), or take tree_decode's rows of it"
            )


class Sinks(_ByHead):
    """A learnable score `tensor` [h] that takes part in the softmax of every row and gives nothing to the output (gpt-oss)."""

    kind = "sinks"
    called = "Sinks logits"


@dataclass(frozen=True, eq=False)
class CosineSim(Score):
    """scale * cosine similarity: q and k are l2-normalised in `groups` parts of the head dim, so |score| <= scale * groups.

    `scale` is a float or a learnable tensor [h]; it takes the place of softmax_scale.
    """

    scale: float | Tensor
    groups: int = 1
    kind = "cosine"

    def __post_init__(self) -> None:
        is_tensor = isinstance(self.scale, Tensor) and self.scale.is_floating_point()
        if not is_tensor and (isinstance(self.scale, bool) or not isinstance(self.scale, Real)):
            got = self.scale.dtype if isinstance(self.scale, Tensor) else type(self.scale).__name__
            raise TypeError(f"CosineSim scale must be a number or a tensor of floating dtype, got {got}")
        object.__setattr__(self, "groups", whole("CosineSim groups", self.groups))
        if self.groups < 1:
            raise ValueError(f"CosineSim groups must be at least 1, got {self.groups}")

    def bound(self, size: float) -> float:
        return math.inf if isinstance(self.scale, Tensor) else abs(self.scale) * self.groups


@dataclass(frozen=True)
class Dropout(Score):
    """Drops probabilities with chance `p` where they multiply v, and scales the rest by 1 / (1 - p).

    Which cells drop is a function of (seed, batch row, head, q_pos, kv_pos) alone: the same in any layout, ring and direction.
    `seed`: an int of up to 64 bits; a training step wants one of its own.
    """

    p: float
    seed: int
    first_head: int = field(default=0, kw_only=True)  # see Note [parts of the heads]
    kind = "dropout"

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", _number("Dropout p", self.p))
        if not 0 <= self.p < 1:
            raise ValueError(f"Dropout p must be at least 0 and below 1, got {self.p}")
        object.__setattr__(self, "seed", whole("Dropout seed", self.seed))
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"Dropout seed must be an int of up to 64 bits, at least 0, got {self.seed!r}")

    def from_head(self, first: int) -> Score:
        return replace(self, first_head=self.first_head + first)

    def keep(self, cells: Cells) -> Tensor:
        """Factors [b, h, i, j] float64: 0 where dropped, else 1 / (1 - p)."""
        state: Tensor | int = _mix(self.seed & 0xFFFFFFFF, self.seed >> 32)
        heads = cells.heads + self.first_head
        for value in (cells.batch[:, None, None, None], heads[:, None, None], cells.q_pos[:, None], cells.kv_pos):
            state = _mix(state, value)
        kept = state >= round(self.p * 2**32)
        return kept.double() / (1 - self.p)


def _mix(state: Tensor | int, value: Tensor | int) -> Tensor | int:
    """A 32-bit hash of the state and a value, in int64: two rounds of xor-shift and multiplication (murmur3's finaliser)."""
    x = (state ^ (value * 0x9E3779B1 + 0x7F4A7C15)) & 0xFFFFFFFF
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    return x ^ (x >> 16)


@dataclass(frozen=True)
class Scores:
    """What a kernel is handed: `steps` change scores in order, `dropout` acts on probabilities.

    `bound`: no score after the steps is larger in size, up to rounding; inf where that is not known. A kernel need not use it.
    """

    steps: tuple[Score, ...]
    dropout: Dropout | None = None
    bound: float = math.inf

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(step.kind for step in (*self.steps, *([self.dropout] if self.dropout else [])))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for step in self.steps for x in step.tensors())

    def with_tensors(self, tensors: Sequence[Tensor]) -> Scores:
        if not self.steps:
            return self
        tensors, steps = list(tensors), []
        for step in self.steps:
            count = len(step.tensors())
            steps.append(step.with_tensors(tuple(tensors[:count])))
            del tensors[:count]
        return replace(self, steps=tuple(steps))

    def without_tensors(self) -> Scores:
        return replace(self, steps=tuple(step.without_tensors() for step in self.steps)) if self.steps else self

    def rows(self, start: int, stop: int) -> Scores:
        return replace(self, steps=tuple(step.rows(start, stop) for step in self.steps)) if self.steps else self

    def from_head(self, first: int) -> Scores:
        dropout = self.dropout and self.dropout.from_head(first)
        return replace(self, steps=tuple(step.from_head(first) for step in self.steps), dropout=dropout)

    def apply(self, scores: Tensor, cells: Cells) -> Tensor:
        for step in self.steps:
            scores = step.apply(scores, cells)
        return scores


_NOTHING = Scores(())


def listed(score: Score | Sequence[Score] | None) -> tuple[Score, ...]:
    """A score, a list of them or None, as a tuple."""
    return () if score is None else tuple(score) if isinstance(score, Sequence) else (score,)


def sort_scores(score: Score | Sequence[Score] | None) -> tuple[CosineSim | None, Scores, Sinks | None]:
    """A score, a list of them or None, by where they act: before the loops, inside the kernels, and as a key of its own.

    Raises TypeError for what is no score, ValueError where one that acts once stands twice.
    """
    if score is None:
        return None, _NOTHING, None
    scores = listed(score)
    for one in scores:
        if not isinstance(one, Score):
            raise TypeError(f"score must be a ring_attn score such as SoftCap(50.0), or a list, got {type(one).__name__}")
        if isinstance(one, _WithTensor) and one.tensor is None:
            raise TypeError(f"{one!r} takes a tensor, got None")
    alone = {}
    for kind in (CosineSim, Sinks, Dropout):
        found = [one for one in scores if isinstance(one, kind)]
        if len(found) > 1:
            raise ValueError(f"{kind.__name__} may stand once in a list of scores, got {len(found)}")
        alone[kind] = found[0] if found else None
    steps = tuple(one for one in scores if not isinstance(one, CosineSim | Sinks | Dropout))
    changing = steps if alone[CosineSim] is None else (alone[CosineSim], *steps)
    bound = reduce(lambda size, one: one.bound(size), changing, math.inf)
    return alone[CosineSim], Scores(steps, alone[Dropout], bound), alone[Sinks]
