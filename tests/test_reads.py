"""Which rows come home where."""

import torch

from ring_attn.comm.reads import arrivals


def test_what_comes_home_to_a_row_is_added_in_the_order_in_which_it_comes():
    places = arrivals([range(4), range(2, 6), range(4, 6), range(1)], 1)[0]
    assert places.tolist() == [[0, 10, -1], [1, -1, -1], [2, 4, -1], [3, 5, -1], [-1, 6, 8], [-1, 7, 9]]
    assert places.dtype == torch.int32


def test_batch_rows_come_one_after_the_other():
    assert arrivals([range(2, 4), range(1)], 2).tolist() == [[[2], [-1], [0], [1]], [[5], [-1], [3], [4]]]


def test_homes_with_no_row_in_common_take_one_column():
    assert arrivals([range(2, 4), range(2), range(5, 6)], 1)[0].tolist() == [[2], [3], [0], [1], [-1], [4]]
