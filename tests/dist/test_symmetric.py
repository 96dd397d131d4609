"""The protocol of symmetric memory without GPUs: gloo processes that map each other's files, with ranks that dawdle.

What copy engines, streams and events do is checked on GPUs (tests/gpu/nccl.py); here it is what is written and read when.
"""

import ctypes
import random
import re
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as torch_memory

import ring_attn as ra
from ring_attn import tables
from ring_attn.comm import copy_engines, process_group, symmetric
from ring_attn.comm.process_group import split_group
from ring_attn.comm.reads import arrivals, pulled, pushed
from ring_attn.comm.stream_flags import Flags, flags_at_first
from ring_attn.comm.symmetric import SymmetricTransport
from ring_attn.comm.transport import Pending, Pieces
from ring_attn.driver import EQUAL, WAIT, WRITE
from ring_attn.layout import Part
from tests.dist.harness import run_processes
from tests.dist.rounds import rounds_that_went_wrong
from tests.matrix import Case, cases, check
from tests.support import Rows, way_home_hidden
from tests.test_replay import BEFORE, Redone
from tests.test_transport import conform


class MappedFiles:
    """Memory over files that all processes of a group map: `get_buffer` of any rank, and flags behind it."""

    def __init__(self, folder, number, size, group):
        ranks = dist.get_process_group_ranks(group)
        path, at_first = Path(folder) / f"{number}-{dist.get_rank()}", np.array(flags_at_first(len(ranks)), dtype=np.int32)
        path.write_bytes(b"\xff" * size + at_first.tobytes())  # NaN in every floating dtype
        dist.barrier(group)
        whole = size + at_first.nbytes
        self.memory = [torch.from_file(str(Path(folder) / f"{number}-{r}"), True, whole, dtype=torch.uint8) for r in ranks]
        self.flags = Flags([memory.data_ptr() + size for memory in self.memory], dist.get_rank(group))

    def get_buffer(self, rank, sizes, dtype):
        return self.memory[rank][: torch.Size(sizes).numel() * dtype.itemsize].view(dtype).view(sizes)

    @classmethod
    def enqueue(cls, operations, stream=None):
        """What the front end of a GPU does, at once."""
        for operation in operations:
            flag = ctypes.c_uint32.from_address(operation.address)
            if operation.operation == WRITE:
                flag.value = operation.value
            else:
                assert (operation.operation, operation.flags) == (WAIT, EQUAL)
                patience = time.monotonic() + 30
                while flag.value != operation.value:
                    assert time.monotonic() < patience, "a flag that nobody raises"
                    time.sleep(0)

    @classmethod
    def copy(cls, copies, to, stream=None):
        """What copy engines do, at once."""
        for place, source, size in copies:
            ctypes.memmove(to + place, source, size)


class Dawdling(MappedFiles):
    """The same, where any rank may fall asleep before any operation."""

    chance = random.Random()

    @classmethod
    def doze(cls):
        if cls.chance.random() < 0.2:
            time.sleep(cls.chance.random() * 0.01)

    def get_buffer(self, *args):
        self.doze()
        return super().get_buffer(*args)

    @classmethod
    def enqueue(cls, operations, stream=None):
        cls.doze()
        super().enqueue(operations)
        cls.doze()

    @classmethod
    def copy(cls, copies, to, stream=None):
        for one in copies:
            cls.doze()
            super().copy([one], to)


