"""Shards and their inverse, labels, padding, and the loss over all ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import ring_attn as ra
from tests.dist.harness import run_processes
from tests.support import FLOAT64_LIMIT, rel_error

LAYOUTS = ("contiguous", "striped", "zigzag")


def check_shard_and_unshard(ring):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 3, dtype=torch.float64, generator=generator).requires_grad_()
    up = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    local = ring.shard(x)
    assert torch.equal(local, x[:, ring.positions(24)])
    assert torch.equal(ring.unshard(local), x)
    assert torch.equal(torch.autograd.grad(ring.unshard(local.sin()), x, up)[0], up * x.cos())
    [partial] = torch.autograd.grad(ring.unshard(local, grad="partial"), local, up * (1 + ring.hosted[0]))
    contributions = sum(1 + rank for rank in range(0, ring.size, len(ring.hosted)))
    assert rel_error(partial, contributions * ring.shard(up)) < FLOAT64_LIMIT
    tokens = torch.arange(48).view(2, 24)
    assert torch.equal(ring.unshard(ring.shard(tokens)), tokens)
    assert torch.equal(ring.unshard(ring.shard(x.mT, 2), -1), x.mT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size", [1, 2, 3])
def test_simulated_shard_and_unshard(layout, ring_size):
    check_shard_and_unshard(ra.Ring.simulated(ring_size, layout, hostile=True))


def _on_gloo(rank, ranks_per_process):
    for layout in LAYOUTS:
        ring = ra.Ring.from_group(None, layout, ranks_per_process=ranks_per_process)
        check_shard_and_unshard(ring)
        check_loss(ring)


@pytest.mark.parametrize(("num_processes", "ranks_per_process"), [(3, 1), (2, 2)])
def test_gloo(num_processes, ranks_per_process):
    run_processes(_on_gloo, num_processes, ranks_per_process)


def test_labels_are_shifted_over_shard_borders():
    tokens = torch.randint(0, 99, (2, 12))
    labels = ra.shift_labels(tokens)
    assert torch.equal(labels[:, :-1], tokens[:, 1:]) and (labels[:, -1] == -100).all()
    for narrow in (torch.uint8, torch.int32):
        assert (
            torch.equal(ra.shift_labels(tokens.to(narrow)), labels) and ra.shift_labels(tokens.to(narrow)).dtype == torch.int64
        )
    with pytest.raises(ValueError, match=r"tokens must be integers, got torch.float32"):
        ra.shift_labels(tokens.float())
    ring = ra.Ring.simulated(3, "striped")
    assert torch.equal(ring.unshard(ring.shard(labels)), labels)


def test_pad_to_a_legal_length():
    ring = ra.Ring.simulated(3, "zigzag")
    assert ring.shard_multiple == 6
    x = torch.randn(2, 13, 4)
    padded = ra.pad_to(x, ring.shard_multiple, value=7.0)
    assert padded.shape == (2, 18, 4) and torch.equal(padded[:, :13], x) and (padded[:, 13:] == 7).all()
    assert ra.pad_to(padded, 6) is padded
    ring.shard(padded)
    with pytest.raises(ValueError, match=r"seq_len 13 must be a multiple of 2 \* ring_size = 6.*pad with ring_attn.pad_to"):
        ring.shard(x)
    with pytest.raises(ValueError, match="multiple must be at least 1, got 0"):
        ra.pad_to(x, 0)
    for dtype, value in ((torch.uint8, -100), (torch.int64, 0.5), (torch.int8, float("inf")), (torch.bool, 2)):
        with pytest.raises(ValueError, match=rf"{dtype} cannot hold the padding {value}; cast x first, labels with \.long\(\)"):
            ra.pad_to(torch.ones(1, 3, dtype=dtype), 4, value=value)
    assert ra.pad_to(torch.ones(1, 3, dtype=torch.int64), 4, value=-100.0)[0, 3] == -100
    assert not ra.pad_to(torch.ones(1, 3, dtype=torch.bool), 4)[0, 3]
    for wrong in (ring.shard, ring.unshard, lambda x, dim: ra.pad_to(x, 6, dim=dim)):
        with pytest.raises(ValueError, match=r"dim 3 is none of x's 3, whose shape is \(2, 18, 4\)"):
            wrong(padded, dim=3)


def check_loss(ring):
    """Value and, summed over the processes, weight gradients of the unsharded mean; some ranks hold no valid label."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 9, dtype=torch.float64, generator=generator).requires_grad_()
    hidden = torch.randn(2, 24, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 9, (2, 24), generator=generator)
    labels[:, 5:] = -100
    want = F.cross_entropy((hidden @ weight).flatten(0, 1), labels.flatten())
    [want_grad] = torch.autograd.grad(want, weight)
    loss = ra.global_token_loss(ring.shard(hidden) @ weight, ring.shard(labels), ring=ring)
    [grad] = torch.autograd.grad(3 * loss, weight)
    if len(ring.hosted) < ring.size:
        dist.all_reduce(grad)
    assert rel_error(loss, want) < FLOAT64_LIMIT
    assert rel_error(grad, 3 * want_grad) < FLOAT64_LIMIT
    nothing = ra.global_token_loss(ring.shard(hidden) @ weight, torch.full_like(ring.shard(labels), -100), ring=ring)
    assert nothing == 0 and (torch.autograd.grad(nothing, weight)[0] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_simulated_loss(layout):
    check_loss(ra.Ring.simulated(4, layout))


def test_loss_refuses_labels_that_are_none():
    logits, ring = torch.randn(2, 4, 9), ra.Ring.simulated(1)
    for dtype in (torch.float32, torch.complex64, torch.bool):
        words = f"labels must be integers, as ring_attn.shift_labels makes them, got {dtype}"
        with pytest.raises(ValueError, match=words):
            ra.global_token_loss(logits, torch.zeros(2, 4, dtype=dtype), ring=ring)
    words = r"logits must be \[..., rows, vocabulary\] and labels \[..., rows\], got \(9,\), \(\)"
    with pytest.raises(ValueError, match=words):
        ra.global_token_loss(logits[0, 0], torch.tensor(1), ring=ring)
    # 156 is what uint8 makes of -100.
    logits, labels = torch.randn(2, 4, 256), torch.tensor([[156, 156, 1, 255]]).expand(2, 4)
    *narrow, wide = (
        ra.global_token_loss(logits, labels.to(dtype), ring=ring) for dtype in (torch.uint8, torch.int32, torch.int64)
    )
    assert all(torch.equal(one, wide) for one in narrow)
    with pytest.raises(TypeError, match=r"ring must be a Ring, on one device Ring.simulated\(1\), got NoneType"):
        ra.global_token_loss(torch.randn(2, 4, 9), torch.zeros(2, 4, dtype=torch.long), ring=None)
    with pytest.raises(ValueError, match=r"labels \[..., rows\], got \(2, 4, 9\), \(2, 3\)"):
        ra.global_token_loss(torch.randn(2, 4, 9), torch.zeros(2, 3, dtype=torch.long), ring=ra.Ring.simulated(1))


def test_whole_numbers_are_numbers():
    labels = ra.pad_to(torch.zeros(1, 3, dtype=torch.int64), 4, value=-100)
    assert labels.tolist() == [[0, 0, 0, -100]]
    with pytest.raises(TypeError, match="value"):
        ra.pad_to(labels, 4, value="-100")
