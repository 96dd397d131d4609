"""What carries the tensors of a group. A group that is made without naming a backend has one for each kind of device."""

from __future__ import annotations

import torch
import torch.distributed as dist


def over_nccl(group: dist.ProcessGroup) -> bool:
    """Whether tensors on GPUs go over NCCL; get_backend knows only of groups with one backend for all devices."""
    return "cuda:nccl" in dist.get_backend_config(group).split(",")


def timeout_s(group: dist.ProcessGroup) -> float:
    """The timeout of an NCCL group in seconds."""
    return group._get_backend(torch.device("cuda")).options._timeout.total_seconds()
