"""The order in which the Gluon kernel does its items and walks an entry: its own functions, on Python's integers."""

from __future__ import annotations

from itertools import product
from types import FunctionType, SimpleNamespace

import pytest

pytest.importorskip("triton.experimental.gluon")
from ring_attn.kernels import gluon_work
from ring_attn.kernels.gluon_work import Span


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
    return FunctionType(function.fn.__code__, {"gl": gl, "Walk": gluon_work.Walk})


walk_of, place_of = _plain(gluon_work.walk_of), _plain(gluon_work.place_of)


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


@pytest.mark.parametrize("items", [1, 5, 6, 7, 12, 40])
@pytest.mark.parametrize("programs", [1, 3, 6])
def test_laps_do_every_item_once_and_share_the_work(items, programs):
    queue, done = SimpleNamespace(items=items), []
    for program in range(min(programs, items)):
        gl = SimpleNamespace(
            where=lambda condition, a, b: a if condition else b,
            program_id=lambda axis, program=program: program,
            num_programs=lambda axis: min(programs, items),
        )
        laps_of, item_of = (FunctionType(f.fn.__code__, {"gl": gl}) for f in (gluon_work.laps_of, gluon_work.item_of))
        done.append([item for lap in range(laps_of(queue)) if (item := item_of(lap)) < items])
        # Only the last lap may hold too many, so that a barrier's phase is that of the lap.
        assert done[-1] == [item_of(lap) for lap in range(len(done[-1]))]
    assert sorted(item for mine in done for item in mine) == list(range(items))
    work = [sum(items - item for item in mine) for mine in done]
    assert max(work) - min(work) <= items


def test_every_head_has_every_program():
    table, found = SimpleNamespace(), []
    queue = SimpleNamespace(table=table, num_q=100, programs=5, items=40, group=2, heads=8)
    names = {
        "gl": SimpleNamespace(minimum=min),
        "Work": gluon_work.Work,
        "_program_work": lambda table, program: (program, 0, 0, 8),
    }
    work_of = FunctionType(gluon_work.work_of.fn.__code__, names)
    for item in range(queue.items):
        work = work_of(queue, item, 32)
        assert work.kv_head == work.head // 2
        found.append((work.head, work.block_start // 32))
    assert sorted(found) == [(head, program) for head in range(8) for program in range(5)]
    # The heads of one block of rows stand side by side.
    assert [program for _, program in found[:8]] == [0] * 8
