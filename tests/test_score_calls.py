"""Scores at the edges of a call: dtypes, rows without keys, dispatch modes, forms of functions, kernels by name, bad input."""

from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ring_attn as ra
from ring_attn import call
from ring_attn.kernels import KernelUnavailable, get_kernel, resolve
from tests.scores import MASKS, SINGLE, Sizes, pieces_of, plain, seen_cells
from tests.support import FLOAT32_LIMIT, FLOAT64_LIMIT, random_qkv, rel_error

WHOLE = Sizes()


def inputs(n=WHOLE, **options):
    return [x.requires_grad_() for x in random_qkv(n.b, n.t, n.t, n.h, n.g, n.d, n.dv, dtype=n.dtype, **options)[:3]]


@pytest.mark.parametrize("tensor_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["alibi", "bias htt", "closure mod", "global mod", "sinks", "learned cosine"])
def test_tensors_may_have_another_dtype_than_q(score, tensor_dtype):
    ring, n = ra.Ring.simulated(2, "striped", hostile=True), Sizes()
    (piece,), (q, k, v) = pieces_of(score, n), (x.detach().float() for x in inputs())
    leaves = [x.detach().to(tensor_dtype).requires_grad_() for x in piece.leaves]
    as_float = [x.detach().float().requires_grad_() for x in leaves]
    found = []
    for tensors in (leaves, as_float):
        out = ring.unshard(ra.ring_attention(*map(ring.shard, (q, k, v)), ring=ring, score=piece.make(tensors, ring)))
        found.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    assert found[0][0].dtype == torch.float32
    assert rel_error(found[0][0], found[1][0]) < 1e-5
    for grad, ref, leaf in zip(found[0][1:], found[1][1:], leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert rel_error(grad, ref) < max(1e-5, torch.finfo(tensor_dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_as_close_as_one_rounding_of_the_inputs(dtype):
    ring = ra.Ring.simulated(3, "zigzag", hostile=True)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs())
    scores = [ra.CosineSim(8.0, 2), ra.SoftCap(5.0), ra.Alibi(torch.rand(4)), ra.Sinks(torch.rand(4)), ra.Dropout(0.2, 1)]
    out = ra.ring_attention(*map(ring.shard, (q, k, v)), ring=ring, score=scores)
    ref = ra.ring_attention(*(ring.shard(x.double()) for x in (q, k, v)), ring=ring, score=scores)
    grads = [torch.autograd.grad(x.double().sin().sum(), (q, k, v)) for x in (out, ref)]
    limit = 4 * torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert all(rel_error(x, y) < limit for x, y in zip((out, *grads[0]), (ref, *grads[1]), strict=True))


def test_rows_that_see_no_key():
    ring, (q, k, v) = ra.Ring.simulated(3, "striped", hostile=True), inputs()
    logits = torch.tensor([0.5, -1.0, 2.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    mask = ra.KeyPadding([0, 5])
    for sinks, lse_of in ((None, torch.full((4,), -torch.inf)), (ra.Sinks(logits), logits)):
        score = [ra.SoftCap(3.0), *([sinks] if sinks else [])]
        out, lse = ra.ring_attention(q, k, v, ring=ring, mask=mask, score=score, return_lse=True)
        grads = torch.autograd.grad(
            [out, lse], [q, k, v, *([logits] if sinks else [])], [torch.randn_like(out), torch.ones_like(lse)]
        )
        assert not out[0].any() and out[1].any()
        assert torch.equal(lse[0], lse_of.double()[:, None].expand_as(lse[0]))
        assert all(grad.isfinite().all() and not grad[0].any() for grad in grads[:3])
        if sinks:
            assert grads[3].isfinite().all() and grads[3][3] == 0 and grads[3][:3].all()


def test_a_zero_row_under_cosine_similarity_has_no_gradient():
    ring, (q, k, v) = ra.Ring.simulated(2, "zigzag"), inputs()
    q, k = (torch.cat([x[:, :8] * 0, x[:, 8:]], 1).detach().requires_grad_() for x in (q, k))
    out = ra.ring_attention(*map(ring.shard, (q, k, v)), ring=ring, score=ra.CosineSim(10.0, 2))
    for grad in torch.autograd.grad(out.sin().sum(), (q, k)):
        assert not grad[:, :8].any() and 0 < grad.abs().max() < 100


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def selectively_checkpointed(function, *args):
    policy = lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_RECOMPUTE  # noqa: E731
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))


def compiled(function, *args):
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*args)


def watched(function, *args):
    with Watched():
        return function(*args)


@pytest.mark.parametrize(
    "score", ["alibi", "bias htt", "all", "global mod, closure mod, sinks", "learned cosine groups, softcap, sinks"]
)
@pytest.mark.parametrize("way", [watched, selectively_checkpointed, compiled])
def test_under_a_dispatch_mode_a_checkpoint_and_a_compiler(score, way):
    torch._dynamo.reset()
    ring, n, qkv = ra.Ring.simulated(2, "zigzag"), Sizes(t=8), inputs(Sizes(t=8))
    pieces, mask = pieces_of(score, n), MASKS["function"](n.t)
    leaves = [x for piece in pieces for x in piece.leaves]
    scores = [piece.make(piece.leaves, ring) for piece in pieces]

    def function(q, k, v):
        return ra.ring_attention(q * 2, k, v, ring=ring, mask=mask, score=scores) * 3

    found = []
    for run in (lambda f, *x: f(*x), way):
        out = run(function, *qkv)
        with Watched() if run is watched else nullcontext():
            found.append([out, *torch.autograd.grad(out.sin().sum(), [*qkv, *leaves])])
    assert all(rel_error(x, y) < FLOAT64_LIMIT for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("way", [watched, selectively_checkpointed, compiled])
@pytest.mark.parametrize("options", [{"exchange": "pull", "keep_kv": True}, {"ulysses": 2}])
def test_what_rounding_took_from_out_goes_along(way, options):
    """See Note [rest] of ring_attn.attention: in 16 bits, bit for bit what the call comes to without these."""
    torch._dynamo.reset()
    ring, slopes = ra.Ring.simulated(2, "zigzag", **options), torch.tensor([0.1, 0.3], requires_grad=True)
    gen = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 16, 2, 8, generator=gen).bfloat16().requires_grad_() for _ in range(3)]

    def function(q, k, v):
        return ra.ring_attention(q * 2, k, v, ring=ring, score=score) * 3

    score, found = ra.Alibi(slopes), []
    for run in (lambda f, *x: f(*x), way):
        out = run(function, *qkv)
        with Watched() if run is watched else nullcontext():
            found.append([out, *torch.autograd.grad(out.sin().sum(), [*qkv, slopes])])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_opcheck_and_gradcheck_with_tensors():
    ring, n = ra.Ring.simulated(2, "striped"), Sizes(b=1, t=4, h=2, g=1, d=2, dv=2)
    pieces = [SINGLE[name](n) for name in ("global mod", "alibi", "softcap", "bias htt", "sinks")]
    leaves = [x for piece in pieces for x in piece.leaves]

    def function(q, k, v, *tensors):
        rest = iter(tensors)
        scores = [piece.make([next(rest) for _ in piece.leaves], ring) for piece in pieces]
        return ra.ring_attention(q, k, v, ring=ring, score=scores, return_lse=True)

    assert torch.autograd.gradcheck(function, [*inputs(n), *leaves], eps=1e-6, atol=1e-7)


FACTOR = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)


