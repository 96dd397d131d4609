"""AdamW that decays matrices only, its learning rate, and clipping by the global norm of all gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ring_attn.train.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the model's parameters; embeddings, and whatever is not a matrix, do not decay."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decays = [p.dim() >= 2 and id(p) not in embeddings for p in parameters]
    groups = [
        {"params": [p for p, d in zip(parameters, decays, strict=True) if d], "weight_decay": config.weight_decay},
        {"params": [p for p, d in zip(parameters, decays, strict=True) if not d], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def learning_rate(step: int, config: OptimConfig) -> float:
    """The learning rate of a step counted from 0: a linear rise over the warm-up, then a cosine to min_lr_ratio * lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps))
    low = config.min_lr_ratio
    return config.lr * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Every group of the optimizer gets `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_by_global_norm(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scales all gradients in place so that their joint norm is at most `limit`; returns the norm before, a scalar.

    Gradients must be complete: reduced over all processes, whole (DDP) or as shards of DTensors (FSDP2).
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
