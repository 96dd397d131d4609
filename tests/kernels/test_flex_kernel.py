"""The flex kernel on plain PyTorch in place of the compiled flex_attention, and compiled as far as a CPU can.

Truth is the reference kernel in float64, which test_reference.py and test_flex.py hold to dense softmaxes.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice, product
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ring_attn as ra
from ring_attn.kernels import KernelUnavailable, Problem, Upstream, flex, get_kernel, resolve
from ring_attn.kernels.flex import FlexKernel
from ring_attn.kernels.flex_call import attend, compiled, work_of
from ring_attn.kernels.functions import outside_of_ops, traced
from ring_attn.kernels.sums import Grads
from ring_attn.layout import LAYOUTS
from ring_attn.mask import MaskMod
from ring_attn.score import Alibi, RelativeBias, Scores, SoftCap
from ring_attn.score_mod import ScoreMod, captured, recapture
from ring_attn.tiles import tiles
from tests.kernels.comparison import check_equal, check_half, exact, plain
from tests.kernels.dense_flex import dense_flex
from tests.support import (
    BAND_KINDS,
    FLOAT32_LIMIT,
    FLOAT64_LIMIT,
    band_tiles,
    random_qkv,
    rel_error,
    run_kernel,
    split_tiles,
    truth,
)

B, H, NUM_Q, NUM_KV = 2, 4, 140, 270  # more than a block each, and no whole number of them
DENSE = FlexKernel(dense_flex)


def table(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


SLOPES, ROWS, ONE, MORE = table(H) / 20, table(B), table().abs(), table(3)
IDS = torch.arange(500) // 90
SETTINGS = SimpleNamespace(weights=table(H), ids=IDS)


def reads_globals(s, b, h, q, k):
    return s * ROWS[b].cos() - SLOPES[h] * (q - k).abs() * 0.2 + SLOPES[h]


def reads_a_scalar(s, b, h, q, k):
    return s * ONE + ONE.sin() * (q % 3)


def reads_what_is_not_captured(s, b, h, q, k):
    return s * SETTINGS.weights[h] + torch.where(k % 3 > 0, MORE[1], 0.5)


def closing_over(unread):
    """`both` is read in two places, `unread` in none that matters."""
    both = table(H, 9)
    return lambda s, b, h, q, k: torch.where(unread.sum() > 9, s, s * 0.5) + both[h, (q + k) % 9] + both[h, k % 9]


def by_several_numbers(distances):
    """A table by head and distance, counted from its end where negative, read in two places."""
    return lambda s, b, h, q, k: s + distances[h, (q - k) % 31 - 15] * distances[h, k % 7]


def by_what_is_looked_up(distances):
    """The second index changes with keys alone."""
    return lambda s, b, h, q, k: (
        s + distances[h, (SETTINGS.ids[q] - SETTINGS.ids[k]).clamp(-2, 2)] * distances[h % 2, SETTINGS.ids[k] + 1]
    )


STEPS = {
    "softcap": (SoftCap(1.5),),
    "alibi": (Alibi(SLOPES),),
    "relative": (RelativeBias(table(H, 41)),),
    "globals": (ScoreMod(reads_globals),),
    "a scalar": (ScoreMod(reads_a_scalar),),
    "not captured": (ScoreMod(reads_what_is_not_captured),),
    "twice": (ScoreMod(closing_over(MORE)),),
    "by several numbers": (ScoreMod(by_several_numbers(table(H, 21))),),
    "by what is looked up": (ScoreMod(by_what_is_looked_up(table(H, 9))),),
    "heads of a part": (ScoreMod(lambda s, b, h, q, k: s / h, first_head=3),),
    "several": (SoftCap(2.0), Alibi(SLOPES), ScoreMod(reads_a_scalar), SoftCap(3.0), ScoreMod(reads_globals)),
}
PREDICATES = {
    "none": (),
    "by position": (MaskMod(lambda b, h, q, k: (IDS[q] == IDS[k]) | (k < 40)),),
    "by head": (MaskMod(lambda b, h, q, k: (q - k).abs() <= 60 * h),),
    "by both": (MaskMod(lambda b, h, q, k: (q + k + b) % (h + 2) == 0), MaskMod(lambda b, h, q, k: (q + 7 * k) & 6)),
    "heads of a part": (MaskMod(lambda b, h, q, k: q // 8 != h, first_head=5),),
    "nothing": (MaskMod(lambda b, h, q, k: q < 0),),
}


def with_predicates(name, tile_list):
    return tuple(replace(tile, predicates=PREDICATES[name]) for tile in tile_list)


def check(tile_lists, inputs, *, score=None, kernel=DENSE, limit=FLOAT64_LIMIT, dlse=None):
    found = run_kernel(kernel, *inputs, tile_lists, scale=0.25, score=score, dlse=dlse)
    want = truth(*inputs, tile_lists, scale=0.25, score=score, dlse=dlse)
    check_equal(found, want, limit)
    assert list(found) == list(want)
    return found


def inputs(h=H, g=2, d=16, dv=16, dtype=torch.float64, seed=0):
    return random_qkv(B, NUM_Q, NUM_KV, h, g, d, dv, dtype=dtype, seed=seed)


@pytest.mark.parametrize("kind", BAND_KINDS)
@pytest.mark.parametrize("name", PREDICATES)
def test_every_band_and_predicate(name, kind):
    visits = 1 + len(name) % 3
    score = Scores(STEPS["globals"]) if len(kind) % 2 else None
    found = check(split_tiles(with_predicates(name, band_tiles(kind, NUM_Q, NUM_KV)), visits), inputs(), score=score)
    if name == "nothing":
        assert (found["out"] == 0).all() and (found["lse"] == -torch.inf).all() and (found["dq"] == 0).all()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", ["causal", "batch rows", "many"])
def test_every_score(name, kind):
    visits = split_tiles(with_predicates("by both", band_tiles(kind, NUM_Q, NUM_KV)), 2)
    found = check(visits, inputs(), score=Scores(STEPS[name]))
    of_tensors = [x for key, x in found.items() if key.startswith("gradient")]
    assert len(of_tensors) == len(Scores(STEPS[name]).tensors())


@pytest.mark.parametrize("made", [Alibi, lambda slopes: RelativeBias(slopes[:, None].expand(-1, 41))])
def test_gradients_of_tensors_in_16_bits_are_rounded_once(made):
    score = Scores((made(SLOPES.bfloat16()),))
    check(split_tiles(band_tiles("full", NUM_Q, NUM_KV), 3), inputs(dtype=torch.float32), score=score, limit=FLOAT32_LIMIT)


@pytest.mark.parametrize(("h", "g", "d", "dv"), [(4, 4, 16, 16), (4, 1, 16, 24), (6, 2, 20, 16)])
def test_heads_and_head_dims(h, g, d, dv):
    dlse = torch.randn(B, h, NUM_Q, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    visits = split_tiles(with_predicates("by head", band_tiles("documents", NUM_Q, NUM_KV)), 2)
    check(visits, inputs(h, g, d, dv), dlse=dlse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    visits = split_tiles(band_tiles("many", NUM_Q, NUM_KV), 3)
    x = inputs(dtype=dtype)
    if dtype == torch.float32:
        check(visits, x, score=Scores((ScoreMod(reads_globals),)), limit=FLOAT32_LIMIT)
        return
    found = run_kernel(DENSE, *x, visits, scale=0.25)
    check_half(found, exact(*x, visits, scale=0.25), plain(*x, visits, scale=0.25))


@pytest.mark.parametrize("name", ["alibi", "globals"])
def test_rows_of_a_shard_that_begins_late(name):
    """Functions go by positions; also where a tile begins late in its shard."""
    visit = tiles((range(100, 100 + NUM_Q),), [(range(NUM_KV),)], ra.Causal() & PREDICATES["by position"][0] & ra.Window(90))
    later = tiles((range(60), range(200, 280)), [(range(90, NUM_KV),)], ra.Causal() & ra.Window(90, 5))
    assert later[0].q_rows.start > 0
    check([visit], inputs(), score=Scores(STEPS[name]))
    check([later], random_qkv(B, NUM_Q, NUM_KV - 90, H, 2, 16, dtype=torch.float64), score=Scores(STEPS[name]))


def test_what_no_gradient_is_wanted_of_gets_none():
    score, x = Scores(STEPS["several"]), inputs()
    visit = band_tiles("causal", NUM_Q, NUM_KV)
    want = truth(*x, [visit], scale=0.25, score=score)
    q, k, v, dout = x
    out = torch.empty_like(dout)
    partial = DENSE.forward(q, k, v, visit, scale=0.25, score=score, out=out)
    of_scores = [None if n % 2 else torch.ones_like(t) for n, t in enumerate(score.tensors())]
    grads = [torch.empty_like(x) for x in (q, k, v)]
    into = Grads.like(q, k, v, tuple(of_scores))
    DENSE.backward(Upstream(dout, out, partial.lse), q, k, v, visit, scale=0.25, score=score, into=into)
    into.write(*grads)
    assert rel_error(grads[0], want["dq"]) < FLOAT64_LIMIT
    for n, grad in enumerate(of_scores):
        assert grad is None or rel_error(grad - 1, want[f"gradient of tensor {n}"]) < FLOAT64_LIMIT


def test_a_mask_whose_tensor_was_written_to_is_another():
    ids = torch.zeros(400, dtype=torch.int64)
    mask = ra.MaskMod(lambda b, h, q, k: ids[q] == ids[k])
    visits = [tiles((range(NUM_Q),), [(range(NUM_KV),)], mask)]
    check(visits, inputs())
    ids[70:] = 1
    check(visits, inputs())
    ids[200:] = 2
    check(visits, inputs())


# In a ring: functions by hand, which share nothing with what runs users' functions.

T = 66


@dataclass(frozen=True)
class OnCpu(FlexKernel):
    def supports(self, problem: Problem) -> str | None:
        return None


@contextmanager
def standing_in(call=dense_flex):
    with patch.dict(flex.KERNELS, flex=OnCpu(call)):
        resolve.cache_clear()
        yield
    resolve.cache_clear()


OF_HEADS, OF_ROWS, OF_CELLS, SCALE = (x.requires_grad_() for x in (table(H), table(B), table(T, T), table()))
TENSORS = OF_HEADS, OF_ROWS, OF_CELLS, SCALE
DOCUMENTS = torch.tensor([[0] * 20 + [1] * 46, [0] * 50 + [1] * 16])


def learned(s, b, h, q, k):
    return s * SCALE + OF_ROWS[b].cos() * OF_CELLS[q, k] - OF_HEADS[h] * (q - k).abs()


def seen_by(b, h, q, k):
    return (DOCUMENTS[b, q] == DOCUMENTS[b, k]) & (h + q > 1)


LEARNED = ra.ScoreMod(learned)


def by_hand(q, k, v):
    """One dense softmax, every function written over whole tensors."""
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = (DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None]) & (torch.arange(H)[:, None, None] + i > 1) & (j <= i)
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.25 * SCALE
    scores = scores + OF_ROWS.cos()[:, None, None, None] * OF_CELLS - OF_HEADS[:, None, None] * (i - j).abs()
    scores = scores.masked_fill(~seen, -torch.inf)
    p = scores.masked_fill(~seen.any(-1, keepdim=True), 0).softmax(-1).masked_fill(~seen, 0)
    return torch.einsum("bhij,bjhd->bihd", p, v)


def outcome(attend, leaves, dout):
    out = attend(*leaves)
    return [out, *torch.autograd.grad(out, [*leaves, *TENSORS], dout)]


def errors(ring, run=lambda attend: attend):
    *leaves, dout = (x.requires_grad_() for x in random_qkv(B, T, T, H, 2, 16, dtype=torch.float64))
    mask = ra.Causal() & ra.MaskMod(seen_by)

    def attend(*inputs):
        local = map(ring.shard, inputs)
        return ring.unshard(ra.ring_attention(*local, ring=ring, mask=mask, score=LEARNED, softmax_scale=0.25))

    found = outcome(run(attend), leaves, dout)
    return [rel_error(x, ref) for x, ref in zip(found, outcome(by_hand, leaves, dout), strict=True)]


@pytest.mark.parametrize(("layout", "exchange"), [*zip(LAYOUTS, islice(cycle(("ring", "gather", "pull")), 3), strict=False)])
def test_in_a_ring(layout, exchange):
    with standing_in():
        found = errors(ra.Ring.simulated(3, layout, exchange=exchange, kernel="flex", hostile=True))
    assert max(found) < FLOAT64_LIMIT, found


def test_heads_of_another_rank_keep_their_numbers():
    with standing_in():
        found = errors(ra.Ring.simulated(6, "zigzag", kernel="flex", hostile=True, ulysses=2))
    assert max(found) < FLOAT64_LIMIT, found


def test_under_a_mode_that_sees_every_operator():
    """It runs outside of the custom op's and the mode's exclusions, in which autograd would record nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    with standing_in(), FlopCounterMode(display=False):
        found = errors(ra.Ring.simulated(3, kernel="flex"))
    assert max(found) < FLOAT64_LIMIT, found


