"""Short calls that come again: what is replayed, on which tensors, and for how long.

A CUDA graph is stood in for by what does the captured work once more on the captured tensors. Graphs themselves are checked on
GPUs (tests/gpu/nccl.py).
"""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch

import ring_attn as ra
from ring_attn import call
from ring_attn.comm import replay
from ring_attn.comm.local import LocalTransport
from ring_attn.comm.replay import Repeated, Replays
from ring_attn.comm.two_axes import TwoAxes
from ring_attn.kernels import KERNEL_NAMES
from tests.matrix import cases, check
from tests.support import random_qkv, rel_error

BEFORE = replay._BEFORE
SOFTCAP = ra.SoftCap(2.0)


class Redone(Replays):
    """Replays without a GPU."""

    def __init__(self, wires=None):
        super().__init__(wires)
        self.captures = self.replayed = 0
        self.capturing = self.amid = False
        self.left = 1 << 40

    def serve(self, device):
        return True

    def know(self, kernel):
        return True

    def may_begin(self):
        return not self.capturing

    def free(self, device):
        return self.left

    @contextmanager
    def aside(self, device):
        yield lambda x: None

    def record(self, run, inputs):
        self.captures, self.amid = self.captures + 1, True
        # A capture writes nothing.
        outputs = [torch.full_like(x, torch.nan) for x in run(*inputs)]
        self.amid = False

        def again():
            for to, x in zip(outputs, run(*inputs), strict=True):
                to.copy_(x)

        return outputs, again

    def replay(self, one, inputs, what):
        self.replayed += 1
        return one.graph(inputs)


def make_ring(size=4, layout="zigzag", wires=None, **options):
    """A ring in one process whose calls are replayed, and its replays."""
    transport = LocalTransport(size, hostile=True)
    transport.replays = Redone(wires)
    return ra.Ring(transport, layout=layout, **{"exchange": "pull", **options}), transport.replays


def inputs(seed=0, rows=48, heads=(4, 2), dtype=torch.float64):
    *leaves, dout = random_qkv(2, rows, rows, *heads, 8, dtype=dtype, seed=seed)
    return [x.requires_grad_() for x in leaves], dout


def results(ring, seed, lse=False, **options):
    """Output and gradients of one call on that ring, and those of one that replays nothing."""
    found = []
    for one in (ring, ra.Ring.simulated(ring.size, ring.layout_choice, exchange=ring.exchange)):
        leaves, dout = inputs(seed)
        out, of_lse = ra.ring_attention(*leaves, ring=one, return_lse=True, **options)
        total = (out * dout).sum() + (of_lse.sin().sum() if lse else 0.0)
        found.append([out.detach(), *torch.autograd.grad(total, leaves)])
    return found


def assert_right(ring, seed, **options):
    for x, y in zip(*results(ring, seed, **options), strict=True):
        assert rel_error(x, y) < 1e-12


@pytest.mark.parametrize("case", cases(), ids=str)
def test_what_comes_again_is_replayed_and_right(case):
    ring, replays = make_ring(layout=case.layout, exchange=case.exchange)
    for seed in range(BEFORE):
        check(replace(case, seed=seed), ring)
    assert (replays.captures, replays.replayed) == (0, 0)
    for seed in range(BEFORE, BEFORE + 3):
        check(replace(case, seed=seed), ring)
    # Messages are not for graphs of which nobody knows: NCCL waits for these to go.
    assert (replays.captures, replays.replayed) == ((2, 4) if case.exchange == "pull" else (0, 0))


def test_results_are_the_callers_own():
    ring, _ = make_ring()
    kept = [results(ring, seed) for seed in range(BEFORE + 3)]
    for found, wanted in kept:
        assert all(rel_error(x, y) < 1e-12 for x, y in zip(found, wanted, strict=True))


def test_several_forwards_before_their_backwards():
    """As of layers alike."""
    ring, replays = make_ring()
    for _ in range(BEFORE + 2):
        (q, k, v), dout = inputs()
        out = q
        plain = q.detach().requires_grad_()
        for _ in range(3):
            out = ra.ring_attention(out, k, v, ring=ring)
        wanted = plain
        for _ in range(3):
            wanted = ra.ring_attention(wanted, k, v, ring=ra.Ring.simulated(4))
        grads = torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(wanted, (plain, k, v), dout)
        assert all(rel_error(x, y) < 1e-12 for x, y in zip(*grads, strict=True))
    assert replays.captures == 2