class pretended:
    """Inside, SymmetricTransport works on gloo processes; `per_node`: and hosts have so many."""

    def __init__(self, handle, folder, per_node=None):
        made = count()

        def link(group):
            hosts = {rank // (per_node or dist.get_world_size()) for rank in dist.get_process_group_ranks(group)}
            return ("gpus" if len(hosts) == 1 else "network", per_node or dist.get_world_size(group))

        size_of = lambda size, device, group: handle(folder, next(made), size, group)  # noqa: E731
        self.patches = [
            patch.object(symmetric, "rendezvous", size_of),
            patch.object(symmetric, "enqueue", handle.enqueue),
            patch.object(symmetric, "copy", handle.copy),
            patch.object(process_group, "_link", link),
            patch.object(symmetric, "_why_not", lambda processes: None),
            patch.object(symmetric, "_on_gpu", lambda x: True),
        ]

    def __enter__(self):
        for one in self.patches:
            one.start()

    def __exit__(self, *error):
        for one in self.patches:
            one.stop()


def _conforms(rank, folder):
    with pretended(MappedFiles, folder):
        transport = SymmetricTransport()
        conform(transport)
        conform(transport.beside)
        assert (
            transport.beside is transport.beside.beside is not transport and transport.beside._memory is not transport._memory
        )
        assert transport.memory_bytes == transport._memory.size + transport.beside.memory_bytes > transport._memory.size > 0
        for case in cases():
            if case.exchange == "pull":
                for keep_kv in (False, True):
                    options = {"exchange": "pull", "kernel": case.kernel, "keep_kv": keep_kv}
                    check(case, ra.Ring(SymmetricTransport(), layout=case.layout, **options))
                for by_heads in (False, True):
                    with way_home_hidden(by_heads):
                        check(case, ra.Ring(SymmetricTransport(), layout=case.layout, exchange="pull", kernel=case.kernel))


@pytest.mark.parametrize("num_processes", [2, 3])
def test_it_conforms_and_gives_the_matrix(num_processes, tmp_path):
    run_processes(_conforms, num_processes, str(tmp_path))


class Watched:
    """A watch that notes what it is told, and whether amid a capture."""

    def __init__(self, replays):
        self.noted, self.amid, self._replays = [], [], replays

    def add(self, works, what, roll):
        self.noted.append((works, what))
        self.amid.append(self._replays.amid)


def _comes_again(rank, folder):
    """Calls that are replayed; amid them memory is made anew, of which all graphs must hear and which none keeps."""
    with pretended(MappedFiles, folder):
        transport = SymmetricTransport()
        assert transport.beside.replays is transport.replays
        replays = transport.replays = transport.beside.replays = Redone(transport)
        watched = Watched(replays)
        with (
            patch.object(symmetric, "_capturing", lambda device: replays.amid),
            patch.object(tables, "capturing", lambda: replays.amid),
            patch.object(symmetric, "made_beside", nullcontext),
            patch.object(symmetric, "_GRAIN", 1),
            patch.object(transport, "_watch", watched),
        ):
            ring = ra.Ring(transport, exchange="pull", kernel="reference")
            small = Case("zigzag", "pull", "causal")
            for n, case in enumerate((small, replace(small, rows_per_chunk=40, mask="window"), small)):
                for seed in range(1 if n == 1 else BEFORE + 3):
                    check(replace(case, seed=seed), ring)
            assert (replays.captures, replays.replayed) == (2 + 2, 4 + 4)
            reads = [one for repeated in replays._captured for one in repeated.graph._tables]
            assert not tables._for_good and reads and not any(isinstance(one, symmetric.Shared) for one in reads)
            assert watched.noted and not any(watched.amid), "nothing moves while it is captured"
            transport.watch("reached", "pull forward, replayed")
            assert watched.noted[-1] == (["reached"], f"rank [{rank}] of 2: pull forward, replayed")
            # Theirs on a GPU.
            transport._stream, transport.beside._stream = "mine", "its"
            assert transport.streams() == ["mine", "its"]
            transport._stream = transport.beside._stream = None
            assert transport.streams() == []
        # A graph of the user's, over whatever is captured for the first time.
        replays.capturing = True
        with (
            patch.object(symmetric, "_capturing", lambda device: True),
            patch.object(tables, "capturing", lambda: True),
            patch.object(symmetric, "made_beside", nullcontext),
        ):
            check(replace(small, layout="striped"), ring)
        kept = list(tables._for_good.values())
        assert any(one is transport._memory.shared for one in kept)
        assert any(
            one is route.places for one in kept for route, _ in transport._memory.routes.values() if route.places is not None
        )


def test_short_calls_are_replayed_until_memory_is_made_anew(tmp_path):
    run_processes(_comes_again, 2, str(tmp_path))


def _lets_go(rank, folder):
    made, new = [], symmetric._Copies
    with pretended(MappedFiles, folder), patch.object(symmetric, "_Copies", lambda *x: made.append(new(*x)) or made[-1]):
        pending = SymmetricTransport().pull([Pieces([torch.zeros(1, 4, 2)])], [[Part(1, range(4))], [Part(0, range(4))]])
        assert made[0].received is not None
        pending.wait()
        assert made[0].received is None


def test_what_has_come_is_held_no_longer(tmp_path):
    run_processes(_lets_go, 2, str(tmp_path))


def _puts_off(rank, folder):
    """Copies of a pull come when it is waited for or the next transfer is asked for, those of a push at once."""
    with pretended(MappedFiles, folder):
        transport, shard, done = SymmetricTransport(), torch.full((1, 4, 2), float(rank)), []
        parts = tuple((Part(1 - mine, range(4)),) for mine in range(2))
        noted = lambda operations, stream: done.append(len(operations)) or MappedFiles.enqueue(operations)  # noqa: E731
        with patch.object(symmetric, "enqueue", noted):
            first = transport.pull([Pieces([shard])], parts)
            assert len(done) == 2, "it is put up"
            second = transport.pull([Pieces([shard + 2])], parts)
            assert len(done) == 6, "the first is read, the second put up"
            assert torch.equal(second.wait()[0], torch.full_like(shard, 3.0 - rank))
            assert len(done) == 8
            assert torch.equal(first.wait()[0], torch.full_like(shard, 1.0 - rank))
            pushed = transport.push([Rows(shard)], parts, [Rows(shard)])
            assert len(done) == 12
            pushed.wait()
            assert len(done) == 12
            # A replay asks for nothing, so what is put off is asked for before it.
            third, beside = (
                one.pull([Pieces([torch.full_like(shard, 4.0 + rank)])], parts) for one in (transport, transport.beside)
            )
            assert len(done) == 16
            transport.finish()
            assert len(done) == 20
            assert all(torch.equal(one.wait()[0], torch.full_like(shard, 5.0 - rank)) for one in (third, beside))
            assert len(done) == 20


def test_copies_of_a_pull_are_put_off(tmp_path):
    run_processes(_puts_off, 2, str(tmp_path))


def _repeats(rank, folder):
    """Pulls and pushes that differ in one thing, twice, then of a size for which the memory must grow, then the first again."""
    halves, ends, large = (
        tuple((Part(1 - r, range(start, stop)),) for r in range(2)) for start, stop in ((3, 6), (4, 6), (3, 1 << 19))
    )
    calls = [(halves, 1, 6, torch.float64), (ends, 1, 6, torch.float64), (halves, 2, 6, torch.float64)]
    calls += [(halves, 1, 9, torch.float64), (halves, 1, 6, torch.float32)]
    big = large, 1, 1 << 19, torch.float64
    with pretended(Dawdling, folder):
        transport, got = SymmetricTransport(), []
        noted = lambda self, *args: got.append(args) or MappedFiles.get_buffer(self, *args)  # noqa: E731
        with patch.object(Dawdling, "get_buffer", noted):
            for number, call in enumerate([*calls, *calls, big, *calls, big]):
                parts, b, rows, dtype = call
                before, wanted = len(got), parts[rank][0].rows
                shards = torch.randn(2, b, rows, 2, generator=torch.Generator().manual_seed(number)).to(dtype)
                # What is made in inference mode must serve outside of it, and the other way round.
                with torch.inference_mode(number % 2 == 0):
                    (pulled,) = transport.pull([Pieces([shards[rank].clone()])], parts).wait()
                    assert torch.equal(pulled, shards[1 - rank][:, wanted.start : wanted.stop])
                    total = torch.zeros_like(shards[rank])
                    transport.push([Rows(2 * pulled)], parts, [Rows(total)]).wait()
                    # Both ranks want the same rows.
                    assert torch.equal(total[:, wanted.start : wanted.stop], 2 * shards[rank][:, wanted.start : wanted.stop])
                    assert not total[:, : wanted.start].any() and not total[:, wanted.stop :].any()
                known = 5 <= number < 10 or number == 16
                assert (len(got) == before) == known, number


def test_a_shape_met_again_is_worked_out_no_second_time(tmp_path):
    run_processes(_repeats, 2, str(tmp_path))


def _reads_in_order(rank, folder):
    """Whose memory a rank reads first: in a contiguous ring its neighbour's below."""
    with pretended(MappedFiles, folder):
        transport, read = SymmetricTransport(), []

        def noted(copies, to, stream):
            memory = transport._memory.shared.memory
            read.extend(n for copy in copies for n, x in enumerate(memory) if 0 <= copy.source - x.data_ptr() < x.numel())
            MappedFiles.copy(copies, to)

        parts = tuple(tuple(Part(source, range(4)) for source in range(mine)) for mine in range(3))
        shards = [torch.full((1, 4, 2), float(number)) for number in range(3)]
        with patch.object(symmetric, "copy", noted):
            (got,) = transport.pull([Pieces([shards[rank]])], parts).wait()
        assert read == [*reversed(range(rank))]
        assert torch.equal(got, torch.cat([shards[rank][:, :0], *shards[:rank]], 1))


def test_ranks_read_in_an_order_in_which_few_share_a_source(tmp_path):
    run_processes(_reads_in_order, 3, str(tmp_path))


class TooLate(Dawdling):
    """Of the four times that a transfer is about flags, one comes only with the next."""

    late, calls, held = 0, 0, ()

    @classmethod
    def enqueue(cls, operations, stream=None):
        cls.held, now = (operations, cls.held) if cls.calls % 4 == cls.late else ((), (*cls.held, *operations))
        cls.calls += 1
        super().enqueue(now)


def _dawdles(rank, folder, handle, late, expected):
    Dawdling.chance, TooLate.late = random.Random(rank), late
    with pretended(handle, folder):
        wrong = torch.tensor(rounds_that_went_wrong(SymmetricTransport(), 300, doze=Dawdling.doze))
        dist.all_reduce(wrong)
        assert (wrong > 0) == expected, f"{wrong} of 300 rounds"


def test_ranks_that_dawdle_never_write_or_read_too_early(tmp_path):
    run_processes(_dawdles, 3, str(tmp_path), Dawdling, 0, False)


def _two_rings(rank, folder):
    Dawdling.chance = random.Random(rank)
    with pretended(Dawdling, folder):
        assert rounds_that_went_wrong(SymmetricTransport(split_group(None, 2, 1)), 100, doze=Dawdling.doze) == 0


def test_two_rings_at_once_do_not_meet(tmp_path):
    run_processes(_two_rings, 4, str(tmp_path))


@pytest.mark.parametrize("late", [0, 2])
def test_flags_must_be_waited_for_in_time(late, tmp_path):
    """The test above can fail: flags that are waited for only when a rank has written come too late for what others still read,
    and those that are waited for only when it has read, for what others have not written yet."""
    run_processes(_dawdles, 3, str(tmp_path), TooLate, late, True)


def _a_row_early(reads):
    """The same reads, each from a row before its own where there is one."""

    def broken(*args):
        found = reads(*args)
        starts = [max(rows.start - 1, 0) for _, rows in found.reads]
        moved = [read._replace(rows=range(n, n + len(read.rows))) for n, read in zip(starts, found.reads, strict=True)]
        return found._replace(reads=moved)

    return broken


def _not_waited_for(received, finish, what):
    """A pull that is over before its copies have begun."""
    return Pending(received, finish if received is None else lambda: None, what)


BROKEN = {
    "pulls are not waited for": ("Pending", _not_waited_for),
    "pulls read a row too early": ("pulled", _a_row_early(pulled)),
    "pushes read a row too early": ("pushed", _a_row_early(pushed)),
    "pushes go home a row too late": ("arrivals", lambda *args: arrivals(*args).roll(1, 1)),
}


def _notices(rank, folder, broken):
    with pretended(MappedFiles, folder), patch.object(symmetric, *BROKEN[broken]) if broken else nullcontext():
        wrong = torch.tensor(rounds_that_went_wrong(SymmetricTransport(), 40))
        dist.all_reduce(wrong)
        assert (wrong > 0) == bool(broken), f"{wrong} of 40 rounds"


@pytest.mark.parametrize("broken", [None, *BROKEN])
def test_rounds_notice_what_is_broken(broken, tmp_path):
    run_processes(_notices, 3, str(tmp_path), broken)


def _is_refused(rank):
    with pytest.raises(ValueError, match="for GPUs of one host over NCCL, but the processes are linked by gloo"):
        SymmetricTransport()
    assert ra.Ring.from_group(exchange="pull").transport.link == "gloo"
    with patch.object(process_group, "_link", lambda group: ("gpus", 2)):
        with patch.dict("os.environ", {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "0"}):
            _falls_back_by_name("set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 in every process")
        with patch.dict("os.environ", {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}):
            with patch.object(torch.cuda, "device_count", lambda: 1):
                _falls_back_by_name("each of 2 processes must see the GPUs of all, but this one sees 1")
            with patch.object(torch.version, "hip", "6.4"):
                _falls_back_by_name("it goes by stream memory operations of CUDA's driver")
            with patch.object(torch.cuda, "device_count", lambda: 4):
                with patch.object(torch.cuda, "can_device_access_peer", lambda one, other: {one, other} != {0, 2}):
                    _falls_back_by_name(r"of these pairs of GPUs one does not reach the other: \[\(0, 2\), \(2, 0\)\]")
                with patch.object(torch.cuda, "can_device_access_peer", lambda one, other: True):
                    pull = ra.Ring.from_group(exchange="pull", kernel="reference")
                    assert pull.transport.link == "symmetric"
                    # Tensors on the CPU, in a group that carries both kinds, go as messages.
                    case = next(case for case in cases() if (case.exchange, case.layout) == ("pull", pull.layout_name))
                    check(case, pull)
                    assert ra.Ring.from_group(exchange="auto").transport.link == "symmetric"
                    assert ra.Ring.from_group(exchange="gather").transport.link == "gpus"
        # Who sees it otherwise than the others is found out by the first call.
        mine = "symmetric" if rank else "gpus"
        with patch.object(symmetric, "_why_not", lambda processes: None if rank else "not here"):
            ring = ra.Ring.from_group(exchange="auto")
        assert ring.transport.link == mine
        x = torch.zeros(1, 4, 1, 4)
        with pytest.raises(ValueError, match=r"every rank must call with the same .* exchange and wires"):
            ra.ring_attention(x, x, x, ring=ring)


def _falls_back_by_name(reason):
    """Under auto, in the log; a pull that was asked for is refused."""
    with pytest.raises(ValueError, match=f"{reason}.*; or pull by messages"):
        ra.Ring.from_group(exchange="pull")
    with patch.object(copy_engines.logger, "info") as log:
        assert ra.Ring.from_group(exchange="auto").transport.link == "gpus"
    text, why = log.call_args.args
    assert text == "exchange: pulls go by messages, not by copy engines: %s"
    assert re.search(reason, str(why))


def test_it_is_refused_where_it_cannot_work():
    run_processes(_is_refused, 2)


@pytest.mark.parametrize("multicast", [0, 1 << 40])
def test_memory_with_multicast_is_refused(multicast, monkeypatch):
    made, group, current = [], SimpleNamespace(size=lambda: 3), []

    @contextmanager
    def device(of):
        current.append(of)
        yield
        current.pop()

    def empty(*args, **options):
        assert current == [options["device"]]
        made.append(torch.empty(*args, **options))
        return made[0]

    get_buffer = lambda rank, sizes, dtype, start=0: made[0][start:].view(dtype)[: sizes[0]]  # noqa: E731
    handle = SimpleNamespace(multicast_ptr=multicast, rank=1, get_buffer=get_buffer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch_memory, "empty", empty)
    monkeypatch.setattr(torch_memory, "rendezvous", lambda memory, of: handle if memory is made[0] and of is group else None)
    if multicast:
        with pytest.raises(RuntimeError, match="came with NVLink multicast; set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 earlier"):
            symmetric.rendezvous(1 << 10, torch.device("cpu"), group)
    else:
        shared = symmetric.rendezvous(1 << 10, torch.device("cpu"), group)
        assert shared.get_buffer is get_buffer and shared.own is made[0]
        assert made[0][1 << 10 :].view(torch.int32).tolist() == flags_at_first(3)


def test_where_memory_cannot_be_made_the_way_out_is_said(monkeypatch):
    def no_memory(*_):
        raise RuntimeError("no room on rank 2")

    monkeypatch.setattr(dist, "barrier", lambda group: None)
    monkeypatch.setattr(symmetric, "rendezvous", no_memory)
    with pytest.raises(RuntimeError, match="no room on rank 2") as found:
        symmetric._Memory().of_size(8, torch.device("cpu"), None)
    assert "exchange='ring' and 'gather' do not" in found.value.__notes__[0]
