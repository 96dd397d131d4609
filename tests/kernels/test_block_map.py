"""Which blocks of a tile hold allowed cells, against asking every cell in Python; and what is noticed of a function."""

from __future__ import annotations

from functools import partial
from itertools import product
from types import FunctionType, SimpleNamespace

import pytest
import torch

import ring_attn as ra
from ring_attn.kernels import block_map as maps
from ring_attn.kernels.block_map import ALL, NONE, SOME, block_map, joined_block_map
from ring_attn.kernels.functions import depends_on, sameness, versions
from ring_attn.layout import LAYOUTS
from ring_attn.tiles import Band, Tile, tiles
from tests.kernels.comparison import LargestTensor
from tests.test_mask_mod import COMPANIONS, EXAMPLES, B, H, T

CPU = torch.device("cpu")


def by_hand(tile, sees, b, h, block):
    """The map of one batch row and head as rows of numbers."""
    q_pos, kv_pos = ([x for part in parts for x in part] for parts in tile.positions)
    lo, hi = (-T if tile.band.lo is None else tile.band.lo), (T if tile.band.hi is None else tile.band.hi)

    def of(i0, j0):
        cells = [
            lo <= j - i <= hi and bool(sees(b, h, q_pos[i], kv_pos[j]))
            for i, j in product(range(len(q_pos))[i0 : i0 + block], range(len(kv_pos))[j0 : j0 + block])
        ]
        return ALL if all(cells) else SOME if any(cells) else NONE

    return [[of(i, j) for j in range(0, len(kv_pos), block)] for i in range(0, len(q_pos), block)]


def check(tile, sees, block, batch=B, heads=H):
    found, joined = block_map(tile, batch, heads, block, CPU), joined_block_map(tile, batch, heads, block, CPU)
    assert found.dtype == joined.dtype == torch.int8
    rows = [tile.batch] if tile.batch is not None else range(batch)
    first = tile.predicates[0].first_head if tile.predicates else 0
    want = torch.tensor([[by_hand(tile, sees, b, first + h, block) for h in range(heads)] for b in rows])
    assert found.shape[0] in (1, len(rows)) and found.shape[1] in (1, heads)
    assert torch.equal(found.expand(want.shape).long(), want)
    assert torch.equal(joined.long(), (want.amax((0, 1)) > NONE).long() + (want.amin((0, 1)) == ALL))


