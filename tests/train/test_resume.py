"""A run that stopped and went on, with any ring and processes, equals the unbroken one; checkpoints are all or nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
import torch.distributed.checkpoint as dcp

from ring_attn.train import checkpoint, command, loop
from ring_attn.train.config import RingConfig, load, to_toml
from ring_attn.train.folder import claim
from ring_attn.train.job import join
from ring_attn.train.loop import Diverged, Trainer, train
from ring_attn.train.metrics import read
from tests.dist.harness import run_processes
from tests.train.runs import STEPS, small_config, with_data, with_run

STOP = 5  # the run dies in step 6, having saved step 4
SIMULATED = RingConfig(simulated=2)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(tmp_path_factory.mktemp("resume"), ring=SIMULATED, checkpoint_every=2)


@pytest.fixture(scope="module")
def unbroken(config):
    return train(config)


@pytest.fixture(scope="module")
def stopped(config, unbroken):
    """The folder of the same run, dead after STOP steps."""
    config = with_run(config, dir=config.run.dir + "-stopped")
    taken = loop.train_step

    def dying(trainer, step):
        if step == STOP:
            raise KeyboardInterrupt
        return taken(trainer, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = Path(config.run.dir) / "checkpoints"
    (folder / "step-old").mkdir()
    assert checkpoint.steps_in(folder) == [2, 4]
    return Path(config.run.dir)


def copied(stopped: Path, name: str) -> str:
    """A copy of the stopped run to go on in."""
    target = stopped.with_name(name)
    shutil.copytree(stopped, target)
    return str(target)


def losses(folder: Path) -> list[tuple]:
    """Steps and losses of a run's metrics, evaluations included."""
    return [(line["step"], "loss" in line, line.get("loss", line.get("eval_loss"))) for line in read(folder)]


def assert_same_run(folder: Path, unbroken: Path) -> None:
    mine, true = losses(folder), losses(unbroken)
    assert [line[:2] for line in mine] == [line[:2] for line in true]
    assert [line[2] for line in mine] == pytest.approx([line[2] for line in true], rel=1e-10, abs=0)


@pytest.mark.parametrize("ring", [SIMULATED, RingConfig(simulated=4, layout="striped"), RingConfig()], ids=["2", "4", "1"])
def test_a_resumed_run_is_the_unbroken_one_with_any_simulated_ring(config, stopped, unbroken, ring):
    folder = copied(stopped, f"resumed-{ring.simulated}")
    outcome = train(replace(with_run(config, dir=folder, resume="must"), ring=ring))
    assert_same_run(Path(folder), unbroken.folder)
    assert (outcome.step, outcome.folder) == (STEPS, Path(folder))
    assert outcome.eval_loss == pytest.approx(unbroken.eval_loss, rel=1e-10, abs=0)


def _train(rank, *configs):
    for config in configs:
        train(config)


def test_a_resumed_run_is_the_unbroken_one_over_gloo_processes(config, stopped, unbroken):
    over = {
        "ddp": with_run(replace(config, ring=RingConfig(size=2)), dir=copied(stopped, "ddp"), resume="auto"),
        "fsdp": with_run(replace(config, ring=RingConfig()), dir=copied(stopped, "fsdp"), resume="auto", parallel="fsdp"),
        "data": with_run(replace(config, ring=RingConfig(size=1)), dir=copied(stopped, "data"), resume="must"),
    }
    run_processes(_train, 2, *over.values())
    for name in over:
        assert_same_run(stopped.with_name(name), unbroken.folder)


def test_a_checkpoint_of_two_fsdp_processes_goes_on_in_one(config, unbroken):
    """Weights and moments of the last step, saved as shards, load whole."""
    folder = unbroken.folder.with_name("sharded")
    run_processes(_train, 2, with_run(replace(config, ring=RingConfig()), dir=str(folder), parallel="fsdp"))
    assert_same_run(folder, unbroken.folder)
    ours, theirs = (loaded(config, path) for path in (unbroken.folder, folder))
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in name for name in ours)
    for name, value in ours.items():
        assert torch.allclose(theirs[name], value, rtol=1e-8, atol=1e-12), name


