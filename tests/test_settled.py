"""What a call comes to: whether it may be replayed, whether its forward is brief, and that kernels are chosen by that."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ring_attn as ra
from ring_attn import settled
from ring_attn.call import Call
from ring_attn.comm.local import LocalTransport
from ring_attn.comm.replay import Replays


def settle(device="cuda", batch=1, rows=2048, heads=32, kernel="auto", exchange="ring", replay=True, replays=None):
    """A causal call of a ring of four in one process, each rank with so many rows; its tensors have no memory."""
    transport = LocalTransport(4)
    transport.replays = replays
    ring = ra.Ring(transport, kernel=kernel, exchange=exchange, replay=replay)
    with FakeTensorMode():
        q, k, v = (torch.empty(batch, 4 * rows, h, 128, dtype=torch.bfloat16, device=device) for h in (heads, 8, 8))
        return Call.make(ring, ra.Causal(), None, 1.0).settle(q, k, v)


@pytest.mark.parametrize(
    ("change", "brief"),
    [
        # A rank attends a quarter of half the square of 8,192: at 4 * 32 * 128 operations a cell and 580 TFLOP/s 237 us.
        ({}, True),
        ({"heads": 80}, True),
        ({"heads": 88}, False),
        ({"batch": 2}, True),
        ({"batch": 3}, False),
        ({"rows": 4096}, False),
        ({"device": "cpu"}, False),
        ({"kernel": "triton"}, False),
    ],
)
def test_a_forward_is_brief_by_all_that_a_rank_attends(change, brief):
    assert settle(**change).problem.brief == brief


@pytest.mark.parametrize(("replay", "device", "replayed"), [(True, "cuda", True), (False, "cuda", False), (True, "cpu", False)])
def test_what_is_replayed_is_not_brief_for_a_host(replay, device, replayed):
    settled = settle(device=device, exchange="pull", replay=replay, replays=Replays())
    assert (settled.replays is not None) == replayed
    assert settled.problem.brief == (device == "cuda" and not replayed)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "pull"),
        ({"mask": ra.Causal() & ra.MaskMod(lambda b, h, q, k: q != k)}, "gather"),
        ({"score": ra.ScoreMod(lambda s, b, h, q, k: s)}, "gather"),
    ],
    ids=["alike", "mask", "score"],
)
def test_few_rows_go_by_copy_engines_where_that_may_be_replayed(changed, expected):
    """Whether or not this rank replays its own."""
    for replay in (True, False):
        transport = LocalTransport(4)
        transport.link, transport.replays = "symmetric", Replays()
        with FakeTensorMode():
            q, k, v = (torch.empty(1, 4 * 128, h, 128, dtype=torch.bfloat16, device="cuda") for h in (32, 8, 8))
            of_call = {"mask": ra.Causal(), "score": None} | changed
            settled = Call.make(ra.Ring(transport, replay=replay), *of_call.values(), 1.0).settle(q, k, v)
        assert settled.exchange.name == expected
        assert (settled.replays is not None) == (replay and expected == "pull")


def test_kernels_are_chosen_by_it(monkeypatch):
    asked = []
    monkeypatch.setattr(settled, "resolve", lambda name, problem: asked.append(problem))
    settle().kernel("forward")
    settle(rows=4096).kernel("forward")
    assert [problem.brief for problem in asked] == [True, False]