def mods():
    """Functions that multiply by FACTOR, reached in the ways that can be followed."""
    tensor = FACTOR

    class Holder:
        def method(self, score, b, h, q, k):
            return score * FACTOR

    def keyword(score, b, h, q, k, *, plus=1.0):
        return score * FACTOR + plus

    return {"closure": lambda s, b, h, q, k: s * tensor, "method": Holder().method, "keyword": keyword}


@pytest.mark.parametrize("how", ["closure", "method", "keyword"])
def test_a_score_mod_in_every_form_a_function_has(how):
    ring, (q, k, v) = ra.Ring.simulated(2, "striped"), inputs()
    out = ra.ring_attention(q, k, v, ring=ring, score=ra.ScoreMod(mods()[how]))
    ref = ra.ring_attention(q * FACTOR, k, v, ring=ring)  # a constant added to all scores changes nothing
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v, FACTOR)) for x in (out, ref)]
    assert all(rel_error(x, y) < FLOAT64_LIMIT for x, y in zip((out, *grads[0]), (ref, *grads[1]), strict=True))


@pytest.mark.parametrize("kernel", ["triton", "flash2", "flash4", "cudnn", "aten", "gluon"])
@pytest.mark.parametrize(
    ("score", "mask", "lacks"),
    [
        (ra.SoftCap(5.0), ra.Causal(), "softcap"),
        ([ra.Alibi(torch.ones(4)), ra.SoftCap(5.0)], ra.Causal(), "alibi"),
        (ra.Bias(torch.zeros(24, 24)), ra.Causal(), "bias"),
        (ra.ScoreMod(lambda s, b, h, q, k: s), ra.Causal(), "(score_mod|ScoreMod)"),
        (ra.Dropout(0.1, 0), ra.Causal(), "dropout"),
        (None, ra.MaskMod(lambda b, h, q, k: q >= k), "functions"),
    ],
)
def test_a_kernel_by_name_runs_a_modifier_or_says_which_it_lacks(kernel, score, mask, lacks):
    n = Sizes(dv=6, dtype=torch.float32)
    qkv = [x.detach() for x in inputs(n)]
    ref, auto = (
        ra.ring_attention(*qkv, ring=ra.Ring.simulated(2, kernel=name), mask=mask, score=score)
        for name in ("reference", "auto")
    )
    assert rel_error(auto, ref) < FLOAT32_LIMIT
    ring = ra.Ring.simulated(2, kernel=kernel)
    plain, full = (call.Call.make(ring, *x, 0.4).problem(*qkv, "forward") for x in ((ra.Causal(), None), (mask, score)))
    if get_kernel(kernel).supports(full) is None:
        assert rel_error(ra.ring_attention(*qkv, ring=ring, mask=mask, score=score), ref) < FLOAT32_LIMIT
    else:
        can_run_here = get_kernel(kernel).supports(plain) is None
        with pytest.raises(KernelUnavailable, match=f"kernel '{kernel}' cannot.*{lacks if can_run_here else ''}"):
            ra.ring_attention(*qkv, ring=ring, mask=mask, score=score)


