"""How calls of a library come together by the fused launches, which only GPUs take otherwise: interpreted, over PyTorch's CPU
attention, against a dense softmax in float64.
"""

from __future__ import annotations

import pytest
import torch

from ring_attn.kernels import get_kernel, tilewise
from ring_attn.tiles import Band, Tile
from tests.kernels.test_aten_cpu import check
from tests.support import random_qkv

triton_merge = pytest.importorskip("ring_attn.kernels.triton_merge")
from ring_attn.kernels import sums, triton_sum  # noqa: E402
from ring_attn.kernels.triton_kernel import interpreted  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
OWN = Tile(range(37), range(37), Band(hi=0), ((), ()))


def rectangle(q_rows, kv_rows):
    return Tile(q_rows, kv_rows, Band(), ((), ()))


@pytest.fixture
def merges(monkeypatch):
    """What each fused merge reads and finishes: (results, dtype of acc, whether there is a sum, rows finished or None, and
    whether they are finished where they are).
    """
    made, call = [], triton_merge.merge_call

    def noted(into, results, target, **options):
        launch = call(into, results, target, **options)
        start, stop, in_place = (launch.arguments[name] for name in ("start", "stop", "IN_PLACE"))
        finished = None if target is None else range(start, stop)
        made.append((len(results), into.acc.dtype, into.sum is not None, finished, *["in place"] * in_place))
        return launch

    monkeypatch.setattr(tilewise, "_can_fuse", lambda x: True)
    monkeypatch.setattr(sums, "fused", lambda device: True)
    monkeypatch.setattr(triton_merge, "merge_call", noted)
    return made


HALF, FULL = (torch.float16, False), (torch.float32, True)


@pytest.mark.parametrize(
    ("visits", "expected"),
    [
        ([(OWN,), (rectangle(range(37), range(37, 50)),)], [(1, *HALF, range(37), "in place")]),
        # As from a zigzag ring's other ranks: the later half of the queries meets more.
        (
            [(OWN,), (rectangle(range(20), range(37, 43)), rectangle(range(20, 37), range(37, 50)))],
            [(1, *HALF, range(20), "in place"), (1, *HALF, range(20, 37), "in place")],
        ),
        # Not all rows, or some of them twice.
        ([(OWN,), (rectangle(range(20, 37), range(37, 50)),)], [(1, *HALF, range(20, 37), "in place")]),
        (
            [(OWN,), (rectangle(range(20), range(37, 43)), rectangle(range(19, 37), range(43, 50)))],
            [(2, *HALF, range(37), "in place")],
        ),
        (
            [(OWN,), tuple(rectangle(range(n, 30 + n), range(37 + n, 38 + n)) for n in range(3))],
            [(2, *FULL, None), (1, *FULL, range(37))],
        ),
        (
            [(OWN,), (rectangle(range(37), range(37, 43)),), (rectangle(range(37), range(43, 50)),)],
            [(1, *FULL, None), (1, *FULL, range(37))],
        ),
        # A first visit of two calls starts from nothing.
        (
            [(rectangle(range(20), range(9)), rectangle(range(20, 37), range(50)))],
            [(1, *FULL, range(20)), (1, *FULL, range(20, 37))],
        ),
    ],
)
def test_calls_come_together(visits, expected, merges):
    check(visits, *random_qkv(2, 37, 50, 4, 2, 16, dtype=torch.float16, seed=3), kernel=get_kernel("aten"))
    assert merges == expected


@pytest.mark.parametrize("kind", ["documents", "batch rows", "many"])
@pytest.mark.parametrize("visits", [1, 2, 3])
def test_packs_come_together(kind, visits, merges, monkeypatch):
    from tests.kernels import test_flash_versions as flash

    packed, call = [], triton_merge.merge_call
    monkeypatch.setattr(
        triton_merge, "merge_call", lambda *x, **o: packed.append(isinstance(x[1][0].rows, torch.Tensor)) or call(*x, **o)
    )
    for installation, kernel in ((flash.installed4, flash.FLASH4), (lambda: flash.installed("2.8.3"), flash.FLASH2)):
        with installation() as calls:
            flash.check(flash.example(kind, 37, 44, visits=visits), kernel, kernel)
            assert calls
    assert any(packed) == (visits < (2 if kind == "documents" else 3)), "more visits have a tile each"


def test_packs_of_some_rows_end_in_the_result(merges):
    """Documents that go on from another rank's: some queries of a visit's meet what came, the others are done."""
    from tests.kernels import test_flash_versions as flash

    own = [Tile(rows, rows, Band(hi=0), ((), ())) for rows in (range(9), range(9, 20), range(20, 37))]
    came = [rectangle(range(9), range(37, 43)), rectangle(range(20, 25), range(43, 50))]
    inputs, visits = random_qkv(2, 37, 50, 4, 2, 16, dtype=torch.float16, seed=3), [tuple(own), tuple(came)]
    case = inputs, visits, flash.exact(*inputs, visits, scale=0.25), flash.plain(*inputs, visits, scale=0.25)
    with flash.installed4():
        flash.check(case, flash.FLASH4, flash.FLASH4)
    assert merges[-1] == (1, torch.float32, True, range(37)) and len(merges) == 2


