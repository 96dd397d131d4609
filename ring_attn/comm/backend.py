"""What carries the tensors of a group. A group that is made without naming a backend has one for each kind of device."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


def over_nccl(group: dist.ProcessGroup) -> bool:
    """Whether tensors on GPUs go over NCCL; get_backend knows only of groups with one backend for all devices."""
    return "cuda:nccl" in dist.get_backend_config(group).split(",")


def may_split(group: dist.ProcessGroup) -> bool:
    """Whether communicators can be split off those of the group, for which the job must be bound to devices."""
    return dist.get_backend(group) == dist.Backend.NCCL and dist.group.WORLD.bound_device_id is not None


def split_off(group: dist.ProcessGroup, parts: Sequence[Sequence[int]], description: str | None = None) -> dist.ProcessGroup:
    """The part of the group's processes, numbered as in the group, that this one is in, as a group with its timeout; all
    processes of the group must call, and no others. It must be one that `may_split`.
    """
    # NCCL wants no operation of a communicator under way while it is split.
    torch.cuda.synchronize()
    return dist.split_group(group, [list(part) for part in parts], timeout=timeout_of(group), group_desc=description)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long a transfer of the group may take."""
    device = torch.device("cuda" if over_nccl(group) else "cpu")
    return group._get_backend(device).options._timeout
