"""What is handed to CUDA's driver, by a driver that notes it, and what it refuses."""

import ctypes
from types import SimpleNamespace

import pytest

from ring_attn.comm import driver
from ring_attn.comm.driver import WRITE, Copy, Operation, copy, enqueue

STREAM = SimpleNamespace(cuda_stream=77)


@pytest.fixture
def asked(monkeypatch):
    """What a driver was asked for, which answers with `asked.status`."""
    noted = SimpleNamespace(calls=[], status=0)
    answer = lambda *given: noted.calls.append(given) or noted.status  # noqa: E731
    monkeypatch.setattr(driver, "_functions", lambda: (answer, answer))
    return noted


def operations(*values):
    return (Operation * len(values))(*(Operation(WRITE, 8, value) for value in values))


def test_operations_go_in_one_call_and_none_in_none(asked):
    both = operations(1, 0)
    enqueue(both, STREAM)
    enqueue(operations(), STREAM)
    assert asked.calls == [(77, 2, both, 0)]


def test_copies_go_behind_where_they_are_to_go(asked):
    copy([Copy(0, 5000, 16), Copy(16, 9000, 32)], 100, STREAM)
    assert asked.calls == [(100, 5000, 16, 77), (116, 9000, 32, 77)]


@pytest.mark.parametrize(
    ("ask", "name"),
    [
        (lambda: enqueue(operations(1), STREAM), "cuStreamBatchMemOp"),
        (lambda: copy([Copy(0, 1, 2)], 3, STREAM), "cuMemcpyAsync"),
    ],
)
def test_what_the_driver_refuses_is_raised(ask, name, asked):
    asked.status = 700
    with pytest.raises(RuntimeError, match=f"{name} gave 700"):
        ask()


def test_operations_lie_in_memory_as_the_driver_reads_them():
    offsets = [getattr(Operation, name).offset for name in ("operation", "address", "value", "flags", "alias")]
    assert offsets == [0, 8, 16, 24, 32]
    assert ctypes.sizeof(Operation) == 48
