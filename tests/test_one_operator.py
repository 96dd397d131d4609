"""A call is one operator to whatever watches operators, and none where nothing does: it would take the host as long again."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ring_attn as ra
from ring_attn import attention, watched
from tests.support import random_qkv

RING = ra.Ring.simulated(2)
FORWARD, BACKWARD = torch.ops.ring_attn.forward.default, torch.ops.ring_attn.backward.default


@pytest.fixture
def made(monkeypatch):
    """The operators made, in order."""
    names = []
    for name in ("_forward_op", "_backward_op"):
        op = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *x, name=name, op=op: names.append(name) or op(*x))
    return names


def inputs():
    q, k, v, dout = random_qkv(1, 16, 16, 2, 1, 4, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v)], dout


def gradients(qkv, dout, **options):
    return torch.autograd.grad(ra.ring_attention(*qkv, ring=RING), qkv, dout, **options)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A tensor with operators of its own."""


def test_nothing_watches(made):
    qkv, dout = inputs()
    gradients(qkv, dout)
    gradients([torch.nn.Parameter(x.detach()) for x in qkv], dout)
    with torch.no_grad():
        ra.ring_attention(*qkv, ring=RING)
    assert made == []


def test_a_gradient_that_is_to_be_differentiated(made):
    """Which the operator refuses."""
    gradients(*inputs(), create_graph=True)
    assert made == ["_backward_op"]


def test_a_mode_sees_one_operator_each_way(made):
    with Seen() as seen:
        gradients(*inputs())
    assert made == ["_forward_op", "_backward_op"]
    assert [function for function in seen.functions if function.namespace == "ring_attn"] == [FORWARD, BACKWARD]
    assert not any("softmax" in str(function) or "exp" in str(function) for function in seen.functions)


def test_a_profiler_sees_them_by_name(made):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(*inputs())
    assert {"ring_attn::forward", "ring_attn::backward"} <= {event.name for event in profile.events()}


def test_a_compiler_that_has_left_the_frame_to_python(made, monkeypatch):
    monkeypatch.setattr(watched, "_callback", lambda: "of Dynamo")
    gradients(*inputs())
    assert made == ["_forward_op", "_backward_op"]


def test_a_compiler_s_callback_is_seen():
    """Between its graphs."""
    seen = []

    @torch.compile(backend="eager")
    def broken(x):
        torch._dynamo.graph_break()
        seen.append(watched._callback())
        return x + 1

    broken(torch.ones(2))
    assert watched._callback() is None
    assert seen and None not in seen


def test_a_tensor_of_another_class(made):
    (q, k, v), _ = inputs()
    ra.ring_attention(q.detach().as_subclass(Own), k.detach(), v.detach(), ring=RING)
    assert made == ["_forward_op"]


def test_a_transform_of_functions(made):
    (q, k, v), _ = inputs()
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda q: ra.ring_attention(q, k.detach(), v.detach(), ring=RING))(q.detach().unsqueeze(0))
    assert made == ["_forward_op"], "which knows that it has no rule for that"


@pytest.mark.parametrize(("kept", "runs"), [([FORWARD], 1), ([], 2)])
def test_checkpointing_by_a_policy_keeps_what_it_is_told_to(kept, runs, monkeypatch):
    ran, forward = [], attention._forward
    monkeypatch.setattr(attention, "_forward", lambda *x: ran.append(None) or forward(*x))
    qkv, dout = inputs()
    wanted = gradients(qkv, dout)
    del ran[:]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    attend = lambda *x: ra.ring_attention(*x, ring=RING) * 1.0  # noqa: E731
    out = checkpoint(attend, *qkv, use_reentrant=False, context_fn=contexts)
    found = torch.autograd.grad(out, qkv, dout)
    assert len(ran) == runs
    assert all(map(torch.equal, found, wanted))