def test_each_kind_of_call_has_a_graph_of_its_own():
    """By masks, scores and scales; a gradient through lse is one of the backward."""
    ring, replays = make_ring()
    slopes = torch.rand(4, dtype=torch.float64)
    kinds = [
        {},
        {"lse": True},
        {"mask": ra.Window(7, 0)},
        {"score": SOFTCAP},
        {"score": ra.Alibi(slopes)},
        {"softmax_scale": 0.3},
    ]
    for seed in range(BEFORE + 2):
        for options in kinds:
            assert_right(ring, seed, **options)
    # Forward and backward of each, but that the first two differ in the backward alone.
    assert replays.captures == 2 * len(kinds) - 1


def test_scores_that_learn_are_replayed_with_the_tensors_of_the_call():
    ring, replays = make_ring()
    for seed in range(BEFORE + 2):
        (q, k, v), dout = inputs(seed)
        tensors = [torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        score = [ra.Alibi(tensors[0]), ra.Sinks(tensors[1])]
        found, wanted = (
            torch.autograd.grad(ra.ring_attention(q, k, v, ring=one, score=score), (q, *tensors), dout)
            for one in (ring, ra.Ring.simulated(4))
        )
        assert all(rel_error(x, y) < 1e-12 for x, y in zip(found, wanted, strict=True))
    for seed in range(BEFORE + 2):
        # Those of sinks alone.
        (q, k, v), dout = inputs(seed)
        slopes, sinks = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64, requires_grad=True)
        found, wanted = (
            torch.autograd.grad(ra.ring_attention(q, k, v, ring=one, score=[ra.Alibi(slopes), ra.Sinks(sinks)]), sinks, dout)
            for one in (ring, ra.Ring.simulated(4))
        )
        assert rel_error(found[0], wanted[0]) < 1e-12
    assert replays.captures == 4  # the second forward is of another kind as well: nothing of its modifiers learns


def test_what_is_kept_for_slopes_that_learn_is_of_their_calls_alone():
    ring, replays = make_ring(kernel="reference")
    for number in range(2 * BEFORE + 4):
        learns = bool(number % 2)
        leaves, dout = inputs(number, dtype=torch.bfloat16)
        slopes = torch.rand(4, requires_grad=learns)
        wanting = [*leaves, slopes] if learns else leaves
        found, wanted = (
            torch.autograd.grad(ra.ring_attention(*leaves, ring=one, score=ra.Alibi(slopes)), wanting, dout)
            for one in (ring, ra.Ring.simulated(4, exchange="pull", kernel="reference"))
        )
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert replays.captures == 4


def test_determinism_is_a_kind():
    ring, replays = make_ring()
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for seed in range(BEFORE + 1):
                assert_right(ring, seed)
        finally:
            torch.use_deterministic_algorithms(False)
    assert replays.captures == 4


def test_memory_made_anew_ends_what_was_captured():
    wires = SimpleWires()
    ring, replays = make_ring(wires=wires)
    other = {"mask": ra.Window(7, 0)}
    for generation in range(3):
        wires.memory_bytes = generation
        for seed in range(BEFORE):
            assert_right(ring, seed)
            assert_right(ring, seed, **other)
        assert replays.captures == 4 * generation and len(replays._captured) == 4 * (generation > 0)
        assert not any(one.graph for one in replays._captured)
        for seed in range(3):
            assert_right(ring, seed)
            assert_right(ring, seed, **other)
        assert (replays.captures, replays.replayed) == (4 * generation + 4, 8 * generation + 8)
    wires.memory_bytes = 9
    assert_right(ring, 0)
    assert not any(one.graph for one in replays._captured), "also of kinds that are not called again"


class SimpleWires:
    memory_bytes = 0


