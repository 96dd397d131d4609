"""Every trimmed tile up to 7 x 7 cut for the libraries: the same cells, each once, in pieces that a library can express."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations

import pytest

from ring_attn.kernels import get_kernel
from ring_attn.kernels.flash import Flash4Kernel
from ring_attn.kernels.split import met_once, share_no_keys, squares, strips, windows
from ring_attn.tiles import Band, Tile

SIZE = 7
FLASH4 = Flash4Kernel()
Q_START, KV_START = 3, 20  # so that rows counted from a corner are not rows of the shard


def cells(tile: Tile) -> set[tuple[int, int]]:
    """The allowed (query row, KV row) pairs, from what `Band` promises."""
    lo, hi = tile.band
    return {
        (q, kv)
        for i, q in enumerate(tile.q_rows)
        for j, kv in enumerate(tile.kv_rows)
        if (lo is None or lo <= j - i) and (hi is None or j - i <= hi)
    }


def is_trimmed(tile: Tile) -> bool:
    """Whether every row and every column has an allowed cell."""
    found = cells(tile)
    return {q for q, _ in found} == set(tile.q_rows) and {kv for _, kv in found} == set(tile.kv_rows)


@cache
def trimmed_tiles() -> list[Tile]:
    """All of them, with every bound that is not idle."""
    found = []
    for num_q in range(1, SIZE + 1):
        for num_kv in range(1, SIZE + 1):
            q_rows, kv_rows = range(Q_START, Q_START + num_q), range(KV_START, KV_START + num_kv)
            for lo in (None, *range(2 - num_q, num_kv)):
                for hi in (None, *range(1 - num_q, num_kv - 1)):
                    found.append(Tile(q_rows, kv_rows, Band(lo, hi), ((), ()), batch=1))
    return [tile for tile in found if is_trimmed(tile)]


def check_cells(tile: Tile, pieces: list[Tile]) -> None:
    """The pieces hold the tile's cells, each once, and are trimmed tiles of its batch row."""
    covered = [cell for piece in pieces for cell in cells(piece)]
    assert sorted(covered) == sorted(cells(tile)), (tile, pieces)
    assert all(is_trimmed(piece) and piece.batch == tile.batch for piece in pieces), (tile, pieces)


def as_flash_attn_2_reads(piece: Tile, max_kv: int) -> set[tuple[int, int]]:
    """The cells that flash-attn 2 attends, given the piece's window and the longest KV of its call.

    Sides of max_kv or more are open; an open side beside a bounded one is max_kv; rows and columns are counted from the
    bottom-right corner.
    """
    left, right = (-1 if side is None else side for side in piece.window)
    assert min(left, right) >= -1, piece
    left, right = (-1 if side >= max_kv else side for side in (left, right))
    if left < 0 and right < 0:
        left = right = 10**6
    left, right = (max_kv if side < 0 else side for side in (left, right))
    last_q, last_kv = piece.q_rows[-1], piece.kv_rows[-1]
    offsets = {(q, kv): (kv - last_kv) - (q - last_q) for q in piece.q_rows for kv in piece.kv_rows}
    return {cell for cell, offset in offsets.items() if -left <= offset <= right}


def test_the_tiles_are_many_and_of_all_kinds():
    found = trimmed_tiles()
    # Of the bounds of a trimmed m x n tile min(m, n) are not idle, counting None, below and above.
    assert len(found) == sum(min(m, n) ** 2 for m in range(1, SIZE + 1) for n in range(1, SIZE + 1))
    assert {(t.band.lo is None, t.band.hi is None) for t in found} == {(a, b) for a in (True, False) for b in (True, False)}


def test_windows_are_taken_at_their_word():
    """In a dense call, and in packs beside longer rectangles."""
    for tile in trimmed_tiles():
        pieces = list(windows(tile))
        check_cells(tile, pieces)
        assert len(pieces) <= 3, tile
        for piece in pieces:
            for max_kv in range(len(piece.kv_rows), 2 * SIZE + 2):
                assert as_flash_attn_2_reads(piece, max_kv) == cells(piece), (tile, piece, max_kv)


def test_a_window_that_is_taken_at_its_word_is_not_cut():
    for tile in trimmed_tiles():
        whole = as_flash_attn_2_reads(tile, len(tile.kv_rows)) == cells(tile)
        # A right side of just Sk is fine beside a bounded left one, and cut all the same.
        whole = whole and tile.window[1] != len(tile.kv_rows)
        assert whole == (list(windows(tile)) == [tile]), tile


def test_squares_are_full_or_causal():
    for tile in trimmed_tiles():
        if tile.band.lo is not None:
            continue
        pieces = list(squares(tile))
        check_cells(tile, pieces)
        causal = [piece for piece in pieces if piece.band.hi is not None]
        assert len(causal) <= 1, tile
        assert len(pieces) <= 3, tile
        assert all(piece.band.lo is None for piece in pieces)
        assert all(piece.band.hi == 0 and len(piece.q_rows) == len(piece.kv_rows) for piece in causal), (tile, pieces)


