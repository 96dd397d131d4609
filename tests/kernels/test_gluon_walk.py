"""The order in which the Gluon kernel walks an entry: its own functions, on Python's integers. Needs no GPU."""

from __future__ import annotations

from itertools import product
from types import FunctionType, SimpleNamespace

import pytest

pytest.importorskip("triton.experimental.gluon")
from ring_attn.kernels import gluon_attend
from ring_attn.kernels.gluon_attend import Span


class Int(int):
    """An integer that divides as the kernel's do: towards zero."""

    def __floordiv__(self, other):
        return Int(int(self / other))

    def __add__(self, other):
        return Int(int(self) + other)

    def __sub__(self, other):
        return Int(int(self) - other)


def _plain(function):
    """A kernel's function of scalars as one of Python."""
    gl = SimpleNamespace(maximum=max, minimum=min, where=lambda condition, a, b: a if condition else b)
    return FunctionType(function.fn.__code__, {"gl": gl, "Walk": gluon_attend.Walk})


walk_of, place_of = _plain(gluon_attend.walk_of), _plain(gluon_attend.place_of)


def _spans():
    for start, length, left, right in product((0, 3, 40), (1, 3, 4, 5, 8, 11, 16, 17), range(0, 20, 3), range(0, 20, 3)):
        stop = start + length
        yield start, stop, min(start + left, stop), max(stop - right, start)


@pytest.mark.parametrize("block", [4, 8])
def test_every_row_of_a_span_is_new_once_and_clear_blocks_are_clear(block):
    for start, stop, clear_start, clear_stop in _spans():
        span = Span(None, None, Int(start), Int(stop), Int(clear_start), Int(clear_stop))
        walk = walk_of(span, block)
        seen = []
        for step in range(walk.count):
            place, limit = place_of(step, span, walk, block)
            new = range(place, min(place + block, limit, stop))
            seen += new
            assert place >= start
            if stop - start >= block:
                assert place + block <= stop, (span, walk, step)
            else:
                assert walk.count == 1
            if step >= walk.masked:
                assert clear_start <= place and place + block <= clear_stop and len(new) == block, (span, walk, step)
        assert sorted(seen) == list(range(start, stop)), (span, walk)
        # All that can go without a mask does, but for the first block.
        clear = [stop - (i + 1) * block for i in range(1, walk.count)]
        clear = [place for place in clear if place >= clear_start and place + block <= clear_stop]
        assert walk.count - walk.masked == len(clear)


def test_an_empty_span_is_one_masked_block():
    assert walk_of(Span(None, None, Int(7), Int(5), Int(9), Int(9)), 4) == (1, 1, 1)
