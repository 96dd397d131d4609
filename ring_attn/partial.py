"""Partial attention: what a query row has gathered from the keys met so far, and how two such states merge.

Note [partial]: for the keys met so far with scores s_j, `m` is any baseline, `acc = sum_j exp(s_j - m) v_j` and
`lse = log sum_j exp(s_j)`, so `out = acc * exp(m - lse)`. A kernel that returns a normalised output is the case m = lse.
Merging is associative and commutative up to rounding; the identity is acc = 0, m = lse = -inf. The mathematics is online
softmax (Milakov and Gimelshein, arXiv 1805.02867) as flash attention uses it (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """`acc` [b, s, h, d] unnormalised, `m` and `lse` [b, h, s] in natural log; all in `accumulator_dtype` of the inputs."""

    acc: Tensor
    m: Tensor
    lse: Tensor

    def rows(self, rows: range, batch: int | None = None) -> Partial:
        """A view of some rows, of one batch row or of all."""
        b = slice(None) if batch is None else slice(batch, batch + 1)
        s = slice(rows.start, rows.stop)
        return Partial(self.acc[b, s], self.m[b, :, s], self.lse[b, :, s])


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(q: Tensor, v_head_dim: int) -> Partial:
    """The identity of `merge` for queries q [b, s, h, d]."""
    b, s, h, _ = q.shape
    dtype = accumulator_dtype(q.dtype)
    acc = torch.zeros(b, s, h, v_head_dim, dtype=dtype, device=q.device)
    m = torch.full((b, h, s), -torch.inf, dtype=dtype, device=q.device)
    return Partial(acc, m, m.clone())


def only_sinks(q: Tensor, v_head_dim: int, sinks: Tensor) -> Partial:
    """The partial of one key a head with score `sinks` [h] and v = 0, for queries q [b, s, h, d]."""
    partial = empty(q, v_head_dim)
    for x in (partial.m, partial.lse):
        x.copy_(sinks[:, None])
    return partial


def merge(a: Partial, b: Partial) -> Partial:
    """The partial of the union of two disjoint sets of keys; rows that met no key on either side stay the identity."""
    m = torch.maximum(a.m, b.m)
    base = torch.where(m == -torch.inf, 0.0, m)
    acc = a.acc * _per_row((a.m - base).exp()) + b.acc * _per_row((b.m - base).exp())
    return Partial(acc, m, torch.logaddexp(a.lse, b.lse))


def merge_all(partials: Sequence[Partial]) -> Partial:
    """The fold of `merge` over any number of partials, in the operations of one."""
    acc, m, lse = (torch.stack(parts) for parts in zip(*partials, strict=True))
    top = m.amax(0)
    weight = (m - torch.where(top == -torch.inf, 0.0, top)).exp()
    return Partial((acc * _per_row(weight)).sum(0), top, lse.logsumexp(0))


def merge_(into: Partial, other: Partial) -> None:
    """`merge`, written into the first argument (whose tensors may be views)."""
    for target, value in zip(into, merge(into, other), strict=True):
        target.copy_(value)


def normalize(partial: Partial, dtype: torch.dtype) -> Tensor:
    """The attention output [b, s, h, d] in `dtype`; 0 for rows that met no key."""
    weight = torch.where(partial.lse == -torch.inf, 0.0, (partial.m - partial.lse).exp())
    return (partial.acc * _per_row(weight)).to(dtype)


def _per_row(weight: Tensor) -> Tensor:
    """[..., h, s] as a factor of [..., s, h, d]."""
    return weight.transpose(-1, -2).unsqueeze(-1)