def test_squares_refuse_a_lower_bound():
    tile = Tile(range(4), range(4), Band(-1, 0), ((), ()))
    with pytest.raises(ValueError, match=r"lower bound, Band\(lo=-1, hi=0\), is not made of full rectangles"):
        list(squares(tile))


@pytest.mark.parametrize("height", [1, 2, 3, SIZE])
def test_strips_are_no_higher_than_asked(height):
    """All but the last have just that height, and no strip has a column that its rows do not see."""
    for tile in trimmed_tiles():
        pieces = list(strips(tile, height))
        check_cells(tile, pieces)
        heights = [len(piece.q_rows) for piece in pieces]
        assert all(h == height for h in heights[:-1]), tile
        assert heights[-1] <= height, tile


def rectangle(q_rows: range, kv_rows: range, batch: int | None = None) -> Tile:
    return Tile(q_rows, kv_rows, Band(), ((), ()), batch)


def test_rows_of_a_zigzag_rank_are_met_once():
    """Of eight halves, the rank that holds the third and the sixth: the first two are seen by all of its queries."""
    visit = rectangle(range(8), range(16)), rectangle(range(8, 16), range(32))
    assert met_once(visit) == (rectangle(range(16), range(16)), rectangle(range(8, 16), range(16, 32)))
    assert met_once(visit[::-1]) == met_once(visit), "in whatever order they come"


@pytest.mark.parametrize("seed", range(200))
def test_tiles_that_meet_keys_once_have_the_same_cells(seed):
    chance, found = random.Random(seed), []
    for _ in range(chance.randint(2, 5)):
        rows = [sorted(chance.sample(range(12), 2)) for _ in range(2)]
        one = rectangle(*(range(*ends) for ends in rows))
        found += [one] if all(cells(one).isdisjoint(cells(tile)) for tile in found) else []
    cut = met_once(tuple(found))
    covered = [cell for tile in cut for cell in cells(tile)]
    assert sorted(covered) == sorted(cell for tile in found for cell in cells(tile))
    assert len(cut) <= len(found) and (share_no_keys(cut) or cut == tuple(found))


def test_tiles_that_meet_keys_once_are_no_more_than_before():
    """Three tiles of a staircase from above, which cut by KV rows would be five."""
    stairs = [(range(2), range(6)), (range(4, 6), range(2, 8)), (range(8, 10), range(4, 9))]
    visit = tuple(rectangle(*rows) for rows in stairs)
    assert not share_no_keys(visit) and met_once(visit) is visit


def test_only_open_tiles_of_all_batch_rows_are_cut_by_keys():
    one, other = rectangle(range(8), range(16)), rectangle(range(8, 16), range(32))
    banded = Tile(range(8, 16), range(32), Band(hi=26), ((), ()))
    of_row = rectangle(range(8, 16), range(32), batch=1)
    for visit in ((one, banded), (one, of_row), (other,)):
        assert met_once(visit) is visit


def test_keys_are_shared_by_tiles_of_one_batch_row():
    all_rows, *of_rows = (rectangle(range(2), range(4), batch) for batch in (None, 0, 1))
    behind = rectangle(range(2), range(4, 6))
    assert share_no_keys(of_rows) and share_no_keys([*of_rows, behind]) and share_no_keys([])
    assert not any(share_no_keys([behind, all_rows, one]) for one in of_rows)
    assert not any(share_no_keys(pair) for pair in combinations([all_rows] * 2 + [of_rows[0]], 2))


def test_more_calls_are_not_made_for_it():
    """Two pairs that went in two packs, cut in a way that takes three: calls count, whatever a library puts together."""
    visit = rectangle(range(8), range(16)), rectangle(range(8, 16), range(32))
    assert met_once(visit, lambda tiles: 2 if tiles == visit else 3) is visit


def test_many_tiles_are_not_cut():
    stairs = tuple(rectangle(range(n, n + 1), range(n + 1)) for n in range(32))
    assert met_once(stairs) != stairs and share_no_keys(met_once(stairs))
    more = (*stairs, rectangle(range(32, 33), range(33)))
    assert met_once(more) is more


def test_packs_are_not_cut_into_more():
    """Three tiles in two packs, which cut would be three in three."""
    visit = tuple(rectangle(*rows) for rows in [(range(4, 8), range(6, 8)), (range(3, 4), range(8)), (range(1, 3), range(1))])
    assert len(met_once(visit)) == 3 and share_no_keys(met_once(visit)) and not share_no_keys(visit)
    assert met_once(visit, FLASH4.number_of_calls) is visit and not FLASH4.rounds("cuda", visit)
    assert get_kernel("cudnn").rounds("cuda", visit)
