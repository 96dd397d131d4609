"""dK and dV of libraries, which round each row once, go home in the dtype of the inputs where that loses nothing."""

import pytest
import torch

import ring_attn as ra
from ring_attn.kernels import Upstream, get_kernel, resolve, tilewise
from ring_attn.kernels.aten import CpuFlash, _differentiate_one_key
from ring_attn.kernels.sums import Grads, RowsOfSum
from tests.dist.harness import run_processes
from tests.kernels import test_flash_versions as flash
from tests.support import BAND_KINDS, band_tiles, random_qkv

HALF = torch.bfloat16


def gradients(ring, mask, seed=0, dtype=HALF, between=lambda: None):
    """out, dq, dk and dv of this process's rows, 32 a rank, with a random upstream gradient. `between`: called amid them."""
    rows = 32 * len(ring.hosted)
    *inputs, dout = random_qkv(2, rows, rows, 4, 2, 8, dtype=dtype, seed=seed)
    inputs = [x.requires_grad_() for x in inputs]
    out = ra.ring_attention(*inputs, ring=ring, mask=mask)
    between()
    out.backward(dout)
    return out.detach(), *(x.grad for x in inputs)


def home(ring):
    """In what dtype its only call sends dK and dV home."""
    (settled,) = ring.settled.values()
    return settled.home