def loaded(config, folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint, by name."""
    with join(config) as job:
        trainer = Trainer.build(config, job)
        assert checkpoint.load(folder / "checkpoints", STEPS, trainer.model, trainer.optimizer) == STEPS
        tensors = dict(trainer.model.state_dict())
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        for p, state in trainer.optimizer.state.items():
            tensors |= {f"{names[id(p)]}.{key}": value for key, value in state.items()}
        return tensors


def test_a_run_leaves_its_configuration_metrics_curve_and_two_checkpoints(config, unbroken):
    folder = unbroken.folder
    assert load(folder / "config.toml") == config
    assert checkpoint.steps_in(folder / "checkpoints") == [STEPS - 2, STEPS]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(line["tokens_per_s"] > 0 and line["grad_norm"] > 0 and line["lr"] > 0 for line in steps)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 5, 10]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert matplotlib.image.imread(folder / "loss.png").std() > 0


def test_a_new_run_leaves_the_one_before_alone(config, unbroken):
    before = (unbroken.folder / "metrics.jsonl").read_text()
    folder = claim(config)
    assert folder.path == unbroken.folder.with_name(unbroken.folder.name + "-2")
    assert folder.start == 0
    assert (unbroken.folder / "metrics.jsonl").read_text() == before


def test_resuming_is_refused_in_words(config, unbroken, tmp_path):
    with pytest.raises(ValueError, match=r"run\.resume = 'must'.*no complete checkpoint"):
        claim(with_run(config, dir=str(tmp_path / "none"), resume="must"))
    other = replace(config, model=replace(config.model, num_layers=3))
    with pytest.raises(ValueError, match=r"another model: model\.num_layers was 2, is 3"):
        claim(with_run(other, resume="auto"))
    (tmp_path / "bare").mkdir()
    shutil.copytree(unbroken.folder / "checkpoints", tmp_path / "bare" / "checkpoints")
    with pytest.raises(ValueError, match=r"config\.toml is missing"):
        claim(with_run(config, dir=str(tmp_path / "bare"), resume="auto"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run\.dir = '.*file/run' cannot be written to, .*; name another"):
        claim(with_run(config, dir=str(tmp_path / "file" / "run")))


def test_a_save_that_dies_leaves_nothing_to_resume_from(config, tmp_path, monkeypatch):
    config = with_run(config, dir=str(tmp_path / "run"), checkpoint_every=2)
    save = dcp.save

    def dying(state, *, checkpoint_id, **more):
        save(state, checkpoint_id=checkpoint_id, **more)
        if "step-00000004" in str(checkpoint_id):
            raise KeyboardInterrupt

    monkeypatch.setattr(dcp, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004.tmp"]
    assert claim(with_run(config, resume="auto")).start == 2
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


def test_resuming_a_finished_run_takes_no_step(config, unbroken):
    again = with_run(config, dir=copied(unbroken.folder, "finished"), resume="must")
    assert train(again).eval_loss == pytest.approx(unbroken.eval_loss, rel=1e-12, abs=0)
    assert losses(Path(again.run.dir)) == losses(unbroken.folder)


def test_training_learns_and_a_loss_that_is_not_finite_stops_it(tmp_path, capsys):
    config = with_data(small_config(tmp_path, ring=SIMULATED, checkpoint_every=0), path=str(tmp_path / "easy"))
    (tmp_path / "easy").write_text("round and round it goes, " * 400)
    config = replace(config, optim=replace(config.optim, lr=1e-2, steps=60, warmup_steps=5))
    assert train(config).eval_loss < 2.0 < 5.0 < read(Path(config.run.dir))[0]["eval_loss"]
    exploding = replace(config, optim=replace(config.optim, lr=1e300, warmup_steps=0))
    with pytest.raises(Diverged, match=r"the loss is nan at step \d+; lower optim\.lr = 1e\+300"):
        train(with_run(exploding, dir=str(tmp_path / "exploding")))
    (tmp_path / "c.toml").write_text(to_toml(with_run(exploding, dir=str(tmp_path / "again"))))
    assert command.main([str(tmp_path / "c.toml")]) == 1
    assert "ring-attn train: the loss is nan at step" in capsys.readouterr().err


def test_a_saved_configuration_reads_back(config, tmp_path):
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load(tmp_path / "c.toml") == config


def test_a_checkpoint_that_is_not_whole_is_named(config, unbroken, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(unbroken.folder, folder)
    newest = folder / "checkpoints" / f"step-{STEPS:08d}"
    for path in newest.glob("*.distcp"):
        path.unlink()
    with pytest.raises(ValueError, match=rf"{newest} cannot be read, delete it to go on from the one before"):
        train(with_run(config, dir=str(folder), resume="must"))
