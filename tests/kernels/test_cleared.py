"""Tiles under a mask's functions, cut by blocks: the same cells, none asked about in vain, and the Triton kernel with them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import ring_attn as ra
from ring_attn.kernels.cleared import cleared
from ring_attn.layout import LAYOUTS
from ring_attn.tiles import tiles
from tests.support import FLOAT32_LIMIT, random_qkv, rel_error, run_kernel, truth
from tests.test_mask_mod import COMPANIONS, EXAMPLES, B, H, T

Q = torch.empty(B, T, H, 4)
BLOCK = 4


def cells(tile):
    """The tile's cells by its band, as shard rows, with their positions."""
    q_pos, kv_pos = ([x for part in parts for x in part] for parts in tile.positions)
    lo, hi = (-T if tile.band.lo is None else tile.band.lo), (T if tile.band.hi is None else tile.band.hi)
    for i, j in product(range(len(tile.q_rows)), range(len(tile.kv_rows))):
        if lo <= j - i <= hi:
            yield (tile.q_rows[i], tile.kv_rows[j]), (q_pos[i], kv_pos[j])


def check(whole, sees):
    """How many cells are left out. The lists of `whole` hold its allowed ones once, each where it stood."""
    parts = cleared(whole, Q, BLOCK)
    placed, seen = {}, set()
    for tile in whole:
        for rows, positions in cells(tile):
            for b, h in product(range(B) if tile.batch is None else [tile.batch], range(H)):
                placed[b, h, *rows] = positions
    left = {cell for cell, (q, k) in placed.items() if sees(*cell[:2], q, k)}
    for part in parts:
        assert len({tile.predicates for tile in part}) <= 1
        for tile in part:
            # Trimmed, as kernels take them.
            assert {rows for rows, _ in cells(tile)} and {i for (i, _), _ in cells(tile)} == set(tile.q_rows)
            for rows, positions in cells(tile):
                for b, h in product(range(B) if tile.batch is None else [tile.batch], range(H)):
                    cell = b, h, *rows
                    assert placed[cell] == positions and cell not in seen
                    assert tile.predicates or cell in left
                    seen.add(cell)
    assert left <= seen
    return len(placed) - len(seen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_function_and_layout(name, layout):
    (fn, sees), shards = EXAMPLES[name], [LAYOUTS[layout](T, 2).shard(rank) for rank in range(2)]
    for mask, shard in zip((ra.Causal(), ra.Window(6, 3)), shards, strict=True):
        check(tiles(shard, shards, mask & ra.MaskMod(fn)), sees)


@pytest.mark.parametrize("name", ["documents, window", "padding", "another function"])
def test_joined_with_other_masks(name):
    (fn, sees), (mask, also) = EXAMPLES["by both"], COMPANIONS[name]
    check(tiles((range(T),), [(range(T),)], ra.MaskMod(fn) & mask), lambda b, h, q, k: sees(b, h, q, k) and also(q, k))


def test_what_is_hidden_is_left_out_and_what_is_whole_is_not_asked_about():
    """Blocks of 8 x 8 on a diagonal, in blocks of 4: all is decided. A prefix of 6 leaves blocks 4 to 7 to be asked about."""
    for fn, hidden, asked in (
        (lambda b, h, q, k: q // 8 == k // 8, T * T - 8 * T, 0),
        (lambda b, h, q, k: k < 6, T * T - 8 * T, 4 * T),
        (lambda b, h, q, k: (q + k + h) % 2 == 0, 0, T * T),
        (lambda b, h, q, k: k < 0, T * T, 0),
    ):
        whole = tiles((range(T),), [(range(T),)], ra.MaskMod(fn))
        assert check(whole, lambda *x, fn=fn: bool(fn(*x))) == hidden * B * H
        parts = cleared(whole, Q, BLOCK)
        assert sum(t.cells for part in parts for t in part if t.predicates) == asked
        assert parts and cleared(whole, Q, BLOCK) is parts


def test_a_function_that_reads_something_else_is_asked_again():
    table = torch.zeros(T, dtype=torch.bool)
    whole = tiles((range(T),), [(range(T),)], ra.MaskMod(lambda b, h, q, k: table[k]))
    assert cleared(whole, Q, BLOCK) == ((),)
    table[:BLOCK] = True
    assert [tile.kv_rows for part in cleared(whole, Q, BLOCK) for tile in part] == [range(BLOCK)]


def test_tiles_without_functions_stay_as_they_are():
    whole = tiles((range(T),), [(range(T),)], ra.Causal())
    assert cleared(whole, Q, BLOCK)[0] is whole


@pytest.mark.parametrize("visits", [1, 2])
@pytest.mark.parametrize("name", ["SEES_BLOCKS", "SEES_PREFIX", "SEES_BY_HEAD"])
def test_the_triton_kernel_with_small_blocks(name, visits, monkeypatch):
    functions = pytest.importorskip("tests.kernels.triton_functions")
    from ring_attn.kernels.triton_blocks import Config, Configs
    from ring_attn.kernels.triton_kernel import TritonKernel, interpreted

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not interpreted():
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    kernel, launches = TritonKernel(Configs(*[Config(16, 16, 4, 1)] * 3), block=16), []
    forward = TritonKernel._forward
    monkeypatch.setattr(TritonKernel, "_forward", lambda self, *x: launches.append(x[3]) or forward(self, *x))
    rows, mask = range(64), getattr(functions, name)
    keys = [rows[at * 64 // visits : (at + 1) * 64 // visits] for at in range(visits)]
    lists = [tiles((rows,), [(part,)], mask & ra.Window(50, 20)) for part in keys]
    inputs = random_qkv(2, 64, 64, 2, 1, 16, seed=3)
    got = run_kernel(kernel, *(x.to(device) for x in inputs), lists, scale=0.3)
    for key, ref in truth(*inputs, lists, scale=0.3).items():
        assert rel_error(got[key].cpu(), ref) < FLOAT32_LIMIT, key
    # What is asked about, and what is not: a launch each, of one kind.
    assert visits < len(launches) <= 2 * visits
    assert all(len({tile.predicates for tile in launched}) == 1 for launched in launches)
