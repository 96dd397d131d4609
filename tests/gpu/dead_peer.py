"""A rank that dies or stalls under NCCL: the others name the transfer, and the job ends within the group's timeout.

    torchrun --standalone --nproc-per-node 2 -m tests.gpu.dead_peer {dies,stalls}

The job is meant to fail: grep its output for "is not done after", and look at the time it took.
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
    ring = ra.Ring.from_group(None, "zigzag", exchange="ring")
    q, k, v, _ = random_qkv(1, 512, 512, 4, 2, 64, dtype=torch.bfloat16, device=device)
    ra.ring_attention(q, k, v, ring=ring).sum().item()
    if rank == 1:
        time.sleep(60 if sys.argv[1] == "stalls" else 0)
        os._exit(0)
    start = time.monotonic()
    try:
        print(ra.ring_attention(q, k, v, ring=ring).sum().item(), "must not be reached")
    finally:
        print(f"ended after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
