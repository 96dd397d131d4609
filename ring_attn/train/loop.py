"""The training loop. It is written as for one device; the ring is in the model, the job and the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ring_attn.sharding import global_token_loss, shift_labels
from ring_attn.train import checkpoint
from ring_attn.train.config import TrainConfig
from ring_attn.train.data import Corpus, open_corpus
from ring_attn.train.folder import RunFolder, claim
from ring_attn.train.job import Job, check_seq_len, join
from ring_attn.train.metrics import Recorder, Reporter, Silent, Speed
from ring_attn.train.optim import clip_by_global_norm, learning_rate, make_optimizer, set_learning_rate
from ring_attn.train.parallel import accumulating, autocast, build_model, for_backward


class Diverged(RuntimeError):
    """The loss is no finite number any more."""


@dataclass(frozen=True)
class Trainer:
    """What a step works on. `model` is on the job's device, wrapped for the job's processes.

    `held_out`: this data rank's whole sequences for evaluation, int64 [n, seq_len].
    """

    config: TrainConfig
    job: Job
    corpus: Corpus
    held_out: Tensor
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def build(cls, config: TrainConfig, job: Job) -> Trainer:
        """A trainer before its first step."""
        check_seq_len(config, job.ring)
        corpus = open_corpus(config.data)
        held_out = corpus.evaluation(config.run.eval_sequences, job.data_rank, job.data_size)
        model = build_model(config, job)
        return cls(config, job, corpus, held_out, model, make_optimizer(model, config.optim))


@dataclass(frozen=True)
class Outcome:
    """What a run ended with: its folder, its last step, and the held-out loss there in nats per byte."""

    folder: Path
    step: int
    eval_loss: float


def train(config: TrainConfig) -> Outcome:
    """Runs what `config` says to the end, in this process's part of the job. Raises ValueError where settings do not fit."""
    with join(config) as job:
        trainer = Trainer.build(config, job)
        folder = job.leader_does(lambda: claim(config))
        if folder.start:
            checkpoint.load(folder.checkpoints, folder.start, trainer.model, trainer.optimizer)
        reporter = Recorder(folder, config, job.device) if job.leads else Silent()
        eval_loss = run_steps(trainer, folder, reporter)
        reporter.finish()
        return Outcome(folder.path, max(folder.start, config.optim.steps), eval_loss)


def run_steps(trainer: Trainer, folder: RunFolder, reporter: Reporter) -> float:
    """Takes the steps from folder.start on, with evaluations and checkpoints between; returns the last held-out loss."""
    run, steps = trainer.config.run, trainer.config.optim.steps
    eval_loss = evaluate(trainer)
    if folder.start == 0:
        reporter.evaluated(0, eval_loss)
    speed = Speed(trainer.config.data.batch_size * trainer.config.data.seq_len)
    for step in range(folder.start, steps):
        loss, grad_norm = train_step(trainer, step)
        done = step + 1
        saves = run.checkpoint_every and _due(done, run.checkpoint_every, steps)
        if saves:
            check_finite(trainer, step, loss)
        if _due(done, run.log_every, steps):
            reporter.step(done, **_numbers(trainer, step, loss, grad_norm), tokens_per_s=speed.after(done - folder.start))
        if _due(done, run.eval_every, steps):
            with speed.paused():
                eval_loss = evaluate(trainer)
            reporter.evaluated(done, eval_loss)
        if saves:
            with speed.paused():
                checkpoint.save(folder.checkpoints, done, trainer.model, trainer.optimizer, leads=trainer.job.leads)
    return eval_loss


def _due(done: int, every: int, steps: int) -> bool:
    return done % every == 0 or done == steps


def train_step(trainer: Trainer, step: int) -> tuple[Tensor, Tensor]:
    """One optimiser step, counted from 0; returns the batch's loss and the gradient's norm before clipping, as scalars."""
    config, job = trainer.config, trainer.job
    trainer.optimizer.zero_grad(set_to_none=True)
    loss = gradients(trainer, trainer.corpus.batch(step, job.data_rank, job.data_size))
    grad_norm = clip_by_global_norm(trainer.model.parameters(), config.optim.clip_norm)
    set_learning_rate(trainer.optimizer, learning_rate(step, config.optim))
    trainer.optimizer.step()
    return loss, grad_norm


def gradients(trainer: Trainer, tokens: Tensor) -> Tensor:
    """Adds the gradient of the mean loss of all data ranks' `tokens` [b, t] to the parameters' .grad; returns that loss.

    Micro batches hold equally many sequences, so the mean over them is the mean over all tokens.
    """
    trainer.model.train()
    micro_batches = tokens.split(trainer.config.data.micro_batch_size or len(tokens))
    total = torch.zeros((), device=trainer.job.device)
    for number, micro_batch in enumerate(micro_batches, 1):
        with accumulating(trainer.model, last=number == len(micro_batches)):
            loss = loss_of(trainer, micro_batch) / len(micro_batches)
            for_backward(loss, trainer.job).backward()
        total = total + loss.detach()
    return total


def loss_of(trainer: Trainer, tokens: Tensor) -> Tensor:
    """The mean next-byte loss of this process's whole sequences `tokens` [b, t], over all processes; nats, a scalar."""
    job = trainer.job
    # Labels are shifted while the sequence is whole: a shard's last row has its next byte on another rank.
    labels = job.ring.shard(shift_labels(tokens)).to(job.device, non_blocking=True)
    rows = job.ring.shard(tokens).to(job.device, non_blocking=True)
    with autocast(trainer.config, job.device):
        logits = trainer.model(rows)
    return global_token_loss(logits, labels, ring=job.ring, group=job.loss_group)


@torch.no_grad()
def evaluate(trainer: Trainer) -> float:
    """The held-out loss in nats per byte, the same on every process."""
    trainer.model.eval()
    parts = trainer.held_out.split(trainer.config.data.micro_batch_size or len(trainer.held_out))
    return sum(loss_of(trainer, part).item() * len(part) for part in parts) / len(trainer.held_out)


def _numbers(trainer: Trainer, step: int, loss: Tensor, grad_norm: Tensor) -> dict[str, float]:
    """A step in numbers. Raises Diverged on every process where the loss is not finite."""
    check_finite(trainer, step, loss)
    return {"loss": loss.item(), "lr": learning_rate(step, trainer.config.optim), "grad_norm": grad_norm.item()}


def check_finite(trainer: Trainer, step: int, loss: Tensor) -> None:
    """Raises Diverged on every process where the loss is not finite: nothing of such a step is saved."""
    value = loss.item()
    if not math.isfinite(value):
        raise Diverged(
            f"the loss is {value} at step {step + 1}; lower optim.lr = {trainer.config.optim.lr} or raise optim.warmup_steps"
        )
