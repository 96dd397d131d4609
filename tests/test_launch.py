"""launch/train.sh starts a number of processes that the demo can use, whatever the machine; python itself is a stub here.

And launch/test.sh finds every test.
"""

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUB = '#!/bin/sh\ncase "$*" in *device_count*) echo "$GPUS" ;; *torch.distributed.run*) echo "$@" ;; esac\n'


def launched(tmp_path: Path, *args: str, gpus: int, **variables: str) -> str:
    """What train.sh hands to python on a machine with this many GPUs."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(STUB)
    python.chmod(0o755)
    (tmp_path / "installed").touch()
    variables |= {"VENV": str(tmp_path), "PYTHON": sys.executable, "GPUS": str(gpus)}
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"} | variables
    script = [str(ROOT / "launch" / "train.sh"), *args]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("gpus", "nproc", "processes"),
    [(0, "", 2), (1, "", 1), (2, "", 2), (3, "", 2), (4, "", 4), (8, "", 4), (8, "8", 8), (3, "3", 3)],
)
def test_processes_fit_the_demo(tmp_path, gpus, nproc, processes):
    line = launched(tmp_path, gpus=gpus, **({"NPROC": nproc} if nproc else {}))
    simulated = " --ring.simulated 2" if processes == 1 else ""
    assert line.endswith(f"--nproc-per-node {processes} -m ring_attn train configs/demo.toml{simulated}")


def test_arguments_go_through(tmp_path):
    line = launched(tmp_path, "configs/gpu.toml", "--optim.lr", "1e-3", gpus=2)
    assert line.endswith("--nproc-per-node 2 -m ring_attn train configs/gpu.toml --optim.lr 1e-3")


def test_every_folder_of_tests_is_searched(request):
    tests, passed_over = ROOT / "tests", request.config.getini("norecursedirs")
    folders = {folder for file in tests.rglob("test_*.py") for folder in file.relative_to(tests).parent.parts}
    assert "dist" in folders and not [x for x in folders if any(fnmatch(x, pattern) for pattern in passed_over)]
