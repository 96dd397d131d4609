"""A second communicator among the processes of an NCCL group: what is posted there waits for nothing posted on the first.

Note [in line]: NCCL runs the operations of one communicator one after another, on one stream. A transfer posted while another
is under way starts only when that one is done, though its rows are ready and its peer waits. On a second communicator both go
at once, and share the wires.

Note [two at once]: a kernel of NCCL holds a few multiprocessors while it waits for its peer's. Two communicators do not lock
each other up as long as all processes post in the same order, as `Transport` demands, and the kernels of both fit on a GPU
together: then the first posted that is not done finds its place everywhere. NCCL itself promises as much from 2.26 on, where
NCCL_LAUNCH_ORDER_IMPLICIT=1 is set.

Note [split]: the communicator is split off the group's own, in which nobody but its processes takes part, as are parts of a
group. `new_group` would not do. Where the default group is bound to a device, it splits the communicator of the default group,
and waits for every process of the job; where it is not, it names the new group by how many groups a process is in, and
processes may differ.
"""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ring_attn.comm.backend import may_split, split_off

logger = logging.getLogger("ring_attn")

_seconds: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def second_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A second group of the same processes, with the timeout of the first; `group` itself where there can or need be none.

    It is made once for a group, by all its processes together and while nothing of them is under way on this GPU, and goes
    with `destroy_process_group()`. Raises RuntimeError where it would have to be made while a CUDA graph is captured.
    """
    if dist.get_backend(group) != dist.Backend.NCCL:
        # Messages of other backends are matched by their tags and wait for none; a group with several may carry both kinds.
        return group
    if not may_split(group):
        logger.info(
            "comm: transfers on their way back wait in line with the others; for a communicator of their own bind the default "
            "group to a device, init_process_group(device_id=...), or name a group, ProcessGroupTransport(beside=...)"
        )
        return group
    found = _seconds.get(group)
    if found is None:
        found = _seconds[group] = _split_off(group)
    return found


def _split_off(group: dist.ProcessGroup) -> dist.ProcessGroup:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "it cannot be made while a CUDA graph is captured; make the same call once before, or do without, "
            "ProcessGroupTransport(group, beside=group)"
        )
    return split_off(group, [range(dist.get_world_size(group))], "ring_attn beside")
