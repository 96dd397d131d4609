"""The rooms of the design: no import runs upward, geometry knows no torch, and the loop knows no names of what it is handed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ring_attn"

# From the ground up; a module imports only from its own level's names to the left, or as stated.
LEVELS = [
    {"typed", "agreement", "driver"},
    {"tables"},
    {"layout"},
    {"mask"},
    {"by_document"},
    {"tiles"},
    {"parts", "plan"},
    {"score"},
    {"score_mod"},
    {"partial"},
    {"kernels"},
    {"comm"},
    {"exchange"},
    {"cost"},
    {"settled", "overlap", "inputs"},
    {"call"},
    {"ulysses", "watched"},
    {"unit_norm"},
    {"scaling"},
    {"attention"},
    {"sharding"},
    {"ring"},
    {"cache"},
    {"decode"},
    {"module", "capabilities"},
    {"models", "integrations"},
    {"train"},
    {"plan_plot", "check"},
    {"plan_report"},
    {"bench"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: level for level, names in enumerate(LEVELS) for name in names}
STDLIB_ONLY = ("layout", "mask", "by_document", "tiles", "parts", "plan")
MAY_NAME_DISTRIBUTED = ("comm", "ring", "train")


def modules() -> list:
    found = sorted(PACKAGE.rglob("*.py"))
    return [(path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")) for path in found]


def imports(path: Path):
    """(module imported, whether it runs: not under TYPE_CHECKING)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node not in typing_only
            yield from ((f"{node.module}.{alias.name}", node not in typing_only) for alias in node.names)


def room_of(module: str) -> str | None:
    match module.split("."):
        case ["ring_attn", room, *_]:
            return room
        case ["ring_attn"]:
            return "__init__"
    return None


@pytest.mark.parametrize(("path", "room"), modules(), ids=lambda x: str(getattr(x, "name", x)))
def test_no_import_runs_upward(path, room):
    assert room in RANK, f"{path} is in no room of the design; give it a level"
    for module, runs in imports(path):
        other = room_of(module)
        if runs and other in RANK and other not in ("__init__", room):
            assert RANK[other] < RANK[room], f"{path.name} imports {module}, which is above it"
        if room in STDLIB_ONLY:
            assert other is not None or module.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {module}"
        if runs and module.startswith("torch.distributed") and not module.startswith("torch.distributed.tensor"):
            assert room in MAY_NAME_DISTRIBUTED, f"{path.name} imports {module}"
        if room == "comm":
            assert other in (None, "comm", "layout", "tables", "driver", "__init__"), (
                f"a transport knows shards and parts of them, no {module}"
            )
        if room == "kernels":
            assert other not in ("comm", "exchange", "layout"), f"a kernel knows no {module}"


def test_the_loop_knows_no_layout_kernel_or_backend_by_name():
    words = re.findall(r"\b(striped|zigzag|contiguous|triton|flash\w*|dist)\b", _code(PACKAGE / "attention.py"), re.IGNORECASE)
    assert [w for w in words if w != "contiguous"] == []


def _code(path: Path) -> str:
    """Source without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0].value.value = ""
    return ast.unparse(tree)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_quick_and_needs_no_optional_package():
    code = """
import sys, time, torch
for name in ("triton", "flash_attn", "tyro", "matplotlib", "tqdm"):
    sys.modules[name] = None
start = time.process_time()
import ring_attn as ra
seconds = time.process_time() - start
q = torch.randn(1, 8, 2, 4, requires_grad=True)
ra.ring_attention(q, q, q, ring=ra.Ring.simulated(2)).sin().sum().backward()
print(seconds)
"""
    assert float(run_python(code)) < 1.0


def test_importing_sets_nothing_up():
    code = """
import os, torch
before = dict(os.environ), torch.get_default_dtype(), torch.is_grad_enabled()
import ring_attn
assert before == (dict(os.environ), torch.get_default_dtype(), torch.is_grad_enabled())
assert not torch.distributed.is_initialized()
"""
    run_python(code)