def test_what_is_excluded_inside_of_ops_comes_back():
    before = torch._C._dispatch_tls_local_exclude_set().raw_repr()
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
        inside = torch._C._dispatch_tls_local_exclude_set().raw_repr()
        x = torch.ones(2).requires_grad_()
        assert (2 * x).grad_fn is None
        with outside_of_ops():
            assert (2 * x).grad_fn is not None
        assert torch._C._dispatch_tls_local_exclude_set().raw_repr() == inside != before


# Compiled: traced and differentiated as on a GPU, and then run by torch's own operators.


@pytest.fixture
def backward_on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *inputs: None)


def counted():
    backend = CompileCounterWithBackend("aot_eager")
    return backend, FlexKernel(partial(compiled, backend=backend))


def test_one_compilation_a_direction_for_any_rows_and_bands(backward_on_a_cpu):
    backend, kernel = counted()
    score = Scores(STEPS["several"])
    for (num_q, num_kv), mask in zip([(260, 150), (270, 270), (140, 500), (300, 400)], cycle((ra.Causal(), ra.Window(50, 20)))):
        visit = tiles((range(5, 5 + num_q),), [(range(num_kv),)], mask & PREDICATES["by both"][0])
        assert all(len(tile.q_rows) > 128 < len(tile.kv_rows) for tile in visit)
        x = random_qkv(B, num_q, num_kv, H, 2, 16, dtype=torch.float64)
        check([visit], x, kernel=kernel, score=score.with_tensors([t.clone() for t in score.tensors()]))
        assert backend.frame_count == 2


