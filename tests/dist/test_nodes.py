"""Copy engines inside nodes, without GPUs: gloo processes that pass for GPUs of two hosts and map each other's files."""

from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import ring_attn as ra
from ring_attn.comm import copy_engines, symmetric
from ring_attn.comm.nodes import inside_node
from ring_attn.comm.symmetric import SymmetricTransport
from ring_attn.layout import Part
from tests.dist.harness import run_processes
from tests.dist.test_symmetric import Dawdling, MappedFiles, pretended
from tests.matrix import cases, check
from tests.test_transport import conform


class Counted:
    """Counts, inside, the transfers by copy engines."""

    def __init__(self):
        self.names = Counter()
        put_up = SymmetricTransport._put_up
        counted = lambda transport, mine, route, what: self.names.update([what]) or put_up(transport, mine, route, what)  # noqa: E731
        self.patch = patch.object(SymmetricTransport, "_put_up", counted)

    def __enter__(self):
        self.patch.start()
        return self.names

    def __exit__(self, *error):
        self.patch.stop()


def _matrix(rank, folder, handle):
    with pretended(handle, folder, per_node=2):
        ring = ra.Ring.from_group(None, "zigzag", exchange="two-level")
        assert ring.transport.link == "nodes" and ring.ranks_per_node == 2
        conform(ring.transport)
        assert ring.transport.beside is ring.transport
        for case in cases()[::3]:
            case = replace(case, exchange="two-level")
            with Counted() as names:
                ring = ra.Ring.from_group(None, case.layout, exchange="two-level", kernel=case.kernel)
                check(case, ring)
            assert case.mask == "window" or any("KV for step 1" in name for name in names), case
            assert case.mask == "window" or any("dK and dV of step 1" in name for name in names), case
            assert (ring.transport.memory_bytes > 0) == bool(names)


@pytest.mark.parametrize("handle", [MappedFiles, Dawdling])
def test_a_ring_of_nodes_pulls_inside_them_and_gives_the_matrix(handle, tmp_path):
    run_processes(_matrix, 4, str(tmp_path), handle)


def _other_ways(rank, folder):
    """Who pulls from everywhere does so by messages; auto has the choice; a transport beside has the same memory."""
    with pretended(MappedFiles, folder, per_node=2):
        for exchange in ("auto", "pull"):
            ring = ra.Ring.from_group(None, "contiguous", exchange=exchange)
            assert ring.transport.link == ("nodes" if exchange == "auto" else "network")
            case = next(case for case in cases() if (case.exchange, case.layout) == ("pull", "contiguous"))
            with Counted() as names:
                check(case, ra.Ring(ring.transport, layout="contiguous", exchange="pull", kernel=case.kernel))
            assert not names
        everyone, other = dist.group.WORLD, dist.new_group([0, 1, 2, 3])
        nodes = ra.Ring.from_group(everyone, exchange="two-level").transport
        beside = nodes._over(other)
        assert (beside.link, beside.group, beside._inside) == ("nodes", other, nodes._inside)
        assert ra.Ring.from_group(everyone, exchange="two-level").transport._inside.group is nodes._inside.group
        with (
            patch.object(symmetric, "_why_not", lambda processes: "not here"),
            patch.object(copy_engines.logger, "info") as log,
        ):
            assert ra.Ring.from_group(everyone, exchange="two-level").transport.link == "network"
        assert "not here" in str(log.call_args.args[1])


def test_everything_else_goes_as_messages(tmp_path):
    run_processes(_other_ways, 4, str(tmp_path))


def _parts(*by_rank):
    return tuple(tuple(Part(rank, range(3)) for rank in wanted) for wanted in by_rank)


def test_parts_are_counted_inside_a_node():
    assert inside_node(_parts([1], [0], [3, 2], []), range(2, 4)) == _parts([1, 0], [])
    assert inside_node(_parts([1], [0], [3, 2], []), range(2)) == _parts([1], [0])
    for away in ([1], [2], [3], []), ([], [], [], [0]):
        assert inside_node(_parts(*away), range(2)) is inside_node(_parts(*away), range(2, 4)) is None


def test_a_node_is_told_alike_of_the_same_parts():
    first = inside_node(_parts([1], [0]), range(2))
    assert inside_node(_parts([1], [0]), range(2)) is first, "routes are kept by it"


def _two_hosts_times_ulysses(rank, folder):
    with pretended(MappedFiles, folder, per_node=2):
        ring = ra.Ring.from_group(None, "zigzag", ulysses=2)
        assert ring.transport.rings[0].link == "network", "the ring's ranks are each on a host of its own"
        assert torch.equal(ring.positions(8), torch.tensor([[0, 1], [6, 7], [2, 3], [4, 5]][rank]))


def test_a_mesh_whose_rings_go_between_hosts(tmp_path):
    run_processes(_two_hosts_times_ulysses, 4, str(tmp_path))


def _mesh_on_one_host(rank, folder):
    with pretended(MappedFiles, folder):
        for case in cases(ulysses=2)[::7]:
            ring = ra.Ring.from_group(None, case.layout, exchange=case.exchange, kernel=case.kernel, ulysses=2)
            assert ring.transport.rings[0].link == ("symmetric" if case.exchange == "pull" else "gpus")
            check(case, ring)


def test_the_rings_of_a_mesh_pull_by_copy_engines(tmp_path):
    run_processes(_mesh_on_one_host, 4, str(tmp_path))
