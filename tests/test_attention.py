"""ring_attention itself: gradients, the two custom ops under torch's own checks, torch.compile, and bad input."""

import pickle
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import ring_attn as ra
from ring_attn import attention, call
from ring_attn.mask import Mask, Rule
from tests.support import FLOAT32_LIMIT, FLOAT64_LIMIT, allowed, dense, random_qkv, rel_error

torch.manual_seed(0)


def qkv(t=8, h=2, g=1, d=4, dv=None, dtype=torch.float64, b=1):
    return [x.requires_grad_() for x in random_qkv(b, t, t, h, g, d, dv, dtype=dtype)[:3]]


@pytest.mark.parametrize("exchange", ["ring", "gather", "pull"])
@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_gradcheck_through_out_and_lse(layout, exchange):
    ring = ra.Ring.simulated(2, layout, exchange=exchange)
    both = lambda q, k, v: ra.ring_attention(q, k, v, ring=ring, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(both, qkv(dv=3))


def test_lse_alone_and_out_alone_have_gradients():
    ring = ra.Ring.simulated(2, "striped")
    q, k, v = qkv()
    ref_out, ref_lse = dense(*(ring.unshard(x) for x in (q, k, v)), allowed(ra.Causal(), 8, 1), 0.5)
    out, lse = ra.ring_attention(q, k, v, ring=ring, return_lse=True)
    for got, ref in ((out, ring.shard(ref_out)), (lse, ring.shard(ref_lse, 2))):
        up = torch.randn_like(got)
        grads = torch.autograd.grad(got, (q, k, v), up, retain_graph=True, allow_unused=True)
        wants = torch.autograd.grad(ref, (q, k, v), up, retain_graph=True, allow_unused=True)
        for grad, want in zip(grads, wants, strict=True):
            assert rel_error(grad, torch.zeros_like(grad) if want is None else want) < FLOAT64_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_dtypes_stay_as_close_as_plain_pytorch(dtype):
    t = 48
    q, k, v, dout = random_qkv(2, t, t, 4, 2, 16, dtype=dtype, seed=3)
    seen = allowed(ra.Causal(), t, 2)
    truth = gradients(lambda *x: dense(*x, seen, 0.25)[0], [x.double() for x in (q, k, v)], dout.double())
    plain = gradients(lambda *x: dense(*x, seen, 0.25)[0], (q, k, v), dout)
    ring = ra.Ring.simulated(3, "zigzag", hostile=True)
    got = gradients(
        lambda *x: ring.unshard(ra.ring_attention(*(ring.shard(y) for y in x), ring=ring, softmax_scale=0.25)), (q, k, v), dout
    )
    for n, (x, ref, other) in enumerate(zip(got, truth, plain, strict=True)):
        assert x.dtype == dtype
        factor = 2 if n == 0 else 3
        assert rel_error(x, ref) <= (FLOAT32_LIMIT if dtype == torch.float32 else factor * rel_error(other, ref))


@pytest.mark.parametrize("kernel", ["reference", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(kernel, dtype):
    ring = ra.Ring.simulated(2, kernel=kernel)
    *inputs, up = random_qkv(1, 32, 32, 2, 1, 16, dtype=dtype)
    want = gradients(lambda *x: ra.ring_attention(*x, ring=ring), inputs, up)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(lambda *x: ra.ring_attention(*x, ring=ring), inputs, up)
    assert all(torch.equal(x, ref) for x, ref in zip(got, want, strict=True))


@pytest.mark.parametrize("exchange", ["ring", "gather", "pull"])
@pytest.mark.parametrize("kernel", ["reference", "aten"])
def test_any_strides(kernel, exchange):
    ring = ra.Ring.simulated(2, exchange=exchange, kernel=kernel)
    q, k, v, _ = random_qkv(2, 32, 32, 4, 2, 16)
    up = torch.tensor(0.5).expand(q.shape)  # as of a sum
    want = gradients(lambda *x: ra.ring_attention(*x, ring=ring), (q, k, v), up.clone())
    for strided in (
        [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)],
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        [torch.stack([x, x], -1).select(-1, 0) for x in (q, k, v)],
    ):
        got = gradients(lambda *x: ra.ring_attention(*x, ring=ring), strided, up)
        assert all(rel_error(x, ref) < FLOAT32_LIMIT for x, ref in zip(got, want, strict=True))


def gradients(function, inputs, up):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, up)]


