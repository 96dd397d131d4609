"""Every launch of the Gluon kernel that ships compiles for sm_90, fits, and keeps its schedule in the machine code.

Needs no GPU. What is asked of the code is what its speed rests on: no spilled register inside a loop over blocks, products that
ptxas does not serialise, and the softmax of a block before the wait for the product in flight beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon")
import triton

from ring_attn.kernels.gluon_forward import config_for
from ring_attn.kernels.gluon_kernel import VERSIONS

pytestmark = pytest.mark.skipif(not triton.__version__.startswith(VERSIONS), reason="with this Triton the kernel is refused")
ROOT = Path(__file__).parents[2]
# "last" reads the carried state as well as normalising: no other launch takes more. "only" is the one without a ring.
REQUESTS = ("bfloat16:128:last", "float16:128:only", "bfloat16:64:last")
REQUESTS += ("bfloat16:128:last:softcap", "bfloat16:64:last:softcap")
SHARED = 227 * 1024
# Bytes, kept before the loops and read after them.
SPILLS = 192


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    """What each request takes; two processes share the work, without the interpreter that the other tests turn on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gluon_compile"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, *part], env=environment, cwd=ROOT, **pipes) for part in (REQUESTS[:2], REQUESTS[2:])]
    lines = []
    for run in runs:
        output, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
        lines += output.splitlines()
    return {taken["request"]: taken for taken in map(json.loads, lines)}


@pytest.mark.parametrize("request_name", REQUESTS)
def test_fits_and_overlaps(compiled, request_name):
    taken = compiled[request_name]
    assert taken["shared"] <= SHARED, taken
    assert taken["spills"] <= SPILLS, taken
    assert taken["loop_spills"] == 0, taken
    assert not taken["serialized"], taken
    config = config_for(int(request_name.split(":")[1]))
    if config.overlap:
        # Two loops, with and without a mask, of each consumer: a block of 64 x 128 scores is 64 exponentials a thread.
        assert len(taken["beside"]) == 2 * config.consumers, taken
        assert min(taken["beside"]) >= 64, taken
