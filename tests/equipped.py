"""A machine with a GPU and every optional library, as far as `Kernel.supports` can tell: what the README's table shows.

`python -m tests.equipped` writes that table into the README.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch

from ring_attn.capabilities import report, table
from ring_attn.kernels import flash, flex, gluon_kernel, triton_kernel

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- capabilities -->\n```text\n)(.*?)(\n```\n)", re.DOTALL)


@contextmanager
def equipped() -> Iterator[None]:
    facts = [
        (flash, "load", flash._Library(ModuleType("flash_attn"), (2, 8, 3))),
        (flash, "load4", SimpleNamespace(utils=SimpleNamespace(create_softcap_scoremod_bwd=None))),
        (flex, "find_spec", object()),
        (gluon_kernel, "_installation_refusal", None),
        (triton_kernel, "interpreted", False),
        (triton_kernel, "find_spec", object()),
        (torch.backends.cuda, "is_flash_attention_available", True),
        (torch.backends.cudnn, "is_available", True),
        (torch.cuda, "is_available", False),  # which GPU is not asked
    ]
    with ExitStack() as stack:
        for owner, name, value in facts:
            stack.enter_context(patch.object(owner, name, lambda *args, value=value: value))
        yield


def block() -> str:
    with equipped():
        return report("cuda", table("cuda"))


if __name__ == "__main__":
    README.write_text(BLOCK.sub(lambda m: m[1] + block() + m[3], README.read_text()))
