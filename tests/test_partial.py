"""Partials form a commutative monoid, and normalising their merge is attention over all keys."""

from functools import reduce

import pytest
import torch

from ring_attn.partial import (
    Partial,
    accumulator_dtype,
    empty,
    finish,
    merge,
    merge_,
    merge_all,
    normalize,
    only_sinks,
    to_add_to,
)
from tests.support import FLOAT64_LIMIT, rel_error

torch.manual_seed(0)


def partial_of(scores, v, baseline=None):
    """The partial of keys with scores [b, h, s, n], from its definition; `baseline` [b, h, s] replaces the row maximum."""
    m = scores.amax(-1) if baseline is None else baseline
    p = (scores - m.unsqueeze(-1)).exp()
    return Partial(torch.einsum("bhsn,bnhd->bshd", p, v), m, p.sum(-1))


def parts(sizes=(3, 1, 5), b=2, s=4, h=3, d=5, spread=30.0):
    scores = [spread * torch.randn(b, h, s, n, dtype=torch.float64) for n in sizes]
    values = [torch.randn(b, n, h, d, dtype=torch.float64) for n in sizes]
    whole = torch.einsum("bhsn,bnhd->bshd", torch.cat(scores, -1).softmax(-1), torch.cat(values, 1))
    return [partial_of(*part) for part in zip(scores, values, strict=True)], whole, torch.cat(scores, -1).logsumexp(-1)


def test_merge_is_attention_over_the_union_in_any_order():
    (a, b, c), whole, lse = parts()
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
        assert rel_error(normalize(merged, torch.float64), whole) < FLOAT64_LIMIT
        assert rel_error(merged.lse, lse) < FLOAT64_LIMIT


def test_merging_all_at_once_is_the_fold_of_merge():
    three, *_ = parts(spread=3000.0)
    nothing = empty(torch.empty(2, 4, 3, 7, dtype=torch.float64), 5)
    for given in (three, [nothing, *three, nothing], [nothing, nothing], three[:1]):
        for found, want in zip(merge_all(given), reduce(merge, given), strict=True):
            assert rel_error(found, want) < FLOAT64_LIMIT


def test_a_normalised_partial_is_the_case_m_equals_lse_and_may_leave_out_its_sum():
    (a, b, c), whole, _ = parts()
    out = torch.empty_like(b.acc)
    normalised = finish(b, out)
    assert normalised.acc is out and normalised.sum is None and rel_error(normalised.lse, b.lse) < FLOAT64_LIMIT
    assert torch.equal(normalize(normalised, torch.float64), normalize(b, torch.float64))
    for one in (normalised, normalised._replace(sum=torch.ones_like(b.m))):
        assert rel_error(normalize(merge(merge(a, one), c), torch.float64), whole) < FLOAT64_LIMIT


@pytest.mark.parametrize("shape", [(2, 4, 3, 7), (1, 1, 3, 7)])
def test_sinks_are_a_key_without_a_value_and_are_left_as_they_are(shape):
    """Kernels write into the partial that they are given, also where it is no larger than the sinks."""
    q, sinks = torch.empty(shape), torch.randn(3)
    before, partial = sinks.clone(), only_sinks(q, sinks)
    assert partial.acc is None and torch.equal(partial.lse, sinks[:, None].expand(shape[0], 3, shape[1]))
    for x in to_add_to(partial, q, 5):
        x.fill_(7.0)
    assert torch.equal(sinks, before)


def test_identity_on_either_side_and_with_itself():
    (a, *_), *_ = parts()
    nothing = empty(torch.empty(2, 4, 3, 7, dtype=torch.float64), 5)
    for merged in (merge(a, nothing), merge(nothing, a)):
        assert all(torch.equal(x, y) for x, y in zip(merged, a, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(merge(nothing, nothing), nothing, strict=True))
    assert torch.equal(normalize(nothing, torch.float64), torch.zeros(2, 4, 3, 5, dtype=torch.float64))


def test_extreme_scores_neither_overflow_nor_vanish():
    (a, b, c), whole, _ = parts(spread=3000.0)
    merged = merge(merge(a, b), c)
    assert all(x.isfinite().all() for x in merged)
    assert rel_error(normalize(merged, torch.float64), whole) < FLOAT64_LIMIT


def test_large_scores_cost_no_digits():
    """In fp32 an lse of 8,192 is off by 4e-4; sums beside baselines that fp32 holds are not."""
    scores = [8192 + (2 * torch.randn(2, 3, 4, n, dtype=torch.float64)).round() for n in (3, 1, 5)]
    values = [torch.randn(2, n, 3, 5, dtype=torch.float64) for n in (3, 1, 5)]
    merged = reduce(merge, [partial_of(one.float(), v.float()) for one, v in zip(scores, values, strict=True)])
    whole = torch.einsum("bhsn,bnhd->bshd", torch.cat(scores, -1).softmax(-1), torch.cat(values, 1))
    assert rel_error(normalize(merged, torch.float32), whole) < 1e-6


def test_merge_in_place_writes_only_the_rows_it_is_given():
    (a, b, _), *_ = parts()
    into = Partial(*(x.clone() for x in a))
    rows = range(1, 3)
    merge_(into.rows(rows, 1), b.rows(rows, 1))
    want = merge(a, b)
    assert all(torch.equal(x, y) for x, y in zip(into.rows(rows, 1), want.rows(rows, 1), strict=True))
    assert torch.equal(into.acc[0], a.acc[0]) and torch.equal(into.acc[1, [0, 3]], a.acc[1, [0, 3]])


@pytest.mark.parametrize(
    ("dtype", "accumulator"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtypes(dtype, accumulator):
    assert accumulator_dtype(dtype) == accumulator
    assert {x.dtype for x in empty(torch.empty(1, 2, 3, 4, dtype=dtype), 4)} == {accumulator}