def test_what_finds_no_room_is_not_asked_about_again():
    ring, replays = make_ring()
    replays.left = replay._MOST - 1
    for seed in range(BEFORE + 1):
        assert_right(ring, seed)
    replays.left = 2 * replay._MOST
    assert_right(ring, 9)
    assert replays.captures == 0


def test_so_much_must_be_free(monkeypatch, caplog):
    megabytes = torch.empty(5 << 20, dtype=torch.uint8, device="meta")
    replays, free = Replays(), [replay._MOST + megabytes.nbytes]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 40))
    assert replays.may_capture([None, megabytes])
    free[0] -= 1
    with caplog.at_level("INFO", "ring_attn"):
        assert not replays.may_capture([megabytes])
    assert "less than 1029 MiB" in caplog.text
    free[0] = 1 << 40
    much = torch.empty(replay._MOST, dtype=torch.uint8, device="meta")
    assert replays.may_capture([much]) and not replays.may_capture([much, torch.empty(1)])


def test_those_make_room_that_were_not_used_for_longest():
    replays = Redone()
    eighth = torch.empty(replay._MOST // 8, dtype=torch.uint8, device="meta")
    kinds = [Repeated(replays) for _ in range(4)]
    for used, one in zip((3, 1, 2, 0), kinds, strict=True):
        one.graph, one.used, one._calls = replay.Graph([None, eighth], [eighth], lambda: None), used, 3
        replays._captured.add(one)
    kinds[3].graph = None
    quarter = eighth.nbytes * 2
    assert replays.make_room(quarter)
    assert [one.graph is not None for one in kinds] == [True, True, True, False]
    assert replays.make_room(quarter + 1)
    assert [one.graph is not None for one in kinds] == [True, False, True, False]
    assert (kinds[0]._calls, kinds[1]._calls) == (3, 0)
    assert replays.make_room(3 * quarter)
    assert [one.graph is not None for one in kinds] == [True, False, False, False]
    assert not replays.make_room(replay._MOST + 1) and kinds[0].graph
    assert replays.make_room(replay._MOST)
    assert not any(one.graph for one in kinds)


def test_what_gave_way_waits_longer():
    replays, x = Redone(), torch.ones(2)
    one = Repeated(replays)
    for waits in (1, 2, 4):
        for _ in range(waits * BEFORE):
            one(lambda given: [given + 1], [x], "forward")
            assert one.graph is None
        one(lambda given: [given + 1], [x], "forward")
        assert one.graph is not None
        one.give_way()


def test_what_has_no_room_is_made_all_the_same(monkeypatch):
    """What a call takes is known when it has been made."""
    ring, replays = make_ring()
    wanted = []
    monkeypatch.setattr(replays, "make_room", lambda size: wanted.append(size))
    for seed in range(BEFORE + 2):
        assert_right(ring, seed)
    leaves, dout = inputs()
    out = sum(x.nbytes for x in leaves) + dout.nbytes + dout[..., 0].nbytes  # and lse
    assert wanted == [out, out + dout.nbytes + sum(x.nbytes for x in leaves)]
    assert replays.captures == 0


def test_what_is_replayed_is_used():
    ring, replays = make_ring()
    for seed in range(BEFORE + 2):
        assert_right(ring, seed)
    first = {one.used for one in replays._captured}
    assert_right(ring, 9)
    assert min(one.used for one in replays._captured) > max(first)


def test_while_a_graph_is_captured_calls_are_part_of_it():
    ring, replays = make_ring()
    for capturing in (True, False, True):
        replays.capturing = capturing
        for seed in range(BEFORE + 1):
            assert_right(ring, seed)
    assert (replays.captures, replays.replayed) == (2, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": ra.MaskMod(lambda b, h, q, kv: q >= kv)},
        {"score": ra.ScoreMod(lambda score, b, h, q, kv: score * 2)},
        {"score": [SOFTCAP, ra.ScoreMod(lambda score, b, h, q, kv: score * 2)]},
    ],
    ids=["mask", "score", "one of two"],
)
def test_functions_which_may_read_what_changes_are_called_every_time(options):
    ring, replays = make_ring()
    for seed in range(BEFORE + 2):
        assert_right(ring, seed, **options)
    assert replays.captures == 0