@pytest.mark.parametrize("keep_kv", [False, True])
def test_opcheck(keep_kv):
    ring = ra.Ring.simulated(2, "zigzag", exchange="pull", keep_kv=keep_kv)
    name, same = call.named(call.Call.make(ring, ra.Causal(), None, 0.5))
    q, k, v = qkv(dv=3)
    torch.library.opcheck(attention._forward_op, (q, k, v, [], name))
    *found, kept = attention._forward_op(q, k, v, [], name)
    assert len(kept) == (2 if keep_kv else 0)
    saved, kept = [x.detach() for x in (q, k, v, *found)], [x.detach() for x in kept]
    torch.library.opcheck(attention._backward_op, (torch.randn_like(saved[3]), None, *saved, [], kept, [], name))
    assert call.called(name) is same


def test_opcheck_where_rest_is_kept():
    """See Note [rest] of ring_attn.attention."""
    ring, slopes = ra.Ring.simulated(2, exchange="pull", keep_kv=True), torch.tensor([0.1, 0.3], requires_grad=True)
    q, k, v = (x.bfloat16() for x in qkv(dv=3))
    # A call lives as long as it is held.
    made = [call.named(call.Call.make(ring, ra.Causal(), ra.Alibi(x), 0.5)) for x in (slopes, slopes.detach())]
    name, fixed = (name for name, _ in made)
    assert len(attention._forward_op(q, k, v, [slopes], fixed)[2]) == 2
    torch.library.opcheck(attention._forward_op, (q, k, v, [slopes], name))
    *found, kept = attention._forward_op(q, k, v, [slopes], name)
    assert [x.shape for x in kept[2:]] == [found[0].shape]
    assert 0 < kept[-1].norm() < 2**-7 * found[0].norm()
    saved, kept, tensors = ([x.detach() for x in several] for several in ((q, k, v, *found), kept, [slopes]))
    torch.library.opcheck(attention._backward_op, (torch.randn_like(saved[3]), None, *saved, tensors, kept, [True], name))


@pytest.mark.parametrize("by_id", [call._BY_ID, True])
def test_compiles_in_one_graph(by_id, monkeypatch):
    """Where a compiler hands over objects, and as before."""
    monkeypatch.setattr(call, "_BY_ID", by_id)
    ring, mask = ra.Ring.simulated(2, "zigzag"), ra.Causal() & ra.Window(5)

    def function(q, k, v):
        return ra.ring_attention(q * 2, k, v, ring=ring, mask=mask) * 3

    inputs, up = qkv(), torch.randn(1, 8, 2, 4, dtype=torch.float64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, inputs, up), gradients(function, inputs, up), strict=True):
        assert rel_error(got, want) < FLOAT64_LIMIT


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("score", [None, ra.CosineSim(5.0, groups=2)])
def test_lengths_head_dims_and_scales_may_vary_in_a_compiled_function(score, dynamic):
    ring = ra.Ring.simulated(2, "zigzag")

    def function(q, k, v, scale=None):
        return ra.ring_attention(q, k, v, ring=ring, score=score, softmax_scale=None if score else scale)

    torch.compiler.reset()  # The cases are all of one code, for which there are only so many graphs.
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for t, d, scale in ((8, 4, 0.3), (16, 4, 0.7), (8, 8, None), (8, 4, -0.1)):
        inputs, up = qkv(t, d=d), torch.randn(1, t, 2, d, dtype=torch.float64)
        found, wanted = (gradients(partial(one, scale=scale), inputs, up) for one in (compiled, function))
        for got, want in zip(found, wanted, strict=True):
            assert rel_error(got, want) < FLOAT64_LIMIT


