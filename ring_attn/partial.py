"""Partial attention: what a query row has gathered from the keys met so far, and how two such states merge.

Note [partial]: for the keys met so far with scores s_j, `m` is any baseline, `acc = sum_j exp(s_j - m) v_j` and
`sum = sum_j exp(s_j - m)`, so `out = acc / sum` and `lse = m + log sum`. A kernel that returns a normalised output is the case
m = lse and sum = 1, which may be left out. Merging is associative and commutative up to rounding; the identity is acc = 0,
sum = 0, m = -inf. The mathematics is online softmax (Milakov and Gimelshein, arXiv 1805.02867) as flash attention uses it
(Dao et al., arXiv 2205.14135).

Note [sum beside lse]: an lse has an absolute error of its size times 2^-24 in fp32. Were it carried in place of the sum, every
output would have it as a relative error, and delta = rowsum(dout * out) would no longer cancel the p of a backward: where
scores are large (ALiBi far away) that grows to 1e-2 in the gradient of slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """`acc` [b, s, h, d] unnormalised, `m` [b, h, s] in natural log and `sum` [b, h, s].

    Where acc is 0 everywhere it may be None (see `to_add_to`), where sum is 1 everywhere, too. All are in `accumulator_dtype`
    of the inputs, but for the acc of a normalised partial, which is the output.
    """

    acc: Tensor | None
    m: Tensor
    sum: Tensor | None = None

    @property
    def lse(self) -> Tensor:
        """[b, h, s], natural log; -inf where a row met no key."""
        return self.m if self.sum is None else self.m + self.sum.log()

    def rows(self, rows: range, batch: int | None = None) -> Partial:
        """A view of some rows, of one batch row or of all."""
        b = slice(None) if batch is None else slice(batch, batch + 1)
        s = slice(rows.start, rows.stop)
        return Partial(self.acc[b, s], self.m[b, :, s], None if self.sum is None else self.sum[b, :, s])

    def head_parts(self, count: int) -> list[Partial]:
        """Views of so many parts of the heads."""
        acc, m, total = ([None] * count if x is None else x.chunk(count, dim) for x, dim in zip(self, (2, 1, 1), strict=True))
        return [Partial(*part) for part in zip(acc, m, total, strict=True)]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(q: Tensor, v_head_dim: int) -> Partial:
    """The identity of `merge` for queries q [b, s, h, d]."""
    b, s, h, _ = q.shape
    dtype = accumulator_dtype(q.dtype)
    acc = torch.zeros(b, s, h, v_head_dim, dtype=dtype, device=q.device)
    return Partial(acc, acc.new_full((b, h, s), -torch.inf), acc.new_zeros(b, h, s))


def only_sinks(q: Tensor, sinks: Tensor) -> Partial:
    """The partial of one key a head with score `sinks` [h] and v = 0, for queries q [b, s, h, d]."""
    # A copy in any case: kernels write to it.
    m = sinks.to(accumulator_dtype(q.dtype))[:, None].repeat(q.shape[0], 1, q.shape[1])
    return Partial(None, m, torch.ones_like(m))


def to_add_to(partial: Partial | None, q: Tensor, v_head_dim: int) -> Partial:
    """The partial with an acc, for queries q [b, s, h, d]; the identity for None."""
    if partial is not None and partial.acc is not None:
        return partial
    if partial is None:
        return empty(q, v_head_dim)
    return partial._replace(acc=partial.m.new_zeros(*q.shape[:3], v_head_dim))


def to_merge_into(partial: Partial) -> Partial:
    """The same with tensors that can hold what is merged into them: a sum, and an acc in `accumulator_dtype`."""
    return Partial(
        partial.acc.to(accumulator_dtype(partial.acc.dtype)),
        partial.m,
        torch.ones_like(partial.m) if partial.sum is None else partial.sum,
    )


def merge(a: Partial, b: Partial) -> Partial:
    """The partial of the union of two disjoint sets of keys; rows that met no key on either side stay the identity."""
    m = torch.maximum(a.m, b.m)
    base = torch.where(m == -torch.inf, 0.0, m)
    (acc, total), (other_acc, other_total) = _weighed(a, base), _weighed(b, base)
    return Partial(acc + other_acc, m, total + other_total)


def _weighed(partial: Partial, base: Tensor) -> tuple[Tensor, Tensor]:
    """(acc, sum) relative to `base`."""
    weight = (partial.m - base).exp()
    return partial.acc * _per_row(weight), weight if partial.sum is None else partial.sum * weight


def merge_all(partials: Sequence[Partial]) -> Partial:
    """The fold of `merge` over any number of partials, in the operations of one."""
    acc, m = (torch.stack(parts) for parts in list(zip(*partials, strict=True))[:2])
    top = m.amax(0)
    weight = (m - torch.where(top == -torch.inf, 0.0, top)).exp()
    sums = torch.stack([torch.ones_like(one.m) if one.sum is None else one.sum for one in partials])
    return Partial((acc * _per_row(weight)).sum(0), top, (sums * weight).sum(0))


def merge_(into: Partial, other: Partial) -> None:
    """`merge`, written into the first argument (whose tensors may be views)."""
    for target, value in zip(into, merge(into, other), strict=True):
        target.copy_(value)


def normalize(partial: Partial, dtype: torch.dtype) -> Tensor:
    """The attention output [b, s, h, d] in `dtype`; 0 for rows that met no key."""
    if partial.sum is None:
        return partial.acc.to(dtype)
    return (partial.acc / _per_row(torch.where(partial.sum == 0, 1.0, partial.sum))).to(dtype)


def finish(partial: Partial, out: Tensor) -> Partial:
    """The partial as a normalised one whose acc is `out`, which is filled."""
    out.copy_(normalize(partial, out.dtype))
    return Partial(out, partial.lse)


def _per_row(weight: Tensor) -> Tensor:
    """[..., h, s] as a factor of [..., s, h, d]."""
    return weight.transpose(-1, -2).unsqueeze(-1)
