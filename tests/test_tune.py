"""The tuning command's own machinery; what it times needs a GPU."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from ring_attn.bench import tune
from ring_attn.bench.kernels import Visit
from ring_attn.bench.results import software
from ring_attn.bench.tune import GATE_DOCUMENTS, GATE_ROWS, TuneOptions, calls, main, scored, timed_apart
from ring_attn.bench.tune_candidates import LAUNCHES, candidates
from ring_attn.bench.tune_report import Timed, brief, report
from ring_attn.kernels import Upstream
from ring_attn.kernels.triton_ahead import Resources
from ring_attn.kernels.triton_blocks import Config
from ring_attn.kernels.triton_kernel import interpreted
from ring_attn.mask import Causal
from ring_attn.tiles import tiles
from tests.support import rel_error

GOOD, BROKEN, HANGING = Config(16, 16, 4, 1), Config(16, 32, 4, 1), Config(16, 64, 4, 1)


def worker(to, launch, wanted, options):
    """Ends at a broken candidate and hangs at a hanging one."""
    for config in wanted:
        if config == BROKEN:
            os._exit(7)
        if config == HANGING:
            time.sleep(60)
        to.send(({launch: 1.0}, ""))


def test_a_candidate_that_breaks_or_hangs_costs_its_own_row_only():
    wanted = [GOOD, BROKEN, BROKEN, GOOD, HANGING, GOOD, HANGING]
    found = list(timed_apart(worker, "dq", wanted, TuneOptions(patience=4.0)))
    ended, hung = ({}, "its process ended with status 7"), ({}, "hung for 4 s")
    fine = ({"dq": 1.0}, "")
    assert found == [(GOOD, fine), (BROKEN, ended), (GOOD, fine), (HANGING, hung), (GOOD, fine)]


def test_the_best_of_all_rounds_counts_and_one_that_fails_in_any_is_out(monkeypatch):
    rounds = [(GOOD, ({"causal": 5.0}, "")), (BROKEN, ({"causal": 9.0}, "")), (GOOD, ({"causal": 7.0}, ""))]
    rounds += [(BROKEN, ({}, "wrong under full")), (GOOD, ({"causal": 6.0}, "")), (BROKEN, ({"causal": 9.0}, ""))]
    taken = Resources(128, 0, 0, 0, False, 0)
    monkeypatch.setattr(tune, "compile_all", lambda wanted, options: dict.fromkeys(wanted, taken))
    monkeypatch.setattr(tune, "timed_apart", lambda *given: iter(rounds))
    found = tune.tune([("dq", GOOD), ("dq", BROKEN)], TuneOptions(cases=("causal",)))
    assert [(row.config, row.tflops, row.why_not) for row in found] == [
        (GOOD, {"causal": 7.0}, ""),
        (BROKEN, {}, "wrong under full"),
    ]


def test_the_report_puts_the_best_first_and_writes_it_as_it_is_made():
    options = TuneOptions(cases=("full:16384", "causal:16384"))
    taken = Resources(128, 8, 0, 65536, True, 4)
    timed = {
        launch: [Timed(launch, GOOD, taken, {"full:16384": 100.0, "causal:16384": 50.0})] for launch in ("forward", *LAUNCHES)
    }
    timed["forward"].append(Timed("forward", Config(64, 64, 4, 2, tma=True), taken, dict.fromkeys(options.cases, 200.0)))
    timed["dq"].append(Timed("dq", BROKEN, None, {}, "wrong under causal"))
    lines = report([row for rows in timed.values() for row in rows], options).splitlines()
    assert lines[0].startswith(f"{software()}, bfloat16, ")
    forward = next(i for i, line in enumerate(lines) if line.startswith("forward"))
    assert "Config(64, 64, 4, 2, tma=True)" in lines[forward + 1]
    assert "serialized" in lines[forward + 1]
    assert any("wrong under causal" in line for line in lines)
    assert any("forward=Config(64, 64, 4, 2, tma=True), dkdv=Config(16, 16, 4, 1)" in line for line in lines)


@pytest.mark.parametrize(("launch", "head_dim", "score"), list(product(LAUNCHES, (64, 128), ("", "softcap"))))
def test_candidates_differ_and_are_written_as_they_are_made(launch, head_dim, score):
    found = candidates(launch, head_dim, score)
    assert len(set(found)) == len(found) > 2
    assert [eval(brief(config), {"Config": Config}) for config in found] == found


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("score", ["", "softcap", "alibi"])
def test_launches_are_right_with_and_without_a_modifier(score):
    """What is timed, against the dense softmax that the check goes by."""
    gen, rows = torch.Generator().manual_seed(0), range(40)
    q, k, v, dout = (torch.randn(1, 40, h, 16, generator=gen) for h in (4, 2, 2, 4))
    visit = scored(Visit(q, 8 * k, v, dout, tiles((rows,), [(rows,)], Causal()), 0.5), score)
    up = Upstream(dout, torch.full_like(q, torch.nan), torch.empty(1, 4, 40))
    grads = {launch: visit.grads() for launch in LAUNCHES}
    for launch, into in grads.items():
        for call in calls(launch, GOOD, visit, up, into):
            call()
    exact, found = visit.dense(torch.float64), [up.out]
    found += *grads["dq"].q.sum.total, *grads["dkdv"].kv.sum.total
    assert [rel_error(x, ref) < 1e-5 for x, ref in zip(found, exact, strict=True)] == [True] * 4
    assert not score or rel_error(exact[0], replace(visit, score=None).dense(torch.float64)[0]) > 1e-3


def test_the_documents_of_the_check_fill_its_length():
    assert sum(GATE_DOCUMENTS) == GATE_ROWS


def test_says_what_it_needs(capsys):
    assert main(["--head-dim", "80"]) == 2
    assert capsys.readouterr().err.startswith(("ring-attn bench tune times GPU kernels", "there are no candidates"))