DOCUMENTS = ra.Causal() & ra.Documents(lengths=[50, 78])
MASKS = {"causal": ra.Causal(), "window": ra.Causal() & ra.Window(20), "full": ra.Full(), "documents": DOCUMENTS}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("layout", "options"),
    [("zigzag", {}), ("zigzag", {"keep_kv": True}), ("zigzag", {"kv_memory": 5120}), ("striped", {})],
    ids=str,
)
def test_nothing_is_lost(mask, layout, options):
    """The same bits as over a wire of fp32."""
    found = {}
    for dtype in (None, torch.float32):
        ring = ra.Ring.simulated(4, layout, exchange="pull", kernel="aten", grad_dtype=dtype, hostile=True, **options)
        found[dtype] = gradients(ring, MASKS[mask])
        assert home(ring) == (dtype or HALF)
    for name, x, y in zip(("out", "dq", "dk", "dv"), *found.values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("kind", BAND_KINDS)
@pytest.mark.parametrize("sizes", [(37, 50), (50, 37), (8, 8), (40, 1)], ids=str)
def test_what_rounds_adds_each_row_once_in_the_dtype_of_the_inputs(kind, sizes, monkeypatch):
    num_q, num_kv = sizes
    tiles, added = band_tiles(kind, num_q, num_kv), torch.zeros(2, num_kv, dtype=torch.int32)

    def noted(self, tensors, rows, places=None, batch=None):
        if len(tensors) == 2:
            assert {x.dtype for x in tensors} == {HALF}
            met = 1 if places is None else (places >= 0).sum(-1)
            added[slice(None) if batch is None else batch, rows.start : rows.stop] += met

    monkeypatch.setattr(RowsOfSum, "add", noted)
    *inputs, dout = random_qkv(2, *sizes, 4, 2, 8, dtype=HALF)
    out, lse = torch.zeros_like(dout), torch.zeros(2, 4, num_q)
    for kernel in (get_kernel("aten"), OneKeyApart(), flash.FLASH4):
        added.zero_()
        with flash.installed4():
            kernel.backward(Upstream(dout, out, lse), *inputs, tiles, scale=1.0, into=Grads.like(*inputs))
        assert added.amax() <= 1 or not kernel.rounds("cpu", tiles)
        assert kernel.rounds("cpu", tiles) or kind not in ("full", "zigzag")


class OneKeyApart(CpuFlash):
    """Differentiates a single key as cuDNN's adapter does, which PyTorch does not give to cuDNN."""

    def differentiate(self, up, q, k, v, tile, scaling):
        if k.shape[1] == 1:
            return _differentiate_one_key(up, q, k, v, scaling.scale)
        return super().differentiate(up, q, k, v, tile, scaling)


def test_it_travels_so(monkeypatch):
    ring, sent = ra.Ring.simulated(4, "zigzag", exchange="pull", kernel="aten"), []
    push = ring.transport.push
    monkeypatch.setattr(ring.transport, "push", lambda grads, *rest, **o: sent.extend(grads) or push(grads, *rest, **o))
    gradients(ring, ra.Causal())
    assert [one.packed().dtype for one in sent] == [HALF] * 4


@pytest.mark.parametrize(
    ("layout", "mask", "options"),
    [
        # Sums in fp32 of several visits, and of all ranks.
        ("zigzag", ra.Causal(), {"exchange": "ring"}),
        ("zigzag", ra.Causal(), {"exchange": "gather"}),
        ("zigzag", ra.Causal(), {"exchange": "two-way"}),
        # A kernel that adds up in fp32; one that does where a gradient comes by lse.
        ("zigzag", ra.Causal(), {"kernel": "reference"}),
        ("zigzag", ra.Causal(), {"kernel": "auto"}),
        ("zigzag", ra.Causal(), {"kernel": "aten+reference"}),
        # Several calls for a row.
        ("zigzag", ra.Causal() & ra.Documents(lengths=[[128], [100, 28]]), {}),
        ("striped", ra.Causal(), {"kv_memory": 5120}),
    ],
    ids=str,
)
def test_what_adds_up_goes_home_in_fp32(layout, mask, options):
    ring = ra.Ring.simulated(4, layout, **{"exchange": "pull", "kernel": "aten"} | options)
    gradients(ring, mask)
    assert home(ring) == torch.float32


@pytest.mark.parametrize(("dtype", "sums"), [(torch.float16, torch.float16), (torch.float32, torch.float32)])
def test_it_is_the_dtype_of_the_inputs(dtype, sums):
    ring = ra.Ring.simulated(4, exchange="pull", kernel="aten")
    gradients(ring, ra.Causal(), dtype=dtype)
    assert home(ring) == sums


def test_each_row_is_asked_for_once(monkeypatch):
    """Tiles of a rank that share keys are cut by these for a backward, not for a forward."""
    ring, asked = ra.Ring.simulated(4, exchange="pull", kernel="aten"), {"attend": [], "differentiate": []}
    for name, tiles in asked.items():
        method = getattr(tilewise.Dense, name)
        monkeypatch.setattr(tilewise.Dense, name, lambda self, *x, m=method, t=tiles: t.append(self.tile) or m(self, *x))
    gradients(ring, ra.Causal())
    shared = {name: {t.q_rows for t in tiles if t.q_rows in (range(16), range(16, 32))} for name, tiles in asked.items()}
    assert shared["attend"] == {range(16), range(16, 32)} and shared["differentiate"] == {range(16, 32)}


def _one_rank_adds_up(rank):
    ring = ra.Ring.from_group(exchange="pull", kernel="reference" if rank == 1 else "aten")
    exact = ra.Ring.from_group(exchange="pull", kernel=ring.kernel, grad_dtype=torch.float32)
    found, wanted = (gradients(one, ra.Causal(), seed=rank) for one in (ring, exact))
    assert home(ring) == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    alike = ra.Ring.from_group(exchange="pull", kernel="aten")
    gradients(alike, ra.Causal(), seed=rank)
    assert home(alike) == HALF
    # What was found out is forgotten, what was agreed on is not.
    for one in (ring, alike):
        before, settled = home(one), dict(one.settled)
        one.settled.clear()
        gradients(one, ra.Causal(), seed=rank)
        assert home(one) == before and one.settled.keys() == settled.keys()
        # Where that comes between a forward and its backward, it does on all ranks.
        again = gradients(one, ra.Causal(), seed=rank, between=one.settled.clear)
        assert one is alike or all(torch.equal(x, y) for x, y in zip(again, wanted, strict=True))


def test_a_rank_that_adds_up_has_all_send_in_fp32():
    run_processes(_one_rank_adds_up, 3)


def test_only_kernels_that_run_are_logged(caplog):
    with caplog.at_level("INFO", logger="ring_attn"):
        resolve.cache_clear()
        gradients(ra.Ring.simulated(4, exchange="pull"), ra.Causal())
    assert [line.split(";")[0] for line in caplog.messages if " kernel: " in line] == [
        "forward kernel: aten", "backward kernel: aten",
    ]  # fmt: skip


def test_ranks_of_two_axes_round_in_their_rings():
    ring = ra.Ring.simulated(4, ulysses=2, exchange="pull", kernel="aten")
    gradients(ring, ra.Causal())
    assert [home(one) for one in ring.of_parts.values()] == [HALF] * 2


def test_shorter_ways_home_are_hidden_where_calls_are_replayed(monkeypatch):
    from ring_attn.comm.replay import Replays
    from tests.test_settled import settle

    # Of others' rows a rank meets at most three quarters: at 8,192 rows that is 48 MiB of dK and dV in fp32.
    assert settle(exchange="pull", replays=Replays()).back.halved
    assert not settle(exchange="pull", replays=Replays(), replay=False).back.halved
    assert not settle(exchange="pull", replays=Replays(), rows=512).back.halved