@pytest.mark.parametrize(
    ("came", "expected"),
    [
        ([rectangle(range(20, 37), range(37, 50))], [(1, *HALF, range(20, 37), "in place")]),
        ([rectangle(range(37), range(37, 50))], [(1, *HALF, range(37), "in place")]),
        # In one call, as packs or not, or in several that have no row in common.
        ([rectangle(range(4, 9), range(37, 43)), rectangle(range(20, 25), range(43, 50))], [(1, *HALF, range(37), "in place")]),
        (
            [rectangle(range(4 + 9 * n, 9 + 9 * n), range(37 + n, 43 + n)) for n in range(3)],
            [(1, *HALF, range(4 + 9 * n, 9 + 9 * n), "in place") for n in range(3)],
        ),
        # Nothing came for this rank; too much to merge at once.
        ([], []),
        (
            [rectangle(range(n, 20 + n), range(37 + 4 * n, 41 + 4 * n)) for n in range(3)],
            [(2, *FULL, None), (1, *FULL, range(37))],
        ),
    ],
    ids=["some rows", "all rows", "a pack", "apart", "none", "three over each other"],
)
def test_what_one_call_made_is_the_result_but_for_rows_met_later(came, expected, merges, monkeypatch):
    from tests.kernels import test_flash_versions as flash

    monkeypatch.setattr(tilewise, "finish", None)
    inputs, visits = random_qkv(1, 37, 50, 4, 2, 16, dtype=torch.float16, seed=3), [(OWN,), tuple(came)]
    case = inputs, visits, flash.exact(*inputs, visits, scale=0.25), flash.plain(*inputs, visits, scale=0.25)
    with flash.installed4():
        flash.check(case, flash.FLASH4, flash.FLASH4)
    assert merges == expected


@pytest.mark.parametrize(
    "visits",
    [
        [(OWN,), tuple(rectangle(range(n, 20 + n), range(37 + 4 * n, 41 + 4 * n)) for n in range(3))],
        [(rectangle(range(20), range(9)), rectangle(range(20, 37), range(9))), (rectangle(range(5), range(9, 50)),)],
    ],
    ids=["something was merged into it", "it never was one"],
)
def test_in_fp32_an_acc_may_be_no_output(visits, merges):
    check(visits, *random_qkv(1, 37, 50, 4, 2, 16, dtype=torch.float32, seed=3), kernel=get_kernel("aten"))
    assert [one[3:] for one in merges] == [(None,), (range(37),)]


def test_a_result_that_must_lie_elsewhere_is_put_there(merges):
    """As among the outputs of several ranks in one process, or where it is wanted in another dtype."""
    from tests.kernels import test_flash_versions as flash

    q, k, v, _ = random_qkv(1, 37, 50, 4, 2, 16, dtype=torch.float16, seed=3)
    last, several = (rectangle(range(20, 37), range(37, 50)),), torch.stack([q, q])
    with flash.installed4():
        for out in (torch.empty_like(q), torch.empty_like(q, dtype=torch.float32), several[1]):
            before = flash.FLASH4.forward(q, k, v, (OWN,), scale=0.25)
            found = flash.FLASH4.forward(q, k, v, last, scale=0.25, into=before, out=out)
            in_place = found.acc.data_ptr() == before.acc.data_ptr()
            assert in_place or found.acc.data_ptr() == out.data_ptr()
    assert [one[3:] for one in merges] == [(range(20, 37), "in place"), (range(37),), (range(37),)]


@pytest.fixture
def passes(monkeypatch):
    """Of each pass that sums up gradients: (dims of a row, whether each addend goes by places)."""
    made, call = [], triton_sum.sum_call
    monkeypatch.setattr(tilewise, "_can_fuse", lambda x: True)
    monkeypatch.setattr(sums, "fused", lambda device: True)

    def noted(targets, addends, *more):
        made.append((len(targets), [one.places is not None for one in addends]))
        return call(targets, addends, *more)

    monkeypatch.setattr(triton_sum, "sum_call", noted)
    return made


def test_packs_take_their_rows(passes, monkeypatch):
    """Rows that do not follow each other are taken by launches of ours, and all that came is summed up by one more."""
    from ring_attn.kernels import triton_take
    from tests.kernels import test_flash_versions as flash

    took, take = [], triton_take.taken
    monkeypatch.setattr(triton_take, "taken", lambda x, *rows: took.append(len(rows[0])) or take(x, *rows))
    early = [rectangle(range(4), range(37, 39)), rectangle(range(20, 24), range(43, 45))]
    late = [rectangle(range(4, 12), range(37, 42)), rectangle(range(24, 32), range(43, 49))]
    inputs, visits = random_qkv(1, 37, 50, 4, 2, 16, dtype=torch.float16, seed=3), [(OWN, *early, *late)]
    case = inputs, visits, flash.exact(*inputs, visits, scale=0.25), flash.plain(*inputs, visits, scale=0.25)
    with flash.installed4():
        flash.check(case, flash.FLASH4, flash.FLASH4)
    assert passes == [(1, [False, True, True]), (2, [False, True, True])]
    # q, k and v forward, and out and dout backward.
    assert sorted(took) == sorted([8, 4, 4, 16, 11, 11, *[8] * 3, 4, 4, *[16] * 3, 11, 11])


@pytest.mark.parametrize(
    ("visits", "expected"),
    [
        ([(rectangle(range(20), range(9)), rectangle(range(19, 37), range(9, 50)))], [(1, 2), (2, 2)]),
        # Of every second visit dk and dv are written apart and come as others' do.
        ([(rectangle(range(37), range(37, 50)),), (OWN,)], [(2, 1), (1, 2), (2, 2)]),
        ([tuple(rectangle(range(n, 30 + n), range(37 + n, 38 + n)) for n in range(6))], [(1, 4), (2, 4), (1, 3), (2, 3)]),
    ],
)
def test_gradients_are_summed_up_once(visits, expected, passes):
    check(visits, *random_qkv(2, 37, 50, 4, 2, 16, dtype=torch.float16, seed=4), kernel=get_kernel("aten"))
    assert [(tensors, len(addends)) for tensors, addends in passes] == expected
