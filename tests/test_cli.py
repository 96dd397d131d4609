"""The commands: what plan prints and draws is the plan, check finds a kernel that is wrong, train runs under torchrun."""

import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from ring_attn import cli
from ring_attn.bench import BENCHMARKS
from ring_attn.by_document import ByDocument
from ring_attn.exchange import EXCHANGES, make_plan
from ring_attn.kernels import get_kernel
from ring_attn.layout import LAYOUTS
from ring_attn.mask import Causal, Documents, Window
from ring_attn.plan_plot import paint
from ring_attn.plan_report import balance_of
from ring_attn.train.metrics import read
from tests.train.runs import write_text

CELLS = re.compile(r"rank (\d+) meets ([\d, ]+|nobody): +([\d,]+) cells in (\d+) tiles?")


def visits(text: str) -> list[tuple]:
    """(rank, sources, cells, tiles) of every visit that a report prints, in order."""
    found = CELLS.findall(text)
    sources = [() if s == "nobody" else tuple(map(int, s.split(", "))) for _, s, _, _ in found]
    return [(int(r), s, int(c.replace(",", "")), int(n)) for (r, _, c, n), s in zip(found, sources, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_plan_prints_every_visit_and_all_cells(capsys, layout, exchange):
    args = ["--layout", layout, "--exchange", exchange, "--ring-size", "4", "--seq-len", "64", "--mask", "causal"]
    assert cli.main(["plan", *args]) == 0
    found = visits(capsys.readouterr().out)
    assert sum(cells for _, _, cells, _ in found) == 64 * 65 // 2
    met = sorted((rank, source) for rank, sources, _, _ in found for source in sources)
    needed = [(rank, source) for rank in range(4) for source in range(4) if layout != "contiguous" or source <= rank]
    assert met == (needed if exchange == "pull" else [(rank, source) for rank in range(4) for source in range(4)])


def test_plan_counts_windows_and_documents(capsys):
    assert cli.main(["plan", "--ring-size", "2", "--seq-len", "32", "--window", "3", "--documents", "10,0,22"]) == 0
    found = visits(capsys.readouterr().out)
    assert sum(cells for _, _, cells, _ in found) == sum(min(i, 3) + 1 for n in (10, 22) for i in range(n))
    assert (
        cli.main(["plan", "--mask", "full", "--ring-size", "1", "--layout", "contiguous", "--seq-len", "9", "--window", "1"])
        == 0
    )
    assert [cells for _, _, cells, _ in visits(capsys.readouterr().out)] == [9 + 2 * 8]


def test_plan_makes_the_layout_by_document_for_the_documents(capsys):
    lengths = [40, 0, 3, 1, 20]
    args = ["--layout", "by-document", "--documents", ",".join(map(str, lengths)), "--ring-size", "2", "--seq-len", "64"]
    assert cli.main(["plan", *args, "--exchange", "auto", "--explain"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("by-document layout, causal mask, 5 documents, ")
    assert sum(cells for _, _, cells, _ in visits(text)) == sum(n * (n + 1) // 2 for n in lengths)
    for rank in range(2):
        held = ", ".join(f"{r.start}..{r.stop - 1}" for r in ByDocument(lengths)(64, 2).shard(rank))
        assert f"  rank {rank} holds {held}\n" in text
    assert "auto takes " in text


def test_plan_explains_with_the_links_between_and_inside_nodes_where_there_are_several(capsys):
    args = ["--explain", "--ring-size", "4", "--seq-len", "4096", "--machine", "nodes"]
    assert cli.main(["plan", *args, "--ranks-per-node", "2"]) == 0
    text = capsys.readouterr().out
    assert "  two-level between nodes moves 45 GB/s after 200 us; compute beside it takes 1.2 times as long\n" in text
    assert "  two-level inside nodes moves 345 GB/s after 30 us; compute beside it takes 1.04 times as long\n" in text
    assert cli.main(["plan", *args]) == 0
    assert "two-level" not in capsys.readouterr().out


def test_an_empty_word_is_no_file_to_draw_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "--seq-len", "64", "--plot", ""]) == 0
    assert "drawn" not in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["kernels", "dtypes"])
def test_a_check_of_nothing_is_refused(what, capsys):
    with pytest.raises(SystemExit):
        cli.main(["check", f"--{what}"])
    assert f"--{what} names nothing to check" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("exchange", ["ring", "gather", "auto"])
def test_plan_explains_of_what_the_steps_above_are(exchange, capsys):
    assert cli.main(["plan", "--explain", "--seq-len", "1024", "--machine", "gpus", "--exchange", exchange]) == 0
    ends = "auto takes gather" + ("; the steps above are those of ring" if exchange == "ring" else "") + "\n\n"
    assert ends in capsys.readouterr().out


def test_plan_names_steps_that_nobody_needs_and_the_kinds_of_tiles(capsys):
    args = ["--layout", "contiguous", "--ring-size", "4", "--seq-len", "64", "--window", "8"]
    assert cli.main(["plan", *args]) == 0
    text = capsys.readouterr().out
    assert "steps 2, 3 hold no allowed cell" in text
    assert re.search(r"band +rows 0\.\.15 x 0\.\.15: 108 cells, window \(8, 0\)", text)
    assert re.search(r"anticausal rows 0\.\.7 x 8\.\.15: 36 cells, window \(0, open\)", text)


def test_plan_shows_the_balance_of_the_layouts(capsys):
    def efficiency(layout):
        plan = make_plan(EXCHANGES["ring"], Causal(), LAYOUTS[layout](4096, 8))
        return balance_of(plan).efficiency

    assert efficiency("zigzag") > 0.99
    assert efficiency("striped") > 0.99
    assert efficiency("contiguous") == pytest.approx((7 * 8 / 2 + 8 / 2) / (8 * 7.5), rel=1e-2)
    assert cli.main(["plan", "--layout", "contiguous", "--ring-size", "8", "--seq-len", "4096"]) == 0
    text = capsys.readouterr().out
    assert f"efficiency {efficiency('contiguous'):.1%}" in text
    assert re.search(r"rank 7: +\d[\d,]+ cells, 1\.8\d\d of the mean", text)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seq-len", "63"], "seq_len 63 must be a multiple of 2 * ring_size = 8 for the zigzag layout"),
        (["--documents", "1,x"], "--documents takes whole numbers"),
        (["--layout", "by-document"], "--layout by-document is made for documents: give their lengths as --documents 100,200"),
        (
            ["--layout", "by-document", "--seq-len", "64", "--documents", "1,2"],
            "the documents of the by-document layout add up to 3 positions, but seq_len is 64",
        ),
        (["--seq-len", "64", "--documents", "1,2"], "the documents add up to 3 positions, but seq_len is 64"),
        (["--num-heads", "3", "--num-kv-heads", "2", "--explain"], "--num-heads 3 must be a multiple of --num-kv-heads 2"),
        (["--exchange", "post"], "exchange 'post' is not one of auto, ring, gather, pull, two-way, two-level"),
        (["--exchange", "two-level"], "the two-level exchange needs --ranks-per-node"),
        (["--exchange", "two-level", "--ranks-per-node", "3"], "--ranks-per-node 3 must divide --ring-size 4"),
        (["--ranks-per-node", "2"], "--ranks-per-node is for the two-level exchange and for --explain, not for ring"),
        (["--window", "-1"], "Window left must be at least 0"),
        (["--seq-len", "0"], "--seq-len must be at least 1, got 0"),
        (["--max-tiles", "-1"], "--max-tiles must be at least 0, got -1"),
        (["--seq-len", "64", "--plot", "no/such/folder/plan.png"], "No such file or directory: 'no/such/folder/plan.png'"),
    ],
)
def test_plan_refuses_in_words(capsys, args, message):
    assert cli.main(["plan", *args]) == 2
    assert message in capsys.readouterr().err


