"""Where a command ends."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist

from ring_attn.comm.start import process_group


class Node:
    """Something that lies in a cycle."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def destroyed(monkeypatch):
    """Notes when a process group is destroyed."""
    noted = []
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: noted.append(len(noted)))
    return noted


def test_what_lies_in_cycles_goes_before_the_process_group(destroyed):
    """NCCL would wait for a graph among it."""
    gc.disable()
    try:
        with process_group(torch.device("cpu")):
            node = weakref.ref(Node(), lambda _: destroyed.append("collected"))
            assert node() is not None
    finally:
        gc.enable()
    assert destroyed == ["collected", 1]


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_after_an_error_nobody_waits_for_other_ranks(device, times, destroyed):
    with pytest.raises(KeyError), process_group(torch.device(device)):
        raise KeyError
    assert len(destroyed) == times
