"""The command line: `ring-attn plan | train | generate | bench | check`, also `python -m ring_attn ...`.

A command is a function `main(argv) -> exit status` in a module that is imported when the command is named, so one command's
optional packages cost the others nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "plan": ("ring_attn.plan_report", "who attends to what at each step, and how evenly the work is spread"),
    "train": ("ring_attn.train.command", "train a small decoder: ring-attn train CONFIG.toml [--section.key value ...]"),
    "generate": ("ring_attn.train.generate", "let what was trained write on: ring-attn generate RUN_FOLDER --prompt TEXT"),
    "bench": ("ring_attn.bench", "how fast: the kernels on this GPU, or rings of it (under torchrun), beside other libraries"),
    "check": ("ring_attn.check", "which kernels, exchanges and devices work on this machine, and their error"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the command that `argv` (default: the process's arguments) names."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if name not in COMMANDS:
        print(f"{name!r} is not one of the commands {', '.join(COMMANDS)}\n\n{_usage()}", file=sys.stderr)
        return 2
    return import_module(COMMANDS[name][0]).main(argv[1:])


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: ring-attn COMMAND [options]      (ring-attn COMMAND --help says which)", "", *lines])
