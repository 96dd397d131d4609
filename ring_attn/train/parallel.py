"""The model spread over processes: how parameter gradients meet, and in which dtype the work is done.

Note [gradient sum]: global_token_loss gives each process its own share of the gradient, so the true gradient is the *sum* over
all processes. DDP and FSDP2 take the mean, so the loss is scaled by the number of processes: one rule for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ring_attn.models.decoder import Decoder, DecoderConfig
from ring_attn.train.config import TrainConfig
from ring_attn.train.data import VOCAB_SIZE
from ring_attn.train.job import Job


def build_model(config: TrainConfig, job: Job) -> nn.Module:
    """The decoder on this process's device, wrapped for run.parallel; every process starts from the same weights."""
    torch.manual_seed(config.run.seed)
    model = Decoder(_checked(config.model), job.ring).to(job.device, weight_dtype(config))
    if job.mesh is None:
        return model
    if config.run.parallel == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _fully_sharded(model, config, job)


def _checked(model: DecoderConfig) -> DecoderConfig:
    if model.vocab_size < VOCAB_SIZE:
        raise ValueError(f"model.vocab_size must be at least {VOCAB_SIZE}, the number of bytes, got {model.vocab_size}")
    return model


def _fully_sharded(model: Decoder, config: TrainConfig, job: Job) -> Decoder:
    """FSDP2 over all processes, data and ring alike: a block a unit, and the rest one more."""
    half = compute_dtype(config, job.device) == torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=job.mesh, mp_policy=policy)
    fully_shard(model, mesh=job.mesh, mp_policy=policy)
    if job.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo has no mean: it sums, and FSDP2 divides afterwards.
                module.set_force_sum_reduction_for_comms(True)
    return model


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: run.dtype, where auto is bfloat16 on CUDA and float32 on the CPU."""
    if config.run.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.run.dtype)


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of weights and of the optimizer's state."""
    return torch.float64 if config.run.dtype == "float64" else torch.float32


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast where that is the dtype of the work."""
    if compute_dtype(config, device) != torch.bfloat16:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def for_backward(loss: Tensor, job: Job) -> Tensor:
    """The loss to call backward on; see Note [gradient sum]."""
    return loss * job.num_processes


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of all micro batches but the `last` stay in the process; with the last their sum is reduced."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield
