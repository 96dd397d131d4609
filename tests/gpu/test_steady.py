"""tests/gpu/steady.py runs where there is no GPU, and counts what GPUs did."""

import re
import sys
import time

import pytest
import torch

import ring_attn as ra
from ring_attn.bench.contenders import Silent
from tests.gpu import steady

SMI = """#!/bin/sh
printf '0, 500.0, 1980, 0x0000000000000000\\n1, 690.5, 1500, 0x0000000000000004\\n'
printf '0, 697.0, 1605, 0x0000000000000004\\n1, 689.5, 1600, 0x0000000000000004\\n'
printf 'no such field\\n0, [N/A], 1505, 0x0\\nno such field\\n'
printf '0, 695.0, 1505, 0x0000000000000000\\n1, 12'
touch "$0.done"
exec sleep 60
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="by libraries that take other head dims and lengths")
def test_it_prints_the_speed_of_every_call(monkeypatch, capsys):
    words = "steady --length 64 --calls 3 --heads 4 --kv-heads 2 --dim 8 --parts 2"
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr(steady, "REST", 0.0)
    rings, tflops, ring_attention, speeds = {}, [], ra.ring_attention, steady.speeds

    def watched(q, k, v, *, ring):
        rings[id(ring)] = ring
        return ring_attention(q, k, v, ring=ring)

    monkeypatch.setattr(ra, "ring_attention", watched)
    monkeypatch.setattr(steady, "speeds", lambda run, tflop, *rest: tflops.append(tflop) or speeds(run, tflop, *rest))
    steady.main()
    assert [isinstance(ring.transport, Silent) for ring in rings.values()] == [False, True]
    assert [settled.head_parts for ring in rings.values() for settled in ring.settled.values()] == [2, 2]
    # Scores and outputs of 64 * 65 / 2 cells, once forward and two and a half times backward, 2 operations a product, 4 heads.
    assert tflops == pytest.approx([2 * 64 * 65 / 2 * 3.5 * 2 * 8 * 4 / 1e12] * 2)
    lines = [re.match(r"(.+): ((\S+ ){3})TFLOP/s$", line) for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ["pull", "without communication"]
    assert all(float(number) > 0 for line in lines for number in line[2].split())


def test_it_counts_kernels_waits_and_copies_of_the_last_two_thirds():
    a_call = [
        (3e3, 12e3, "flash_fwd_sm90"),
        (14e3, 32e3, "flash_bwd_sm90"),
        (27e3, 30e3, "sum_kernel beside it"),
        (33e3, 35e3, "Memcpy PtoP"),
        (36e3, 62e3, "flash_bwd_sm90"),
    ]
    # The first of three calls is slower, and its last copy late.
    events = [(1.5 * start - 90e3, 1.5 * stop - 90e3, name) for start, stop, name in a_call] + [(2e3, 2.5e3, "Memcpy PtoP")]
    events += [(start + n * 62e3, stop + n * 62e3, name) for n in range(2) for start, stop, name in a_call]
    assert steady.account((steady.Event(*event) for event in reversed(events)), 3) == (
        "60.50 ms a call: attention backward 44.00, attention forward 9.00, other kernels 3.00, copies 2.00; "
        "waits before attention backward 6.00, attention forward 1.50"
    )
    one_behind_another = [steady.Event(0.0, 10e3, "sum_kernel"), steady.Event(10e3, 30e3, "sum_kernel")]
    assert steady.account(one_behind_another, 2) == "15.00 ms a call: other kernels 15.00; waits before none"


def test_it_says_nothing_of_calls_that_have_other_kernels():
    with_another = [steady.Event(start, start + 1.0, "sum_kernel") for start in (0.0, 1.0, 2.0)]
    assert steady.account(with_another, 2).startswith("3 kernels in 2 calls are not as many in each")
    assert steady.account([*with_another[:2], steady.Event(2.0, 3.0, "Memset (Device)")], 2).startswith("0.00 ms a call")


@pytest.mark.parametrize("words", ["--calls 0", "--parts 3", "--parts 0", "--parts -2"])
def test_it_names_calls_and_parts_that_cannot_be(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", f"steady --kv-heads 4 --length 64 --dim 8 {words}".split())
    monkeypatch.setattr(steady, "REST", 0.0)
    with pytest.raises(SystemExit):
        steady.main()
    assert "must be at least 1, and --parts" in capsys.readouterr().err


def test_it_reads_what_a_gpu_draws(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(SMI)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def run() -> None:
        end = time.monotonic() + 10
        while not (tmp_path / "nvidia-smi.done").exists() and time.monotonic() < end:
            time.sleep(0.01)

    others = ["no such field", "0, [N/A], 1505, 0x0"]
    assert steady.sampled(run) == ["GPU 0: 696 W, 1555 MHz, limits [0, 4]", "GPU 1: 690 W, 1550 MHz, limits [4]", *others]
