"""RingSelfAttention: the same layer with and without a ring."""

import math
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ring_attn as ra
from ring_attn import call
from ring_attn.module import rotary_angles, rotate
from tests.support import FLOAT64_LIMIT, rel_error


def layers(ring, **options):
    torch.manual_seed(0)
    plain = ra.RingSelfAttention(24, 4, 2, **options).double()
    ringed = ra.RingSelfAttention(24, 4, 2, **options, ring=ring).double()
    ringed.load_state_dict(plain.state_dict())
    return plain, ringed


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("options", [{}, {"head_dim": 10, "bias": True}, {"rope_theta": None}])
def test_same_output_and_gradients_with_and_without_a_ring(layout, options):
    ring = ra.Ring.simulated(3, layout, hostile=True)
    plain, ringed = layers(ring, **options)
    x = torch.randn(2, 36, 24, dtype=torch.float64).requires_grad_()
    up = torch.randn(2, 36, 24, dtype=torch.float64)
    mask = ra.Causal() & ra.Documents(lengths=[5, 31])
    want, got = plain(x, mask=mask), ring.unshard(ringed(ring.shard(x), mask=mask))
    assert rel_error(got, want) < FLOAT64_LIMIT
    grads = torch.autograd.grad(got, [x, *ringed.parameters()], up)
    wants = torch.autograd.grad(want, [x, *plain.parameters()], up)
    for grad, ref in zip(grads, wants, strict=True):
        assert rel_error(grad, ref) < FLOAT64_LIMIT


def test_rows_that_are_no_equal_shards_are_named():
    ring = ra.Ring.simulated(2)
    with pytest.raises(ValueError, match=r"7 rows cannot be the equal shards of 2 hosted ranks; use ring\.shard"):
        ra.RingSelfAttention(8, 2, ring=ring)(torch.randn(1, 7, 8))
    with pytest.raises(ValueError, match=r"7 rows cannot be the equal shards of 2 hosted ranks; use ring\.shard"):
        ring.unshard(torch.randn(1, 7, 8))


def test_rotary_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)
    scores = []
    for shift in (0, 1, 1000, 1 << 20):
        cos, sin = rotary_angles(torch.tensor([7 + shift, 3 + shift]), 16)
        scores.append((rotate(q, cos[:1], sin[:1]) * rotate(k, cos[1:], sin[1:])).sum())
    assert all(abs(score - scores[0]) < 1e-9 for score in scores)
    assert abs(scores[0] - (q * k).sum()) > 1e-3


def test_bfloat16_rotation_keeps_far_positions_apart():
    cos, sin = rotary_angles(torch.tensor([1 << 20, (1 << 20) + 1]), 16)
    x = torch.randn(1, 1, 1, 16, dtype=torch.bfloat16).expand(1, 2, 1, 16)
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16 and not torch.equal(turned[:, 0], turned[:, 1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((10, 4), r"dim 10 must be a multiple of num_heads 4, or name head_dim"),
        ((12, 4, 3), r"num_heads 4 must be a multiple of num_kv_heads 3"),
        ((12, 4, 0), r"num_kv_heads must be at least 1, got 0"),
        ((12, 0), r"num_heads must be at least 1, got 0"),
        ((12, 4), r"rotary embeddings need an even head_dim, got 3; pass rope_theta=None"),
    ],
)
def test_bad_shapes_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        ra.RingSelfAttention(*args)


@pytest.mark.parametrize("theta", [0, -1.0, math.inf, math.nan])
def test_a_base_without_rotations_is_named(theta):
    with pytest.raises(ValueError, match=f"rope_theta must be above 0 and finite, got {theta}; None leaves rotary"):
        ra.RingSelfAttention(12, 2, rope_theta=theta)


@pytest.mark.parametrize("shape", [(12,), (4, 12), (1, 4, 11), (1, 4, 2, 12)])
def test_an_input_that_is_none_is_named(shape):
    layer, message = ra.RingSelfAttention(12, 2), re.escape(f"x must be [batch, rows, 12], got {shape}")
    for attend in (layer, lambda x: layer.decode(x, ra.KVCache(layer.ring))):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            attend(torch.zeros(shape))


@pytest.mark.parametrize("by_id", [call._BY_ID, True])
def test_a_compiled_layer_takes_every_length(by_id, monkeypatch):
    """The second length makes a graph that takes all, and one by documents is as whole as any."""
    monkeypatch.setattr(call, "_BY_ID", by_id)
    torch._dynamo.reset()
    ring, counter = ra.Ring.simulated(2, "zigzag", kernel="reference"), CompileCounterWithBackend("aot_eager")
    _, layer = layers(ring)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for length in (8, 12, 16, 20, 8):
        x = torch.randn(1, length, 24, dtype=torch.float64, requires_grad=True)
        found, want = (torch.autograd.grad(run(x).sin().sum(), x)[0] for run in (compiled, layer))
        assert rel_error(found, want) < FLOAT64_LIMIT
    assert counter.frame_count == 2
    lengths = [7, 0, 9]
    of_batch, mask = ring.with_layout(ra.ByDocument(lengths)), ra.Causal() & ra.Documents(lengths)
    compiled = torch.compile(lambda x: layer(x, mask=mask, ring=of_batch), backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 16, 24, dtype=torch.float64)
    assert rel_error(compiled(x), layer(x, mask=mask, ring=of_batch)) < FLOAT64_LIMIT