def test_sizes_of_one_row_and_of_one_block_are_programs_of_their_own():
    """Compilers take such sizes for numbers, and Dynamo ends at a few compilations of one code."""
    _, kernel = counted()
    for num_q, num_kv in product((1, 5, 300), (1, 7, 290)):
        visit = with_predicates("by position", tiles((range(num_q),), [(range(num_kv),)], ra.Full()))
        kernel.forward(*random_qkv(B, num_q, num_kv, H, 2, 16, dtype=torch.float64)[:3], visit, scale=0.25)


@pytest.mark.parametrize(
    "name", ["relative", "globals", "a scalar", "not captured", "twice", "by several numbers", "by what is looked up"]
)
def test_gradients_of_tensors_are_compiled(name, backward_on_a_cpu):
    _, kernel = counted()
    check(
        [with_predicates("by position", band_tiles("causal", NUM_Q, NUM_KV))],
        inputs(),
        kernel=kernel,
        score=Scores(STEPS[name]),
    )


def test_compiled_in_a_ring(backward_on_a_cpu):
    backend = CompileCounterWithBackend("aot_eager")
    with standing_in(partial(compiled, backend=backend)):
        found = errors(ra.Ring.simulated(3, "zigzag", kernel="flex", hostile=True))
    assert max(found) < FLOAT64_LIMIT, found
    assert backend.frame_count == 2


