"""Dropout: which cells drop depends on (seed, batch row, head, q, k) alone, both directions agree, its statistics are right."""

from itertools import combinations, product

import pytest
import torch

import ring_attn as ra
from ring_attn.score import Cells, Dropout
from tests.scores import kept

T, B, H = 24, 2, 3


def dropped_cells(ring, p, seed, mask=None):
    """Factors [b, h, t, t] as a whole call shows them: with v the identity, out holds every probability times its factor."""
    gen = torch.Generator().manual_seed(5)
    q, k = (torch.randn(B, T, H, 4, generator=gen, dtype=torch.float64) for _ in range(2))
    v = torch.eye(T, dtype=torch.float64)[None, :, None].expand(B, T, H, T)
    score = None if p is None else Dropout(p, seed)
    return ring.unshard(
        ra.ring_attention(*map(ring.shard, (q, k, v)), ring=ring, mask=mask or ra.Full(), score=score)
    ).transpose(1, 2)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
def test_cells_are_those_of_the_seed_in_any_layout_ring_and_exchange(seed):
    whole = dropped_cells(ra.Ring.simulated(1), None, seed)
    for size, layout, exchange in product((1, 2, 3, 4), ("contiguous", "striped", "zigzag"), ("ring", "gather", "pull")):
        found = dropped_cells(ra.Ring.simulated(size, layout, exchange=exchange, hostile=True), 0.4, seed)
        assert torch.allclose(found, whole * kept(0.4, seed, B, H, T, T), rtol=1e-12, atol=0)


def test_forward_and_backward_drop_the_same():
    """The output is linear in v: dv of any dout is the transposed map, so <out(v), dout> = <v, dv> for every v."""
    ring = ra.Ring.simulated(3, "striped", hostile=True)
    q, k, v, dout = (torch.randn(B, T, H, 4, dtype=torch.float64) for _ in range(4))
    v.requires_grad_()
    score = Dropout(0.5, 3)
    out = ra.ring_attention(q, k, v, ring=ring, score=score)
    (dv,) = torch.autograd.grad(out, v, dout)
    other = torch.randn_like(v)
    assert torch.allclose(
        (ra.ring_attention(q, k, other, ring=ring, score=score) * dout).sum(), (dv * other).sum(), rtol=1e-12, atol=1e-12
    )


def test_nothing_drops_at_p_0_and_little_stays_near_1():
    ring = ra.Ring.simulated(2, kernel="reference")
    assert torch.equal(dropped_cells(ring, 0.0, 1), dropped_cells(ring, None, 1))
    assert (dropped_cells(ring, 0.999, 1) != 0).double().mean() < 0.01


def test_the_expectation_is_attention_without_dropout():
    """Over many seeds the mean of every cell's factor, and of all, is 1 within five standard errors."""
    cells, p, seeds = everywhere(8, 8, 16), 0.3, 400
    factors = torch.stack([Dropout(p, seed).keep(cells) for seed in range(seeds)])
    error = (p / (1 - p) / seeds) ** 0.5
    assert abs(factors.mean() - 1) < 5 * error / (8 * 8 * 16) ** 0.5
    assert ((factors.mean(0) - 1).abs() < 5 * error).all()
    assert set(factors.unique().tolist()) == {0.0, 1 / (1 - p)}


def everywhere(b, h, t, q_start=0):
    positions = torch.arange(t)
    return Cells(torch.arange(b), torch.arange(h), positions + q_start, positions, positions)


def bits(p=0.5, seed=0, **sizes):
    return (Dropout(p, seed).keep(everywhere(**sizes)) > 0).double()


@pytest.mark.parametrize("axis", ["seed", "batch", "head", "query", "key"])
def test_neighbours_are_as_independent_as_coins(axis):
    """The number of cells in which neighbours along an axis agree is that of fair coins, within five standard deviations."""
    if axis == "seed":
        slices = [bits(seed=seed, b=4, h=4, t=64).flatten() for seed in (0, 1, 2, 3, 2**32, 2**33, 2**32 + 1)]
    else:
        dim = ("batch", "head", "query", "key").index(axis)
        slices = [x.flatten() for x in bits(b=4, h=4, t=64).movedim(dim, 0)[:8]]
    for a, b in combinations(slices, 2):
        assert abs((a == b).sum() - a.numel() / 2) < 5 * a.numel() ** 0.5 / 2


def test_far_positions_and_every_bit_of_the_share():
    """A long sequence far from 0, at several p: the share of dropped cells is p, in every row and column as well."""
    for p, start in product((0.01, 0.25, 0.9), (0, 2**20 - 7, 2**31)):
        dropped = Dropout(p, 11).keep(everywhere(1, 1, 512, start))[0, 0] == 0
        deviation = (p * (1 - p)) ** 0.5
        assert abs(dropped.double().mean() - p) < 5 * deviation / 512
        for dim in (0, 1):
            assert ((dropped.double().mean(dim) - p).abs() < 5.5 * deviation / 512**0.5).all()


def test_no_structure_in_two_dimensions():
    """The spectrum of a block of cells is flat, as that of noise is: no diagonal, stripe or period stands out."""
    block = bits(b=1, h=1, t=256)[0, 0] - 0.5
    power = torch.fft.fft2(block).abs().square() / block.numel() / 0.25
    assert power.flatten()[1:].max() < 20, "of exponential variables with mean 1, 65536 stay below 20 with chance 0.9999"
