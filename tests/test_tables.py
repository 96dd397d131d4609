"""Tables on devices: who keeps them, and where they are made while something is captured."""

import gc
import threading
import weakref
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from ring_attn import tables
from ring_attn.comm.replay import Graph
from ring_attn.kernels import packs, triton_blocks
from ring_attn.tables import held, hold, kept_tables, made_beside
from ring_attn.tiles import Band, Tile
from tests.test_replay import Redone


class Table:
    """Something that can be seen to go."""


@pytest.fixture
def capture(monkeypatch):
    """Whether something is captured on the current stream, as the test says; what is done about other streams."""
    state = SimpleNamespace(on=False, done=[])
    turns = count()

    def stream():
        """The first of two is captured as well."""
        captured = next(turns) % 2 == 0
        return SimpleNamespace(captured=captured, synchronize=lambda: state.done.append(f"waited, captured: {captured}"))

    @contextmanager
    def within(given):
        before, state.on = state.on, given.captured
        yield
        state.on = before

    @contextmanager
    def allowed():
        yield state.done.append("allowed")
        state.done.append("as before")

    monkeypatch.setattr(tables, "capturing", lambda: state.on)
    monkeypatch.setattr(tables, "beside_captures", allowed)
    monkeypatch.setattr(tables, "_for_good", {})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    return state


def gone(ref):
    gc.collect()
    return ref() is None


def test_a_cache_keeps_the_latest():
    made = []

    @kept_tables(1)
    def make(number):
        made.append(number)
        return Table()

    first = make(1)
    assert make(1) is first and made == [1]
    first = weakref.ref(first)
    make(2)
    assert gone(first) and make(1) is not None and made == [1, 2, 1]
    make.cache_clear()
    make(1)
    assert made == [1, 2, 1, 1]


def test_a_graph_of_ours_holds_what_it_met_and_no_longer_than_it_lives(capture):
    make = kept_tables(1)(lambda number: Table())
    before = weakref.ref(make(1))
    capture.on = True
    with held() as met:
        first, second = weakref.ref(make(1)), weakref.ref(make(2))
    capture.on = False
    make(3)
    assert first is before and met == [first(), second()] and not gone(first) and not tables._for_good
    met.clear()
    assert gone(first) and gone(second)


def test_what_is_captured_elsewhere_stays(capture):
    make = kept_tables(1)(lambda number: Table())
    capture.on = True
    first = weakref.ref(make(1))
    make(1)
    capture.on = False
    make(2)
    assert not gone(first) and list(tables._for_good.values()) == [first()]
    with held():
        pass
    capture.on = True
    hold(make(2))
    assert len(tables._for_good) == 2, "after a capture of ours"


def test_another_thread_captures_for_itself(capture):
    capture.on = True
    with held() as met:
        thread = threading.Thread(target=lambda: hold("theirs"))
        thread.start()
        thread.join()
        hold("mine")
    assert met == ["mine"] and list(tables._for_good.values()) == ["theirs"]


def test_amid_a_capture_tables_are_made_beside_it_and_waited_for(capture):
    make = kept_tables(4)(lambda number: capture.done.append(f"made {number}, captured: {capture.on}"))
    make(1)
    capture.on = True
    make(1)
    make(2)
    assert capture.done == [
        "made 1, captured: False",
        *("allowed", "made 2, captured: False", "waited, captured: False", "as before"),
    ]
    capture.done.clear()
    with made_beside():
        assert not capture.on
    assert capture.done == ["allowed", "waited, captured: False", "as before"]


def test_the_tables_of_kernels_are_such(capture):
    """The caches that hold tensors on devices."""
    device = torch.device("cpu")
    tiles = (Tile(range(4), range(6), Band(), ((range(4),), (range(6),))),)
    capture.on = True
    with held() as met:
        table = triton_blocks._make(triton_blocks.TableKey(tiles, False, 8, 4, 1, device, 0, 9, False, 0))
        pack = packs.make_pack(tiles, 1, 4, 6, device)
    assert len(met) == 2 and met[0] is table and met[1] is pack


def test_which_stream_a_table_is_for(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True, get_device=lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    found = []
    for captured in (False, True):
        monkeypatch.setattr(tables, "capturing", lambda captured=captured: captured)
        found.append(triton_blocks._stream_of(on_gpu))
    with held():
        # On the stream of a capture of ours the call was made just before.
        found.append(triton_blocks._stream_of(on_gpu))
    assert found == [7, triton_blocks._ANY, 7]


@pytest.mark.parametrize(("stream", "waited_for"), [(7, False), (triton_blocks._ANY, True)])
def test_a_table_for_any_stream_is_waited_for(stream, waited_for, monkeypatch):
    asked = []
    monkeypatch.setattr(triton_blocks, "_to_device", lambda ints, device, waited: asked.append(waited))
    triton_blocks._make.__wrapped__(triton_blocks.TableKey((), False, 8, 4, 1, torch.device("cuda"), 0, 9, False, stream))
    assert asked == [waited_for]


def test_a_graph_has_what_was_held_while_it_was_captured(monkeypatch):
    replays, table = Redone(), [Table()]
    ref = weakref.ref(table[0])
    monkeypatch.setattr(tables, "capturing", lambda: replays.amid)
    _, graph = replays.capture(lambda x: [hold(table[0]) and x + 1], [torch.ones(2)])
    table.clear()
    assert isinstance(graph, Graph) and not gone(ref)
    del graph
    assert gone(ref)