def test_what_inference_made_serves_training(backward_on_a_cpu):
    """What is kept of a tile is no tensor of inference mode, which a backward could not use."""
    _, kernel = counted()
    x = random_qkv(B, 45, 51, H, 2, 16, dtype=torch.float64)
    visit = with_predicates("by head", tiles((range(45),), [(range(51),)], ra.Window(13)))
    with torch.inference_mode():
        score = Scores((ScoreMod(closing_over(MORE.clone())),))
        kernel.forward(*(t.clone() for t in x[:3]), visit, scale=0.25, score=score)
    check([visit], x, kernel=kernel, score=Scores((ScoreMod(closing_over(MORE)),)))


def test_torch_s_own_forward_uncompiled():
    """As `attend` hands everything to flex_attention."""

    def uncompiled(q: Tensor, k: Tensor, v: Tensor, work) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, work.blocks, work.mask_mod, work.score_mod, work.scale, work.stages)

    x = inputs()
    visit = with_predicates("by both", band_tiles("window", NUM_Q, NUM_KV))
    found = FlexKernel(uncompiled).forward(*x[:3], visit, scale=0.25, score=Scores(STEPS["several"]))
    want = truth(*x, [visit], scale=0.25, score=Scores(STEPS["several"]))
    assert rel_error(found.lse, want["lse"]) < 1e-6, "torch keeps it in fp32 here"