@pytest.mark.parametrize("by_id", [call._BY_ID, True])
def test_masks_may_be_joined_inside_of_a_compiled_function(by_id, monkeypatch):
    monkeypatch.setattr(call, "_BY_ID", by_id)
    ring, causal, windows, score = ra.Ring.simulated(2, "zigzag"), ra.Causal(), ra.Window(5) & ra.Window(3), ra.SoftCap(2.0)

    def function(q, k, v):
        return ra.ring_attention(q, k, v, ring=ring, mask=causal & windows, score=score)

    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(*qkv()), function(*qkv()))


def test_a_mask_s_function_is_asked_first_in_a_compiled_call():
    ring, mask = ra.Ring.simulated(2, "zigzag"), ra.Causal() & ra.MaskMod(lambda b, h, q, k: q - k < 3)
    function = lambda q, k, v: ra.ring_attention(q, k, v, ring=ring, mask=mask)  # noqa: E731
    inputs, up = qkv(), torch.randn(1, 8, 2, 4, dtype=torch.float64)
    found = gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs, up)
    for got, want in zip(found, gradients(function, inputs, up), strict=True):
        assert rel_error(got, want) < FLOAT64_LIMIT


@pytest.mark.parametrize("by_id", [False, True])
def test_a_number_that_is_given_for_a_layout_is_no_address(by_id, monkeypatch):
    monkeypatch.setattr(call, "_BY_ID", by_id)
    given = map(call.given_to, (ra.Ring.simulated(2), 4096, ra.Causal()))
    assert list(map(call._found, given))[1] == 4096


def test_another_mask_is_compiled_anew(monkeypatch):
    monkeypatch.setattr(call, "_BY_ID", True)
    ring = ra.Ring.simulated(2, "zigzag")
    compiled = torch.compile(lambda mask, q, k, v: ra.ring_attention(q, k, v, ring=ring, mask=mask), backend="eager")
    q, k, v = qkv()
    for mask in (ra.Causal() & ra.Window(n) for n in (1, 3, 5)):
        assert torch.equal(compiled(mask, q, k, v), ra.ring_attention(q, k, v, ring=ring, mask=mask))


def test_what_a_ring_has_met_compiles_nothing_anew():
    """Calls of other shapes in between, whose plans the ring keeps; of lengths, the second makes a graph that takes all."""
    ring, counter = ra.Ring.simulated(2, "zigzag"), CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda q, k, v: ra.ring_attention(q, k, v, ring=ring), backend=counter)
    for length in (8, 12, 16, 20, 8):
        inputs = qkv(length)
        assert torch.equal(compiled(*inputs), ra.ring_attention(*inputs, ring=ring))
        ra.ring_attention(*qkv(length + 16), ring=ring)
    assert counter.frame_count == 2


@pytest.mark.parametrize("by_id", [False, True])
def test_sinks_may_be_made_inside(by_id, monkeypatch):
    """A call knows no more of them than that they are there."""
    monkeypatch.setattr(call, "_BY_ID", by_id)
    ring, counter = ra.Ring.simulated(2, "zigzag"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, x: ra.ring_attention(q, k, v, ring=ring, score=[ra.Sinks(x), SOFTCAP]), backend=counter, fullgraph=True
    )
    for seed in range(2):
        inputs = [*qkv(), torch.randn(qkv()[0].shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))]
        inputs = [x.detach().requires_grad_() for x in inputs]
        wanted = ra.ring_attention(*inputs[:3], ring=ring, score=[ra.Sinks(inputs[3]), SOFTCAP])
        found = compiled(*inputs)
        assert rel_error(found, wanted) < FLOAT64_LIMIT
        up = torch.randn_like(wanted)
        for got, want in zip(*(torch.autograd.grad(x, inputs, up) for x in (found, wanted)), strict=True):
            assert rel_error(got, want) < FLOAT64_LIMIT
    assert counter.frame_count == 1


SOFTCAP = ra.SoftCap(2.0)
MADE_INSIDE = {
    "Window": lambda: {"mask": ra.Window(3)},
    "SoftCap": lambda: {"score": ra.SoftCap(3.0)},
    "Ring": lambda: {"ring": ra.Ring.simulated(2)},
}