@pytest.mark.parametrize(
    ("kernel", "second", "ulysses"), [("reference", "bias htt", 1), ("reference", "bias htt", 2), ("triton", "softcap", 1)]
)
def test_no_gradient_is_computed_for_a_tensor_that_wants_none(kernel, second, ulysses):
    n = Sizes(t=8, dtype=torch.float32)
    ring, pieces = ra.Ring.simulated(2, "striped", kernel=kernel, ulysses=ulysses, hostile=True), pieces_of("alibi", n)
    pieces += pieces_of(second, n)
    if get_kernel(kernel).supports(call.Call.make(ra.Ring.simulated(2), ra.Causal(), None, 1.0).problem(*inputs(n), "forward")):
        pytest.skip("Triton runs neither compiled nor interpreted here")
    found, seen = {}, []
    backward = type(get_kernel(kernel)).backward

    def watched(self, *args, into, **options):
        seen.append([x is not None for x in into.score])
        backward(self, *args, into=into, **options)

    for wanted in (True, False):
        (slopes, *rest), qkv = [x.detach().float() for piece in pieces for x in piece.leaves], inputs(n)
        leaves = [slopes.requires_grad_(wanted), *(x.requires_grad_() for x in rest)]
        scores = [pieces[0].make(leaves[:1], ring), pieces[1].make(leaves[1:], ring)]
        with patch.object(type(get_kernel(kernel)), "backward", watched):
            out = ring.unshard(ra.ring_attention(*map(ring.shard, qkv), ring=ring, score=scores))
            found[wanted] = list(torch.autograd.grad(out.sin().sum(), [*qkv, *leaves[0 if wanted else 1 :]]))
        assert all(row == [wanted, *[True] * len(rest)] for row in seen) and seen
        seen.clear()
    del found[True][3]  # the slopes'
    assert all(map(torch.equal, found[True], found[False]))


