"""The tuning command's own machinery; what it times needs a GPU."""

from __future__ import annotations

import os
import time
from itertools import product

import pytest

pytest.importorskip("triton")

from ring_attn.bench.tune import GATE_DOCUMENTS, GATE_ROWS, TuneOptions, main, timed_apart
from ring_attn.bench.tune_candidates import LAUNCHES, candidates
from ring_attn.bench.tune_report import Timed, brief, report
from ring_attn.kernels.triton_ahead import Resources
from ring_attn.kernels.triton_blocks import Config

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
    wanted = [GOOD, BROKEN, BROKEN, GOOD, HANGING, GOOD]
    found = list(timed_apart(worker, "dq", wanted, TuneOptions(patience=4.0)))
    assert [config for config, _ in found] == wanted
    ended, hung = ({}, "its process ended with status 7"), ({}, "hung for 4 s")
    fine = ({"dq": 1.0}, "")
    assert [result for _, result in found] == [fine, ended, ended, fine, hung, fine]


def test_the_report_puts_the_best_first_and_writes_it_as_it_is_made():
    options = TuneOptions(cases=("full:16384", "causal:16384"))
    taken = Resources(128, 8, 0, 65536, True, 4)
    timed = {
        launch: [Timed(launch, GOOD, taken, {"full:16384": 100.0, "causal:16384": 50.0})] for launch in ("forward", *LAUNCHES)
    }
    timed["forward"].append(Timed("forward", Config(64, 64, 4, 2, tma=True), taken, dict.fromkeys(options.cases, 200.0)))
    timed["dq"].append(Timed("dq", BROKEN, None, {}, "wrong under causal"))
    lines = report([row for rows in timed.values() for row in rows], options).splitlines()
    forward = next(i for i, line in enumerate(lines) if line.startswith("forward"))
    assert "Config(64, 64, 4, 2, tma=True)" in lines[forward + 1]
    assert "serialized" in lines[forward + 1]
    assert any("wrong under causal" in line for line in lines)
    assert any("forward=Config(64, 64, 4, 2, tma=True), dkdv=Config(16, 16, 4, 1)" in line for line in lines)


@pytest.mark.parametrize(("launch", "head_dim"), list(product(LAUNCHES, (64, 128))))
def test_candidates_differ_and_are_written_as_they_are_made(launch, head_dim):
    found = candidates(launch, head_dim)
    assert len(set(found)) == len(found) > 2
    assert [eval(brief(config), {"Config": Config}) for config in found] == found


def test_the_documents_of_the_check_fill_its_length():
    assert sum(GATE_DOCUMENTS) == GATE_ROWS


def test_says_what_it_needs(capsys):
    assert main(["--head-dim", "80"]) == 2
    assert capsys.readouterr().out.startswith(("ring-attn bench tune times GPU kernels", "there are no candidates"))
