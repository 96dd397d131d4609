"""`ring-attn bench kernels` without a GPU: what it asks, what it says that auto takes, and the order that it leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
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
        lambda ks, mask, n, direction, options: [
            Row(k.name, direction, mask, n, 1.0, SPEEDS[k.name, n], n / 2**17) for k in ks
        ],
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


def test_the_table_has_the_memory_beside_each_speed(measured):
    rows = [*measured.rows, Row("cudnn", "forward", "window", 2048, 1.0, 30.0)]
    lines = [line.split() for line in results.table(rows, measured.options).splitlines()]
    assert ["triton", "300", "(100)", "0.016", "392", "(", "98)", "0.062"] in lines
    assert ["flash4", "200", "(", "67)", "0.016", "400", "(100)", "0.062"] in lines
    assert ["cudnn", "30", "(", "10)", "-"] in lines
    assert "GiB" in results.table(rows, measured.options).splitlines()[1]


def test_the_columns_of_the_table_stand_below_their_lengths(measured):
    lines = results.table(measured.rows, measured.options).splitlines()
    assert {len(line) for line in lines if line.startswith(("window ", "  "))} == {20 + 20 * len(LENGTHS)}


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


def install(folder: Path, **versions: str) -> None:
    """What importlib.metadata knows of installed distributions; there is nothing to import."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")


def repository(folder: Path, *files: Path) -> str:
    """The commit of these files, in a repository made there."""
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", *map(str, files)], ["commit", "-q", "--no-verify", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    return subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("kept", ["by its own tree", "beside another's files", "nowhere"])
def test_the_commit_is_that_of_the_package_wherever_one_stands(kept, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # of a hook that runs this
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    here, tree = tmp_path / "here", tmp_path / "tree"
    code = tree / "ring_attn" / "bench" / "results.py"
    for folder in (here, code.parent):
        folder.mkdir(parents=True)
    code.touch()
    monkeypatch.setattr(results, "__file__", str(code))
    install(tmp_path / "installed", ring_attn="9.8.7")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    repository(here)
    found = {"by its own tree": lambda: repository(tree, code), "beside another's files": lambda: repository(tree)}
    expected = found[kept]() if kept in found else ""
    monkeypatch.chdir(here)
    options = KernelBenchOptions(results=str(tmp_path / "rows.jsonl"))
    results.append([Row("triton", "forward", "full", 64)], options, "a GPU")
    (row,) = map(json.loads, Path(options.results).read_text().splitlines())
    assert row["commit"] == (expected if kept == "by its own tree" else "ring-attn 9.8.7")


def test_without_git_the_version_of_the_package_stands_for_the_commit(monkeypatch, tmp_path):
    install(tmp_path, ring_attn="9.8.7")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert results.commit() == "ring-attn 9.8.7"


def test_rows_and_table_have_the_versions_of_what_takes_part_which_is_not_imported(measured, monkeypatch, tmp_path):
    install(tmp_path, triton="3.9.1", flash_attn="2.7.6", flash_attn_4="4.0.0b99", yunchang="0.5")
    monkeypatch.syspath_prepend(tmp_path)
    options = KernelBenchOptions(results=str(tmp_path / "rows.jsonl"))
    before = set(sys.modules)
    results.append([Row("triton", "forward", "full", 64)], options, "a GPU", also=["yunchang", "ring-attention-nowhere"])
    assert set(sys.modules) == before
    (row,) = map(json.loads, Path(options.results).read_text().splitlines())
    versions = {"torch": torch.__version__, "triton": "3.9.1", "flash-attn": "2.7.6", "flash-attn-4": "4.0.0b99"}
    assert row.items() >= (versions | {"yunchang": "0.5", "machine": "a GPU", "kernel": "triton"}).items()
    assert "ring-attention-nowhere" not in row
    (head, *_) = results.table(measured.rows, measured.options).splitlines()
    assert f"torch {torch.__version__}, triton 3.9.1, flash-attn 2.7.6, flash-attn-4 4.0.0b99, bfloat16" in head