def test_auto_takes_the_reference_for_a_modifier_and_says_why(caplog):
    caplog.set_level("INFO", "ring_attn")
    resolve.cache_clear()
    ra.ring_attention(*(x.detach() for x in inputs(Sizes(dv=6))), ring=ra.Ring.simulated(2), score=ra.SoftCap(3.0))
    assert "forward kernel: reference; not aten: it has no softcap" in caplog.text


def holds(**attributes):
    return type("Holder", (), attributes)()


GRAD = torch.ones((), dtype=torch.float64, requires_grad=True)
HOLDER = holds(w=GRAD)


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (lambda: ra.SoftCap(0.0), ValueError, "SoftCap cap must be above 0 and finite, got 0.0"),
        (lambda: ra.SoftCap(-1.0), ValueError, "SoftCap cap must be above 0"),
        (lambda: ra.SoftCap(float("inf")), ValueError, "SoftCap cap must be above 0 and finite, got inf"),
        (lambda: ra.SoftCap(float("nan")), ValueError, "got nan; leave SoftCap out"),
        (lambda: ra.Alibi(torch.ones(3)), ValueError, r"Alibi slopes must be \[num_heads\] = \[4\], got \(3,\)"),
        (lambda: ra.Alibi(torch.ones(())), ValueError, r"Alibi slopes must be \[num_heads\]"),
        (lambda: ra.Alibi([1.0] * 4), TypeError, "Alibi takes a tensor, got list"),
        (lambda: ra.Sinks(torch.ones(4, 1)), ValueError, r"Sinks logits must be \[num_heads\] = \[4\], got \(4, 1\)"),
        (lambda: ra.Sinks(0.0), TypeError, "Sinks takes a tensor, got float"),
        (lambda: ra.Sinks(None), TypeError, "Sinks takes a tensor, got None"),
        (lambda: ra.Alibi(None), TypeError, "Alibi takes a tensor, got None"),
        (lambda: ra.SoftCap("50"), TypeError, "SoftCap cap must be a number, for it gets no gradient, got str"),
        (lambda: ra.Dropout("0.1", 1), TypeError, "Dropout p must be a number, for it gets no gradient, got str"),
        (lambda: ra.Dropout(torch.ones((), requires_grad=True), 1), TypeError, "Dropout p must be a number, .* got Tensor"),
        (lambda: ra.RelativeBias(torch.zeros(4, 6)), ValueError, r"RelativeBias must be .* \[4, an odd number\], got \(4, 6\)"),
        (lambda: ra.Bias(torch.zeros(24)), ValueError, r"Bias must be \[2 or 1, 4 or 1, rows 24, keys 24\].*got \(24,\)"),
        (
            lambda: ra.Bias(torch.zeros(12, 24)),
            ValueError,
            r"got \(12, 24\); shard the whole bias with ring.shard\(bias, dim=-2\)",
        ),
        (lambda: ra.Bias(torch.zeros(2, 24, 24)), ValueError, r"got \(2, 24, 24\)"),
        (lambda: ra.Bias(torch.zeros(3, 4, 24, 24)), ValueError, r"got \(3, 4, 24, 24\)"),
        (lambda: ra.Bias(torch.zeros(1, 1, 1, 24, 24)), ValueError, r"got \(1, 1, 1, 24, 24\)"),
        (lambda: ra.CosineSim(1.0, 0), ValueError, "CosineSim groups must be at least 1, got 0"),
        (lambda: ra.CosineSim(1.0, 4), ValueError, "CosineSim groups 4 must divide head_dim 6"),
        (
            lambda: ra.CosineSim(torch.ones(2)),
            ValueError,
            r"CosineSim scale must be a number or \[num_heads\] = \[4\], got \(2,\)",
        ),
        (lambda: [ra.CosineSim(1.0), ra.CosineSim(2.0)], ValueError, "CosineSim may stand once in a list of scores, got 2"),
        (lambda: [ra.Sinks(torch.ones(4))] * 2, ValueError, "Sinks may stand once in a list of scores, got 2"),
        (lambda: [ra.Dropout(0.1, 1), ra.Dropout(0.1, 2)], ValueError, "Dropout may stand once in a list of scores, got 2"),
        (lambda: ra.Dropout(1.0, 0), ValueError, "Dropout p must be at least 0 and below 1, got 1.0"),
        (lambda: ra.Dropout(-0.1, 0), ValueError, "Dropout p must be at least 0 and below 1, got -0.1"),
        (lambda: ra.Dropout(0.1, -1), ValueError, "Dropout seed must be an int of up to 64 bits, at least 0, got -1"),
        (lambda: ra.Dropout(0.1, 2**64), ValueError, "Dropout seed must be an int of up to 64 bits"),
        (lambda: ra.Dropout(0.1, 0.5), ValueError, "Dropout seed takes whole numbers, got 0.5"),
        (lambda: ra.Dropout(0.1, True), ValueError, "Dropout seed takes whole numbers, got True"),
        (lambda: ra.CosineSim(1.0, 2.0), ValueError, "CosineSim groups takes whole numbers, got 2.0"),
        (lambda: ra.CosineSim("8"), TypeError, "CosineSim scale must be a number or a tensor of floating dtype, got str"),
        (lambda: ra.CosineSim(torch.ones(4, dtype=torch.int64)), TypeError, "floating dtype, got torch.int64"),
        (
            lambda: ra.Bias(torch.ones(24, 24) > 0),
            TypeError,
            r"Bias takes .* floating dtype, got torch.bool; .* MaskMod\(lambda",
        ),
        (
            lambda: ra.Alibi(torch.ones(4, dtype=torch.complex64)),
            TypeError,
            "Alibi takes .* floating dtype, got torch.complex64",
        ),
        (lambda: ra.ScoreMod(holds(__call__=lambda self, s, b, h, q, k: s * GRAD)), ValueError, "that cannot be followed"),
        (
            lambda: ra.ScoreMod(lambda s, *x, held=HOLDER: s * held.w),
            ValueError,
            r"ScoreMod\(.*lambda.*\) reaches a tensor",
        ),
        (
            lambda: ra.Alibi(torch.ones(4, device="meta")),
            ValueError,
            r"must be on the device of q, cpu, got \(4,\) on meta; move them with",
        ),
        (
            lambda: ra.CosineSim(torch.ones(4, device="meta")),
            ValueError,
            "CosineSim scale must be on the device of q, cpu, got meta",
        ),
        (lambda: 5, TypeError, "score must be a ring_attn score such as SoftCap.*got int"),
        (lambda: [torch.zeros(24, 24)], TypeError, "score must be a ring_attn score .*got Tensor"),
        (lambda: [[ra.SoftCap(1.0)]], TypeError, "score must be a ring_attn score .*got list"),
    ],
)
def test_a_wrong_score_is_named(score, error, message):
    with pytest.raises(error, match=message):
        ra.ring_attention(*inputs(), ring=ra.Ring.simulated(2), score=score())


