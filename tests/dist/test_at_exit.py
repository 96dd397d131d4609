"""A ring in a variable of a script lives until the interpreter ends; its group must not."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import atexit, weakref

atexit.register(lambda: print("its group lives" if group() else "its group is gone"))  # runs last

import torch.distributed as dist
import ring_attn as ra

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
group = weakref.ref(dist.group.WORLD)
ring = ra.Ring.from_group()
dist.destroy_process_group()
assert group() is not None, "the ring holds it"
"""


def test_a_ring_lets_go_of_its_group_before_the_interpreter_ends():
    """Where gloo's threads still held tensors, as after a gather of four processes, every second script ended by SIGABRT."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "its group is gone\n", done.stderr
