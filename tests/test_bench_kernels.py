"""`ring-attn bench kernels` without a GPU: what it asks, what it says that auto takes, and the order that it leaves."""

import json
from types import SimpleNamespace

import pytest
import torch

from ring_attn.bench import kernels, results
from ring_attn.bench.kernels import KernelBenchOptions
from ring_attn.bench.results import Row
from ring_attn.kernels import get_kernel
from ring_attn.mask import Causal
from ring_attn.tiles import tiles
from tests.support import random_qkv

LENGTHS = 2048, 8192
SPEEDS = {("triton", 2048): 300.0, ("flash4", 2048): 200.0, ("triton", 8192): 392.0, ("flash4", 8192): 400.0}


class Named:
    def __init__(self, name, reason=None):
        self.name, self.reason = name, reason

    def supports(self, problem):
        return self.reason if problem.direction == "backward" else None


@pytest.fixture
def measured(monkeypatch):
    """Options and rows of a bench whose kernels have these speeds and in which auto takes Triton."""
    asked = []
    monkeypatch.setattr(kernels, "gate", lambda *args: None)
    monkeypatch.setattr(kernels, "resolve", lambda name, problem: asked.append((name, problem)) or Named("triton"))
    monkeypatch.setattr(
        kernels,
        "measure",
        lambda ks, mask, n, direction, options: [Row(k.name, direction, mask, n, 1.0, SPEEDS[k.name, n], 0.0) for k in ks],
    )
    for module in (results, kernels):
        monkeypatch.setattr(module, "machine", lambda: "a GPU")
    options = KernelBenchOptions(masks=("window",), lengths=LENGTHS, head_dim=64)
    rows = kernels.bench([Named("triton"), Named("flash4", "it has no backward")], "window", options)
    return SimpleNamespace(options=options, rows=rows, asked=asked)


def test_auto_is_asked_for_every_problem(measured):
    assert [(name, p.direction, p.kind, p.rows, p.left_bounded, p.head_dim) for name, p in measured.asked] == [
        ("auto", direction, "window", n, True, 64) for direction in ("forward", "backward") for n in LENGTHS
    ]
    assert [(row.kernel, row.length) for row in measured.rows if row.auto and row.direction == "forward"] == [
        ("triton", n) for n in LENGTHS
    ]


def test_the_table_says_what_auto_takes_and_how_near_the_fastest_it_is(measured):
    text = results.table(measured.rows, measured.options)
    forward, backward = (line.split() for line in text.splitlines() if "auto takes" in line)
    assert forward == ["auto", "takes", "triton", "(100)", "triton", "(", "98)"]
    assert backward == ["auto", "takes", "triton", "(100)", "triton", "(100)"]
    assert "flash4 window backward: it has no backward" in text


def test_a_kernel_of_which_no_graph_can_be_made_is_named_and_the_others_are_timed(monkeypatch):
    options = KernelBenchOptions(heads=4, kv_heads=2, head_dim=8, repeats=1)
    tensors, rows = random_qkv(1, 16, 16, 4, 2, 8), range(16)
    visit = kernels.Visit(*tensors, tiles((rows,), [(rows,)], Causal()), 0.3)
    monkeypatch.setattr(kernels.Visit, "random", lambda *args: visit)
    monkeypatch.setattr(kernels, "timed", lambda *args: ([1.0], 1 << 30))
    runs = []

    def captured(run):
        runs.append(run)
        if len(runs) % 2:
            raise RuntimeError("it synchronizes")
        return run, run()

    monkeypatch.setattr(kernels, "captured", captured)
    for direction in ("forward", "backward"):
        timed, refused = kernels.measure([get_kernel("aten"), get_kernel("reference")], "causal", 16, direction, options)
        assert (timed.kernel, timed.extra_gib, timed.why_not) == ("reference", 1.0, None) and timed.tflops > 0
        assert (refused.kernel, refused.tflops) == ("aten", None)
        assert refused.why_not == "no CUDA graph can be made of it: it synchronizes"


def test_what_auto_takes_and_was_not_timed_is_left_open(measured):
    others = [row for row in measured.rows if not row.auto]
    (line, _) = (line for line in results.table(others, measured.options).splitlines() if "auto takes" in line)
    assert line.split() == ["auto", "takes", "-", "-"]


def test_the_order_is_by_speed_and_replaces_what_was_measured_before(measured, monkeypatch, tmp_path):
    file = tmp_path / "measured.json"
    old = {"direction": "forward", "mask": "window", "head_dim": 64, "length": 512, "order": ["aten"]}
    file.write_text(json.dumps({"9.0": [old, old | {"head_dim": 128}], "8.0": [old]}))
    monkeypatch.setattr(results, "MEASURED", file)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    flex = Row("flex", "forward", "window", 2048, 1.0, 1000.0, 0.0)  # auto never takes it
    results.write_order([flex, *measured.rows], measured.options)
    found = json.loads(file.read_text())
    assert found["8.0"] == [old] and found["9.0"][0] == old | {"head_dim": 128}
    orders = {(e["direction"], e["length"]): e["order"] for e in found["9.0"][1:]}
    assert orders == {
        ("forward", 2048): ["triton", "flash4"],
        ("forward", 8192): ["flash4", "triton"],
        ("backward", 2048): ["triton"],
        ("backward", 8192): ["triton"],
    }
