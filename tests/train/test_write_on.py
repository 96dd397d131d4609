"""ring-attn generate: a run's newest checkpoint writes the same text with any ring, and that of its weights on one device."""

import shutil
from dataclasses import replace

import pytest
import torch

from ring_attn import cli
from ring_attn.models.decoder import Decoder
from ring_attn.train.config import RingConfig, to_toml
from ring_attn.train.generate import GenerateOptions, written
from ring_attn.train.loop import train
from tests.dist.harness import run_processes
from tests.test_generate import dense_generate
from tests.train.runs import small_config
from tests.train.test_resume import loaded

PROMPT = "so bescheiden, 3 µm"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ten steps on two ranks of one process: its configuration and folder."""
    config = small_config(tmp_path_factory.mktemp("write"), ring=RingConfig(simulated=2))
    return config, train(config).folder


def options(run, **more) -> GenerateOptions:
    return GenerateOptions(str(run[1]), PROMPT, 40, **more)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_that_of_the_weights(run, temperature):
    model, tensors = Decoder(run[0].model).double(), loaded(*run)
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    prompt = torch.tensor([list(PROMPT.encode())])
    tokens = dense_generate(model, prompt, 40, temperature, torch.Generator().manual_seed(7))
    want = bytes(tokens[0].tolist()).decode(errors="replace")
    assert want.startswith(PROMPT) and len(tokens[0, prompt.shape[1] :].unique()) > 1
    for simulated in (None, 2, 3):
        assert written(options(run, temperature=temperature, seed=7, simulated=simulated)) == want


def _same_text(rank: int, given: GenerateOptions, want: str) -> None:
    assert written(given) == want


def test_processes_make_one_ring(run):
    given = options(run, temperature=1.0)
    run_processes(_same_text, 2, given, written(given))


@pytest.mark.parametrize(
    "ring",
    [
        RingConfig(size=4, ulysses=2),
        RingConfig(size=4, exchange="two-level", ranks_per_node=2),
        RingConfig(size=2, exchange="pull", keep_kv=True),
    ],
    ids=["two axes", "two levels", "kept"],
)
def test_a_run_on_a_grid_writes_on_in_one_process(run, tmp_path, ring):
    shutil.copytree(run[1], tmp_path / "run")
    saved = to_toml(replace(run[0], ring=ring, run=replace(run[0].run, parallel="fsdp")))
    (tmp_path / "run" / "config.toml").write_text(saved)
    assert written(options((None, tmp_path / "run"))) == written(options(run))


def test_the_command(run, capsys, tmp_path):
    assert (
        cli.main(["generate", str(run[1]), "--prompt", PROMPT, "--num-tokens", "40", "--temperature", "1", "--seed", "3"]) == 0
    )
    assert capsys.readouterr().out == written(options(run, temperature=1.0, seed=3)) + "\n"
    for args, message in (
        ([str(tmp_path)], "is no folder of a run, for it has no config.toml; ring-attn train makes one"),
        ([str(run[1]), "--prompt", ""], "the prompt must be [batch, tokens] with at least one token"),
        ([str(run[1]), "--temperature", "-1"], "temperature must be at least 0"),
        ([str(run[1]), "--simulated", "0"], "ring.simulated must be at least 1, got 0"),
    ):
        assert cli.main(["generate", *args]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "config.toml").write_text((run[1] / "config.toml").read_text())
    assert cli.main(["generate", str(tmp_path)]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err
