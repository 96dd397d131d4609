"""Whether the processes of a group make their rings over it alike: where they do not, calls would wait for each other for good.

Note [nobody waits]: each process notes in the job's store what it makes and looks at what others have noted by then. So the
last one at the latest finds out that they differ, and where it ends with its error, so do those that wait for it. All look at
the first process's note and that one at everybody's, which is as good: of two that differ one differs from the first.
"""

from __future__ import annotations

from collections import Counter

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_WITHOUT_STORE = "fake", "mpi"  # jobs whose stores keep no notes
_made: Counter[tuple[int, ...]] = Counter()


def check_alike(group: dist.ProcessGroup | None, ring_size: int | None, ranks_per_process: int, ulysses: int) -> None:
    """Raises ValueError where another process of the group made this ring, counted among those over it, of other sizes."""
    group = dist.group.WORLD if group is None else group
    if dist.get_backend(group) in _WITHOUT_STORE:
        return
    processes = dist.get_process_group_ranks(group)
    mine, number = dist.get_rank(), _made[tuple(processes)]
    _made[tuple(processes)] += 1
    ring_size = len(processes) * ranks_per_process if ring_size is None else ring_size
    said = f"ring_size={ring_size}, ranks_per_process={ranks_per_process}, ulysses={ulysses}"
    store, ring = _get_default_store(), f"ring_attn ring {number} of {processes}"
    store.set(f"{ring} by {mine}", said)
    for process in processes[1:] if mine == processes[0] else processes[:1]:
        noted = f"{ring} by {process}"
        if store.check([noted]) and (other := store.get(noted).decode()) != said:
            raise ValueError(
                f"every process of a group must make its rings alike, in one order, but process {process} made this one with "
                f"{other}, and process {mine} with {said}"
            )
