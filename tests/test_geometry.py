"""Layouts and tiles against brute force, without torch: every layout, mask, ring size 1 to 6 and small length."""

import time
from itertools import pairwise, product

import numpy as np
import pytest

from ring_attn.layout import LAYOUTS, Contiguous, Part, Striped, Zigzag
from ring_attn.mask import Causal, Documents, Full, KeyPadding, Window
from ring_attn.parts import needed
from ring_attn.plan import Plan
from ring_attn.tiles import Band, count_cells, kv_rows_met, part_positions, tiles

TWO_SECONDS = 2.0


def flat(shard):
    return [position for r in shard for position in r]


def masks(t):
    """(mask, what it allows by its own words, number of batch rows)."""
    document = [0] * (t // 3) + [1] * min(1, t) + [3] * (t - t // 3 - 1)
    lengths = [t // 3, min(1, t), 0, t - t // 3 - 1]
    yield Full(), lambda b, i, j: True, 1
    yield Causal(), lambda b, i, j: j <= i, 1
    yield Window(3), lambda b, i, j: i - 3 <= j <= i, 1
    yield Window(2, 1), lambda b, i, j: i - 2 <= j <= i + 1, 1
    yield Window(None, 2), lambda b, i, j: j <= i + 2, 1
    yield Window(4, None), lambda b, i, j: j >= i - 4, 1
    yield Window(0, 0), lambda b, i, j: i == j, 1
    yield Causal() & Documents(lengths=lengths), lambda b, i, j: j <= i and document[i] == document[j], 1
    yield Window(2) & Documents(cu_seqlens=[0, t // 2, t]), lambda b, i, j: i - 2 <= j <= i and (i < t // 2) == (j < t // 2), 1
    yield KeyPadding([t // 2]), lambda b, i, j: j < t // 2, 1
    keys = [0, t, t // 3]
    yield Causal() & KeyPadding(keys), lambda b, i, j: j <= i and j < keys[b], 3
    starts = [t // 2, t, 0]
    yield KeyPadding(keys, starts=starts), lambda b, i, j: starts[b] <= j < keys[b], 3


def cells(tile):
    """Local (row, column) pairs of a tile, from the meaning of its band."""
    lo, hi = tile.band
    for i in tile.q_rows:
        for j in tile.kv_rows:
            offset = (j - tile.kv_rows.start) - (i - tile.q_rows.start)
            if (lo is None or offset >= lo) and (hi is None or offset <= hi):
                yield i, j


def check_tiles(found, q_shard, kv_shards, seen, batch):
    queries, keys = flat(q_shard), [p for shard in kv_shards for p in flat(shard)]
    covered = []
    for tile in found:
        if tile.batch not in (None, batch):
            continue
        mine = list(cells(tile))
        assert tile.cells == len(mine)
        assert {i for i, _ in mine} == set(tile.q_rows), "a row without a cell"
        assert {j for _, j in mine} == set(tile.kv_rows), "a column without a cell"
        assert all(side is None or side >= 0 for side in tile.window)
        assert flat(tile.positions[0]) == [queries[i] for i in tile.q_rows]
        assert flat(tile.positions[1]) == [keys[j] for j in tile.kv_rows]
        covered += mine
    want = {(i, j) for i, p in enumerate(queries) for j, s in enumerate(keys) if seen(batch, p, s)}
    assert len(covered) == len(set(covered)), "a cell counted twice"
    assert set(covered) == want


def check_rows_met(found, q_shard, kv_layout, mask):
    """`found`: the tiles with the keys of all ranks."""
    met = kv_rows_met(q_shard, kv_layout, mask)
    assert [row for rows in met for row in rows] == sorted({row for tile in found for row in tile.kv_rows})
    assert all(before.stop < rows.start for before, rows in pairwise(met))


def test_every_layout_mask_ring_size_and_small_length():
    start, checked = time.process_time(), 0
    for layout_class in LAYOUTS.values():
        for ring_size in range(1, 7):
            for chunk in range(1, 5 if ring_size < 4 else 3):
                layout = layout_class(ring_size * layout_class.chunks_per_rank * chunk, ring_size)
                shards = [layout.shard(rank) for rank in range(ring_size)]
                for mask, seen, rows in masks(layout.seq_len):
                    mask.check(layout.seq_len, layout.seq_len, rows)
                    for q_shard in shards:
                        for kv_shards in [*([s] for s in shards), shards]:
                            found = tiles(q_shard, kv_shards, mask)
                            for batch in range(rows):
                                check_tiles(found, q_shard, kv_shards, seen, batch)
                                checked += 1
                        check_rows_met(found, q_shard, layout, mask)
    assert checked > 8000
    assert time.process_time() - start < TWO_SECONDS


def cross_masks(t, t_kv):
    """(mask, which cells it allows) for t queries and t_kv keys, by its words."""
    q_document = [0] * (t // 3) + [2] * (t - t // 3)
    kv_document = [0] * (t_kv - t_kv // 2) + [1] + [2] * (t_kv // 2 - 1)
    packed = Documents([t // 3, 0, t - t // 3], kv_lengths=[t_kv - t_kv // 2, 1, t_kv // 2 - 1])
    yield Full(), lambda q, k: True
    yield Causal(), lambda q, k: k <= q
    yield Window(3, 2), lambda q, k: q - 3 <= k <= q + 2
    yield Window(None, t_kv - t) if t_kv >= t else Window(2, None), lambda q, k: k - q <= t_kv - t if t_kv >= t else k >= q - 2
    yield packed, lambda q, k: q_document[q] == kv_document[k]
    yield Causal() & packed, lambda q, k: k <= q and q_document[q] == kv_document[k]
    yield KeyPadding(t_kv - 1, starts=2), lambda q, k: 2 <= k < t_kv - 1


def test_queries_and_keys_of_two_layouts_and_lengths():
    """Cross-attention, where the steps of positions differ: the same promises as above."""
    for q_class, kv_class in product(LAYOUTS.values(), repeat=2):
        for ring_size, chunk, kv_chunk in ((1, 3, 5), (2, 3, 2), (3, 2, 2), (4, 1, 3)):
            layout = q_class(ring_size * q_class.chunks_per_rank * chunk, ring_size)
            kv_layout = kv_class(ring_size * kv_class.chunks_per_rank * kv_chunk, ring_size)
            kv_shards = [kv_layout.shard(rank) for rank in range(ring_size)]
            for mask, seen in cross_masks(layout.seq_len, kv_layout.seq_len):
                mask.check(layout.seq_len, kv_layout.seq_len, 1)
                for rank in range(ring_size):
                    for met in [*([s] for s in kv_shards), kv_shards]:
                        found = tiles(layout.shard(rank), met, mask)
                        check_tiles(found, layout.shard(rank), met, lambda b, q, k, seen=seen: seen(q, k), 0)
                    check_rows_met(found, layout.shard(rank), kv_layout, mask)


@pytest.mark.parametrize("layout_class", LAYOUTS.values())
def test_shards_partition_the_sequence(layout_class):
    for ring_size in range(1, 7):
        layout = layout_class(ring_size * 6, ring_size)
        shards = [flat(layout.shard(rank)) for rank in range(ring_size)]
        assert {len(shard) for shard in shards} == {6}
        assert sorted(p for shard in shards for p in shard) == list(range(layout.seq_len))


def test_known_zigzag_schedule():
    """Own step: plain causal. From an earlier rank: all queries x its front half. From a later one: back half x all keys."""
    layout, half = Zigzag(64, 4), 8
    for rank in range(4):
        for source in range(4):
            [tile] = tiles(layout.shard(rank), [layout.shard(source)], Causal())
            if source == rank:
                assert (tile.q_rows, tile.kv_rows, tile.band) == (range(16), range(16), Band(None, 0))
            elif source < rank:
                assert (tile.q_rows, tile.kv_rows, tile.band) == (range(16), range(half), Band())
            else:
                assert (tile.q_rows, tile.kv_rows, tile.band) == (range(half, 16), range(16), Band())


def test_what_a_zigzag_rank_gets_of_all_others_meets_a_query_row_once():
    """Each half of the queries has one tile, with all that it sees; so no row is attended in two calls, and merged again."""
    for size in range(2, 7):
        layout = Zigzag(8 * size, size)
        for rank in range(size):
            keys = [part_positions(layout, part) for part in needed(layout, layout, Causal(), rank)]
            rows = sorted((tile.q_rows for tile in tiles(layout.shard(rank), keys, Causal())), key=lambda rows: rows.start)
            assert all(before.stop <= after.start for before, after in pairwise(rows)), (size, rank, rows)


def test_known_striped_schedule():
    """Causal where the source is not ahead; else strictly lower: the first query row and the last key drop out."""
    layout = Striped(64, 4)
    for rank in range(4):
        for source in range(4):
            [tile] = tiles(layout.shard(rank), [layout.shard(source)], Causal())
            rows = (range(16), range(16)) if source <= rank else (range(1, 16), range(15))
            assert (tile.q_rows, tile.kv_rows, tile.band) == (*rows, Band(None, 0))


def around(layout, mask):
    """The plan of a ring: whole shards, one source a step."""
    size, everything = layout.ring_size, range(layout.shard_len)
    meets = tuple(tuple((Part((rank - step) % size, everything),) for rank in range(size)) for step in range(size))
    return Plan(layout, layout, mask, meets)


def test_zigzag_and_striped_balance_causal_work():
    for layout, spread in ((Zigzag(256, 4), 0), (Striped(256, 4), 64), (Contiguous(256, 4), 64 * 64)):
        plan = around(layout, Causal())
        for step in (1, 2, 3):
            work = [plan.cells(rank, step) for rank in range(4)]
            assert max(work) - min(work) == spread, (layout, step, work)


def test_windows_shorten_the_tour():
    steps = {left: around(Contiguous(128, 8), Window(left)).steps for left in (0, 1, 16, 17, 127)}
    assert steps == {0: (0,), 1: (0, 1), 16: (0, 1), 17: (0, 1, 2), 127: tuple(range(8))}
    assert around(Zigzag(128, 8), Window(4)).steps == (0, 1, 7)
    assert around(Contiguous(128, 8), Documents(lengths=[16] * 8)).steps == (0,)


def test_count_cells_against_brute_force():
    for num_q in range(1, 7):
        for num_kv in range(1, 7):
            for lo in (None, *range(-8, 8)):
                for hi in (None, *range(-8, 8)):
                    want = sum(
                        (lo is None or j - i >= lo) and (hi is None or j - i <= hi) for i in range(num_q) for j in range(num_kv)
                    )
                    if lo is None or hi is None or lo <= hi + 1:
                        assert count_cells(num_q, num_kv, Band(lo, hi)) == want


def test_many_documents_stay_linear():
    layout = Striped(1 << 16, 4)
    start = time.process_time()
    found = tiles(layout.shard(0), [layout.shard(1)], Causal() & Documents(lengths=[16] * (1 << 12)))
    assert len(found) == 1 << 12
    assert time.process_time() - start < TWO_SECONDS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Zigzag(20, 4),
            r"seq_len 20 must be a multiple of 2 \* ring_size = 8 for the zigzag layout; pad with ring_attn.pad_to",
        ),
        (lambda: Striped(10, 4), r"seq_len 10 must be a multiple of ring_size = 4 for the striped layout"),
        (lambda: Contiguous(10, 0), r"ring_size must be at least 1, got 0"),
        (lambda: Contiguous(8, 4).shard(4), r"rank 4 is not in a ring of 4"),
        (lambda: Window(-1), r"Window left must be at least 0 positions, or None for an open side, got -1"),
        (lambda: Documents(), r"exactly one of lengths=... and cu_seqlens=..."),
        (lambda: Documents(lengths=[3, -1]), r"document lengths must be at least 0, got \[3, -1\]"),
        (lambda: Documents(lengths=[3, 1.5]), r"takes whole numbers, got 1.5"),
        (lambda: Documents(lengths=[3, [4]]), r"not a mixture"),
        (lambda: Documents(cu_seqlens=[1, 3]), r"cu_seqlens must start at 0 and never fall, got \[1, 3\]"),
        (lambda: Documents(lengths=[3, 4]).check(8, 8, 1), r"the documents add up to 7 positions, but seq_len is 8"),
        (lambda: Documents(lengths=[[8], [8]]).check(8, 8, 3), r"given for 2 batch rows, but the batch is 3"),
        (lambda: KeyPadding([-1]), r"KeyPadding lengths must be at least 0, got \[-1\]"),
        (lambda: KeyPadding([[3], [4]]), r"KeyPadding lengths are one int a batch row.*got \[\[3\], \[4\]\]"),
        (lambda: KeyPadding(starts=[]), r"KeyPadding starts are one int a batch row"),
        (lambda: KeyPadding(), r"KeyPadding takes lengths=... \(padding on the right\), starts=..."),
        (lambda: KeyPadding([3, 4], starts=[1, 2, 3]), r"as many starts as lengths, got 3 and 2"),
        (lambda: Documents([3], kv_lengths=[2], kv_cu_seqlens=[0, 2]), r"at most one of kv_lengths=... and kv_cu_seqlens=..."),
        (lambda: Documents([3, 4], kv_lengths=[7]), r"every document needs queries and keys.* got \[2\] and \[1\]"),
        (lambda: Documents([3, 4]).check(7, 8, 1), r"add up to 7 positions, but the keys' length is 8.*need kv_lengths"),
        (lambda: KeyPadding(2.0), r"KeyPadding takes whole numbers, got 2.0"),
        (lambda: KeyPadding(np.ones((2, 4), bool)), r"KeyPadding lengths are numbers of keys, got a mask; .*=mask\.sum\(1\)"),
        (lambda: Window(1.5), r"Window takes whole numbers, got 1.5"),
        (lambda: Window(1, "2"), r"Window takes whole numbers, got '2'"),
        (lambda: KeyPadding([9]).check(8, 8, 1), r"KeyPadding lengths \[9\] must not exceed the number of keys, 8"),
        (lambda: (KeyPadding([1, 2]) & KeyPadding([1, 2, 3])).rules(), r"masks for 2 and for 3 batch rows cannot be combined"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_of_another_library_are_plain_ints():
    assert KeyPadding(np.int64(3)) == KeyPadding(np.array(3)) == KeyPadding([np.array(3)]) == KeyPadding(3)
    assert Documents(np.array([[2, 3], [4, 1]])) == Documents([[np.int32(2), 3], np.array([4, 1])])
    assert repr(Window(np.int64(3), np.array(1))) == "Window(left=3, right=1)"


def test_masks_combine_and_compare_by_value():
    assert Causal() & Window(3) == Causal() & Window(3)
    assert KeyPadding(8, starts=[1, 2]) == KeyPadding([8, 8], starts=[1, 2])
    assert hash(Documents(lengths=[2, 3])) == hash(Documents(cu_seqlens=[0, 2, 5]))
    [rule] = (Causal() & Window(5, 3) & Documents(lengths=[2, 6]) & Documents(lengths=[4, 4]) & KeyPadding([7])).rules()
    assert (rule.left, rule.right, rule.first_key, rule.num_keys) == (5, 0, 0, 7)
    assert rule.documents == (((2, 8), (2, 8)), ((4, 8), (4, 8)))