def test_what_cannot_be_compiled_says_what_else_runs_it():
    def fails(q, k, v, work):
        raise torch._dynamo.exc.TorchDynamoException("not this")

    x = inputs()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException) as caught:
        FlexKernel(fails).forward(*x[:3], band_tiles("full", NUM_Q, NUM_KV), scale=0.25)
    assert caught.value.__notes__ == [
        "torch's flex_attention cannot compile this for kernel 'flex'; kernel='reference' runs any function"
    ]


def graph_of(score_mod):
    """A function as flex_attention takes it, as a graph of operations on single numbers."""
    numbers = [torch.tensor(0.0), *(torch.tensor(0, dtype=torch.int32) for _ in range(4))]
    with TransformGetItemToIndex():
        return make_fx(score_mod)(*numbers).graph


class Places(NamedTuple):
    """Which of the query's and the key's row a number changes with; and which torch 2.11 believes, as it forgets lookups'."""

    real: frozenset
    believed: frozenset


def places(graph):
    found = {}
    *_, row, column = (node for node in graph.nodes if node.op == "placeholder")
    for node in graph.nodes:
        own = frozenset({node} & {row, column})
        before = [found[x] for x in node.all_input_nodes]
        looked_up = node.target is torch.ops.aten.index.Tensor
        believed = own.union(*([] if looked_up else [x.believed for x in before]))
        found[node] = Places(own.union(*(x.real for x in before)), believed)
    return found


@pytest.mark.parametrize("name", STEPS)
def test_indices_have_the_shape_of_their_positions(name):
    """Of tensors that learn; torch 2.11 and 2.12 cannot compile the gradient otherwise, see Notes [shifts] and [indices]."""
    tile = band_tiles("causal", NUM_Q, NUM_KV)[0]
    graph = graph_of(work_of(tile, inputs(dtype=torch.float32)[0], STEPS[name], 1.0).score_mod)
    found = places(graph)
    lookups = [node for node in graph.nodes if node.target is torch.ops.aten.index.Tensor]
    indices = [x for node in lookups if node.meta["val"].dtype.is_floating_point for x in node.args[1]]
    assert lookups and all(found[index].real == found[index].believed for index in indices)


@pytest.mark.parametrize("name", STEPS)
def test_scores_keep_their_dtype(name):
    """Also where what a function reads is in float64."""
    tile = band_tiles("causal", NUM_Q, NUM_KV)[0]
    score, *numbers = scalars()
    modify = work_of(tile, inputs(dtype=torch.float32)[0], STEPS[name], 1.0).score_mod
    assert modify(score.float(), *numbers).dtype == torch.float32


BY_CELL = {
    "by distance": lambda x: lambda s, b, h, q, k: s + x[h, (q - k).clamp(-4, 4) + 4],
    "by cell": lambda x: lambda s, b, h, q, k: s + x[q % 3, k % 9],
    "by what is looked up": lambda x: lambda s, b, h, q, k: s + x[h, (IDS[q] == IDS[k]).long()],
}
BY_ROW = {
    "nothing": lambda x: lambda s, b, h, q, k: s + (q - k) / 100,
    "by head": lambda x: lambda s, b, h, q, k: s - x[h, b] * (q - k).abs(),
    "by row": lambda x: lambda s, b, h, q, k: s * x[b, q % 9] + x[h, k % 9],
    "flags by cell": lambda x: lambda s, b, h, q, k: torch.where((x > 0)[q % 3, k % 9], s, 0.5 * s),
}


def above_zero(fn):
    return lambda b, h, q, k: fn(0.0, b, h, q, k) > 0


def test_stages_where_tensors_are_read_by_cell():
    """What is read by query and key takes shared memory with every stage; see Note [stages]."""
    values, q = table(H, 9).float(), inputs(dtype=torch.bfloat16)[0]
    tile = band_tiles("causal", NUM_Q, NUM_KV)[0]
    for made, stages in ((BY_CELL, 1), (BY_ROW, None)):
        for name, function in made.items():
            score = SoftCap(2.0), ScoreMod(function(values))
            assert work_of(tile, q, score, 1.0).stages == stages, name
            assert work_of(tile, q.float(), score, 1.0).stages == 1
            mask = MaskMod(above_zero(function(values)))
            assert work_of(replace(tile, predicates=(mask,)), q, (), 1.0).stages == stages, name


