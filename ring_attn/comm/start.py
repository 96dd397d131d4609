"""Where a command starts: the device of this process, and the process group of torchrun's processes."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def device_of(name: str) -> torch.device:
    """This process's device: "cpu", its own GPU for "cuda", and for "auto" the GPU where there are any.

    Makes the GPU the current one. Raises ValueError where there is none for this process.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch sees no CUDA device here; set 'auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; start fewer "
            f"processes, or set the device to 'cpu'"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def is_distributed() -> bool:
    """Whether this process is one of a group: of the default process group, or else of those that torchrun started."""
    return dist.is_initialized() or "WORLD_SIZE" in os.environ


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The default process group, over NCCL or gloo, for as long as this lasts. Nothing where there is one, or no torchrun.

    After an error NCCL's is left to the end of the process.
    """
    if dist.is_initialized() or not is_distributed():
        yield
        return
    on_cuda = device.type == "cuda"
    dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    try:
        yield
    except BaseException:
        # NCCL would wait for ranks that are elsewhere, and for graphs that the error holds.
        if not on_cuda:
            dist.destroy_process_group()
        raise
    # NCCL waits for CUDA graphs with transfers of its own to go, and graphed callables lie in cycles.
    gc.collect()
    dist.destroy_process_group()
