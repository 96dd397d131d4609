"""A rank that dies or stalls amid calls on GPUs: the others name the transfer and the rank, within the group's timeout.

    torchrun --standalone --nproc-per-node 4 -m tests.gpu.dead_peer {dies,stalls} {ring,pull,...}

The job is meant to fail: look in its output for "rank [1] does not wait", and at the time it took. By pull it is symmetric
memory that is waited for where TORCH_SYMM_MEM_DISABLE_MULTICAST=1 is set, by ring NCCL.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import ring_attn as ra
from tests.support import random_qkv


def main() -> None:
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=10))
    ring = ra.Ring.from_group(None, "zigzag", exchange=sys.argv[2], kernel="aten")
    q, k, v, _ = random_qkv(1, 4096, 4096, 4, 2, 64, dtype=torch.bfloat16, device=device)
    ra.ring_attention(q, k, v, ring=ring).sum().item()
    print(f"rank {rank} is ready", flush=True)
    if rank == 1:
        for _ in range(3):  # asked for, and not waited for
            ra.ring_attention(q, k, v, ring=ring)
        time.sleep(60 if sys.argv[1] == "stalls" else 0)
        os._exit(0)
    start = time.monotonic()
    try:
        for _ in range(20):
            total = ra.ring_attention(q, k, v, ring=ring).sum()
        print(total.item(), "must not be reached")
    finally:
        print(f"ended after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
