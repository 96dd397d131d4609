"""One conformance suite for all transports: local, hostile local, and gloo processes hosting one rank or two."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from ring_attn.comm import process_group
from ring_attn.comm.backend import over_nccl
from ring_attn.comm.local import LocalTransport
from ring_attn.comm.process_group import ProcessGroupTransport
from ring_attn.comm.transport import Pieces
from ring_attn.layout import Part
from tests.dist.harness import run_processes
from tests.support import Rows

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


def make_payload(rank, *, salt=0, dtype=torch.float64, device="cpu"):
    """What rank sends: known to every process, different for every rank, element and salt."""
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    return torch.randint(-99, 99, (2, 3), generator=generator).to(device, dtype)


def conform(transport, device="cpu"):
    """Raises where a transport breaks its contract. Every process of the ring runs it."""
    size, hosted = transport.ring_size, transport.hosted
    payload = partial(make_payload, device=device)
    for dtype in DTYPES:
        for offset in range(-size, size + 1):
            got = transport.shift([payload(r, dtype=dtype) for r in hosted], offset).wait()
            assert all(torch.equal(x, payload((r - offset) % size, dtype=dtype)) for r, x in zip(hosted, got, strict=True))
        parts = [[payload(r, salt=to, dtype=dtype) for to in range(size)] for r in hosted]
        got = transport.all_to_all(parts).wait()
        assert all(
            torch.equal(x, payload(src, salt=r, dtype=dtype))
            for r, row in zip(hosted, got, strict=True)
            for src, x in enumerate(row)
        )
    together(transport, device)
    parts_of_rows(transport, device)
    several_under_way(transport, payload)
    misuse(transport, payload)


def together(transport, device="cpu"):
    """What all ranks do together, and all that two axes do."""
    size, hosted = transport.ring_size, transport.hosted
    payload = partial(make_payload, device=device)
    for dtype in DTYPES:
        got = transport.all_gather([payload(r, dtype=dtype) for r in hosted]).wait()
        assert all(torch.equal(x, payload(r, dtype=dtype)) for r, x in enumerate(got)) and len(got) == size
    for dtype in (torch.float64, torch.float32):
        parts = [[payload(r, salt=to, dtype=dtype) for to in range(size)] for r in hosted]
        got = transport.reduce_scatter(parts).wait()
        sums = [sum(payload(src, salt=r, dtype=dtype) for src in range(size)) for r in hosted]
        assert all(torch.equal(x, want) for x, want in zip(got, sums, strict=True))


def parts_of_rows(transport, device):
    """Pulls some rows of some ranks, none for one of them, and pushes numbers back, for one batch row and for two."""
    size, hosted, rows = transport.ring_size, transport.hosted, 7
    gen = torch.Generator().manual_seed(size)
    parts = []
    for rank in range(size):
        wanted = [(source, *sorted(torch.randint(0, rows + 1, (2,), generator=gen).tolist())) for source in range(size)] * 2
        kept = [Part(source, range(a, b)) for source, a, b in wanted if source != rank and a < b]
        parts.append([kept[n] for n in torch.randperm(len(kept), generator=gen)] if rank != 1 else [])
    cut = lambda x: [x] if len(x) == 1 else x.split([1, 2], -1)  # noqa: E731
    for b, dtype in ((1, torch.float64), (2, torch.float32), (3, torch.bfloat16)):
        shards = [torch.randint(-99, 99, (b, rows, 3), generator=gen).to(device, dtype) for _ in range(size)]
        kept = [x.clone() for x in shards]
        got = transport.pull([Pieces(cut(shards[r])) for r in hosted], parts).wait()
        for rank, x in zip(hosted, got, strict=True):
            want = [shards[part.rank][:, part.rows.start : part.rows.stop] for part in parts[rank]]
            assert torch.equal(x, torch.cat([x.new_empty(b, 0, 3), *want], 1))
        assert all(map(torch.equal, shards, kept)), "what is pulled stays with its owner"
        sent = [torch.randint(-9, 9, (b, sum(len(p.rows) for p in own), 3), generator=gen).to(device, dtype) for own in parts]
        wide = torch.promote_types(dtype, torch.float32)
        sums = [torch.zeros(b, rows, 3, device=device, dtype=wide) for _ in range(size)]
        for own, x in zip(parts, sent, strict=True):
            for part, piece in zip(own, x.split([len(p.rows) for p in own], 1) if own else (), strict=True):
                sums[part.rank][:, part.rows.start : part.rows.stop] += piece
        into = [Rows(torch.zeros_like(sums[0])) for _ in hosted]
        pushed = transport.push([Rows(sent[r].clone()) for r in hosted], parts, into)
        assert not any(x.rows.any() for x in into), "nothing is added before it is waited for"
        pushed.wait()
        assert all(torch.equal(x.rows, sums[rank]) for rank, x in zip(hosted, into, strict=True))


def several_under_way(transport, payload):
    """Transfers of different sizes posted together arrive in any order of waiting."""
    posted = [transport.shift([payload(r, salt=n).repeat(n + 1, 1) for r in transport.hosted], n + 1) for n in range(4)]
    for n in (2, 0, 3, 1):
        for rank, x in zip(transport.hosted, posted[n].wait(), strict=True):
            assert torch.equal(x, payload((rank - n - 1) % transport.ring_size, salt=n).repeat(n + 1, 1))


def misuse(transport, payload):
    pending = transport.shift([payload(r) for r in transport.hosted])
    pending.wait()
    with pytest.raises(RuntimeError, match="waited for exactly once"):
        pending.wait()
    with pytest.raises(ValueError, match=r"payloads for .* hosted ranks; give one a hosted rank"):
        transport.shift([payload(0)] * (len(transport.hosted) + 1))
    with pytest.raises(ValueError, match="payloads must be contiguous"):
        transport.all_gather([payload(r).t() for r in transport.hosted])
    with pytest.raises(ValueError, match="one a rank of the ring"):
        transport.reduce_scatter([[payload(0)] * (transport.ring_size + 1)] * len(transport.hosted))


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("ring_size", [1, 2, 3, 5])
def test_local(ring_size, hostile):
    conform(LocalTransport(ring_size, hostile=hostile))


def test_hostile_hands_out_nan_until_waited_for_and_overwrites_what_was_sent():
    transport = LocalTransport(2, hostile=True)
    sent = [make_payload(0), make_payload(1)]
    pending = transport.shift(sent)
    assert all(x.isnan().all() for x in pending.received)
    sent[0][0, 0] = 1234.0
    assert pending.wait()[1][0, 0] == 1234.0, "a payload is read as late as wait()"
    assert all(x.isnan().all() for x in sent)


def _conform_on_gloo(rank, ranks_per_process):
    conform(ProcessGroupTransport(ranks_per_process=ranks_per_process))


@pytest.mark.parametrize(("num_processes", "ranks_per_process"), [(1, 1), (2, 1), (3, 1), (2, 2), (2, 3)])
def test_gloo(num_processes, ranks_per_process):
    run_processes(_conform_on_gloo, num_processes, ranks_per_process)


@pytest.mark.parametrize(
    ("backend", "nccl"),
    [("nccl", True), ("gloo", False), ("cpu:gloo,cuda:nccl", True), ("cpu:gloo", False), ("cuda:gloo", False)],
)
def test_what_carries_tensors_on_gpus(monkeypatch, backend, nccl):
    """A group that is made without a backend has one for each kind of device, and get_backend calls that undefined."""
    config = dist.distributed_c10d.BackendConfig(dist.Backend(backend))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: str(config))
    assert over_nccl(None) is nccl


@pytest.mark.parametrize(
    ("on_host", "ranks", "link"),
    [
        (4, range(4), ("gpus", 4)),
        (4, range(4, 8), ("gpus", 4)),
        (8, range(16), ("network", 8)),
        (8, range(12), ("network", 4)),
        (2, (0, 2, 1, 3), ("network", 1)),
        (2, (0, 1, 4, 5), ("network", 2)),
    ],
)
def test_what_lies_between_processes_and_how_many_share_a_host(monkeypatch, on_host, ranks, link):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_host))
    monkeypatch.setattr(process_group, "over_nccl", lambda group: True)
    monkeypatch.setattr(process_group.dist, "get_world_size", lambda *group: 24)
    monkeypatch.setattr(process_group.dist, "get_process_group_ranks", lambda group: list(ranks))
    assert process_group._link(None) == link