class Indices(TorchDispatchMode):
    """Counts lookups, and sees to it that their indices count from the beginning."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor:
            self.count += 1
            assert all(((index >= 0) & (index < size)).all() for index, size in zip(args[1], args[0].shape, strict=True))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["by several numbers", "by what is looked up"])
def test_indices_count_from_the_beginning(name):
    """flex_attention, compiled, would read before the tensor."""
    x = inputs(dtype=torch.float32)
    work = work_of(band_tiles("full", NUM_Q, NUM_KV)[0], x[0], STEPS[name], 1.0)
    with Indices() as seen:
        dense_flex(*(t.transpose(1, 2) for t in x[:3]), work)
    assert seen.count > 4


def scalars():
    return [torch.zeros((), dtype=torch.float64), *(torch.zeros((), dtype=torch.int64) for _ in range(4))]


def scaled_by(factor, values):
    return lambda s, b, h, q, k: s * factor + values[h]


def test_a_function_is_traced_once_for_what_it_reads():
    one = traced(scaled_by(2, table(H)), scalars())
    assert one.uses == (1,)
    assert traced(scaled_by(2, table(H) + 1), scalars()) is one, "tensors are arguments"
    assert traced(scaled_by(3, table(H)), scalars()) is not one
    assert traced(scaled_by(2, table(5)), scalars()) is not one, "shapes are numbers to a function"
    fn = scaled_by(2, table(H))
    assert traced(fn, scalars()[:1] + [x.int() for x in scalars()[1:]]) is not one
    assert captured(fn)[0] is not one.arguments(captured(fn), 3)[0]


def test_a_function_that_reads_more_is_traced_once_whatever_tensors_it_captures():
    owner = SimpleNamespace(factor=2)

    def made(values):
        return lambda s, b, h, q, k: s * owner.factor + values[h]

    fn, other = made(table(H)), made(table(H))
    assert traced(fn, scalars()) is traced(recapture(fn, (table(H) + 1,)), scalars())
    assert traced(fn, scalars()) is not traced(other, scalars())


def test_a_function_is_traced_once_for_inference_and_training():
    with torch.inference_mode():
        one = traced(scaled_by(5, table(11)), scalars())
        assert traced(scaled_by(5, table(11)), scalars()) is one
    assert traced(scaled_by(5, table(11)), scalars()) is one


def problem(**change):
    fields = {"direction": "forward", "device": "cuda", "dtype": torch.bfloat16, "num_heads": 4, "num_kv_heads": 2}
    return Problem(**({**fields, "head_dim": 64, "v_head_dim": 64} | change))


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(flex, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "no backward and no fused forward with lse on 'cpu'; it runs on CUDA"),
        ({"dtype": torch.float64}, "it takes float16, bfloat16, float32, not float64"),
        ({"head_dim": 8}, "it takes head dims from 16 on, not 8"),
        ({"v_head_dim": 8}, "it takes head dims from 16 on, not 8"),
        ({"head_dim": 320}, "it takes a head_dim up to 256, not 320"),
        ({"score": ("alibi", "dropout")}, "it has no dropout"),
        (
            {"score": ("score_mod",), "deterministic": True, "direction": "backward"},
            "the gradients of its scores' tensors add up in no fixed order; reference's do",
        ),
    ],
)
def test_what_it_refuses(change, reason, installed):
    with pytest.raises(KernelUnavailable, match=reason):
        resolve("flex", problem(**change))


def test_what_it_takes(installed):
    for direction, dtype in product(("forward", "backward"), (torch.float16, torch.bfloat16, torch.float32)):
        every = ("softcap", "softcap", "alibi", "relative_bias", "score_mod", "triton_score_mod")
        options = {"lse_grad": True, "left_bounded": True, "head_dim": 20, "v_head_dim": 128, "predicate": "python"}
        assert resolve("flex", problem(direction=direction, dtype=dtype, score=every, **options)) is get_kernel("flex")
    assert flex.FlexKernel().supports(problem(deterministic=True, score=("softcap",), direction="backward")) is None


def test_without_triton(monkeypatch):
    monkeypatch.setattr(flex, "find_spec", lambda name: None)
    assert flex.FlexKernel().supports(problem()) == "triton is not installed"
