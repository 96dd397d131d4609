"""Which kernel a problem gets, what is said about it, and that naming a kernel costs no optional package."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from ring_attn import kernels
from ring_attn.kernels import KERNEL_NAMES, KernelUnavailable, Problem, check_kernel_name, get_kernel, order, resolve

NAMES = [name for name in KERNEL_NAMES if name != "auto"]
# Where nothing was measured; devices without a line here have the reference only.
FIXED = {
    ("cuda", "forward"): ["flash4", "cudnn", "gluon", "triton", "flash2", "aten", "reference"],
    ("cuda", "backward"): ["flash4", "cudnn", "flash2", "triton", "aten", "reference"],
    ("cpu", "forward"): ["aten", "reference"],
    ("cpu", "backward"): ["aten", "reference"],
    ("mps", "forward"): ["reference"],
    ("mps", "backward"): ["reference"],
}


@dataclass
class Stub:
    """A kernel that refuses for the reason given."""

    name: str
    reason: str | None

    def supports(self, problem: Problem) -> str | None:
        return self.reason


@pytest.fixture(autouse=True)
def _nothing_remembered():
    resolve.cache_clear()
    order._entries.cache_clear()
    yield
    resolve.cache_clear()
    order._entries.cache_clear()


@pytest.fixture
def capability(monkeypatch):
    """A function after which this machine has a GPU of a compute capability, or none."""

    def install(major_minor):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: major_minor is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: major_minor)

    return install


@pytest.fixture
def refusing(monkeypatch):
    """A function after which the kernels named refuse everything, as "NAME has a cold", and all others do everything."""

    def install(names):
        stubs = {name: Stub(name, f"{name} has a cold" if name in names else None) for name in NAMES}
        monkeypatch.setattr(kernels, "get_kernel", stubs.__getitem__)

    return install


def problem(device="cpu", direction="forward", **change):
    fields = {"dtype": torch.float32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "v_head_dim": 16}
    return Problem(direction, device, **(fields | change))


def messages(caplog):
    assert all(record.name == "ring_attn" and record.levelno == logging.INFO for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(("device", "direction"), FIXED)
def test_auto_takes_the_first_that_can_and_says_why_not_the_others(device, direction, refusing, capability, caplog):
    caplog.set_level(logging.INFO, "ring_attn")
    capability(None)
    names = FIXED[device, direction]
    for refused, chosen in enumerate(names):
        refusing(names[:refused])
        resolve.cache_clear()
        caplog.clear()
        assert resolve("auto", problem(device, direction)).name == chosen
        reasons = "".join(f"; not {name}: {name} has a cold" for name in names[:refused])
        assert messages(caplog) == [f"{direction} kernel: {chosen}{reasons}"]
    refusing(names)
    resolve.cache_clear()
    everything = "; ".join(f"{name}: {name} has a cold" for name in names)
    with pytest.raises(KernelUnavailable, match=f"^no kernel can do this: {re.escape(everything)}$"):
        resolve("auto", problem(device, direction))


def entry(*order, direction="forward", mask="causal", head_dim=128, length=4096):
    return {"direction": direction, "mask": mask, "head_dim": head_dim, "length": length, "order": list(order)}


MEASURED = {
    "8.6": [
        entry("triton", "flash2", "aten"),
        entry("flash2", "triton", length=16384),
        entry("aten", "cudnn", head_dim=64),
        entry("cudnn", "aten", direction="backward"),
        entry("cudnn", "flash2", mask="documents"),
        entry("flex", "cudnn", "triton", mask="full"),  # flex is taken by name alone
        entry("gluon", "cudnn", mask="full", length=1 << 20),
    ]
}


@pytest.mark.parametrize(
    ("major_minor", "change", "expected"),
    [
        ((8, 6), {}, ["triton", "flash2", "aten", "flash4", "cudnn", "gluon", "reference"]),
        ((8, 6), {"rows": 8191}, ["triton", "flash2"]),
        ((8, 6), {"rows": 8193}, ["flash2", "triton"]),
        ((8, 6), {"rows": 1 << 20}, ["flash2", "triton"]),
        ((8, 6), {"head_dim": 48, "rows": 16384}, ["aten", "cudnn", "flash4", "gluon", "triton"]),
        ((8, 6), {"direction": "backward"}, ["cudnn", "aten", "flash4", "flash2", "triton"]),
        ((8, 6), {"kind": "full"}, ["cudnn", "triton"]),
        ((8, 6), {"kind": "window", "brief": True}, ["gluon", "flash4", "cudnn", "triton", "flash2", "aten", "reference"]),
        ((8, 6), {"brief": True}, ["triton", "flash2", "aten", "flash4", "cudnn", "gluon", "reference"]),
        ((8, 6), {"rows": 16384, "brief": True}, ["flash2", "triton", "flash4", "cudnn", "gluon"]),
        ((8, 6), {"kind": "full", "brief": True}, ["cudnn", "triton", "flash4", "gluon"]),
        ((8, 6), {"kind": "full", "rows": 1 << 20, "brief": True}, ["gluon", "cudnn", "flash4", "triton"]),
        ((8, 6), {"brief": True, "direction": "backward"}, ["cudnn", "aten", "flash4", "flash2", "triton"]),
        (None, {"brief": True, "device": "cpu"}, FIXED["cpu", "forward"]),
        ((8, 6), {"kind": "documents"}, ["flash2", "flash4", "gluon", "triton", "aten", "cudnn", "reference"]),  # see order_for
        ((8, 6), {"kind": "window"}, FIXED["cuda", "forward"]),
        ((8, 9), {}, FIXED["cuda", "forward"]),
        (None, {}, FIXED["cuda", "forward"]),
        ((8, 6), {"device": "cpu"}, FIXED["cpu", "forward"]),
    ],
)
def test_order_on_a_gpu_is_that_of_the_nearest_measurement(
    major_minor, change, expected, refusing, capability, tmp_path, monkeypatch
):
    (tmp_path / "measured.json").write_text(json.dumps(MEASURED))
    monkeypatch.setattr(order, "MEASURED", tmp_path / "measured.json")
    capability(major_minor)
    request = problem(**({"device": "cuda", "head_dim": 128, "rows": 4096} | change))
    for refused, chosen in enumerate(expected):
        refusing(expected[:refused])
        resolve.cache_clear()
        assert resolve("auto", request).name == chosen


def test_the_table_of_measurements_names_what_there_is():
    table = json.loads(order.MEASURED.read_text())
    entries = [e for capability in table.values() for e in capability]
    assert entries
    for e in entries:
        assert e["direction"] in ("forward", "backward")
        assert e["mask"] in ("full", "causal", "window", "documents")
        assert set(e["order"]) < set(NAMES)
        assert len(set(e["order"])) == len(e["order"]) > 0


@pytest.mark.parametrize(("direction", "chosen"), [("forward", "triton"), ("backward", "flash2")])
def test_a_pair_is_a_kernel_for_each_direction(direction, chosen, refusing):
    refusing([])
    assert resolve("triton+flash2", problem(direction=direction)).name == chosen
    refusing([chosen])
    resolve.cache_clear()
    with pytest.raises(KernelUnavailable, match=f"kernel '{chosen}' cannot do this {direction}"):
        resolve("triton+flash2", problem(direction=direction))


@pytest.mark.parametrize(
    ("name", "part"),
    [("tritn", "tritn"), ("auto+aten", "auto"), ("aten+", ""), ("+aten", ""), ("aten+triton+aten", "triton+aten")],
)
def test_a_name_that_is_neither_a_kernel_nor_a_pair(name, part):
    names = re.escape(", ".join(KERNEL_NAMES))
    with pytest.raises(
        ValueError, match=f"^kernel '{re.escape(part)}' is not one of {names}, nor a pair such as triton\\+flash2$"
    ):
        check_kernel_name(name)


@pytest.mark.parametrize("name", [*KERNEL_NAMES, "triton+flash2", "aten+aten"])
def test_a_name_that_is_a_kernel_or_a_pair(name):
    check_kernel_name(name)


def test_a_choice_is_logged_once_for_a_problem(refusing, caplog):
    caplog.set_level(logging.INFO, "ring_attn")
    refusing(["aten"])
    for change in ({}, {}, {"head_dim": 8}, {}, {"head_dim": 8}, {"direction": "backward"}):
        resolve("auto", problem(**change))
    assert [message.split(" ")[0] for message in messages(caplog)] == ["forward", "forward", "backward"]


def test_a_named_kernel_is_no_choice_and_not_logged(refusing, caplog):
    caplog.set_level(logging.INFO, "ring_attn")
    refusing([])
    assert [resolve(name, problem()).name for name in NAMES] == NAMES
    assert messages(caplog) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_named_kernel_that_cannot_says_why(name, refusing):
    refusing([name])
    with pytest.raises(KernelUnavailable) as caught:
        resolve(name, problem(direction="backward"))
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, NotImplementedError)
    expected = f"kernel '{name}' cannot do this backward: {name} has a cold; kernel='auto' picks one that can"
    assert str(caught.value) == expected


@pytest.mark.parametrize("name", ["tritn", "", "Reference", "flash"])
def test_an_unknown_name_lists_the_names(name):
    names = ", ".join(KERNEL_NAMES)
    with pytest.raises(ValueError, match=f"^kernel '{name}' is not one of {names}$") as caught:
        resolve(name, problem())
    assert not isinstance(caught.value, KernelUnavailable)


def test_auto_is_no_kernel():
    with pytest.raises(ValueError, match="'auto' is not one of"):
        get_kernel("auto")


@pytest.mark.parametrize(
    ("change", "chosen", "message"),
    [
        ({}, "aten", "forward kernel: aten"),
        ({"v_head_dim": 8}, "reference", "forward kernel: reference; not aten: it needs v_head_dim = head_dim, not 8 and 16"),
        ({"lse_grad": True}, "aten", "forward kernel: aten"),
        (
            {"lse_grad": True, "direction": "backward"},
            "reference",
            "backward kernel: reference; not aten: its backward recomputes delta from out and dout",
        ),
    ],
)
def test_the_kernels_themselves_on_the_cpu(change, chosen, message, caplog):
    caplog.set_level(logging.INFO, "ring_attn")
    assert resolve("auto", problem(**change)) is get_kernel(chosen)
    assert len(caplog.records) == 1
    assert messages(caplog)[0].startswith(message)


def test_every_name_resolves_without_an_optional_package():
    """None in sys.modules is how Python spells a package that is not there."""
    program = f"""
import sys
sys.modules["triton"] = sys.modules["flash_attn"] = None
import torch
from ring_attn.kernels import Problem, get_kernel
for name in {NAMES}:
    kernel = get_kernel(name)
    print(kernel.name, kernel.supports(Problem("forward", "cuda", torch.float16, 2, 1, 16, 16)), sep="|")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reasons = dict(line.split("|") for line in done.stdout.splitlines())
    assert list(reasons) == NAMES
    assert reasons["triton"] == "triton is not installed"
    assert reasons["flex"] == "triton is not installed"
    assert reasons["flash2"] == "flash_attn is not installed"
    assert reasons["reference"] == "None"
