"""Masks that are functions: what they hide is not computed, nothing grows with t^2, and they join bands and documents."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ring_attn as ra
from ring_attn.kernels import reference, resolve
from ring_attn.layout import LAYOUTS
from ring_attn.tiles import tiles
from tests.support import FLOAT64_LIMIT, dense, random_qkv, rel_error

B, T, H = 2, 24, 4
DOCUMENT = torch.tensor([0] * 5 + [1] * 9 + [2] * 10)
BY_ROW = torch.stack([DOCUMENT, DOCUMENT.flip(0)])
KEPT = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)


def sees_block(b, h, q, k):
    return KEPT[q // 8, k // 8]


# name -> (function, what it means for Python's integers)
EXAMPLES = {
    "prefix": (lambda b, h, q, k: (k < 7) | (k <= q), lambda b, h, q, k: k < 7 or k <= q),
    "dilated": (lambda b, h, q, k: ((q - k) % 3 == 0) & (k <= q), lambda b, h, q, k: (q - k) % 3 == 0 and k <= q),
    "strict": (lambda b, h, q, k: k < q, lambda b, h, q, k: k < q),
    "blocks": (sees_block, lambda b, h, q, k: k // 8 == 0 or (k // 8 == q // 8)),
    "document": (lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k], lambda b, h, q, k: index(q) == index(k)),
    "by row": (lambda b, h, q, k: BY_ROW[b, q] == BY_ROW[b, k], lambda b, h, q, k: index(q, b) == index(k, b)),
    "by head": (lambda b, h, q, k: (q - k).abs() <= 2 * h, lambda b, h, q, k: abs(q - k) <= 2 * h),
    "by both": (lambda b, h, q, k: (q + k + b) % (h + 1) == 0, lambda b, h, q, k: (q + k + b) % (h + 1) == 0),
    "ints": (lambda b, h, q, k: (q ^ k) & 6, lambda b, h, q, k: (q ^ k) & 6 != 0),
    "nothing": (lambda b, h, q, k: q < 0, lambda b, h, q, k: False),
    "no query or key": (lambda b, h, q, k: h > 1, lambda b, h, q, k: h > 1),
}


def index(position, b=0):
    """The document of a position, by its ends."""
    position = T - 1 - position if b else position
    return sum(position >= end for end in (5, 14))


COMPANIONS = {
    "alone": (ra.Full(), lambda q, k: True),
    "causal": (ra.Causal(), lambda q, k: k <= q),
    "documents, window": (
        ra.Documents(lengths=[10, 0, 14]) & ra.Window(6, 3),
        lambda q, k: (q < 10) == (k < 10) and q - 6 <= k <= q + 3,
    ),
    "padding": (ra.Causal() & ra.KeyPadding(T - 3), lambda q, k: k <= q and k < T - 3),
    "another function": (ra.MaskMod(lambda b, h, q, k: k % 2 == 0), lambda q, k: k % 2 == 0),
}


@contextmanager
def blocks_of(rows: int, columns: int):
    with patch.dict(reference.KERNELS, reference=reference.ReferenceKernel(rows, columns)):
        resolve.cache_clear()
        yield
    resolve.cache_clear()


@pytest.mark.parametrize("companion", COMPANIONS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_function_and_its_companions(name, companion):
    (fn, by_hand), (mask, also) = EXAMPLES[name], COMPANIONS[companion]
    cells = [[[[by_hand(b, h, q, k) and also(q, k) for k in range(T)] for q in range(T)] for h in range(H)] for b in range(B)]
    seen = torch.tensor(cells)
    q, k, v, dout = random_qkv(B, T, T, H, 2, 6, 5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = torch.stack(
        [dense(q[:, :, h : h + 1], k[:, :, h // 2, None], v[:, :, h // 2, None], seen[:, h], 0.5)[0] for h in range(H)]
    )
    truth = [out := out.squeeze(3).movedim(0, 2), *torch.autograd.grad(out, leaves, dout)]
    number = list(EXAMPLES).index(name) + list(COMPANIONS).index(companion)
    ring = ra.Ring.simulated(
        3 + number % 2, list(LAYOUTS)[number % 3], exchange=("ring", "gather", "pull")[number // 2 % 3], hostile=True
    )
    both = ra.MaskMod(fn) & mask if number % 2 else mask & ra.MaskMod(fn)
    with blocks_of(*((5, 4), (64, 64))[number % 2]):
        out = ring.unshard(ra.ring_attention(*map(ring.shard, leaves), ring=ring, mask=both, softmax_scale=0.5))
        found = [out, *torch.autograd.grad(out, leaves, dout)]
    assert all(rel_error(x, ref) < FLOAT64_LIMIT for x, ref in zip(found, truth, strict=True))


class Counts:
    """How often a block's scores are computed, and how often a function is asked."""

    def __init__(self) -> None:
        self.scores = self.asked = 0

    @contextmanager
    def counted(self):
        raw = reference._Block._raw

        def counting(block):
            self.scores += 1
            return raw(block)

        with patch.object(reference._Block, "_raw", counting):
            yield self

    def asking(self, fn):
        def counted(b, h, q, k):
            self.asked += 1
            return fn(b, h, q, k)

        return counted


