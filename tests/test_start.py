"""Where a command starts and ends."""

import gc
import weakref

import torch
import torch.distributed as dist

from ring_attn.comm.start import process_group


class Node:
    """Something that lies in a cycle."""

    def __init__(self):
        self.itself = self


def test_what_lies_in_cycles_goes_before_the_process_group(monkeypatch):
    """NCCL would wait for a graph among it."""
    made, seen = [], []
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: seen.append(made[0]()))
    gc.disable()
    try:
        with process_group(torch.device("cpu")):
            made.append(weakref.ref(Node()))
            assert made[0]() is not None
    finally:
        gc.enable()
    assert seen == [None]
