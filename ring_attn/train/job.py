"""Who takes part in a run: the processes, their device, the ring each belongs to, and the data axis beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ring_attn.comm.start import device_of, is_distributed, process_group
from ring_attn.ring import Ring
from ring_attn.train.config import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """This process's place. `data_rank` of `data_size` counts rings; all ranks of a ring share it.

    `mesh`: one axis over all processes, for parameters; None without torch.distributed.
    """

    device: torch.device
    ring: Ring
    data_rank: int = 0
    data_size: int = 1
    num_processes: int = 1
    global_rank: int = 0
    mesh: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes what a run writes once."""
        return self.global_rank == 0

    @property
    def loss_group(self) -> dist.ProcessGroup | None:
        """The group whose tokens a loss counts; None: the ring's."""
        return dist.group.WORLD if self.data_size > 1 else None

    def leader_does(self, action: Callable[[], T]) -> T:
        """What `action` returns on the leader, on every process; a ValueError there is raised on every process too."""
        if self.mesh is None:
            return action()
        box: list = [None, None]
        if self.leads:
            try:
                box[0] = action()
            except ValueError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise box[1]
        return box[0]


@contextmanager
def join(config: TrainConfig) -> Iterator[Job]:
    """The job this process belongs to: that of the default process group, else torchrun's, else this one process.

    A process group made here is destroyed on the way out. Raises ValueError where the number of processes, the ring size and
    the batch do not fit together.
    """
    distributed = is_distributed()
    num_processes = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    ring_size = check_sizes(config, num_processes, distributed)
    device = device_of(config.run.device)
    ring = config.ring
    choice = {"layout": ring.layout, "exchange": ring.exchange, "kernel": ring.kernel, "ulysses": ring.ulysses}
    choice |= {"ranks_per_node": ring.ranks_per_node, "kv_memory": ring.kv_memory, "keep_kv": ring.keep_kv}
    choice["grad_dtype"] = ring.grad_dtype and getattr(torch, ring.grad_dtype)
    if not distributed:
        yield Job(device, Ring.simulated(ring_size, **choice))
        return
    with process_group(device):
        yield _distributed_job(config, device, ring_size, choice)


def _distributed_job(config: TrainConfig, device: torch.device, ring_size: int, choice: dict) -> Job:
    num_processes = dist.get_world_size()
    everyone = init_device_mesh(device.type, (num_processes,), mesh_dim_names=("everyone",))
    if config.ring.simulated is not None:
        ring, data_rank, data_size = Ring.simulated(ring_size, **choice), 0, 1
    else:
        data_size = num_processes // ring_size
        mesh = init_device_mesh(device.type, (data_size, ring_size), mesh_dim_names=("data", "ring"))
        ring, data_rank = Ring.from_group(mesh.get_group("ring"), **choice), mesh.get_local_rank("data")
    return Job(device, ring, data_rank, data_size, num_processes, dist.get_rank(), everyone)


def check_sizes(config: TrainConfig, num_processes: int, distributed: bool) -> int:
    """The ring size. Raises ValueError where sizes do not fit together; needs no process group."""
    ring = config.ring
    if ring.simulated is not None and num_processes > 1:
        raise ValueError(
            f"ring.simulated = {ring.simulated} hosts every rank in one process, but there are {num_processes} processes; "
            f"start one, or set ring.size instead"
        )
    if not distributed and ring.size is not None and ring.size > 1:
        raise ValueError(
            f"ring.size = {ring.size} needs as many processes, but this is one without torchrun; start it with torchrun "
            f"--nproc-per-node {ring.size}, or set ring.simulated = {ring.size}"
        )
    if config.run.parallel == "fsdp" and not distributed:
        raise ValueError("run.parallel = 'fsdp' shards weights over processes; start the run with torchrun, or set 'ddp'")
    ring_size = ring.simulated or ring.size or num_processes
    processes_a_ring = 1 if ring.simulated else ring_size
    if num_processes % processes_a_ring:
        raise ValueError(f"{num_processes} processes do not make rings of ring.size = {ring_size}; use a multiple of it")
    if ring_size % ring.ulysses:
        raise ValueError(f"ring.ulysses = {ring.ulysses} must be a divisor of the {ring_size} ranks of a ring")
    _check_batch(config, num_processes // processes_a_ring)
    return ring_size


def _check_batch(config: TrainConfig, data_size: int) -> None:
    for name, count in (("data.batch_size", config.data.batch_size), ("run.eval_sequences", config.run.eval_sequences)):
        if count % data_size:
            raise ValueError(f"{name} = {count} must be a multiple of the number of rings side by side, {data_size}")
    share, micro = config.data.batch_size // data_size, config.data.micro_batch_size
    if micro is not None and share % micro:
        raise ValueError(f"a data rank's {share} sequences a step must be a multiple of data.micro_batch_size = {micro}")


def check_seq_len(config: TrainConfig, ring: Ring) -> None:
    """Raises ValueError where the ring cannot shard the run's sequences."""
    if config.data.seq_len % ring.shard_multiple:
        raise ValueError(
            f"data.seq_len = {config.data.seq_len} must be a multiple of {ring.shard_multiple} for the {ring.layout_name} "
            f"layout over {ring.size} ranks"
        )