def test_the_picture_of_a_plan_is_its_mask(tmp_path):
    mask = Causal() & Window(9) & Documents(lengths=[20, 12])
    for layout in LAYOUTS.values():
        for exchange in EXCHANGES.values():
            plan = make_plan(exchange, mask, layout(32, 4))
            by_step, by_rank = paint(plan)
            owner = {p: rank for rank in range(4) for r in plan.layout.shard(rank) for p in r}
            for q, k in np.ndindex(32, 32):
                seen = k <= q <= k + 9 and (q < 20) == (k < 20)
                assert by_rank[q, k] == (owner[q] if seen else -1)
                assert by_step[q, k] == -1 or owner[k] in {part.rank for part in plan.meets[by_step[q, k]][owner[q]]}
    rows = paint(make_plan(EXCHANGES["ring"], Causal(), LAYOUTS["striped"](4096, 4)), samples=64)[1]
    assert set(rows[:, 0]) == {0, 1, 2, 3}, "a sampled picture shows every rank"


def test_plan_draws(capsys, tmp_path):
    path = tmp_path / "plan.png"
    assert cli.main(["plan", "--seq-len", "1024", "--plot", str(path)]) == 0
    assert f"drawn to {path}" in capsys.readouterr().out
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 300
    assert cli.main(["plan", "--seq-len", "1024", "--plot", str(tmp_path / "plan.foo")]) == 2
    said = capsys.readouterr()
    assert not said.out and "ring-attn plan: Format 'foo' is not supported" in said.err
    assert picture.std() > 0.1


