"""The check that stands before the Gluon kernel, on kernels that are right, wrong and broken. Needs no GPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.metadata import version

import pytest
import torch

from ring_attn.kernels import Problem, get_kernel, gluon_check, gluon_kernel
from ring_attn.kernels.gluon_check import check_refusal, disagreement
from ring_attn.kernels.gluon_kernel import GluonKernel
from ring_attn.partial import finish

CPU, BF16, FP16 = torch.device("cpu"), torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Broken:
    """The reference kernel with one fault."""

    fault: str = ""
    name: str = "broken"

    def forward(self, q, k, v, tiles, *, scale, score=None, into=None, out=None):
        if self.fault == "raises":
            raise RuntimeError("ptxas\n  is unhappy")
        if self.fault == "drops what it carries":
            into = None
        if self.fault == "drops sinks" and into is not None and into.acc is None:
            into = None
        if self.fault == "drops the last key" and out is not None:
            tiles = tiles[:-1]
        if self.fault == "reads another KV head":
            k = k.flip(2)
        if self.fault == "ignores a softcap":
            score = None
        state = get_kernel("reference").forward(q, k, v, tiles, scale=scale, score=score, into=into)
        if out is not None:
            state = finish(state, torch.empty_like(out) if self.fault == "writes nothing" else out)
        if self.fault == "base 2":
            state.m.mul_(1.442695)
        if self.fault == "a wrong row" and out is not None:
            out[1, 633, 2] = out[1, 632, 2]
        return state


@pytest.fixture(autouse=True)
def _nothing_found(monkeypatch):
    monkeypatch.setattr(gluon_check, "_found", {})


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [64, 128])
def test_another_right_kernel_agrees(dtype, dim):
    assert disagreement(get_kernel("reference"), get_kernel("aten"), CPU, dtype, dim) is None
    assert disagreement(Broken(), get_kernel("reference"), CPU, dtype, dim) is None
    assert disagreement(Broken(), get_kernel("reference"), CPU, dtype, dim, softcap=True) is None


def test_a_softcap_is_checked_where_it_is_asked_for():
    assert disagreement(Broken("ignores a softcap"), get_kernel("reference"), CPU, FP16, 64) is None
    found = disagreement(Broken("ignores a softcap"), get_kernel("reference"), CPU, FP16, 64, softcap=True)
    assert found.startswith("it failed its check against reference in 1 visits: "), found


@pytest.mark.parametrize(
    "fault", ["drops what it carries", "drops sinks", "drops the last key", "reads another KV head", "base 2", "a wrong row"]
)
def test_a_wrong_kernel_does_not(fault):
    found = disagreement(Broken(fault), get_kernel("reference"), CPU, FP16, 64)
    assert found.startswith("it failed its check against reference in "), found


def test_outputs_that_are_not_written_are_not_taken_for_right():
    found = disagreement(Broken("writes nothing"), get_kernel("reference"), CPU, BF16, 64)
    assert found == (
        f"it failed its check against reference in 1 visits: {2 * 640 * 4 * 64} of {2 * 640 * 4 * 64} outputs and "
        f"0 of {2 * 640 * 4} log-sum-exps differ"
    )


def test_a_kernel_that_raises_is_refused_in_its_words():
    found = disagreement(Broken("raises"), get_kernel("reference"), CPU, BF16, 64)
    assert found == "it failed to run its check: RuntimeError: ptxas is unhappy"


def test_it_runs_once_and_says_so_once(caplog):
    caplog.set_level(logging.INFO, "ring_attn")
    refusals = [check_refusal(Broken("raises"), get_kernel("reference"), CPU, BF16, 64) for _ in range(2)]
    assert refusals == ["it failed to run its check: RuntimeError: ptxas is unhappy"] * 2
    assert check_refusal(Broken(), get_kernel("reference"), CPU, BF16, 64) is None
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"broken on cpu, torch.bfloat16, head dim 64: {refusals[0]}"),
        ("INFO", "broken on cpu, torch.bfloat16, head dim 64: agrees with reference"),
    ]


def test_it_does_not_run_while_a_graph_is_captured(monkeypatch):
    assert check_refusal(Broken(), get_kernel("reference"), CPU, BF16, 64) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert check_refusal(Broken(), get_kernel("reference"), CPU, BF16, 64) is None
    assert "while a CUDA graph is captured" in check_refusal(Broken(), get_kernel("reference"), CPU, FP16, 64)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert check_refusal(Broken(), get_kernel("reference"), CPU, FP16, 64) is None


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a Triton that is known and a GPU of compute capability 9.0, as far as `supports` asks."""
    monkeypatch.setattr(gluon_kernel, "version", lambda name: "3.6.0" if name == "triton" else version(name))
    monkeypatch.setattr(gluon_kernel, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def problem(**change):
    fields = {"dtype": BF16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "v_head_dim": 64}
    return Problem("forward", "cuda", **(fields | change))


def test_supports_asks_for_every_device_dtype_and_head_dim_once(hopper, monkeypatch):
    asked = []
    monkeypatch.setattr(gluon_check, "disagreement", lambda kernel, other, *key, softcap: asked.append((*key, softcap)))
    for _ in range(2):
        for change in ({}, {"dtype": FP16}, {"head_dim": 128, "v_head_dim": 128}, {"num_heads": 8}, {"score": ("softcap",)}):
            assert GluonKernel().supports(problem(**change)) is None
    device = torch.device("cuda", 3)
    plain = [(device, BF16, 64), (device, FP16, 64), (device, BF16, 128)]
    assert asked == [*((*key, False) for key in plain), (device, BF16, 64, True)]


def test_supports_refuses_what_fails_and_asks_only_when_nothing_else_refuses(hopper, monkeypatch):
    asked = []
    monkeypatch.setattr(gluon_check, "disagreement", lambda *key, softcap: asked.append(key) or "it fails")
    for change in (
        {"dtype": torch.float32},
        {"head_dim": 80},
        {"score": ("alibi",)},
        {"score": ("softcap",) * 2},
        {"predicate": "triton"},
    ):
        assert GluonKernel().supports(problem(**change)) not in (None, "it fails")
    assert not asked
    assert GluonKernel().supports(problem()) == "it fails"


def test_supports_asks_nothing_without_a_gpu(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gluon_check, "disagreement", lambda *key: pytest.fail("asked"))
    assert GluonKernel().supports(problem()) is None
