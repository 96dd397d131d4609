"""`ring-attn bench ring`: the rows it leaves, its gate, its bound and its arithmetic, on a simulated ring and over gloo."""

from __future__ import annotations

import json
import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from unittest.mock import patch

import matplotlib.image
import pytest
import torch

import ring_attn as ra
from ring_attn import call
from ring_attn.bench import peers, timing
from ring_attn.bench import ring as bench_ring
from ring_attn.bench.contenders import OnRing, Silent
from ring_attn.bench.kernels import document_lengths
from ring_attn.bench.ring import Bench, RingBenchOptions, beside
from ring_attn.bench.ring_report import RingRow
from ring_attn.bench.timeline import timeline
from ring_attn.bench.timing import Everyone
from ring_attn.cli import main
from ring_attn.comm.local import LocalTransport
from ring_attn.comm.transport import Transport
from ring_attn.exchange import EXCHANGES, get_exchange
from ring_attn.kernels.reference import ReferenceKernel
from tests import sabotage
from tests.dist.harness import run_processes
from tests.support import way_home_hidden

SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float32", "device": "cpu"}
DIRECTIONS = ("forward", "forward + backward")


def command(*args: str) -> list[str]:
    shape = [word for name, value in SHAPE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["bench", "ring", *shape, "--repeats", "2", *args]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def no_other_library():
    """As where none is installed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Of sys.modules these only: what is first imported meanwhile stays.
        for name in ("yunchang", "ring_attention_pytorch"):
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(peers, "find_spec", lambda package: None)
        yield


def small_bench(transport: Transport | None = None, **changes) -> Bench:
    options = RingBenchOptions(**SHAPE, lengths=(64,), masks=("causal",), repeats=3, peers=False, **changes)
    return Bench(options, [transport or LocalTransport(2)] * 2, torch.device("cpu"))


def test_every_exchange_layout_and_mask_has_its_rows_and_a_bound(tmp_path, capsys):
    results, plot = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    args = command("--lengths", "64", "128", "--masks", "causal", "documents", "--layouts", "striped", "zigzag")
    with no_other_library():
        assert main([*args, "--simulated", "2", "--results", str(results), "--plot", str(plot)]) == 0
    rows = read(results)
    timed = {(r["name"], r["layout"], r["mask"], r["length"], r["direction"]) for r in rows if r["ms"]}
    work = list(product(("causal", "documents"), (64, 128), DIRECTIONS))
    rings = set(product(("auto", "ring", "gather", "pull", "pull, KV kept"), ("striped", "zigzag")))
    assert {row for row in timed if row[0] != "no communication"} == {
        (*who, *what) for who, what in product([*rings, ("one device", "contiguous")], work)
    }
    assert len([row for row in timed if row[0] == "no communication"]) == len(work)
    for row in rows:
        if row["ms"]:
            name = row["name"].removesuffix(", KV kept")
            assert row["chosen"].startswith(name if name in EXCHANGES else tuple(EXCHANGES))
            assert row["percent"] == pytest.approx(100 * row["tflops"] / row["bound"])
            assert row["extra_gib"] is None and row["dtype"] == "float32" and row["ring_size"] == 2 and row["torch"]
    out = capsys.readouterr().out
    assert "yunchang Ulysses (contiguous): yunchang is not installed" in out
    assert "torch context_parallel all-gather flash (zigzag): it needs a process a rank: start with torchrun" in out
    assert "documents, 128 positions" in out
    assert matplotlib.image.imread(plot).std() > 0.05


def test_the_layout_by_document_is_made_for_the_documents_of_a_case(tmp_path, capsys):
    results = tmp_path / "rows.jsonl"
    args = command("--lengths", "64", "--masks", "documents", "causal", "--layouts", "by-document", "--no-peers")
    more = "--ulysses", "1", "2", "--exchanges", "auto", "pull", "--simulated", "4", "--results", str(results)
    assert main([*args, *more]) == 0
    rows = [row for row in read(results) if row["layout"] == "by-document"]
    rings = "auto", "pull", "Ulysses 2 x auto", "Ulysses 2 x pull", "pull, KV kept", "Ulysses 2 x pull, KV kept"
    timed = {(row["name"], row["length"], row["direction"]) for row in rows if row["ms"]}
    assert timed == set(product((*rings, "no communication"), (64,), DIRECTIONS))
    assert {row["mask"] for row in rows if row["ms"]} == {"documents"}
    reason = "it needs documents, and the causal mask has none"
    assert {(row["name"], row["mask"], row["why_not"]) for row in rows if not row["ms"]} == {
        (name, "causal", reason) for name in rings
    }
    assert f"pull (by-document): {reason} [causal 64]" in capsys.readouterr().out


def test_where_no_layout_is_named_that_by_document_is_made_for_each_case():
    bench = Bench(RingBenchOptions(**SHAPE, peers=False), [LocalTransport(2)] * 2, torch.device("cpu"))
    assert {one.layout for one in bench.rings} == {"contiguous", "striped", "zigzag", "by-document"}
    case = bench.case("documents", 64)
    made = ra.ByDocument(case.documents)
    for one in (one for one in bench.rings if one.layout == "by-document"):
        settled = one.settled(case)
        assert all(x.at(case).layout_choice == made for x in (one, settled, settled.without_wires(), settled.singly()))
        assert torch.equal(one.positions(case), ra.Ring.simulated(2, made).positions(64))


@pytest.mark.parametrize("broken", ["push_to_the_next_rank", "pull_a_row_too_late"])
def test_the_gate_checks_the_layout_by_document(broken, capsys):
    args = command("--lengths", "64", "--masks", "documents", "--layouts", "by-document", "--exchanges", "pull", "--no-peers")
    with getattr(sabotage, broken)(), patch.object(bench_ring, "timed", side_effect=AssertionError("timed")):
        assert main([*args, "--simulated", "4"]) == 1
    assert "pull (by-document): wrong: " in capsys.readouterr().out


def test_two_axes_and_nodes_are_timed_beside_the_rings(tmp_path):
    results = tmp_path / "rows.jsonl"
    args = command("--lengths", "64", "--masks", "causal", "--layouts", "zigzag", "--exchanges", "pull", "two-level")
    more = "--simulated", "4", "--ulysses", "1", "2", "--ranks-per-node", "2", "--no-peers", "--results", str(results)
    assert main([*args, *more]) == 0
    rows = [row for row in read(results) if row["direction"] == "forward"]
    assert [row["name"] for row in rows if "x" in row["name"]] == [
        "Ulysses 2 x pull",
        "Ulysses 2 x two-level",
        "Ulysses 2 x pull, KV kept",
    ]
    assert {row["chosen"].split(",")[0] for row in rows[:4]} == {"pull", "two-level"} and all(row["percent"] for row in rows)


def test_what_a_ring_cannot_do_is_said_and_the_others_are_timed(capsys):
    args = command("--lengths", "64", "--masks", "causal", "--layouts", "zigzag", "--exchanges", "ring", "--no-peers")
    assert main([*args, "--simulated", "3", "--lengths", "96", "--ulysses", "1", "3"]) == 0
    out = capsys.readouterr().out
    assert "Ulysses 3 x ring (zigzag): num_heads 4 must be a multiple of ulysses 3" in out
    assert "  ring (zigzag)" in out


def test_results_are_added_to_what_is_there(tmp_path):
    results = tmp_path / "rows.jsonl"
    args = command("--lengths", "32", "--masks", "window", "--layouts", "zigzag", "--exchanges", "pull", "--no-peers")
    for times in (1, 2):
        assert main([*args, "--simulated", "2", "--results", str(results)]) == 0
        assert len(read(results)) == times * 2 * len(("pull", "pull, KV kept", "no communication", "one device"))


@pytest.mark.parametrize("broken", ["push_to_the_next_rank", "pull_a_row_too_late"])
def test_nothing_is_timed_where_an_exchange_is_wrong(broken, tmp_path, capsys):
    results, plot = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    args = command("--lengths", "64", "--masks", "causal", "--layouts", "zigzag", "--simulated", "4", "--no-peers")
    with getattr(sabotage, broken)(), patch.object(bench_ring, "timed", side_effect=AssertionError("timed")):
        assert main([*args, "--results", str(results), "--plot", str(plot)]) == 1
    rows = {row["name"]: row for row in read(results)}
    assert all(row["ms"] is None for row in rows.values())
    assert rows["pull"]["why_not"].startswith("wrong: ")
    assert rows["gather"]["why_not"] == "not timed: ring attention is wrong, see the other rows"
    assert "pull (zigzag): wrong: " in capsys.readouterr().out
    assert not plot.exists()


def test_what_is_found_is_told_at_once(capsys):
    bench = small_bench(exchanges=("pull",), layouts=("zigzag",))
    entry = bench.entry(bench.rings[0], bench.cases[0])
    assert capsys.readouterr().err.splitlines() == ["causal 64, pull (zigzag): right"]
    bench.measured(entry)
    forward, both = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"causal 64, pull \(zigzag\): forward [\d.]+ ms, \S+ TFLOP/s", forward)
    assert re.fullmatch(r"causal 64, pull \(zigzag\): forward \+ backward [\d.]+ ms, \S+ TFLOP/s", both)
    bench.measured(replace(entry, fault="wrong: dq"))
    assert not capsys.readouterr().err, "it was told when it was found"


def test_times_are_medians_and_operations_count_the_allowed_cells():
    bench = small_bench(exchanges=("ring",), layouts=("zigzag",))
    with patch.object(bench_ring, "timed", return_value=([1.0, 8.0, 2.0], None)):
        found = list(bench.speeds(bench.rings[0], bench.cases[0]))
    tflops = 4 * 8 * 4 * (64 * 65 // 2) / 2.0 / 1e9
    assert found == [(2.0, pytest.approx(tflops), None), (2.0, pytest.approx(3.5 * tflops), None)]


def test_every_run_is_timed_behind_another_one(monkeypatch):
    done, bench = [], small_bench(exchanges=("pull",), layouts=("zigzag",))
    attend = lambda q, k, v: done.append("run") or q + k.sum() + v.sum()  # noqa: E731
    monkeypatch.setattr(OnRing, "attention", lambda one, case: nullcontext(attend))
    monkeypatch.setattr(Everyone, "meet", lambda everyone: done.append("meet"))
    monkeypatch.setattr(timing, "mark", lambda device: done.append("mark") or float(len(done)))
    list(bench.speeds(bench.rings[0], bench.cases[0]))
    assert done == 2 * (["run"] * 2 + bench.options.repeats * ["meet", "run", "mark", "run", "mark"])


@pytest.mark.parametrize(("tflop", "runs"), [(0.0, 8), (0.137, 8), (0.48, 2), (1.0, 1), (35.0, 1)])
def test_short_runs_are_timed_behind_several(tflop, runs, monkeypatch):
    """A host that has paused is slow; 8,192 positions on four GPUs are 0.137 TFLOP forward, 0.48 with the backward."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert (bench_ring.behind(tflop * 1e12 + 1, gpu), bench_ring.behind(tflop * 1e12 + 1, cpu)) == (runs, 1)
    done = []
    monkeypatch.setattr(timing, "mark", lambda device: done.append("mark") or 0.0)
    timing.timed(lambda: done.append("run"), 1, cpu, lambda: done.append("ready"), runs)
    assert done == ["run", "run", "ready", *["run"] * runs, "mark", "run", "mark"]
    bench, asked = small_bench(exchanges=("pull",), layouts=("zigzag",)), []
    monkeypatch.setattr(bench_ring, "behind", lambda flops, device: asked.append(flops) or runs)
    monkeypatch.setattr(bench_ring, "timed", lambda run, repeats, device, ready, behind: ([float(behind)] * repeats, None))
    assert [ms for ms, _, _ in bench.speeds(bench.rings[0], bench.cases[0])] == [runs, runs]
    assert asked == [4 * 8 * 4 * (64 * 65 // 2), 3.5 * 4 * 8 * 4 * (64 * 65 // 2)]


@pytest.mark.parametrize("wrong", [{0}, {2, 3}, {3}], ids=str)
def test_what_is_wrong_at_first_or_when_it_comes_again_is_found(wrong, monkeypatch):
    bench, calls = small_bench(exchanges=("pull",), layouts=("zigzag",)), count()

    @contextmanager
    def attention(one, case):
        yield lambda *given: ra.ring_attention(*given, ring=one.ring) * (1.5 if next(calls) in wrong else 1.0)

    monkeypatch.setattr(OnRing, "attention", attention)
    assert bench.entry(bench.rings[0], bench.cases[0]).fault.startswith("wrong: ")


def test_what_is_asked_for_singly_is_not_replayed_and_neither_is_its_bound():
    one = OnRing("auto", ra.Ring.simulated(2, exchange="pull")).singly()
    case = small_bench().cases[0]
    assert one.name == "auto, singly"
    assert [x.ring.replay for x in (one, one.settled(case), one.settled(case).without_wires(), one.keeping())] == [False] * 4
    assert OnRing("auto", ra.Ring.simulated(2)).settled(case).without_wires().ring.replay


def test_gradients_in_another_dtype_are_timed_beside_those_of_the_sums():
    bench = small_bench(exchanges=("auto", "pull"), layouts=("zigzag",), grad_dtype="bfloat16")
    (one,) = (x for x in bench.rings if x.ring.grad_dtype is not None)
    assert (one.name, one.ring.exchange) == ("auto, dK dV in bfloat16", "auto")
    settled = one.settled(bench.cases[0])
    ways = one, settled, settled.without_wires(), settled.singly()
    assert [x.ring.grad_dtype for x in ways] == [torch.bfloat16] * 4
    with pytest.raises(ValueError, match=r"grad_dtype bfloat16 is for what auto takes, which is not among \('pull',\)"):
        small_bench(exchanges=("pull",), layouts=("zigzag",), grad_dtype="bfloat16")


@pytest.mark.parametrize(("kernel", "dtype"), [("auto", torch.float32), ("aten", torch.bfloat16)])
@pytest.mark.parametrize("axes", [{}, {"ulysses": 2}])
def test_what_is_timed_sends_what_the_ring_sends(axes, kernel, dtype):
    """Also where kernels that auto might take round, and the one named that it takes for this call."""
    case = small_bench().cases[0]
    case = replace(case, shape=replace(case.shape, dtype=torch.bfloat16))
    settled = OnRing("pull", ra.Ring.simulated(4, exchange="pull", kernel=kernel, **axes)).settled(case)
    assert (settled.ring.kernel, settled.ring.grad_dtype) == ("aten+aten", dtype)


@pytest.mark.parametrize("what", ["results", "plot"])
def test_what_could_not_be_written_is_told_before_anything_is_timed(what, tmp_path, capsys):
    path = str(tmp_path / "none" / "rows")
    assert main([*command("--lengths", "64"), f"--{what}", path]) == 2
    said = capsys.readouterr()
    assert f"ring-attn bench ring: {what} {path!r} cannot be written: there is no folder" in said.err
    assert "TFLOP/s" not in said.err + said.out


def test_the_percentage_is_of_the_bound():
    row = RingRow("pull", "zigzag", "", 4, "causal", 64, "forward", ms=4.0, tflops=300.0)
    bound = RingRow("pull", "zigzag", "", 4, "causal", 64, "forward", ms=3.0, tflops=400.0)
    assert (beside(row, bound).percent, beside(row, bound).bound) == (75.0, 400.0)
    missing = RingRow("pull", "zigzag", "", 4, "causal", 64, "", why_not="out of memory")
    assert beside(row, missing) == row and beside(missing, bound) == missing


def test_rings_are_held_against_their_own_bound_and_one_device_against_the_fastest():
    bench = small_bench(exchanges=("ring", "pull"), layouts=("zigzag",), keep_kv=False)
    tflops = {("ring", False): 200.0, ("ring", True): 400.0, ("pull", False): 300.0, ("pull", True): 500.0}

    def speeds(contender, case):
        silent = isinstance(contender.ring.transport, Silent)
        yield from [(1.0, tflops.get((contender.name, silent), 100.0), None)] * 2

    with patch.object(bench, "speeds", speeds):
        rows = list(bench.timed([bench.entry(contender, bench.cases[0]) for contender in (*bench.rings, *bench.others)]))
    assert [(row.name, row.tflops, row.bound, row.percent) for row in rows if row.direction == "forward"] == [
        ("ring", 200.0, 400.0, 50.0),
        ("pull", 300.0, 500.0, 60.0),
        ("no communication", 500.0, 500.0, 100.0),
        ("one device", 100.0, 500.0, 20.0),
    ]


def test_a_bound_that_fails_hides_no_row():
    bench = small_bench(exchanges=("ring",), layouts=("zigzag",))

    def speeds(contender, case):
        if isinstance(contender.ring.transport, Silent):
            raise RuntimeError("no bound")
        yield from [(1.0, 100.0, None)] * 2

    with patch.object(bench, "speeds", speeds):
        rows = list(bench.timed([bench.entry(bench.rings[0], bench.cases[0])]))
    assert [(row.name, row.direction, row.ms, row.percent) for row in rows] == [("ring", way, 1.0, None) for way in DIRECTIONS]


def test_the_gate_asks_again_where_auto_takes_something_else():
    bench = small_bench()
    pull, gather = (OnRing("auto", ra.Ring.simulated(2, exchange=name)).settled(bench.cases[0]) for name in ("pull", "gather"))
    with sabotage.push_to_the_next_rank():
        assert bench.gate.fault(pull, "causal").startswith("wrong: dk") and bench.gate.fault(gather, "causal") is None


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("mask", [ra.Causal(), ra.Causal() & ra.Window(5)])
def test_the_bound_makes_every_visit_and_moves_nothing(exchange, mask):
    class Broken(LocalTransport):
        shift = all_gather = reduce_scatter = all_to_all = pull = push = None

    ring = ra.Ring(Silent(Broken(4)), exchange=exchange)
    q, k, v = (torch.randn(2, 64, h, 8, requires_grad=True) for h in (4, 2, 2))
    out = ra.ring_attention(q, k, v, ring=ring, mask=mask)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert out.shape == q.shape and [g.shape for g in grads] == [x.shape for x in (q, k, v)]
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_timeline_shows_every_visit_in_order(exchange):
    bench = small_bench(exchanges=(exchange,), layouts=("zigzag",))
    case = bench.cases[0]
    bars = timeline(bench.rings[0].settled(case), case, bench.everyone).bars
    steps = range(1 if exchange == "gather" else 2)
    assert [(bar.process, bar.direction, bar.step) for bar in bars] == [
        (0, direction, step) for direction in ("forward", "backward") for step in steps
    ]
    times = [at for bar in bars for at in (bar.start, bar.stop)]
    assert times == sorted(times) and times[0] > 0
    assert call.get_exchange is get_exchange


def test_timelines_are_titled_by_the_ring_that_they_show(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(bench_ring, "draw", lambda *given: drawn.append(given))
    args = command(
        "--lengths", "64", "--masks", "causal", "--layouts", "zigzag", "--exchanges", "two-way", "auto", "--no-peers"
    )
    assert main([*args, "--simulated", "4", "--ulysses", "1", "2", "--plot", str(tmp_path / "plot.png")]) == 0
    ((rows, timelines, _),) = drawn
    labels = {row.label: row.chosen for row in rows}
    titles = {f"{label}: {chosen}, causal 64" for label, chosen in labels.items() if chosen}
    assert {"auto (zigzag)", "Ulysses 2 x two-way (zigzag)"} < set(labels) and {one.title for one in timelines} <= titles
    fastest = min((row for row in rows if row.name.endswith("two-way") and row.direction == DIRECTIONS[-1]), key=lambda r: r.ms)
    assert any(one.title.startswith(f"{fastest.label}: two-way, ") for one in timelines)


def test_the_timeline_by_parts_of_the_heads():
    bench = small_bench(exchanges=("pull",), layouts=("zigzag",))
    case = bench.cases[0]
    with way_home_hidden(by_heads=True):
        bars = timeline(bench.rings[0].settled(case), case, bench.everyone).bars
    assert [bar.step for bar in bars if bar.direction == "backward"] == [0, 1, 1, 0]
    assert [bar.step for bar in bars if bar.direction == "forward"] == [0, 1, 1]
    times = [at for bar in bars for at in (bar.start, bar.stop)]
    assert times == sorted(times)


def test_what_is_checked_is_what_auto_takes_at_the_length_that_is_timed():
    ring = ra.Ring.simulated(4, exchange="auto", kernel="auto")
    bench = small_bench()
    settled = OnRing("auto", ring).settled(bench.cases[0])
    assert settled.ring.exchange in EXCHANGES and "auto" not in settled.ring.kernel
    assert settled.chosen.startswith(settled.ring.exchange)


@pytest.mark.parametrize("by_heads", [False, True])
def test_the_gate_checks_what_is_timed(by_heads):
    bench, seen, backward = small_bench(exchanges=("pull",), layouts=("zigzag",)), [], ReferenceKernel.backward
    forwards, forward = set(), ReferenceKernel.forward
    with way_home_hidden(by_heads):
        settled = bench.rings[0].settled(bench.cases[0])
    assert settled.chosen.endswith(", 2 parts forward, 2 parts" if by_heads else ", halves")
    assert settled.head_parts == settled.forward_parts == 1 + by_heads

    def noted(self, up, q, k, v, *rest, **options):
        seen.append(k.shape[1:3])
        return backward(self, up, q, k, v, *rest, **options)

    def noted_forward(self, q, k, *rest, **options):
        forwards.add(k.shape[2])
        return forward(self, q, k, *rest, **options)

    settled = replace(settled, ring=ra.Ring(settled.ring.transport, exchange="pull", kernel="reference"))
    with patch.object(ReferenceKernel, "backward", noted), patch.object(ReferenceKernel, "forward", noted_forward):
        assert bench.gate.fault(settled, "causal") is None
    assert forwards == ({1, 2} if by_heads else {2})
    keys, heads = zip(*seen, strict=True)
    assert ({1} == set(heads)) == by_heads and keys[0] == settled.gate_rows // (1 if by_heads else 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lengths", "100"], "lengths must be multiples of 2 * ring size = 8, at least 32, got (100,)"),
        (["--head-dim", "0"], "head_dim must be at least 1, got 0"),
        (["--kv-heads", "3"], "heads 4 must be a multiple of kv_heads 3"),
        (["--masks", "padding"], "mask 'padding' is not one of causal, full, window, documents"),
        (["--layouts", "spiral"], "layout 'spiral' is not one of contiguous, striped, zigzag, by-document"),
        (["--exchanges", "mail"], "exchange 'mail' is not one of auto, ring, gather, pull, two-way, two-level"),
        (["--exchanges", "two-level"], "exchange='two-level' needs ranks_per_node, how many neighbouring ranks share a node"),
    ],
)
def test_options_that_break_a_rule(args, message, capsys):
    assert main(command(*args)) == 2
    assert capsys.readouterr().err == f"ring-attn bench ring: {message}\n"


@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_documents_divide_and_fill_the_length(multiple):
    for length, scale in ((65536, 1.0), (1024, 1 / 32)):
        lengths = document_lengths(length, multiple, scale)
        assert sum(lengths) == length and len(set(lengths)) > 4
        assert all(0 < x <= length // 4 and x % multiple == 0 for x in lengths)


def _over_gloo(rank: int, folder: str) -> None:
    args = command("--lengths", "64", "--masks", "causal", "--layouts", "zigzag", "--results", f"{folder}/{rank}.jsonl")
    with no_other_library():
        assert main([*args, "--plot", f"{folder}/{rank}.png"]) == 0


def test_over_gloo_the_leader_alone_writes_and_torch_says_why_not(tmp_path):
    run_processes(_over_gloo, 2, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.jsonl", "0.png"]
    rows = read(tmp_path / "0.jsonl")
    assert {row["name"] for row in rows if row["ms"]} == {*EXCHANGES, "pull, KV kept", "auto", "no communication", "one device"}
    refusals = {row["name"]: row["why_not"] for row in rows if row["why_not"]}
    assert refusals["torch context_parallel all-gather flash"].startswith("it fails: NotImplementedError: Operator aten")
    assert refusals["ring-flash-attn zigzag"] == "ring_flash_attn is not installed"


def _slowest(rank: int) -> None:
    bench = small_bench(ra.Ring.from_group(None).transport)
    times = [[1.0, 9.0, 1.0], [2.0, 2.0, 3.0]][rank]
    with patch.object(bench_ring, "timed", return_value=(times, None)):
        ms, tflops, _ = next(iter(bench.speeds(bench.rings[0], bench.cases[0])))
    assert ms == 3.0
    assert tflops == pytest.approx(4 * 8 * 4 * (64 * 65 // 2) / 2 / 3.0 / 1e9)


def test_the_slowest_process_counts_in_every_run():
    run_processes(_slowest, 2)