@pytest.mark.parametrize("kind", MADE_INSIDE)
def test_what_a_compiled_function_makes_itself_is_refused(kind):
    ring, made = ra.Ring.simulated(2), MADE_INSIDE[kind]
    compiled = torch.compile(lambda q, k, v: ra.ring_attention(q, k, v, **({"ring": ring} | made())), backend="eager")
    with pytest.raises(Exception, match=f"outside of the compiled function, and a {kind} was made inside"):
        compiled(*qkv())


class OwnMask(Mask):
    """Without attributes of its own, and no dataclass."""

    def rules(self):
        return (Rule(right=0),)


def test_a_mask_of_the_user_s_own_kind_compiles():
    ring, mask, (q, k, v) = ra.Ring.simulated(2, "zigzag"), OwnMask(), qkv()
    compiled = torch.compile(lambda q, k, v: ra.ring_attention(q, k, v, ring=ring, mask=mask), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), ra.ring_attention(q, k, v, ring=ring))


def test_an_eager_call_is_forgotten_with_its_graph():
    import gc

    ring = ra.Ring.simulated(2, "contiguous")
    q, k, v = qkv()
    gc.collect()
    before = len(call._calls)
    outs = [ra.ring_attention(q, k, v, ring=ring, mask=ra.Causal() & ra.Documents(lengths=[n, 8 - n])) for n in range(1, 5)]
    assert len(call._calls) == before + 4
    torch.autograd.grad([out.sin().sum() for out in outs], (q, k, v))
    del outs
    gc.collect()
    assert len(call._calls) == before


def test_what_one_call_comes_to_is_given_to_no_other():
    """Calls on one ring that differ in one thing, each against a ring that has seen no other."""
    kept = ra.Ring.simulated(2, "zigzag", exchange="pull")
    longer = torch.randn(1, 16, 2, 4, dtype=torch.float64)
    q, k, v = (x.detach() for x in qkv())
    calls = [
        ((q, k, v), {"mask": ra.Causal()}),
        ((q, k, v), {"mask": ra.Causal() & ra.Window(2)}),
        ((q, k, v), {"mask": ra.Full(), "kv_layout": "zigzag"}),
        ((q, k, v), {"mask": ra.Causal(), "kv_layout": "striped"}),
        ((q, k, v), {"score": ra.SoftCap(0.5)}),
        ((q, k, v), {"softmax_scale": 3.0}),
        ((q, longer, longer), {"mask": ra.Full(), "kv_layout": "striped"}),
        ((longer, longer, longer), {}),
        ((q.repeat(1, 1, 2, 1), k, v), {}),
        (tuple(x.float() for x in (q, k, v)), {}),
    ]
    for inputs, options in calls * 2:
        got = ra.ring_attention(*inputs, ring=kept, **options)
        fresh = ra.Ring.simulated(2, "zigzag", exchange="pull")
        assert torch.equal(got, ra.ring_attention(*inputs, ring=fresh, **options)), options
    assert len(kept.settled) == len(calls)


def test_kernels_of_a_call_are_asked_for_by_what_a_backward_needs(monkeypatch):
    """One call's kernels, where the gradient of lse and determinism come and go; each problem is resolved once."""
    problems = []
    monkeypatch.setattr("ring_attn.settled.resolve", lambda name, problem: problems.append(problem) or len(problems))
    q, k, v = (x.detach() for x in qkv())
    settled = call.Call.make(ra.Ring.simulated(2), ra.Causal(), None, 1.0).settle(q, k, v)
    asked = [("forward", False, False), ("backward", False, False), ("backward", True, False), ("backward", False, True)]
    for number, (direction, lse_grad, deterministic) in [*enumerate(asked, 1)] * 2:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda found=deterministic: found)
        assert settled.kernel(direction, lse_grad=lse_grad) == number
    assert [(p.direction, p.lse_grad, p.deterministic) for p in problems] == asked


