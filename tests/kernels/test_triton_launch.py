"""A launch made again is the one that Triton would make, and two that it would compile differently share nothing.

Needs no GPU: see tests/kernels/triton_launches.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def found_wrong(*arguments: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton_launches", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_second_launch_is_the_first_one_without_triton():
    assert found_wrong("again") == []


def test_what_triton_tells_apart_has_another_key():
    assert found_wrong("apart") == []


@pytest.mark.parametrize("left_out", ["alignment", "coarse alignment", "dtype", "strides", "functions", "tables", "types"])
def test_the_test_above_can_fail(left_out):
    assert found_wrong("apart", left_out)