def test_a_function_of_scores_that_raises_says_what_it_should_be():
    q, k, v = inputs()
    for of in (q, q.detach()):
        with pytest.raises(TypeError) as found:
            ra.ring_attention(of, k.detach(), v.detach(), ring=ra.Ring.simulated(2), score=ra.ScoreMod(lambda s, b, h: s))
        assert "must be a function (score, b, h, q_pos, kv_pos) -> score of tensors" in found.value.__notes__[0]


def test_that_memory_runs_out_in_a_function_is_not_its_fault():
    def greedy(score, b, h, q_pos, kv_pos):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError) as found:
        ra.ring_attention(*inputs(), ring=ra.Ring.simulated(2), score=ra.ScoreMod(greedy))
    assert not hasattr(found.value, "__notes__")


def test_integers_of_another_library_are_whole_numbers():
    assert ra.Dropout(0.1, np.uint64(2**64 - 1)) == ra.Dropout(0.1, 2**64 - 1)
    assert ra.CosineSim(1.0, torch.tensor(2)).groups == 2


def test_cosine_similarity_has_a_scale_of_its_own():
    with pytest.raises(ValueError, match=r"CosineSim has a scale of its own; leave softmax_scale=0\.5 out"):
        ra.ring_attention(*inputs(), ring=ra.Ring.simulated(2), score=ra.CosineSim(1.0), softmax_scale=0.5)