def test_what_a_call_comes_to_goes_with_its_signature():
    ring = ra.Ring.simulated(1)
    q, k, v = (x.detach() for x in qkv())
    for n in range(300):
        ra.ring_attention(q, k, v, ring=ring, softmax_scale=1.0 + n)
        assert len(ring.settled) <= len(ring._agreed)
    assert len(ring._agreed) == 256


@pytest.mark.parametrize("of", [torch.square, lambda out: out * torch.linspace(0, 1, out.shape[-1])])
def test_a_second_derivative_is_refused(of):
    """Also where what comes in does not depend on the inputs: dq itself does."""
    q, k, v = qkv()
    out = ra.ring_attention(q, k, v, ring=ra.Ring.simulated(2))
    (dq,) = torch.autograd.grad(of(out).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward through ring_attn\.backward"):
        dq.square().sum().backward()


def test_the_fallback_scale_is_one_over_root_head_dim():
    ring = ra.Ring.simulated(1)
    q, k, v = qkv()
    assert torch.equal(ra.ring_attention(q, k, v, ring=ring), ra.ring_attention(q, k, v, ring=ring, softmax_scale=0.5))
    assert not torch.equal(ra.ring_attention(q, k, v, ring=ring), ra.ring_attention(q, k, v, ring=ring, softmax_scale=0.6))


def broken(**change):
    """Inputs of a good call with some replaced by functions of the good ones."""
    q, k, v = (x.detach() for x in qkv(t=8, h=4, g=2))
    good = {"q": q, "k": k, "v": v, "ring": ra.Ring.simulated(2, "zigzag"), "mask": ra.Causal()}
    good |= {name: f(good[name]) if callable(f) else f for name, f in change.items()}
    return good.pop("q"), good.pop("k"), good.pop("v"), good


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda q: q[0, 0]}, r"q must be \[batch, rows, heads, head_dim\] or \[batch, rows, head_dim\], got \(4, 4\)"),
        (
            {"q": lambda q: q.float()},
            r"q, k and v must share one dtype, got torch.float32, torch.float64, torch.float64; cast them",
        ),
        (
            {name: lambda x: x.to(torch.float8_e4m3fn) for name in "qkv"},
            r"q must have dtype float16, bfloat16, float32 or float64, got torch.float8_e4m3fn; cast it",
        ),
        ({"v": lambda v: v.to("meta")}, r"must be on one device, got cpu, cpu, meta"),
        ({name: lambda x: x.to("meta") for name in "qkv"}, r"q, k and v are on device meta, where there are no numbers"),
        ({"q": lambda q: q[:, :, :3]}, r"num_heads 3 must be a multiple of num_kv_heads 2"),
        (
            {"k": lambda k: k[:, :6], "v": lambda v: v[:, :6]},
            r"q has 8 rows here and k 6; shard both with the same ring",
        ),
        (
            {"k": lambda k: k[:, :6]},
            r"k and v the same rows, got \(1, 8, 4, 4\), \(1, 6, 2, 4\).*shard all three with the same ring",
        ),
        ({"k": lambda k: k[..., :3]}, r"k must share q's head_dim"),
        ({"v": lambda v: v[:, :, :1]}, r"v must share k's heads"),
        (
            {"q": lambda q: q.long(), "k": lambda k: k.long(), "v": lambda v: v.long()},
            r"q must have dtype float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            {"q": lambda x: x[:, :0], "k": lambda x: x[:, :0], "v": lambda x: x[:, :0]},
            r"every dimension of q must be at least 1",
        ),
        ({"v": lambda v: v[..., :0]}, r"every dimension of v must be at least 1, got \(1, 8, 2, 0\)"),
        (
            {"q": lambda x: x[:, :6], "k": lambda x: x[:, :6], "v": lambda x: x[:, :6]},
            r"seq_len 6 must be a multiple of 2 \* ring_size = 4",
        ),
        (
            {"q": lambda x: x[:, :7], "k": lambda x: x[:, :7], "v": lambda x: x[:, :7]},
            r"7 rows cannot be the equal shards of 2 hosted ranks",
        ),
        ({"mask": ra.Documents(lengths=[3, 4])}, r"the documents add up to 7 positions, but seq_len is 8"),
        ({"mask": ra.KeyPadding([1, 2, 3])}, r"given for 3 batch rows, but the batch is 1"),
        (
            {"ring": ra.Ring.simulated(2, kernel="flash2")},
            r"kernel 'flash2' cannot do this forward: .*kernel='auto' picks one that can",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, v, options = broken(**change)
    with pytest.raises(ValueError, match=message):
        ra.ring_attention(q, k, v, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda q: q[0, 0]}, r"q must be \[batch, rows, heads, head_dim\] or \[batch, rows, head_dim\], got \(4, 4\)"),
        ({"k": lambda k: k.unsqueeze(0)}, r"k must be \[batch, rows, heads, head_dim\] or .*, got \(1, 1, 8, 2, 4\)"),
        (
            {"q": lambda x: x[..., :0], "k": lambda x: x[..., :0]},
            r"every dimension of q must be at least 1, got \(1, 8, 4, 0\)",
        ),
    ],
)
@pytest.mark.parametrize("scale", [2.0, torch.ones(4)])
def test_bad_input_is_named_before_norms_are_taken_of_it(scale, change, message):
    q, k, v, options = broken(**change)
    with pytest.raises(ValueError, match=message):
        ra.ring_attention(q, k, v, **options, score=ra.CosineSim(scale))


