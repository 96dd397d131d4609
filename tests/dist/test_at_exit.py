"""A ring in a variable of a script lives until the interpreter ends; its groups must not."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import atexit, weakref

def at_last():  # runs behind what ring_attn registers
    print("groups live" if any(group() for group in groups) else "groups are gone")
    try:
        ring.transport.all_gather([torch.zeros(1, 1, 1)])
    except AttributeError:
        print("and the ring does nothing")

atexit.register(at_last)

import torch
import torch.distributed as dist
import ring_attn as ra

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
groups = [weakref.ref(group) for group in (dist.group.WORLD, dist.new_group([0]))]
ring, another, third = (ra.Ring.from_group(group()) for group in (*groups, groups[0]))
dist.destroy_process_group()
assert all(group() for group in groups), "the rings hold them"
"""


def test_rings_let_go_of_their_groups_before_the_interpreter_ends():
    """Gloo would end the process by SIGABRT, where its threads still hold tensors."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "groups are gone\nand the ring does nothing\n"), done.stderr
