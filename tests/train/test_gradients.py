"""Ten float64 steps: a ring, simulated or real, beside data ranks, under DDP and FSDP2, takes those of one plain device."""

from dataclasses import replace

import pytest
import torch

from ring_attn.train.config import RingConfig
from tests.dist.harness import run_processes
from tests.train.runs import assert_same_steps, job_steps, plain_steps, small_config, with_data, with_run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(tmp_path_factory.mktemp("gradients"))


@pytest.fixture(scope="module")
def truth(config):
    return plain_steps(config)


@pytest.mark.parametrize(
    ("ring", "micro_batch_size", "checkpoint_blocks"),
    [
        (RingConfig(simulated=4), None, False),
        (RingConfig(simulated=4, layout="striped", exchange="gather"), 1, False),
        (RingConfig(simulated=4, exchange="ring"), None, False),
        (RingConfig(simulated=4, exchange="two-level", ranks_per_node=2), None, False),
        (RingConfig(simulated=2, layout="contiguous", kernel="reference"), 2, True),
        (RingConfig(simulated=4, ulysses=2), None, True),
        (RingConfig(), None, True),
    ],
    ids=[
        "zigzag",
        "striped, gather, micro batches",
        "ring",
        "two levels",
        "contiguous, checkpointed blocks",
        "two axes",
        "one rank",
    ],
)
def test_a_simulated_ring_takes_the_steps_of_one_device(config, truth, ring, micro_batch_size, checkpoint_blocks):
    config = with_data(replace(config, ring=ring), micro_batch_size=micro_batch_size)
    config = replace(config, model=replace(config.model, checkpoint_blocks=checkpoint_blocks))
    assert_same_steps(job_steps(config), truth)


def _processes(rank, runs, truth):
    for name, config in runs.items():
        try:
            assert_same_steps(job_steps(config), truth)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_two_gloo_processes_take_the_steps_of_one_device(config, truth):
    ring = replace(config, ring=RingConfig(size=2))
    runs = {
        "ring of 2, DDP": ring,
        "ring of 2, FSDP2, micro batches": with_data(with_run(ring, parallel="fsdp"), micro_batch_size=2),
        "2 data ranks, DDP": replace(config, ring=RingConfig(size=1)),
    }
    run_processes(_processes, 2, runs, truth)


def test_data_ranks_beside_rings_take_the_steps_of_one_device(config, truth):
    grid = with_data(replace(config, ring=RingConfig(size=2)), micro_batch_size=1)
    runs = {
        "2 x 2, FSDP2": with_run(grid, parallel="fsdp"),
        "2 x 2, DDP": grid,
        "2 x 2, trading heads": replace(grid, ring=RingConfig(size=2, ulysses=2)),
        "a ring of 2 x 2": replace(config, ring=RingConfig(size=4, ulysses=2)),
        "two levels": replace(config, ring=RingConfig(size=4, exchange="two-level", ranks_per_node=2, grad_dtype="float64")),
    }
    run_processes(_processes, 4, runs, truth)


def test_the_truth_is_not_blind(config, truth):
    """Neither to a gradient scaled by 2, which clipping would hide in the weights, nor to one wrong tensor."""
    scaled = [{**step, "norm": step["norm"] * 2} for step in truth]
    with pytest.raises(AssertionError, match="norm is off"):
        assert_same_steps(scaled, truth)
    name = "blocks.1.attention.k_proj.weight"
    wrong = [{**step, name: step[name] + 1e-8 * torch.randn_like(step[name])} for step in truth]
    with pytest.raises(AssertionError, match=r"k_proj\.weight is off"):
        assert_same_steps(wrong, truth)
