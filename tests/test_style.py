"""The repository passes its linter and formatter. `pre-commit install` runs the same before a commit."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


COMMANDS = {"check": ["check", "--output-format", "concise"], "format": ["format", "--check"]}


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("command", COMMANDS)
def test_ruff_finds_nothing(command):
    ruff = [sys.executable, "-m", "ruff", *COMMANDS[command], "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