def test_long_calls_are_not_replayed(monkeypatch):
    ring, replays = make_ring()
    monkeypatch.setattr(call, "forward_us", lambda *given: call.SHORT)
    for seed in range(BEFORE + 2):
        assert_right(ring, seed)
    assert replays.captures == 0
    ring.settled.clear()
    monkeypatch.setattr(call, "forward_us", lambda *given: call.SHORT - 1)
    for seed in range(BEFORE + 2):
        assert_right(ring, seed)
    assert replays.captures == 2


def test_a_ring_may_do_without():
    ring, replays = make_ring(replay=False)
    for one in (ring, ring.with_layout("striped")):
        for seed in range(BEFORE + 2):
            assert_right(one, seed)
    assert replays.captures == 0
    assert not ra.Ring.simulated(4, ulysses=2, replay=False).of_parts[0].replay
    assert ra.Ring.simulated(4, ulysses=2).of_parts[1].replay


def test_transports_have_replays_of_their_own():
    assert [LocalTransport(2).replays, ra.Ring.simulated(2).transport.replays] == [None, None]
    replays = Replays()
    assert [replays.serve(torch.device(name)) for name in ("cpu", "cuda")] == [False, True]
    known = {name: replays.know(name) for name in KERNEL_NAMES if name != "auto"}
    assert {name for name, is_known in known.items() if not is_known} == {"reference", "flex"}


def test_what_reads_switches_is_asked_for_anew(monkeypatch):
    ring, replays = make_ring(kernel="reference")
    monkeypatch.setattr(replays, "know", lambda kernel: kernel != "reference")
    for seed in range(BEFORE + 2):
        assert_right(ring, seed)
    assert replays.captures == 0


@pytest.mark.parametrize("options", [{"keep_kv": True}, {"kv_memory": 4096}, {"grad_dtype": torch.float64}], ids=str)
def test_other_ways_of_a_ring(options):
    ring, replays = make_ring(**options)
    for seed in range(BEFORE + 2):
        assert_right(ring, seed)
    assert (replays.captures, replays.replayed) == (2, 2)


def test_heads_against_rows_are_traded_around_what_is_replayed():
    traders = [LocalTransport(2) for _ in range(2)]
    rings = [LocalTransport(2) for _ in range(2)]
    for one in rings:
        one.replays = Redone()
    ring = ra.Ring(TwoAxes(traders, rings), exchange="pull")
    for seed in range(BEFORE + 2):
        leaves, dout = inputs(seed)
        found = torch.autograd.grad(ra.ring_attention(*leaves, ring=ring), leaves, dout)
        alike = ra.Ring.simulated(4, ulysses=2, exchange="pull")
        wanted = torch.autograd.grad(ra.ring_attention(*leaves, ring=alike), leaves, dout)
        assert all(rel_error(x, y) < 1e-12 for x, y in zip(found, wanted, strict=True))
    assert [one.replays.captures for one in rings] == [2, 2]


def test_inputs_of_any_strides_and_of_inference():
    ring, replays = make_ring()
    for number in range(BEFORE + 4):
        (q, k, v), _ = inputs(number)
        wanted = ra.ring_attention(q, k, v, ring=ra.Ring.simulated(4))
        shapes = torch.cat([x.detach() for x in (q, k, v)], 2)
        with torch.inference_mode() if number % 2 == BEFORE % 2 else nullcontext():
            joined = shapes.clone()
            found = ra.ring_attention(joined[:, :, :4], joined[:, :, 4:6], joined[:, :, 6:], ring=ring)
        assert rel_error(found, wanted.detach()) < 1e-12
    assert_right(ring, 99)
    assert (replays.captures, replays.replayed) == (1, 4)


class FakeStream:
    """A stream of which a capture may have taken hold; `current` is the one on which things are done."""

    current: FakeStream
    device_index = 0

    def __init__(self, captured=False):
        self.captured, self.waited = captured, []

    def wait_stream(self, other):
        self.waited.append(other)

    def wait_event(self, event):
        self.waited.append(event)

    def record_event(self):
        return f"event on {id(self)}"

    @contextmanager
    def __call__(self):
        before, FakeStream.current = FakeStream.current, self
        yield
        FakeStream.current = before


