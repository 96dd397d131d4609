"""What the training tests share: small texts, small configurations, and ten steps written out plainly as the truth."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from ring_attn.models.decoder import Decoder, DecoderConfig
from ring_attn.train.config import DataConfig, OptimConfig, RingConfig, RunConfig, TrainConfig
from ring_attn.train.data import open_corpus
from ring_attn.train.job import join
from ring_attn.train.loop import Trainer, train_step
from ring_attn.train.optim import learning_rate, make_optimizer

STEPS = 10


def write_text(folder: Path, num_bytes: int = 6000, files: int = 3) -> Path:
    """A folder of random words; no two places of it read alike for long."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        words = " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(num_bytes // files // 4))
        (folder / f"{number}.txt").write_text(words[: num_bytes // files])
    return folder


def small_config(root: Path, **changes) -> TrainConfig:
    """A run of ten steps in float64 on random text, with grouped heads and gradients that are clipped. For `replace`."""
    return TrainConfig(
        model=DecoderConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=24),
        data=DataConfig(str(write_text(root / "text")), seq_len=64, batch_size=4, cache=str(root / "cache"), held_out=0.2),
        optim=OptimConfig(lr=3e-3, warmup_steps=2, steps=STEPS, clip_norm=0.5),
        ring=changes.pop("ring", RingConfig()),
        run=RunConfig(dir=str(root / "run"), device="cpu", dtype="float64", eval_sequences=4, eval_every=5, **changes),
    )


def with_data(config: TrainConfig, **changes) -> TrainConfig:
    return replace(config, data=replace(config.data, **changes))


def with_run(config: TrainConfig, **changes) -> TrainConfig:
    return replace(config, run=replace(config.run, **changes))


def plain_steps(config: TrainConfig) -> list[dict]:
    """Loss, gradient norm and clipped gradients of every step, with one device's model and nothing of the loop or the ring."""
    torch.manual_seed(config.run.seed)
    model = Decoder(config.model).double()
    optimizer = make_optimizer(model, config.optim)
    corpus = open_corpus(config.data)
    taken = []
    for step in range(config.optim.steps):
        tokens = corpus.batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, config.optim.clip_norm / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optim)
        optimizer.step()
        taken.append(_numbers(loss.detach(), norm, model))
    return taken


def job_steps(config: TrainConfig) -> list[dict]:
    """The same of the training loop, in this process's part of its job."""
    with join(config) as job:
        trainer = Trainer.build(config, job)
        assert all(isinstance(p, DTensor) == (config.run.parallel == "fsdp") for p in trainer.model.parameters())
        return [_numbers(*train_step(trainer, step), trainer.model) for step in range(config.optim.steps)]


def _numbers(loss: torch.Tensor, norm: torch.Tensor, model: torch.nn.Module) -> dict:
    grads = {name.removeprefix("module."): _whole(p.grad) for name, p in model.named_parameters()}
    return {"loss": loss.clone(), "norm": norm.clone(), **grads}


def _whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def assert_same_steps(found: list[dict], truth: list[dict], limit: float = 1e-10) -> None:
    """Every number of every step agrees to a relative `limit`, tensor by tensor."""
    assert len(found) == len(truth) == STEPS
    for step, (mine, true) in enumerate(zip(found, truth, strict=True)):
        assert mine.keys() == true.keys()
        for name, value in true.items():
            error = ((mine[name] - value).norm() / value.norm()).item()
            assert error <= limit, f"step {step}: {name} is off by {error:.1e}"
