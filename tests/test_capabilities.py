"""What capabilities() says is true of this machine: every yes runs and is right, every no raises in the words of the table."""

from __future__ import annotations

import re
from contextlib import contextmanager, nullcontext
from functools import cache

import pytest
import torch

import ring_attn as ra
from ring_attn import cli
from ring_attn.capabilities import BATCH, FEATURES, FORWARD_ONLY, NUM_HEADS, SEQ_LEN, YES, answer, report, table, usual_dtype
from ring_attn.kernels import KERNEL_NAMES, KernelUnavailable, resolve
from tests.equipped import BLOCK, README, block
from tests.scores import Piece, Sizes, kept, plain, positions, seen_cells
from tests.support import FLOAT32_LIMIT, FLOAT64_LIMIT, rel_error

DEVICES = list(ra.capabilities())
LIMITS = {torch.float64: FLOAT64_LIMIT, torch.float32: FLOAT32_LIMIT, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@cache
def inputs(feature):
    gen = torch.Generator().manual_seed(0)
    shapes = (*feature.shapes(), (BATCH, SEQ_LEN, NUM_HEADS, feature.v_head_dim), (BATCH, NUM_HEADS, SEQ_LEN))
    return [torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes]


def run(feature, ring, device, dtype, backward=True):
    """out, dq, dk, dv in global order; with a gradient through lse where the feature is that."""
    q, k, v, dout, dlse = inputs(feature)
    leaves = [x.to(device, dtype, copy=True).requires_grad_(backward) for x in (q, k, v)]
    dlse = dlse.to(device, dtype if dtype == torch.float64 else torch.float32)
    with torch.device(device):
        score = feature.scores(ring)
    with deterministically() if feature.deterministic else nullcontext():
        out, lse = ra.ring_attention(*map(ring.shard, leaves), ring=ring, mask=feature.mask, score=score, return_lse=True)
        found, up = [ring.unshard(out)], [dout.to(device, dtype)]
        if feature.lse_grad:
            found, up = [*found, ring.unshard(lse, 2)], [*up, dlse]
        return [*found, *(torch.autograd.grad(found, leaves, up) if backward else [])]


@contextmanager
def deterministically():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # A warning, since cuBLAS wants a variable that is set before a process starts.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def plain_scores(feature):
    """What the feature's score means, written the plain way."""
    (i, j), slopes = positions(Sizes(t=SEQ_LEN)), torch.linspace(0.1, 1.0, NUM_HEADS)[:, None, None]
    bias = torch.linspace(-1.0, 1.0, SEQ_LEN**2).sin().view(SEQ_LEN, SEQ_LEN)
    pieces = {
        "SoftCap": Piece(None, step=lambda s: 2 * torch.tanh(s / 2)),
        "Alibi": Piece(None, step=lambda s: s - slopes * (i - j).abs()),
        "RelativeBias": Piece(
            None,
            step=lambda s: s + torch.linspace(-1.0, 1.0, NUM_HEADS * 7).cos().view(NUM_HEADS, 7)[:, (i - j).clamp(-3, 3) + 3],
        ),
        "Bias": Piece(None, step=lambda s: s + bias),
        "ScoreMod": Piece(None, step=lambda s: s - 0.1 * (torch.arange(NUM_HEADS)[:, None, None] + 1) * (i - j)),
        "CosineSim": Piece(None, cosine=(8.0, 2)),
        "Sinks": Piece(None, sinks=slopes.flatten()),
        "Dropout": Piece(None, keep=kept(0.3, 1, BATCH, NUM_HEADS, SEQ_LEN, SEQ_LEN)),
    }
    return [] if feature.score is None else [pieces[feature.name]]


@cache
def truth(feature):
    """By one dense softmax in float64: out, lse where its gradient is the feature, dq, dk, dv."""
    *leaves, dout, dlse = (x.clone().requires_grad_() for x in inputs(feature))
    cells = seen_cells(feature.mask, Sizes(b=BATCH, t=SEQ_LEN, h=NUM_HEADS))
    found, up = plain(*leaves, cells, plain_scores(feature)), (dout, dlse)
    kept_ones = slice(2 if feature.lse_grad else 1)
    return [*found[kept_ones], *torch.autograd.grad(found[kept_ones], leaves, up[kept_ones])]


def right(found, feature, dtype):
    """Against the truth of inputs that were not rounded to `dtype`."""
    return all(rel_error(x.cpu(), ref) < LIMITS[dtype] for x, ref in zip(found, truth(feature), strict=False))


@contextmanager
def skipped_where_left_out(kernel):
    """A flash-attn 2 that was built without its larger head dims tells only when it is called."""
    try:
        yield
    except RuntimeError as error:
        if kernel == "flash2" and "only supports head dimension at most" in str(error):
            pytest.skip(f"this build of flash-attn 2 leaves that out: {error}")
        raise


@pytest.mark.parametrize("kernel", KERNEL_NAMES[1:])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
@pytest.mark.parametrize("device", DEVICES)
def test_every_yes_is_right_and_every_no_raises(device, feature, kernel):
    said, dtype = answer(kernel, feature, device), feature.dtype or usual_dtype(device)
    ring = ra.Ring.simulated(2, "contiguous", exchange="gather", kernel=kernel)
    if said == YES:
        with skipped_where_left_out(kernel):
            found = run(feature, ring, device, dtype)
        assert right(found, feature, dtype)
        if feature.deterministic:
            assert all(torch.equal(x, y) for x, y in zip(found, run(feature, ring, device, dtype), strict=True))
        return
    with pytest.raises(KernelUnavailable, match=re.escape(said.removeprefix(FORWARD_ONLY))):
        run(feature, ring, device, dtype)
    if said.startswith(FORWARD_ONLY):
        assert right(run(feature, ring, device, dtype, backward=False), feature, dtype)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_auto_does_every_feature(feature):
    for device in DEVICES:
        dtype = feature.dtype or usual_dtype(device)
        assert right(run(feature, ra.Ring.simulated(2), device, dtype), feature, dtype)


def test_every_mask_and_score_is_a_feature():
    names = " ".join(feature.name for feature in FEATURES)
    kinds = ((name, getattr(ra, name)) for name in ra.__all__)
    public = {name for name, kind in kinds if isinstance(kind, type) and issubclass(kind, ra.mask.Mask | ra.score.Score)}
    assert len(public) == 14
    assert [name for name in sorted(public) if not re.search(rf"\b{name}\b", names)] == []


def test_the_table_has_every_feature_and_kernel():
    found = ra.capabilities()
    for rows in found.values():
        assert list(rows) == [feature.name for feature in FEATURES]
        assert all(list(row) == list(KERNEL_NAMES[1:]) for row in rows.values())
        assert all(row["reference"] == YES for row in rows.values())
    assert found["cpu"]["v_head_dim 32, head_dim 64"]["aten"].startswith("it needs v_head_dim = head_dim, not 32 and 64")


def test_a_report_numbers_the_reasons():
    text = report(
        "cpu",
        {"one": {"a": YES, "b": "it is cold, not warm", "c": "gone"}, "two": {"a": "it has no alibi", "b": YES, "c": "gone"}},
    )
    *_, head, one, two, _, first, second, last = text.splitlines()
    assert head.split() == ["a", "b"]
    assert (one.split(), two.split()) == (["one", "yes", "[1]"], ["two", "[2]", "yes"])
    assert (first, second, last) == ("[1] it is cold", "[2] it has no such score modifier", "c is not here: gone")
    forward = report("cpu", {"one": {"a": FORWARD_ONLY + "it is cold"}, "two": {"a": YES}})
    assert "forward [1]" in forward and forward.endswith("[1] it is cold")


def test_check_prints_it(capsys):
    assert cli.main(["check", "--capabilities"]) == 0
    assert capsys.readouterr().out == "\n\n".join(report(device, table(device)) for device in DEVICES) + "\n"


def test_the_readme_shows_it():
    resolve.cache_clear()
    (shown,) = (found[2] for found in BLOCK.finditer(README.read_text()))
    assert shown == block(), "a kernel takes more or less than the README says: python -m tests.equipped writes the table anew"
