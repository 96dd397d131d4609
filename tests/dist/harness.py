"""Runs a function in several gloo processes of this machine and brings their exceptions back."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(body: Callable, num_processes: int, *args, timeout_s: float = 60) -> None:
    """`body(rank, *args)` on every process of a fresh gloo group. Raises where any of them raised, with its traceback.

    `body` must be a module-level function. The group meets over a file, so no port is taken. Processes are forked from a server
    that has imported torch once, so a test costs no import.
    """
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "pytest", "ring_attn", "tests.matrix"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _main, (body, num_processes, folder, timeout_s, args), nprocs=num_processes, start_method="forkserver"
        )


def _main(rank: int, body: Callable, num_processes: int, folder: str, timeout_s: float, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(folder) / "store"), num_processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_processes, timeout=timedelta(seconds=timeout_s))
    body(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
