"""Configurations: what a TOML file may say, what it may not, and what a command line adds."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ring_attn.models.decoder import Decoder, DecoderConfig
from ring_attn.train.command import parse
from ring_attn.train.config import DataConfig, OptimConfig, RingConfig, RunConfig, TrainConfig, from_table, load, to_toml
from ring_attn.train.job import check_sizes, join
from ring_attn.train.loop import Trainer
from ring_attn.train.optim import learning_rate, make_optimizer

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlearning_rate = 1", r"unknown key optim\.learning_rate; known ones here: lr, min_lr_ratio"),
        ("[optimizer]\nlr = 1", r"unknown key optimizer; known ones here: model, data, optim, ring, run"),
        ("optim = 3", r"optim is a table, written \[optim\], got 3"),
        ("[optim]\nsteps = 1.5", r"optim\.steps must be a whole number, got 1\.5"),
        ("[optim]\nsteps = true", r"optim\.steps must be a whole number, got True"),
        ("[optim]\nlr = 'big'", r"optim\.lr must be a number, got 'big'"),
        ("[model]\ntie_head = 1", r"model\.tie_head must be true or false, got 1"),
        ("[data]\npath = 3", r"data\.path must be a text, got 3"),
        ("[run]\nresume = 'yes'", r"run\.resume must be one of 'new', 'auto', 'must', got 'yes'"),
        ("[ring]\nsize = 'all'", r"ring\.size must be a whole number, got 'all'"),
        ("[ring]\nsize = 2\nsimulated = 2", r"ring\.size = 2 is a ring over processes and ring\.simulated = 2"),
        ("[ring]\nranks_per_node = 0", r"ring\.ranks_per_node must be at least 1, got 0"),
        ("[ring]\nkv_memory = 0", r"ring\.kv_memory must be at least 1, got 0"),
        ("[ring]\ngrad_dtype = 'int8'", r"ring\.grad_dtype must be one of 'float64', .* 'float16', got 'int8'"),
        ("[model]\ndim = 0", r"model\.dim must be at least 1, got 0"),
        ("[model]\nfull_every = 2", r"model\.full_every says which blocks have no model\.window, and there is none"),
        ("[model]\nwindow = 3\nfull_every = 1", r"model\.full_every 1 of 4 blocks leaves none with a window or none without"),
        ("[model]\nwindow = 3\nfull_every = 5", r"model\.full_every 5 of 4 blocks leaves none .* take 2 to model\.num_layers"),
        ("[data]\nheld_out = 1.0", r"data\.held_out is a share of the bytes"),
        ("[optim]\nlr = nan", r"optim\.lr must be at least 0, got nan"),
        ("[optim]\nclip_norm = 0", r"optim\.clip_norm must be above 0"),
        ("[optim", r"c\.toml is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_the_key(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path / "c.toml")
    assert "c.toml" in str(raised.value)


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"# \xff")
    with pytest.raises(ValueError, match=r"c\.toml is not TOML: 'utf-8' codec can't decode byte 0xff"):
        load(tmp_path / "c.toml")


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"no configuration file nowhere\.toml"):
        load("nowhere.toml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configurations_of_the_repository_load_and_make_a_model(path):
    config = load(path)
    with_small_width = dataclasses.replace(config.model, num_layers=1)
    assert Decoder(with_small_width).head.weight.shape == (256, config.model.dim)


@given(
    lr=st.floats(0, math.inf),
    steps=st.integers(1, 10**6),
    path=st.text(st.characters(exclude_categories=("Cs", "Cc"))),
    size=st.none() | st.integers(1, 64),
    grad_dtype=st.none() | st.sampled_from(["float64", "bfloat16"]),
    tie=st.booleans(),
    resume=st.sampled_from(["new", "auto", "must"]),
)
def test_what_is_saved_reads_back_equal(lr, steps, path, size, grad_dtype, tie, resume, tmp_path_factory):
    config = TrainConfig(
        DecoderConfig(tie_head=tie),
        DataConfig(path),
        OptimConfig(lr, steps=steps),
        RingConfig(size, kv_memory=size, grad_dtype=grad_dtype),
        RunConfig(resume=resume),
    )
    file = tmp_path_factory.getbasetemp() / "saved.toml"
    file.write_text(to_toml(config))
    assert load(file) == config


def test_every_key_that_may_be_none_is_none_by_default():
    """TOML has no None: a key is left out for it, which must then mean None."""
    for section in (DecoderConfig, DataConfig, OptimConfig, RingConfig, RunConfig):
        for key in dataclasses.fields(section):
            assert "None" not in str(key.type) or key.default is None, f"{section.__name__}.{key.name}"


def test_the_command_line_overrides_the_file(tmp_path):
    (tmp_path / "c.toml").write_text("[optim]\nlr = 1\nsteps = 7\n[ring]\nsimulated = 2")
    config = parse([str(tmp_path / "c.toml"), "--optim.lr", "0.25", "--ring.simulated", "4", "--model.no-tie-head"])
    assert (config.optim.lr, config.optim.steps, config.ring.simulated) == (0.25, 7, 4)
    assert not config.model.tie_head
    with pytest.raises(ValueError, match="first argument is a configuration file"):
        parse(["--optim.lr", "0.25"])


def config_with(**sections) -> TrainConfig:
    return from_table(TrainConfig, {"run": {"device": "cpu"}} | sections)


@pytest.mark.parametrize(
    ("sections", "num_processes", "message"),
    [
        ({"ring": {"simulated": 2}}, 2, r"ring\.simulated = 2 hosts every rank in one process, but there are 2 processes"),
        ({"ring": {"ulysses": 3}}, 4, r"ring\.ulysses = 3 must be a divisor of the 4 ranks of a ring"),
        ({"ring": {"size": 3}}, 4, r"4 processes do not make rings of ring\.size = 3"),
        ({"ring": {"size": 8}}, 4, r"4 processes do not make rings of ring\.size = 8"),
        ({"ring": {"size": 2}, "data": {"batch_size": 3}}, 4, r"data\.batch_size = 3 must be a multiple of .* side by side, 2"),
        ({"ring": {"size": 1}, "run": {"eval_sequences": 6}}, 4, r"run\.eval_sequences = 6 must be a multiple of .*, 4"),
        ({"data": {"batch_size": 6, "micro_batch_size": 4}}, 2, r"6 sequences a step must be a multiple of .* = 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sections, num_processes, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(config_with(**sections), num_processes, distributed=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"ring": {"size": 2}},
            r"ring\.size = 2 needs as many processes.*torchrun --nproc-per-node 2, or set ring\.simulated = 2",
        ),
        ({"run": {"parallel": "fsdp"}}, r"run\.parallel = 'fsdp' shards weights over processes"),
        (
            {"ring": {"simulated": 4}, "data": {"seq_len": 20}},
            r"data\.seq_len = 20 must be a multiple of 8 for the zigzag layout",
        ),
        ({"ring": {"layout": "spiral"}}, r"layout 'spiral' is not one of"),
        ({"ring": {"exchange": "post"}}, r"exchange 'post' is not one of"),
        ({"ring": {"simulated": 4, "exchange": "two-level"}}, r"exchange='two-level' needs ranks_per_node"),
        ({"ring": {"simulated": 4, "ranks_per_node": 3}}, r"ranks_per_node 3 must divide the ring size 4"),
        ({"ring": {"simulated": 4, "exchange": "ring", "ranks_per_node": 2}}, r"ranks_per_node=2 is for exchange='two-level'"),
    ],
)
def test_one_process_refuses_what_it_cannot_do(sections, message):
    config = config_with(**sections)
    with pytest.raises(ValueError, match=message), join(config) as job:
        Trainer.build(config, job)


@pytest.mark.parametrize(("word", "dtype"), [("bfloat16", torch.bfloat16), (None, None)])
def test_the_ring_gets_what_the_configuration_says(word, dtype):
    section = RingConfig(simulated=4, exchange="two-level", ranks_per_node=2, kv_memory=4096, grad_dtype=word)
    with join(config_with(ring=dataclasses.asdict(section))) as job:
        found = job.ring.exchange, job.ring.ranks_per_node, job.ring.kv_memory, job.ring.grad_dtype
    assert found == ("two-level", 2, 4096, dtype)
    with join(config_with(ring={"simulated": 2, "exchange": "pull", "keep_kv": True})) as job:
        assert job.ring.keep_kv


def test_the_learning_rate_rises_and_falls():
    config = OptimConfig(lr=2.0, min_lr_ratio=0.1, warmup_steps=4, steps=20)
    rates = [learning_rate(step, config) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_only_matrices_decay():
    model = Decoder(DecoderConfig(dim=16, num_layers=1, tie_head=False))
    groups = make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decay.pop(id(p)) == (0.0 if "norm" in name or "embed" in name else 0.3), name
    assert not decay