def test_types_and_unbuilt_combinations_are_refused():
    q, k, v, options = broken()
    with pytest.raises(TypeError, match="mask must be a ring_attn mask"):
        ra.ring_attention(q, k, v, **(options | {"mask": torch.ones(8, 8)}))
    with pytest.raises(TypeError, match=r"got the class Causal: write Causal\(\.\.\.\)"):
        ra.ring_attention(q, k, v, **(options | {"mask": ra.Causal}))
    with pytest.raises(TypeError, match="score must be a ring_attn score"):
        ra.ring_attention(q, k, v, **options, score=[object()])
    with pytest.raises(TypeError, match=r"ring must be a Ring, on one device Ring.simulated\(1, .contiguous.\), got NoneType"):
        ra.ring_attention(q, k, v, **(options | {"ring": None}))
    with pytest.raises(ValueError, match="softmax_scale must be a number, for it gets no gradient; multiply q"):
        ra.ring_attention(q, k, v, **options, softmax_scale=torch.ones((), requires_grad=True))
    with pytest.raises(TypeError, match="SoftCap cap must be a number, for it gets no gradient, got Parameter"):
        ra.SoftCap(torch.nn.Parameter(torch.ones(())))


NO_MASKS = {
    "arguments": (lambda q, k: q >= k, "positional arguments"),
    "control flow": (lambda b, h, q, k: k if q else q, "data-dependent control flow"),
    "tuple": (lambda b, h, q, k: (q >= k,), "has no attribute 'dtype'"),
    "scores": (
        lambda b, h, q, k: (q - k) * 0.5,
        r"\(<lambda>\) returned torch.float32; compare, as in x > 0, or change",
    ),
    "tensor": (torch.ones(8, 8), "not callable|no attribute"),
    "vector": (
        lambda b, h, q, k: torch.arange(3) + k <= q,
        r"\(<lambda>\) must return one value for one cell, a scalar, got shape \(3,\)",
    ),
}


@pytest.mark.parametrize("kind", NO_MASKS)
def test_a_function_that_is_no_mask_fails_with_the_rule(kind):
    function, error = NO_MASKS[kind]
    q, k, v, options = broken()
    with pytest.raises(Exception, match=error) as found:
        ra.ring_attention(q, k, v, **(options | {"mask": ra.Causal() & ra.MaskMod(function)}))
    assert "must be a function (b, h, q_pos, kv_pos) -> bool of integer tensors, without `if`" in found.value.__notes__[0]


