"""What is handed to CUDA's driver, by a driver that notes it, and what it refuses."""

import ctypes
from contextlib import contextmanager, suppress
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ring_attn import driver
from ring_attn.driver import WRITE, Copy, Operation, beside_captures, copy, enqueue

STREAM = SimpleNamespace(cuda_stream=77, device_index=3)


@pytest.fixture(params=[3, 0], ids=["the current device", "another device"])
def asked(request, monkeypatch):
    """What a driver was asked for, which answers with `asked.status` and wants the stream's device to be the current one."""
    noted = SimpleNamespace(calls=[], status=0, device=request.param)

    @contextmanager
    def device(number):
        before, noted.device = noted.device, number
        yield
        noted.device = before

    def function(name, *given):
        assert noted.device == STREAM.device_index
        noted.calls.append((name, *given))
        return noted.status

    known = {name: partial(function, name) for name in ("cuStreamBatchMemOp_v2", "cuMemcpyAsync")}
    monkeypatch.setattr(driver, "_driver", lambda: SimpleNamespace(**known))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: noted.device)
    monkeypatch.setattr(torch.cuda, "device", device)
    return noted


def test_beside_a_capture_a_thread_is_given_back_its_mode(monkeypatch):
    """The driver changes places with what it is given."""
    mode, met = [0], []

    def exchange(given):
        mode[0], given._obj.value = given._obj.value, mode[0]
        return 0

    monkeypatch.setattr(driver, "_driver", lambda: SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange))
    with suppress(KeyError), beside_captures():
        met.append(mode[0])
        raise KeyError
    assert (met, mode) == ([driver._RELAXED], [0])


def operations(*values):
    return (Operation * len(values))(*(Operation(WRITE, 8, value) for value in values))


def test_operations_go_in_one_call_and_none_in_none(asked):
    both = operations(1, 0)
    enqueue(both, STREAM)
    enqueue(operations(), STREAM)
    assert asked.calls == [("cuStreamBatchMemOp_v2", 77, 2, both, 0)]


def test_copies_go_behind_where_they_are_to_go(asked):
    copy([Copy(0, 5000, 16), Copy(16, 9000, 32)], 100, STREAM)
    assert asked.calls == [("cuMemcpyAsync", 100, 5000, 16, 77), ("cuMemcpyAsync", 116, 9000, 32, 77)]


@pytest.mark.parametrize(
    ("ask", "name"),
    [
        (lambda: enqueue(operations(1), STREAM), "cuStreamBatchMemOp_v2"),
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