@pytest.fixture
def gpu(monkeypatch):
    """CUDA streams and graphs that note what is done. `refuses`: what the end of a capture raises."""
    state = SimpleNamespace(done=[], refuses=None, gone=[], allowed=False)

    class Captured:
        def capture_begin(self, pool=None, *, capture_error_mode):
            state.done.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            state.done.append("end")
            if state.refuses:
                raise RuntimeError(state.refuses)

        def replay(self):
            state.done.append("replay")

        def __del__(self):
            state.gone.append(state.allowed)

    @contextmanager
    def allowed():
        state.allowed = True
        yield
        state.allowed = False

    monkeypatch.setattr(replay, "beside_captures", allowed)
    FakeStream.current = state.here = FakeStream()
    pools = count(1)
    for name, value in (
        ("graph_pool_handle", lambda: (0, next(pools))),
        ("CUDAGraph", Captured),
        ("Stream", lambda device: FakeStream()),
        ("stream", lambda stream: stream()),
        ("current_stream", lambda device=None: FakeStream.current),
        ("is_current_stream_capturing", lambda: FakeStream.current.captured),
        ("mem_get_info", lambda device: (1 << 40, 1 << 40)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: state.done.append(given), raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: state.done.append(stream))
    yield state
    gc.collect()


class Wired:
    """Wires with two streams, of which one is captured; what was put off, and what is watched."""

    memory_bytes = 1

    def __init__(self):
        self.forked, self.idle, self.asked = FakeStream(True), FakeStream(), []

    def streams(self):
        return [self.forked, self.idle]

    def finish(self):
        self.asked.append("finish")

    def watch(self, reached, what):
        self.asked.append((reached.event, what))


def test_a_call_is_made_before_it_is_captured_on_the_tensors_of_the_graph(gpu):
    wires, met = Wired(), []
    replays = Replays(wires)
    repeated, x = Repeated(replays), torch.arange(6.0).view(2, 3)

    def run(given, nothing):
        met.append((given.data_ptr(), given.stride(), FakeStream.current, gc.isenabled(), torch.is_inference_mode_enabled()))
        assert nothing is None
        return [given + 1]

    with torch.inference_mode():
        for _ in range(BEFORE + 3):
            wanted = x.t().clone() + 1
            (found,) = repeated(run, [x.t(), None], "pull forward, replayed")
            if len(met) < BEFORE + 2:
                assert torch.equal(found, wanted)
    *before, real, captured = met
    assert len(before) == BEFORE and {stream for _, _, stream, _, _ in before} == {gpu.here}
    assert real[:3] == captured[:3] and real[1] == (2, 1) and real[2] is replays._aside
    assert [one[3:] for one in (before[0], real, captured)] == [(True, True), (True, False), (False, False)]
    assert gpu.done[:4] == [gpu.here, ("begin", (0, 1), "thread_local"), "end", "replay"]
    # Nothing is asked for but the copies; those on other streams wait.
    assert wires.asked == 2 * ["finish", (gpu.here.record_event(), "pull forward, replayed")]
    assert replays._aside.waited == [gpu.here, wires.forked, *[gpu.here.record_event()] * 2]
    assert gpu.here.waited == [replays._aside.record_event()] * 2, "of the call that was captured, and to replay it"
    other = FakeStream()
    with other():
        repeated(run, [x.t(), None], "")
        repeated(run, [x.t(), None], "")
    assert other.waited == [gpu.here.record_event()]
    replays.capture(lambda given: [given], [x])
    # The stream on which memory is made knows when what was there before is over.
    assert replays._aside.waited[4:] == [other.record_event(), other.record_event(), gpu.here, wires.forked]
    assert gpu.done[-2][1] == (0, 1), "one pool for all"


@pytest.mark.parametrize("refuses", [None, "the driver refuses"])
def test_a_capture_that_fails_leaves_the_call_as_it_was(refuses, gpu, caplog):
    wires = Wired()
    replays = Replays(wires)
    repeated, x, calls = Repeated(replays), torch.ones(2), count()

    def run(given):
        if next(calls) == BEFORE + 1:
            raise torch.OutOfMemoryError("no memory is left")
        return [given + 1]

    gpu.refuses = refuses
    for _ in range(BEFORE + 3):
        assert torch.equal(repeated(run, [x], "forward")[0], x + 1)
    (text,) = [record.getMessage() for record in caplog.records]
    assert text.endswith("one failed, OutOfMemoryError: no memory is left")
    # Another capture that ends ends what the first left of random numbers.
    ended = [(0, (0, 1)), ("begin", None, "thread_local"), "end"] if refuses else []
    assert gpu.done[1:] == [("begin", (0, 1), "thread_local"), "end", *ended]
    assert replays._aside.waited == [gpu.here, wires.forked], "what was forked is joined"
    assert not replays.recording and gc.isenabled() and repeated.graph is None
    # Nothing is captured any more, and its pool went with it.
    assert not replays.may_capture([x])
    gpu.refuses = None
    replays.capture(lambda given: [given], [x])
    assert gpu.done[-2][1] == (0, 2)


def test_what_the_driver_refuses_ends_a_capture_all_the_same(gpu, monkeypatch):
    """A capture that it took for spoilt refuses everything on its streams, until it is ended."""
    wires, calls, spoilt = Wired(), count(), [False]
    replays = Replays(wires)
    repeated, x, wait, end = Repeated(replays), torch.ones(2), FakeStream.wait_stream, torch.cuda.CUDAGraph.capture_end

    def wait_stream(self, other):
        if spoilt[0]:
            raise RuntimeError("operation failed due to a previous error during capture")
        wait(self, other)

    def capture_end(self):
        spoilt[0] = False
        end(self)

    def run(given):
        if next(calls) == BEFORE + 1:
            spoilt[0], gpu.refuses = True, "the capture was spoilt"
            raise RuntimeError("operation not permitted when stream is capturing")
        return [given + 1]

    monkeypatch.setattr(FakeStream, "wait_stream", wait_stream)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", capture_end)
    before = len(replay._unended)
    for _ in range(BEFORE + 2):
        assert torch.equal(repeated(run, [x], "forward")[0], x + 1)
    assert gpu.done.count("end") == 2 and repeated.graph is None
    gc.collect()
    assert len(replay._unended) == before + 1 and gpu.gone == [False], "PyTorch may ask the one that has not ended"


def test_the_first_replay_waits_for_the_call_that_was_captured(gpu):
    repeated, x, other = Repeated(Replays()), torch.ones(2), FakeStream()
    for _ in range(BEFORE + 1):
        repeated(lambda given: [given + 1], [x], "forward")
    with other():
        repeated(lambda given: [given + 1], [x], "forward")
    assert other.waited == [repeated._replays._aside.record_event()]


def test_graphs_go_without_hurting_a_capture(gpu):
    """The newest keeps the pool."""
    replays, x = Replays(), torch.ones(2)
    repeated = [Repeated(replays) for _ in range(2)]
    for one in repeated:
        for _ in range(BEFORE + 1):
            one(lambda given: [given + 1], [x], "forward")
    assert gpu.gone == []
    repeated[1].forget()
    assert gpu.gone == []
    repeated[0].forget()
    assert gpu.gone == [True]
    del one, repeated, replays
    assert gpu.gone == [True, True]


def test_what_is_no_failure_of_a_capture_is_raised(gpu):
    replays, calls = Replays(), count()

    def run(given):
        if next(calls):
            raise KeyboardInterrupt
        return [given]

    with pytest.raises(KeyboardInterrupt):
        replays.capture(run, [torch.ones(2)])
    assert gpu.done[-1] == "end" and not replays.recording and gc.isenabled()


def test_a_transport_is_not_held_by_its_replays():
    wires = Wired()
    replays, gone = Replays(wires), weakref.ref(wires)
    replays.look_at_memory()
    assert replays._memory == 1
    del wires
    assert gone() is None
    replays.look_at_memory()


def test_calls_that_are_compared_every_time_are_replayed_as_well():
    ring, replays = make_ring()
    ring.compares_every_call = True
    for seed in range(BEFORE + 2):
        assert_right(ring, seed)
    assert (replays.captures, replays.replayed) == (2, 2)
