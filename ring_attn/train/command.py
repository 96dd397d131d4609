"""`ring-attn train CONFIG.toml [--section.key value ...]`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from ring_attn.train.config import TrainConfig, load

_USAGE = "usage: ring-attn train CONFIG.toml [--section.key value ...]      (ring-attn train --help lists the keys)"


def main(argv: Sequence[str]) -> int:
    """Trains; 2 where the configuration breaks a rule, which is then named, 1 where the loss is no number any more."""
    leads = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if leads else logging.ERROR, format="%(message)s")
    try:
        config = parse(argv)
    except ValueError as error:
        print(f"ring-attn train: {error}\n{_USAGE}", file=sys.stderr)
        return 2
    from ring_attn.train.loop import Diverged, train

    try:
        outcome = train(config)
    except ValueError as error:
        print(f"ring-attn train: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"ring-attn train: {error}", file=sys.stderr)
        return 1
    if leads:
        print(f"step {outcome.step}: held-out loss {outcome.eval_loss:.4f} nats per byte; see {outcome.folder}")
    return 0


def parse(argv: Sequence[str]) -> TrainConfig:
    """The configuration of a TOML file, the first argument, with the other arguments over it."""
    import tyro

    argv = list(argv)
    if not argv or (argv[0].startswith("-") and not {"-h", "--help"}.intersection(argv)):
        raise ValueError("the first argument is a configuration file, such as configs/demo.toml")
    default = TrainConfig() if argv[0].startswith("-") else load(argv.pop(0))
    return tyro.cli(TrainConfig, default=default, args=argv, prog="ring-attn train CONFIG.toml")
