"""The constant baseline of bounded scores in the Triton forward, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

import ring_attn as ra
from ring_attn.kernels.triton_kernel import interpreted
from ring_attn.partial import only_sinks
from ring_attn.score import Alibi, CosineSim, Scores, SoftCap, sort_scores
from ring_attn.tiles import Tile
from tests.support import band_tiles, random_qkv, split_tiles

functions = pytest.importorskip("tests.kernels.triton_functions")
from tests.kernels.test_triton_scores import DEVICE, KERNEL, check, slopes, some_tiles  # noqa: E402

pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

LOG2E = math.log2(math.e)


def baseline(score: Scores, dtype=torch.float32) -> float | None:
    from ring_attn.kernels.triton_scores import chain_of

    return chain_of(score, (), dtype).baseline(dtype)


@pytest.mark.parametrize(
    ("score", "bound"),
    [
        (CosineSim(4.0, groups=2), 8.0),
        (CosineSim(-4.0), 4.0),
        ([CosineSim(4.0), SoftCap(3.0)], 3 * torch.tanh(torch.tensor(4 / 3)).item()),
        (SoftCap(2.5), 2.5),
        ([Alibi(slopes(2)), SoftCap(2.5)], 2.5),
        ([CosineSim(4.0), Alibi(slopes(2))], torch.inf),
        ([SoftCap(2.5), functions.BOW], torch.inf),
        (CosineSim(torch.ones(2)), torch.inf),
        ([], torch.inf),
    ],
)
def test_what_bounds_a_score(score, bound):
    assert sort_scores(score)[1].bound == pytest.approx(bound)


@pytest.mark.parametrize(
    ("dtype", "bound", "used"),
    [
        (torch.float32, 0.0, 0.0),
        (torch.float32, 41.0, 0.0),
        (torch.float32, 50.0, 50 * LOG2E - 60),
        (torch.float32, 51.3, 51.3 * LOG2E - 60),
        (torch.float32, 51.4, None),
        (torch.float32, torch.inf, None),
        (torch.bfloat16, 50.0, 50 * LOG2E - 60),
        (torch.bfloat16, 51.4, None),
        (torch.float16, 6.7, 0.0),
        (torch.float16, 8.5, 9.8 - 8.5 * LOG2E),
        (torch.float16, 8.7, None),
    ],
)
def test_a_bound_is_used_where_all_probabilities_can_be_held(dtype, bound, used):
    found = baseline(Scores((), None, bound), dtype)
    assert found == (used if used is None else pytest.approx(used))
    if found is not None:
        least, most = -bound * LOG2E - found, bound * LOG2E - found
        assert least >= 0.7 * math.log2(torch.finfo(dtype).tiny) - 1e-6
        assert most <= (15.0 if dtype == torch.float16 else 60.0) + 1e-6


def of_unit_norm(x):
    return (x / x.norm(dim=-1, keepdim=True)).float()


@pytest.mark.parametrize("kind", ["causal", "batch rows", "many", "zigzag"])
@pytest.mark.parametrize("bound", [0.5, 30.0, 51.0])
def test_a_constant_baseline(kind, bound):
    """Scores from one end of the bound to the other, on one visit and carried on from it."""
    num_kv = 64 if kind == "zigzag" else 48
    q, k, v, dout = random_qkv(2, 32, num_kv, 2, 1, 4, seed=7)
    q, k = (of_unit_norm(x.double()) for x in (q, k))
    k[:, 5], k[:, 9] = q[:, 20, 0:1], -q[:, 20, 0:1]
    score = Scores((), None, bound)
    assert baseline(score) is not None
    for visits in (1, 2):
        check(split_tiles(some_tiles(kind), visits), q, k, v, dout, score, scale=bound)


@pytest.mark.parametrize("sink", [-200.0, -3.0, 3.0, 60.0])
@pytest.mark.parametrize("bound", [6.0, torch.inf])
def test_a_baseline_joins_what_was_carried(sink, bound):
    """Sinks far below, inside and far above the bound; some rows meet no key, some on one of two visits."""
    q, k, v, dout = random_qkv(1, 37, 44, 2, 1, 16, seed=8)
    q, k = (of_unit_norm(x.double()) for x in (q, k))
    middle = Tile(range(5, 29), range(7, 40), band_tiles("causal", 24, 33)[0].band, ((range(5, 29),), (range(7, 40),)))
    rest = Tile(range(20, 33), range(4), band_tiles("full", 13, 4)[0].band, ((range(20, 33),), (range(4),)))
    for visits in ([(middle,)], [(middle,), (rest,)], [(), (rest,)]):
        partial = only_sinks(q, torch.tensor([sink, -torch.inf]))
        check(visits, q, k, v, dout, Scores((), None, bound), scale=6.0, partial=partial)


def test_rows_without_keys_under_a_constant_baseline():
    q, k, v, _ = (x.to(DEVICE) for x in random_qkv(1, 37, 44, 2, 2, 16, seed=11))
    middle = Tile(range(5, 29), range(7, 40), band_tiles("causal", 24, 33)[0].band, ((), ()))
    partial = KERNEL.forward(q, k, v, (middle,), scale=0.2, score=Scores((), None, 20.0))
    for rows in (slice(5), slice(29, None)):
        assert (partial.m[..., rows] == -torch.inf).all() and (partial.lse[..., rows] == -torch.inf).all()
        assert (partial.acc[:, rows] == 0).all()
    # See Note [base 2] of triton_forward.
    torch.testing.assert_close(partial.sum[..., 5:29], torch.full_like(partial.sum[..., 5:29], 2.0**24), rtol=1e-4, atol=0)


def test_other_kernels_are_asked_nothing_new_by_a_bound():
    """Cosine similarity needs nothing of a kernel, also where its scale is a number."""
    q = torch.randn(1, 8, 1, 4)
    ring = ra.Ring.simulated(2, kernel="aten")
    assert ra.ring_attention(q, q, q, ring=ring, score=CosineSim(5.0)).isfinite().all()