CHECK = ["--seq-len=32", "--ring-size=2", "--num-heads=2", "--head-dim=16", "--kernels", "reference", "cudnn", "aten"]


def test_check_prints_errors_and_reasons(capsys):
    assert cli.main(["check", *CHECK]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("cpu    float64  reference  ring"))
    assert row.endswith("ok, 15 cases")
    assert all(0 < float(error) < 1e-12 for error in row.split()[4:8])
    assert any("cudnn" in line and "not here: cuDNN attention runs on CUDA" in line for line in lines)
    assert lines[-1] == "everything that claims to work is right"


@pytest.mark.parametrize(("ring_size", "checked"), [(2, False), (3, False), (4, True), (6, True)])
def test_check_runs_two_levels_where_there_are_several_nodes(capsys, monkeypatch, ring_size, checked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    size = ["--ring-size", str(ring_size), "--seq-len", str(12 * ring_size)]
    assert cli.main(["check", *size, "--head-dim", "8", "--kernels", "reference", "--dtypes", "float64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    why = f"exchange two-level: not here, a ring of {ring_size} is not several nodes of 2 ranks; --ring-size 4 is"
    assert (why in lines) != checked
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("device dtype")) : -1]
    assert [line[27:37].rstrip() for line in table] == ["exchange", *EXCHANGES, "two-way", *(["two-level"] if checked else [])]
    assert all(line.endswith("  ok, 15 cases") and line.index("  ok") == table[0].index("  verdict") for line in table[1:])


@pytest.mark.parametrize("factor", [1 + 1e-9, math.nan])
def test_check_finds_a_kernel_that_is_wrong(capsys, monkeypatch, factor):
    backward = type(get_kernel("reference")).backward

    def doubled(self, up, q, k, v, tiles, *, scale, score=None, into):
        backward(self, up, q, k, v, tiles, scale=scale, score=score, into=into)
        (_, dv), _ = into.kv.claim()
        dv.mul_(factor)

    monkeypatch.setattr(type(get_kernel("reference")), "backward", doubled)
    assert cli.main(["check", *CHECK]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG: dv off by" in line]
    assert wrong
    assert factor != factor or all(line.split()[1:3] == ["float64", "reference"] for line in wrong)
    # The largest error of dv is in the last column before the verdict, also where it is no number.
    assert all(not float(line.split("  WRONG")[0].split()[-1]) < 1e-10 for line in wrong)


def test_the_command_line_helps_and_refuses(capsys):
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["trian"]) == 2
    assert "'trian' is not one of the commands plan, train, " in capsys.readouterr().err
    assert cli.main(["bench", "--help"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in BENCHMARKS)
    assert cli.main(["bench", "rings"]) == 2
    assert "'rings' is not one of the benchmarks kernels, ring, tune" in capsys.readouterr().err
    assert cli.main(["check", "--head-dim", "0"]) == 2
    assert "ring-attn check: --head-dim must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["train", "nowhere.toml"]) == 2
    assert "no configuration file nowhere.toml" in capsys.readouterr().err


def test_naming_no_command_imports_no_optional_package():
    code = "import sys, ring_attn.cli; print({'tyro', 'matplotlib', 'triton'} & set(sys.modules))"
    assert python("-c", code).stdout.strip() == "set()"


CONFIG = """
[model]
dim = 16
num_layers = 1
num_heads = 2
[data]
path = "{root}/text"
cache = "{root}/cache"
seq_len = 64
batch_size = 2
[optim]
steps = 3
[run]
dir = "{root}/run"
device = "cpu"
eval_sequences = 2
"""


def test_train_runs_under_torchrun(tmp_path):
    write_text(tmp_path / "text")
    (tmp_path / "c.toml").write_text(CONFIG.format(root=tmp_path))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python(*torchrun, "-m", "ring_attn", "train", str(tmp_path / "c.toml"), "--optim.steps", "4")
    assert re.search(r"^step 4: held-out loss \d\.\d+ nats per byte; see ", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.count("held-out loss") == 1, "only the leader reports"
    assert [line["step"] for line in read(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
    assert "steps = 4" in (tmp_path / "run" / "config.toml").read_text()
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / ".metadata").is_file()
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


def python(*args: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return done
