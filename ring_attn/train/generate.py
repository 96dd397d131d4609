"""`ring-attn generate RUN_FOLDER --prompt TEXT`: what the newest checkpoint of a run writes behind a prompt."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from ring_attn.models.decoder import Decoder
from ring_attn.models.generate import generate
from ring_attn.train import checkpoint
from ring_attn.train.config import load
from ring_attn.train.folder import CHECKPOINTS, CONFIG
from ring_attn.train.job import join
from ring_attn.train.parallel import autocast, weight_dtype


@dataclass(frozen=True)
class GenerateOptions:
    """Writes on from a prompt with the newest checkpoint of a run. Under torchrun all processes make one ring.

    Attributes:
        run: Folder of the run.
        prompt: Text to go on from.
        num_tokens: Bytes to write.
        temperature: 0: the likeliest byte; above, bytes are drawn.
        seed: Of what is drawn.
        simulated: Ranks in this one process.
    """

    run: str
    prompt: str = "def "
    num_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0
    simulated: int | None = None


def main(argv: Sequence[str]) -> int:
    """Prints the prompt and what follows it; 2 where the options break a rule, which is then named."""
    import tyro

    leads = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = tyro.cli(Annotated[GenerateOptions, tyro.conf.PositionalRequiredArgs], args=list(argv), prog="ring-attn generate")
    try:
        text = written(options)
    except ValueError as error:
        print(f"ring-attn generate: {error}", file=sys.stderr)
        return 2
    if leads:
        print(text)
    return 0


def written(options: GenerateOptions) -> str:
    """The prompt and the text behind it, the same on every process. Raises ValueError where an option does not fit."""
    folder = Path(options.run)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no folder of a run, for it has no {CONFIG}; ring-attn train makes one")
    config = load(folder / CONFIG)
    steps = checkpoint.steps_in(folder / CHECKPOINTS)
    if not steps:
        raise ValueError(f"{folder / CHECKPOINTS} holds no complete checkpoint; train with run.checkpoint_every above 0")
    # Nodes and ranks that trade heads need not divide this ring as they did the one of training.
    anew = {"ulysses": 1, "exchange": "auto", "ranks_per_node": None, "keep_kv": False}
    ring = replace(config.ring, size=None, simulated=options.simulated, **anew)
    # Every process holds whole weights, however they were spread in training.
    config = replace(config, ring=ring, run=replace(config.run, parallel="ddp"))
    with join(config) as job:
        model = Decoder(config.model, job.ring).to(job.device, weight_dtype(config)).eval()
        checkpoint.load_weights(folder / CHECKPOINTS, steps[-1], model)
        prompt = torch.tensor([list(options.prompt.encode())], dtype=torch.int64, device=job.device)
        generator = torch.Generator(job.device).manual_seed(options.seed)
        with autocast(config, job.device):
            found = generate(model, prompt, options.num_tokens, temperature=options.temperature, generator=generator)
    return bytes(found[0].tolist()).decode(errors="replace")
