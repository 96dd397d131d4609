"""What carries the tensors of a group. A group that is made without naming a backend has one for each kind of device."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


def over_nccl(group: dist.ProcessGroup) -> bool:
    """Whether tensors on GPUs go over NCCL; get_backend knows only of groups with one backend for all devices."""
    return "cuda:nccl" in dist.get_backend_config(group).split(",")


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long a transfer of the group may take."""
    device = torch.device("cuda" if over_nccl(group) else "cpu")
    return group._get_backend(device).options._timeout