def run(ring, mask, t, seed=0):
    """Forward and backward of a small call."""
    q, k, v, dout = random_qkv(1, t, t, 1, 1, 4, dtype=torch.float64, seed=seed)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ra.ring_attention(*leaves, ring=ring, mask=mask)
    torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize(
    ("mask", "computed", "asked"),
    [
        # 16 x 16 blocks of 4: a function is asked once a block the band enters, a block is computed where a cell is left.
        (lambda fn: ra.MaskMod(fn(lambda b, h, q, k: q // 16 == k // 16)), 4 * 16, 256),
        (lambda fn: ra.MaskMod(fn(lambda b, h, q, k: q // 4 == k // 4)), 16, 256),
        (lambda fn: ra.MaskMod(fn(lambda b, h, q, k: (q == 63) & (k == 0))), 1, 256),
        (lambda fn: ra.MaskMod(fn(lambda b, h, q, k: q < 0)), 0, 256),
        (lambda fn: ra.Causal() & ra.MaskMod(fn(lambda b, h, q, k: q // 4 == k // 4)), 16, 136),
        (lambda fn: ra.Window(4) & ra.MaskMod(fn(lambda b, h, q, k: q // 4 == k // 4)), 16, 31),
        (lambda fn: ra.Documents(lengths=[16] * 4) & ra.MaskMod(fn(lambda b, h, q, k: k < 8)), 8, 64),
    ],
)
@pytest.mark.parametrize("ring_size", [1, 4])
def test_what_a_function_hides_is_not_computed(mask, computed, asked, ring_size):
    counts = Counts()
    with blocks_of(4, 4), counts.counted():
        run(ra.Ring.simulated(ring_size, "contiguous", kernel="reference"), mask(counts.asking), 64)
    assert (counts.scores, counts.asked) == (2 * computed, 2 * asked), "once forward, once backward"


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return found


@pytest.mark.parametrize("score", [None, ra.ScoreMod(lambda s, b, h, q, k: s - 0.1 * (q - k)), ra.Dropout(0.5, 0)])
def test_nothing_grows_with_the_square_of_the_sequence(score):
    largest, t, block = Largest(), 512, 64

    def watched(method):
        def inside(*args, **kwargs):
            with largest:
                return method(*args, **kwargs)

        return inside

    kernel = reference.ReferenceKernel
    with (
        blocks_of(block, block),
        patch.object(kernel, "forward", watched(kernel.forward)),
        patch.object(kernel, "backward", watched(kernel.backward)),
    ):
        q = torch.randn(1, t, 1, 4, requires_grad=True)
        mask = ra.MaskMod(lambda b, h, q, k: (q - k) % 5 == 0)
        ra.ring_attention(q, q, q, ring=ra.Ring.simulated(2, kernel="reference"), mask=mask, score=score).sin().sum().backward()
    assert block * block <= largest.numel < t * t / 2 / 2 / 4


def test_tiles_carry_functions_and_are_cut_and_trimmed_as_without():
    fn, shard = (lambda b, h, q, k: q != k), (range(12), range(36, 48))
    plain = ra.Causal() & ra.Documents(lengths=[7, 41]) & ra.Window(9)
    for mask in (plain & ra.MaskMod(fn), ra.MaskMod(fn) & plain, ra.MaskMod(fn) & plain & ra.MaskMod(fn)):
        found = tiles(shard, [shard], mask)
        assert [tile.predicates for tile in found] == [(ra.MaskMod(fn),)] * len(found)
        assert [(t.q_rows, t.kv_rows, t.band, t.positions) for t in found] == [
            (t.q_rows, t.kv_rows, t.band, t.positions) for t in tiles(shard, [shard], plain)
        ]


def test_masks_of_functions_are_equal_by_function():
    fn, other = (lambda b, h, q, k: q == k), (lambda b, h, q, k: q == k)
    assert ra.MaskMod(fn) == ra.MaskMod(fn) != ra.MaskMod(other)
    assert len({ra.MaskMod(fn), ra.MaskMod(fn), ra.MaskMod(other)}) == 2
    assert repr(ra.MaskMod(sees_block)) == "MaskMod(sees_block)"


def test_a_function_that_returns_no_tensor_is_named():
    with pytest.raises(ValueError, match="must only return Tensors, got type <class 'bool'>") as raised:
        run(ra.Ring.simulated(2), ra.MaskMod(lambda b, h, q, k: True), 8)
    assert "must be a function (b, h, q_pos, kv_pos) -> bool of integer tensors" in raised.value.__notes__[0]


def test_a_table_that_is_too_short_is_named():
    few = torch.ones(5)
    for changed in (
        {"mask": ra.MaskMod(lambda b, h, q, k: few[k] > 0)},
        {"score": ra.ScoreMod(lambda s, b, h, q, k: s * few[k])},
    ):
        q, k, v, _ = random_qkv(1, 8, 8, 2, 1, 4)
        with pytest.raises(IndexError, match="out of bounds") as raised:
            ra.ring_attention(q, k, v, ring=ra.Ring.simulated(2), **changed)
        assert "Mod(test_a_table_that_is_too_short_is_named.<locals>.<lambda>) must be a function" in raised.value.__notes__[0]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_backward_does_not_ask_a_function_that_reads_something_else_by_then(checkpointed):
    numbers = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    mask = ra.Causal() & ra.MaskMod(lambda b, h, q, k: numbers[q] == numbers[k])
    q, k, v, dout = random_qkv(1, 8, 8, 2, 1, 4, dtype=torch.float64)
    attend = partial(ra.ring_attention, ring=ra.Ring.simulated(2, "contiguous"), mask=mask)

    def out():
        inputs = q.detach().requires_grad_(), k, v
        return inputs[0], checkpoint(attend, *inputs, use_reentrant=False) if checkpointed else attend(*inputs)

    leaf, found = out()
    found.backward(dout)
    wanted = leaf.grad
    leaf, found = out()
    numbers.mul_(2)
    with pytest.raises(RuntimeError, match=r"reads was written to between a forward and its backward.*; write to it after"):
        found.backward(dout)
    leaf, found = out()
    found.backward(dout)
    assert torch.equal(leaf.grad, wanted)