@pytest.fixture(params=[(5, 1 << 22), (7, 1), (4, 70)], ids=["at once", "a block at a time", "some blocks at a time"])
def block(request, monkeypatch):
    monkeypatch.setattr(maps, "CELLS", request.param[1])
    return request.param[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_function_and_layout(name, layout, block):
    (fn, sees), shards = EXAMPLES[name], [LAYOUTS[layout](T, 2).shard(rank) for rank in range(2)]
    for mask, shard in zip((ra.Causal(), ra.Window(6, 3)), shards, strict=True):
        for tile in tiles(shard, shards, mask & ra.MaskMod(fn)):
            check(tile, sees, block)


@pytest.mark.parametrize("name", ["documents, window", "padding", "another function"])
def test_joined_with_other_masks(name, block):
    (fn, sees), (mask, also) = EXAMPLES["by both"], COMPANIONS[name]
    for tile in tiles((range(T),), [(range(T),)], ra.MaskMod(fn) & mask):
        # What is no function was cut into tiles and bands, and holds in all of their cells.
        check(tile, lambda b, h, q, k: sees(b, h, q, k) and also(q, k), block)


def test_tiles_of_one_batch_row(block):
    fn, sees = EXAMPLES["by row"]
    found = tiles((range(T),), [(range(T),)], ra.MaskMod(fn) & ra.Documents(lengths=[[9, 15], [20, 4]]))
    assert {tile.batch for tile in found} == {0, 1}
    for tile in found:
        check(tile, sees, block)


def test_heads_are_counted_from_the_first(block):
    fn, sees = EXAMPLES["by head"]
    (tile,) = tiles((range(T),), [(range(T),)], ra.MaskMod(fn).from_head(2))
    check(tile, sees, block, heads=2)


@pytest.mark.parametrize(("num_q", "num_kv"), [(1, 1), (1, 17), (17, 1), (16, 8), (13, 22)])
def test_bands_without_functions(num_q, num_kv):
    for lo, width, block in product([None, *range(-num_q - 1, num_kv + 1, 3)], [None, 0, 1, 7], (1, 4, 8)):
        band = Band(lo, None if width is None else (lo or 0) + width)
        check(Tile(range(num_q), range(num_kv), band, ((range(num_q),), (range(num_kv),))), lambda *_: True, block)


def test_what_a_function_does_not_depend_on_is_asked_once():
    shapes = {"prefix": (1, 1), "document": (1, 1), "by row": (B, 1), "by head": (1, H), "by both": (B, H), "nothing": (1, 1)}
    for name, shape in shapes.items():
        fn = EXAMPLES[name][0]
        (tile,) = tiles((range(T),), [(range(T),)], ra.MaskMod(fn))
        assert depends_on(fn, CPU) == (shape[0] > 1, shape[1] > 1)
        assert tuple(block_map(tile, B, H, 8, CPU).shape) == (*shape, 3, 3)


def test_cells_that_the_band_hides_are_not_asked_about(monkeypatch):
    monkeypatch.setattr(maps, "CELLS", 1)
    asked = []

    def fn(b, h, q, k):
        asked.append(1)
        return q // 4 == k // 4

    (tile,) = tiles((range(64),), [(range(64),)], ra.Causal() & ra.MaskMod(fn))
    block_map(tile, 1, 1, 4, CPU)
    assert len(asked) == 16 * 17 // 2 + 2, "every block on or below the diagonal, and once for each of b and h"


def test_memory_is_linear(monkeypatch):
    monkeypatch.setattr(maps, "CELLS", 1 << 10)
    t, block = 512, 32
    (tile,) = tiles((range(t),), [(range(t),)], ra.MaskMod(lambda b, h, q, k: (q - k) % 5 == 0))
    with LargestTensor() as largest:
        block_map(tile, 2, 2, block, CPU)
    assert largest.numel <= block * t


TABLE, LIMIT, REACH = torch.arange(4), 3, SimpleNamespace(far=5)


def names_globals(b, h, q, k):
    return (TABLE[h] < LIMIT) & (q >= k)


def reads_an_object(b, h, q, k):
    return (q - k).abs() < REACH.far


def near(reach, *tables):
    first, *rest = tables or (torch.zeros(3),)
    second = rest[0] if rest else first
    return lambda b, h, q, k: ((q - k).abs() < reach) & (first[h] == second[h])


def test_functions_are_the_same_that_differ_in_the_values_of_tensors_alone():
    assert sameness(near(2)) == sameness(near(2)) and hash(sameness(near(2))) == hash(sameness(near(2)))
    two, three = torch.zeros(2), torch.zeros(3)
    others = [near(3), near(2.0), near(True), near(2, two), near(2, three, torch.zeros(3)), near(2, three.int())]
    others += [near(SimpleNamespace()), lambda b, h, q, k: (lambda x: x > 0)(q), partial(near(2), 0), REACH]
    told = [sameness(near(2)), *map(sameness, others)]
    assert len(set(told)) == len(told)
    assert sameness(near(2, three, two)) != sameness(near(2, three, three))


def test_a_function_that_reads_more_is_like_itself_alone(monkeypatch):
    for fn in (reads_an_object, REACH.__init__, partial(near(2), 0)):
        copy = FunctionType(fn.__code__, fn.__globals__) if isinstance(fn, FunctionType) else partial(fn)
        assert sameness(fn) == sameness(fn) != sameness(copy)
    before = sameness(names_globals)
    monkeypatch.setitem(globals(), "LIMIT", 2)
    assert sameness(names_globals) != before


def test_writes_to_captured_tensors_are_counted():
    before, table = versions(names_globals), torch.zeros(3)
    fn = near(2, table)
    assert versions(fn) == versions(fn)
    counts = versions(fn)
    table[0] = 1
    assert versions(fn) != counts and versions(names_globals) == before
    TABLE.add_(0)
    assert versions(names_globals) != before
    with torch.inference_mode():
        assert versions(near(2, torch.zeros(3))) == (0, 0)