@pytest.mark.parametrize("kernel", ["reference", "aten"])
@pytest.mark.parametrize("scale", [-1.0, -0.0, 0.0, 0.3])
def test_a_scale_of_any_sign(kernel, scale):
    """PyTorch's CPU attention alone gives NaN for a scale that is not above 0 under a mask."""
    n, ring, mask = Sizes(dv=6), ra.Ring.simulated(2, "zigzag", kernel=kernel), ra.Causal() & ra.Window(7)
    leaves = inputs(n)
    found = ring.unshard(ra.ring_attention(*map(ring.shard, leaves), ring=ring, mask=mask, softmax_scale=scale))
    ref, _ = plain(*leaves, seen_cells(mask, n), [], scale)
    grads = [torch.autograd.grad(x.sin().sum(), leaves) for x in (found, ref)]
    assert all(rel_error(x, y) < FLOAT64_LIMIT for x, y in zip((found, *grads[0]), (ref, *grads[1]), strict=True))


@pytest.mark.parametrize("options", [{"softmax_scale": float("nan")}, {"score": ra.CosineSim(float("inf"))}])
def test_a_scale_that_is_not_finite_is_named(options):
    with pytest.raises(ValueError, match=r"the scale of scores must be finite, got (nan|inf)"):
        ra.ring_attention(*inputs(), ring=ra.Ring.simulated(2), **options)


def test_a_tensor_that_begins_to_need_a_gradient_is_refused_at_the_next_call():
    held, ring = holds(w=torch.ones((), dtype=torch.float64)), ra.Ring.simulated(2)
    score = ra.ScoreMod(lambda s, b, h, q, k: s * held.w)
    ra.ring_attention(*inputs(), ring=ring, score=score)
    held.w.requires_grad_()
    with pytest.raises(ValueError, match="reaches a tensor that needs a gradient"):
        ra.ring_attention(*inputs(), ring=ring, score=score)
    with torch.no_grad():
        ra.ring_attention(*inputs(), ring=ring, score=score)


def test_scores_without_modifiers_cost_a_kernel_nothing():
    """Sinks and cosine similarity are done outside: a kernel is handed no kind of score, and a bound that it need not use."""
    seen = []
    kernel = type(get_kernel("reference"))
    forward = kernel.forward
    with patch.object(kernel, "forward", lambda self, *a, **k: seen.append(k["score"]) or forward(self, *a, **k)):
        ra.ring_attention(
            *inputs(), ring=ra.Ring.simulated(2, kernel="reference"), score=[ra.Sinks(torch.ones(4)), ra.CosineSim(2.0)]
        )
    assert [(score.kinds, score.bound) for score in seen] == [((), 2.0)] * 4
