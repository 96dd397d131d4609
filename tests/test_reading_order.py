"""In which order ranks read from each other, against how long it would take at best."""

import random

import pytest

from ring_attn.comm.reading_order import played, reading_orders
from ring_attn.exchange.pull import PullExchange
from ring_attn.layout import LAYOUTS
from ring_attn.mask import Causal


def wanted(layout, size, home=False):
    """Rows that each rank wants of each other, in shards' twelfths; `home`: of what it pushes back."""
    of = LAYOUTS[layout](12 * size, size)
    parts = PullExchange().meets(of, of, Causal(), None)[1]
    rows = [[sum(len(part.rows) for part in mine if part.rank == source) for source in range(size)] for mine in parts]
    return [list(column) for column in zip(*rows, strict=True)] if home else rows


def ends(rows):
    """When each rank has read, in the orders that were found."""
    orders = reading_orders(rows)
    found, when = played(rows, lambda rank, source, *_: (orders[rank].index(source),))
    assert found == orders
    return when


def bound(rows):
    return max(map(sum, (*rows, *zip(*rows, strict=True))))


def test_two_that_read_from_one_share_it():
    assert played([[0, 0, 6], [0, 0, 9], [0, 0, 0]], lambda *_: (0,)) == ([[2], [2], []], [12.0, 15.0, 0.0])


@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_no_rank_of_a_contiguous_ring_waits_longer_than_it_reads(size, home):
    rows = wanted("contiguous", size, home)
    assert ends(rows) == list(map(sum, rows))


@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize(("size", "best", "most"), [(4, 36, 36), (8, 84, 102)])
def test_a_zigzag_ring_comes_near_the_bound(size, best, most, home):
    rows = wanted("zigzag", size, home)
    assert bound(rows) == best
    assert max(ends(rows)) <= most, "beginning with the next rank it takes 48 and 119"


@pytest.mark.parametrize("size", [1, 3, 5])
def test_every_source_is_read_once_and_within_half_more_than_the_bound(size):
    chance = random.Random(size)
    for _ in range(20):
        rows = [[chance.randint(0, 100) * (rank != source) for source in range(size)] for rank in range(size)]
        orders = reading_orders(rows)
        assert [sorted(order) for order in orders] == [[n for n, count in enumerate(of) if count] for of in rows]
        assert bound(rows) - 1e-6 <= max(ends(rows)) <= 1.5 * bound(rows)
