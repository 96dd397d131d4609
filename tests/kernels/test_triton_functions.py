"""Functions of scores and masks in the Triton kernels: over a ring, and what is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

import ring_attn as ra
from ring_attn.kernels import KernelUnavailable
from ring_attn.kernels.triton_kernel import TritonKernel, interpreted
from ring_attn.layout import LAYOUTS
from ring_attn.mask import Causal, MaskMod, Window
from ring_attn.score import Alibi, Scores, SoftCap
from ring_attn.score_mod import ScoreMod
from tests.scores import Piece, Sizes, alibi, compared, cosine, errors, positions, sinks, softcap
from tests.support import FLOAT32_LIMIT, band_tiles, random_qkv, rel_error, run_kernel

triton = pytest.importorskip("triton")
functions = pytest.importorskip("tests.kernels.triton_functions")
BOW, SHRINK, SEES, SEES_NEAR, bow, through_bow = (
    getattr(functions, name) for name in ("BOW", "SHRINK", "SEES", "SEES_NEAR", "bow", "through_bow")
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


def user_mod(mod: ScoreMod) -> Callable[[Sizes], Piece]:
    def piece(n: Sizes) -> Piece:
        b, h, (i, j) = torch.arange(n.b)[:, None, None, None], torch.arange(n.h)[:, None, None], positions(n)
        return Piece(lambda x, ring: mod, step=lambda s: mod.fn(s, b, h, i, j))

    return piece


RINGS = {
    "softcap, alibi": ([softcap, alibi], Causal()),
    "alibi, softcap, sinks": ([alibi, softcap, sinks], Window(9, 4)),
    "cosine, softcap, sinks": ([cosine(4.0, 2), softcap, sinks], Causal() & ra.Documents(lengths=[7, 0, 17])),
    "functions": ([user_mod(BOW), alibi], Causal() & SEES),
}
WAYS = list(product((3, 4), LAYOUTS, ("ring", "gather")))


@pytest.mark.parametrize("number", range(len(WAYS)), ids=lambda n: "-".join(map(str, WAYS[n])))
def test_over_a_ring(number):
    ring_size, layout, exchange = WAYS[number]
    ring = ra.Ring.simulated(ring_size, layout, exchange=exchange, kernel="triton", hostile=True)
    pieces, mask = RINGS[list(RINGS)[(number + number // 4) % 4]]
    n = Sizes(h=2, g=1, b=1, d=8, dv=6, dtype=torch.float32, seed=number)
    found = errors(ring, n, mask, [piece(n) for piece in pieces], device=DEVICE)
    assert all(error < FLOAT32_LIMIT for error in found.values()), found


ULYSSES = {
    "functions": ([user_mod(BOW), user_mod(SHRINK), alibi], Causal() & SEES),
    "a mask function": ([], SEES),
    "alibi": ([alibi, sinks], Window(9, 4)),
    "softcap": ([softcap], Causal()),
}
ULYSSES_WAYS = [(2, 1, "contiguous", "ring"), (2, 2, "zigzag", "gather"), (4, 1, "striped", "pull")]


@pytest.mark.parametrize("way", ULYSSES_WAYS, ids=lambda way: "-".join(map(str, way)))
@pytest.mark.parametrize("name", ULYSSES)
def test_heads_of_another_rank_keep_their_numbers(name, way):
    """On a ring of two axes, against the plain softmax and against the reference kernel."""
    parts, rings, layout, exchange = way
    pieces, mask = ULYSSES[name]
    n, found = Sizes(t=16, b=1, d=8, dv=6, dtype=torch.float32), {}
    for kernel in ("triton", "reference"):
        ring = ra.Ring.simulated(parts * rings, layout, exchange=exchange, kernel=kernel, hostile=True, ulysses=parts)
        found[kernel] = compared(ring, n, mask, [piece(n) for piece in pieces], device=DEVICE)
    for name, (x, ref) in found["triton"].items():
        assert rel_error(x, ref) < FLOAT32_LIMIT, name
        assert rel_error(x, found["reference"][name][0]) < FLOAT32_LIMIT, name


@pytest.mark.parametrize(("layout", "kv_layout"), [("striped", "contiguous"), ("zigzag", "striped")])
def test_queries_and_keys_whose_positions_have_different_steps(layout, kv_layout):
    ring = ra.Ring.simulated(2, layout, kernel="triton", hostile=True)
    n = Sizes(b=1, t=16, h=2, g=1, d=8, dv=6, dtype=torch.float32, kv_len=24, kv_layout=kv_layout)
    found = errors(ring, n, Window(9, 4), [alibi(n), softcap(n)], device=DEVICE)
    assert all(error < FLOAT32_LIMIT for error in found.values()), found


def shrunk_by(factor):
    """A pair of functions whose names are those of every other such pair."""

    @triton.jit
    def forward(score, b, h, q_pos, kv_pos):
        return score * factor

    @triton.jit
    def backward(dscore, score, b, h, q_pos, kv_pos):
        return dscore * factor

    return ScoreMod(lambda s, b, h, q, k: s * factor, triton=(forward, backward))


def test_two_functions_of_one_name_are_refused():
    from ring_attn.kernels.triton_scores import check_names

    halved, doubled = shrunk_by(0.5), shrunk_by(2.0)
    check_names(halved.triton * 2)
    inputs = [x.to(DEVICE) for x in random_qkv(1, 20, 20, 1, 1, 16)]
    with pytest.raises(ValueError, match=r"two different Triton functions are named .*shrunk_by.*__qualname__"):
        run_kernel(TritonKernel(), *inputs, [band_tiles("full", 20, 20)], scale=0.2, score=Scores((halved, doubled)))


def calling(helper):
    @triton.jit
    def forward(score, b, h, q_pos, kv_pos):
        return helper(score, b, h, q_pos, kv_pos)

    forward.fn.__qualname__ = f"forward_{id(helper)}"
    return forward


def test_so_are_two_functions_that_others_call():
    from ring_attn.kernels.triton_scores import check_names

    first, second = (calling(shrunk_by(factor).triton[0]) for factor in (0.5, 2.0))
    check_names([first, first])
    with pytest.raises(ValueError, match=r"two different Triton functions are named .*shrunk_by"):
        check_names([first, second])


@pytest.mark.parametrize("functions", [bow, (bow,), (bow, lambda *x: x[0]), [bow, through_bow], (bow, through_bow, bow)])
def test_functions_that_are_no_pair_are_refused(functions):
    with pytest.raises(TypeError, match=r"ScoreMod\(.*\) takes triton=\(forward, backward\), two @triton.jit functions, got"):
        ScoreMod(lambda s, b, h, q, k: s, triton=functions)


def test_a_predicate_that_is_not_jitted_is_refused():
    with pytest.raises(TypeError, match=r"MaskMod\(.*\) takes triton=predicate, a @triton.jit function, got"):
        MaskMod(lambda b, h, q, k: q == k, triton=lambda b, h, q, k: q == k)


def test_a_captured_tensor_that_needs_a_gradient_is_refused_beside_triton_functions():
    table = torch.ones(8, requires_grad=True)
    mod = ScoreMod(lambda s, b, h, q, k: s * table[h], triton=(bow, through_bow))
    q = torch.ones(1, 8, 1, 4)
    with pytest.raises(ValueError, match="captures a tensor that needs a gradient, which its Triton functions cannot give"):
        ra.ring_attention(q, q, q, ring=ra.Ring.simulated(2), score=mod)
    with torch.no_grad():
        ra.ring_attention(q, q, q, ring=ra.Ring.simulated(2, kernel="reference"), score=mod)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"score": ScoreMod(BOW.fn)}, r"by Triton functions beside it, ScoreMod\(fn, triton=\(forward, backward\)\)"),
        ({"mask": MaskMod(SEES.fn)}, r"masks that are bands, or MaskMod\(fn, triton=predicate\)"),
        ({"mask": MaskMod(SEES.fn) & SEES_NEAR}, r"masks that are bands, or MaskMod\(fn, triton=predicate\)"),
        (
            {"score": [Alibi(torch.ones(1, device=DEVICE))] * 2},
            "the gradient of one Alibi's slopes",
        ),
        ({"score": [SoftCap(1.0), ra.Bias(torch.zeros(8, 8, device=DEVICE))]}, "it has no bias"),
        ({"score": ra.Dropout(0.1, 0)}, "it has no dropout"),
    ],
)
def test_refuses_in_words(change, reason):
    q = torch.ones(1, 8, 1, 4, device=DEVICE)
    with pytest.raises(KernelUnavailable, match=reason):
        ra.ring_attention(q, q, q, ring=ra.Ring.simulated(2, kernel="triton"), **change)