def test_a_mask_s_function_is_asked_about_cells_that_there_are_alone():
    """Where its table has no entry for position 0."""
    ring, (q, k, v) = ra.Ring.simulated(2, "zigzag"), qkv()
    table = torch.tensor([True, False, True])
    mask = ra.Full() & ra.KeyPadding(starts=[5])
    found = ra.ring_attention(q, k, v, ring=ring, mask=mask & ra.MaskMod(lambda b, h, q, k: table[k - 5]))
    want = ra.ring_attention(q, k, v, ring=ring, mask=mask & ra.MaskMod(lambda b, h, q, k: k != 6))
    assert torch.equal(found, want)


NO_SCORES = {
    "number": (lambda score, b, h, q, k: 0.0, TypeError, "must return a tensor that it makes of the score, got 0.0"),
    "vector": (
        lambda score, b, h, q, k: score + torch.ones(3),
        ValueError,
        r"one score for one cell, a scalar, got shape \(3,\)",
    ),
    "complex": (lambda score, b, h, q, k: score * 1j, TypeError, "must return a real score, got torch.complex128"),
    "mask": (
        lambda score, b, h, q, k: score > 0,
        TypeError,
        "a real score, got torch.bool; to allow some cells alone there is",
    ),
}


@pytest.mark.parametrize("kind", NO_SCORES)
def test_a_function_that_makes_no_score_is_refused(kind):
    function, error, words = NO_SCORES[kind]
    q, k, v, options = broken()
    with pytest.raises(error, match=words):
        ra.ring_attention(q, k, v, **options, score=ra.ScoreMod(function))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_an_input_that_is_no_tensor_is_named(name):
    q, k, v, options = broken()
    inputs = {"q": q, "k": k, "v": v, name: [[0.0]]}
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor \[batch, rows, heads, head_dim\] or .*, got list$"):
        ra.ring_attention(**inputs, **options)


@pytest.mark.parametrize("name", ["q", "k", "v", "slopes"])
def test_forward_mode_is_refused(name):
    q, k, v, options = broken()
    leaves = {"q": q, "k": k, "v": v, "slopes": torch.ones(q.shape[2])}
    with forward_ad.dual_level():
        leaves[name] = forward_ad.make_dual(leaves[name], torch.ones_like(leaves[name]))
        slopes = leaves.pop("slopes")
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            ra.ring_attention(**leaves, **options, score=ra.Alibi(slopes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "spiral"}, r"layout 'spiral' is not one of contiguous, striped, zigzag"),
        ({"exchange": "push"}, r"exchange 'push' is not one of auto, ring, gather, pull"),
        ({"kernel": "flash3"}, r"kernel 'flash3' is not one of auto, reference, triton, .*nor a pair"),
        ({"ring_size": 0}, r"ring_size must be at least 1, got 0"),
    ],
)
def test_a_ring_of_what_there_is(options, message):
    with pytest.raises(ValueError, match=message):
        ra.Ring.simulated(**({"ring_size": 2} | options))


def test_a_ring_of_processes_wants_a_process_group():
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group first"):
        ra.Ring.from_group(None)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ra.Ring.simulated("4"),
        lambda: ra.Ring.simulated(4, layout=7),
        lambda: ra.Ring.from_group("default"),
        lambda: ra.Ring.simulated(4).shard([1, 2, 3, 4]),
        lambda: ra.pad_to(torch.zeros(1, 3), "4"),
        lambda: ra.RingSelfAttention(8, 2, ring="ring"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(call):
    with pytest.raises(TypeError, match=r"parameter \w+="):
        call()


def test_a_simulated_ring_is_pickled_without_what_it_remembers_of_calls():
    """A function of a mask could not be."""
    ring = ra.Ring.simulated(4, ulysses=2)
    before = pickle.dumps(ring)
    q, k, v, _ = random_qkv(1, 16, 16, 2, 2, 4)
    mask = ra.MaskMod(lambda b, h, q, k: q >= k)
    out = ra.ring_attention(q, k, v, ring=ring, mask=mask)
    assert len(pickle.dumps(ring)) <= len(before) + 20
    copied = pickle.loads(pickle.dumps(ring))
    assert torch.equal(ra.ring_attention(q, k, v, ring=copied, mask=mask), out)
