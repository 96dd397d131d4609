"""The ring on real GPUs over NCCL: conformance, the matrix in float64, 16 bits against plain PyTorch, and times.

    torchrun --standalone --nproc-per-node 4 -m tests.gpu.nccl [--only symmetric]

Every rank checks its own rows; rank 0 prints a line for each check; exits non-zero on every rank where any of them found fault.
Symmetric memory needs TORCH_SYMM_MEM_DISABLE_MULTICAST=1.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import ring_attn as ra
from ring_attn.bench.timing import captured
from ring_attn.comm import replay as replay_module
from ring_attn.comm import symmetric as symmetric_memory
from ring_attn.comm.process_group import ProcessGroupTransport, split_group
from ring_attn.comm.second import second_group
from ring_attn.comm.symmetric import SymmetricTransport
from ring_attn.comm.transport import Transport
from ring_attn.driver import Operations
from ring_attn.kernels import triton_blocks
from ring_attn.kernels.packs import make_pack
from tests.dist.rounds import rounds_that_went_wrong
from tests.matrix import EXCHANGES, LAYOUTS, MASKS, Case, cases, check
from tests.support import GRAD_FACTOR, OUT_FACTOR, allowed, dense, random_qkv, rel_error, way_home_hidden
from tests.test_transport import conform

DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def gradients(function, inputs, up):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, up)]


def ratios_in_16_bits(
    layout: str, exchange: str, mask_name: str, kernel: str, dtype: torch.dtype, head_dim: int = 128
) -> list[float]:
    """Errors of out, dq, dk, dv on this rank's rows, as multiples of plain single-device PyTorch's own in that dtype."""
    ring = ra.Ring.from_group(None, layout, exchange=exchange, kernel=kernel)
    t = ring.size * 2 * 149
    mask = MASKS[mask_name](t)
    inputs = random_qkv(2, t, t, 8, 2, head_dim, dtype=dtype, device=DEVICE, seed=7)
    q, k, v, dout = inputs
    seen, scale = allowed(mask, t, 2, DEVICE), head_dim**-0.5
    truth = gradients(lambda *x: dense(*x, seen, scale)[0], [x.double() for x in (q, k, v)], dout.double())
    plain = gradients(lambda *x: dense(*x, seen, scale)[0], (q, k, v), dout)
    got = gradients(
        lambda *x: ra.ring_attention(*x, ring=ring, mask=mask), [ring.shard(x) for x in (q, k, v)], ring.shard(dout)
    )
    return [
        rel_error(x, ring.shard(a)) / max(rel_error(ring.shard(b), ring.shard(a)), 1e-30)
        for x, a, b in zip(got, truth, plain, strict=True)
    ]


def dozing_rounds(count: int, rings: int = 1) -> None:
    """Pulls and pushes in rings side by side, every one checked. Before whatever a rank does, and before either of its streams
    writes or awaits flags, that stream may be delayed, or the host until it is idle.
    """
    chance, at_once = random.Random(dist.get_rank()), symmetric_memory.enqueue

    def doze() -> None:
        chosen = chance.random()
        if chosen < 0.3:
            torch.cuda._sleep(int(chance.random() * 5e6))
        elif chosen < 0.33:
            torch.cuda.current_stream().synchronize()

    def enqueue(operations: Operations, stream: torch.cuda.Stream) -> None:
        doze()
        at_once(operations, stream)

    group = split_group(None, dist.get_world_size() // rings, 1)
    with patch.object(symmetric_memory, "enqueue", enqueue):
        assert rounds_that_went_wrong(SymmetricTransport(group), count, DEVICE, doze) == 0


def rounds_from_elsewhere(count: int) -> str:
    """Rounds in a ring, and a call of what auto takes, while another rank's device is the current one."""
    with torch.cuda.device((DEVICE.index + 1) % torch.cuda.device_count()):
        assert rounds_that_went_wrong(SymmetricTransport(), count, DEVICE) == 0
        return check_16_bits("zigzag", "pull", "causal", "auto", torch.bfloat16)


def forget(transport: Transport) -> None:
    """Empties every cache of tables on devices, and writes over what they held."""
    for cache in (triton_blocks._make, make_pack):
        cache.cache_clear()
    for one in (transport, transport.beside):
        if isinstance(one, SymmetricTransport):
            one._places.clear()
            one._memory.routes.clear()
    for size in range(1, 200):
        torch.full([size * 128], -1 << 30, dtype=torch.int32, device=DEVICE)


def replays(exchange: str, count: int = 20, **options) -> None:
    """A CUDA graph of a forward and a backward gives, on new inputs and between other calls, what the call gives."""
    ring = ra.Ring.from_group(None, "zigzag", exchange=exchange, **options)
    shape = 1, 300, 300, 4, 2, 128
    q, k, v, dout = (x.requires_grad_() for x in random_qkv(*shape, dtype=torch.bfloat16, device=DEVICE, seed=ring.hosted[0]))

    def run() -> list[torch.Tensor]:
        out = ra.ring_attention(q, k, v, ring=ring)
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    replay, found = captured(run)
    for number in range(count):
        for x, y in zip((q, k, v, dout), random_qkv(*shape, device=DEVICE, seed=100 * number + ring.hosted[0]), strict=True):
            x.data.copy_(y)
        wanted = run()
        forget(ring.transport)
        replay()
        if number % 2:
            run()
        assert all(rel_error(x, y) < 1e-2 for x, y in zip(found, wanted, strict=True)), f"replay {number}"


def graphed_layers(exchange: str, count: int = 20) -> None:
    """Two graphed callables in a row, with calls as they are in between, give on new inputs what two such calls give."""
    ring = ra.Ring.from_group(None, "zigzag", exchange=exchange)
    make = {"dtype": torch.bfloat16, "device": DEVICE}
    of = lambda seed: random_qkv(1, 300, 300, 4, 2, 128, seed=100 * seed + ring.hosted[0], **make)  # noqa: E731
    call = lambda q, k, v: ra.ring_attention(q, k, v, ring=ring)  # noqa: E731
    layers = [torch.cuda.make_graphed_callables(call, tuple(x.requires_grad_() for x in of(n)[:3])) for n in range(2)]
    for number in range(count):
        *inputs, dout = of(2 + number)
        wanted = gradients(lambda q, k, v: call(call(q, k, v), k, v), inputs, dout)
        found = gradients(lambda q, k, v: layers[1](layers[0](q, k, v), k, v), inputs, dout)
        assert all(rel_error(x, y) < 1e-2 for x, y in zip(found, wanted, strict=True)), f"call {number}"


def two_layers(ring, mask, q, k, v):
    return ra.ring_attention(ra.ring_attention(q, k, v, ring=ring, mask=mask), k, v, ring=ring, mask=mask)


def repeated(count: int = 10, anew: int = 6, some: bool = False, **options) -> str:
    """Calls that come again, two layers alike in a row, of three kinds in turns, on two streams, with delays, give what calls
    asked for singly give; symmetric memory is made anew amid them, and tables are forgotten. `some`: every other rank replays.
    """
    transport, chance = SymmetricTransport(), random.Random(dist.get_rank())
    ring, singly = (ra.Ring(transport, exchange="pull", replay=replay, **options) for replay in (True, False))
    documents = ra.Documents(lengths=[301, 99, 300 * ring.size - 400])
    masks = ra.Causal(), ra.Window(100, 0), ra.Causal() & documents
    streams = torch.cuda.current_stream(), torch.cuda.Stream()
    replayed, replay = [], transport.replays.replay

    def counted(*given):
        replayed.append(given)
        return replay(*given)

    with ExitStack() as stack:
        stack.enter_context(patch.object(transport.replays, "replay", counted))
        failed = stack.enter_context(patch.object(replay_module.logger, "warning"))
        if some and dist.get_rank() % 2:
            stack.enter_context(patch.object(transport.replays, "make_room", lambda given: False))
        for number in range(count):
            for n, mask in enumerate(masks):
                rows = 3000 if (number, n) == (anew, 0) else 300
                *inputs, dout = random_qkv(
                    1, rows, rows, 4, 2, 128, dtype=torch.bfloat16, device=DEVICE, seed=100 * number + ring.hosted[0]
                )
                if n:
                    # As models lay them out that keep heads in front of rows.
                    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
                wanted = gradients(partial(two_layers, singly, mask), inputs, dout)
                torch.cuda._sleep(int(chance.random() * 5e6))
                forget(transport)
                stream = streams[(number + n) % 2]
                stream.wait_stream(streams[0])
                with torch.cuda.stream(stream):
                    found = gradients(partial(two_layers, ring, mask), inputs, dout)
                    errors = [rel_error(x, y) for x, y in zip(found, wanted, strict=True)]
                streams[0].wait_stream(stream)
                assert max(errors) < 1e-2, f"call {number} under {mask}: {errors}"
            with torch.inference_mode():
                found = ra.ring_attention(*inputs, ring=ring, mask=mask)
                assert rel_error(found, ra.ring_attention(*inputs, ring=singly, mask=mask)) < 1e-2
    assert bool(replayed) == (not some or dist.get_rank() % 2 == 0)
    assert not failed.called, failed.call_args
    return f"{len(replayed)} replays"


def repeated_with_hidden_way_home() -> str:
    with way_home_hidden(by_heads=False):
        return repeated()


def rings_made_anew(count: int = 8) -> str:
    """A ring for every batch, as of documents, replays its calls as well, and what earlier ones captured takes no memory."""
    ring, taken = ra.Ring(SymmetricTransport(), exchange="pull"), []
    singly = ra.Ring(ring.transport, exchange="pull", layout="striped", replay=False)
    for number in range(count):
        of_batch = ring.with_layout("striped")
        for call in range(4):
            *inputs, dout = small_inputs(10 * number + call)
            found, wanted = (gradients(partial(two_layers, one, ra.Causal()), inputs, dout) for one in (of_batch, singly))
            assert all(rel_error(x, y) < 1e-2 for x, y in zip(found, wanted, strict=True)), f"batch {number}, call {call}"
        assert sum(one.graph is not None for one in ring.transport.replays._captured) == 2
        del of_batch
        taken.append(torch.cuda.memory_reserved())
    assert taken[-1] == taken[2], f"bytes reserved after each batch: {taken}"
    assert not ring.transport.replays._captured
    return f"{taken[-1] >> 20} MiB reserved"


def small_inputs(seed: int) -> list[torch.Tensor]:
    """q, k, v and dout, this rank's own."""
    return random_qkv(1, 300, 300, 4, 2, 128, dtype=torch.bfloat16, device=DEVICE, seed=10 * seed + dist.get_rank())


def failing_captures(count: int = 6, *, by_driver: bool = False) -> str:
    """A capture that fails where a transfer has just forked leaves calls as they were, and is the last one. `by_driver`: for
    it was asked for what it does not do amid one, and refuses all that follows.
    """
    transport = SymmetricTransport()
    ring, singly = (ra.Ring(transport, exchange="pull", replay=replay) for replay in (True, False))
    copies = symmetric_memory.copy

    def fails(to_do, to, stream):
        if transport.replays.recording:
            if by_driver:
                stream.synchronize()
            raise RuntimeError("out of patience")
        copies(to_do, to, stream)

    for broken, mask in ((True, ra.Causal()), (False, ra.Window(100, 0))):
        with patch.object(symmetric_memory, "copy", fails if broken else copies):
            for number in range(count):
                *inputs, dout = small_inputs(number)
                found, wanted = (gradients(partial(two_layers, one, mask), inputs, dout) for one in (ring, singly))
                assert all(rel_error(x, y) < 1e-2 for x, y in zip(found, wanted, strict=True)), f"{broken=}, call {number}"
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    assert not transport.replays._captured
    return f"random numbers are drawn as before, one of them {torch.randn(1, device=DEVICE).item():.2f}"


def abandoned_calls(count: int = 4) -> None:
    """A call that ends with an error while its KV is asked for, as where memory is short, before calls that are replayed."""
    transport = SymmetricTransport()
    ring, singly = (ra.Ring(transport, exchange="pull", replay=replay) for replay in (True, False))
    *inputs, dout = small_inputs(0)
    wanted = gradients(partial(two_layers, singly, ra.Causal()), inputs, dout)
    kernel = next(iter(singly.settled.values())).kernel("forward")
    for _ in range(count):
        with patch.object(type(kernel), "forward", side_effect=torch.OutOfMemoryError), pytest.raises(torch.OutOfMemoryError):
            ra.ring_attention(*inputs, ring=singly)
        found = gradients(partial(two_layers, ring, ra.Causal()), inputs, dout)
        assert all(rel_error(x, y) < 1e-2 for x, y in zip(found, wanted, strict=True))


def short_by_messages() -> str:
    """What auto takes for few rows, which may be messages: nothing is captured of these."""
    ring = ra.Ring.from_group(None)
    for number in range(5):
        *inputs, dout = (x[:, :128] for x in small_inputs(number))
        gradients(partial(two_layers, ring, ra.Causal()), inputs, dout)
    settled = next(iter(ring.settled.values()))
    assert bool(ring.transport.replays._captured) == (settled.exchange.name == "pull")
    return settled.exchange.name


def symmetric_ring(layout: str, kernel: str = "auto", keep_kv: bool = False) -> ra.Ring:
    return ra.Ring(SymmetricTransport(), layout=layout, exchange="pull", kernel=kernel, keep_kv=keep_kv)


def check_16_bits(layout: str, exchange: str, mask_name: str, kernel: str, dtype: torch.dtype) -> str:
    ratios = ratios_in_16_bits(layout, exchange, mask_name, kernel, dtype)
    limits = [OUT_FACTOR, *[GRAD_FACTOR] * 3]
    assert all(r <= limit for r, limit in zip(ratios, limits, strict=True)), (
        f"{layout} {exchange} {mask_name} {kernel}: {ratios}"
    )
    return " ".join(f"{r:.2f}" for r in ratios)


def median_ms(function, repeats: int = 7) -> float:
    """CUDA-event median of the slowest rank."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        dist.barrier()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    slowest = torch.tensor(statistics.median(times), device=DEVICE)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def timing(ring: ra.Ring, seq_len: int, h: int = 32, g: int = 8, d: int = 128) -> str:
    """ms and TFLOP/s a GPU, forward and forward + backward, causal, bf16."""
    rows = ring.layout(seq_len).shard_len * len(ring.hosted)
    q, k, v, dout = (
        x.requires_grad_() for x in random_qkv(1, rows, rows, h, g, d, dtype=torch.bfloat16, device=DEVICE, seed=ring.hosted[0])
    )
    with torch.no_grad():
        forward = median_ms(lambda: ra.ring_attention(q, k, v, ring=ring))
    both = median_ms(lambda: torch.autograd.grad(ra.ring_attention(q, k, v, ring=ring), (q, k, v), dout))
    flops = 2 * h * seq_len * rows * d / 1e9
    return f"forward {forward:8.2f} ms {flops / forward:5.0f} TF   both {both:8.2f} ms {3.5 * flops / both:5.0f} TF"


class Report:
    """What was attempted: rank 0 prints a line for each, at once, and what failed is kept."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def attempt(self, name: str, function: Callable, *args) -> None:
        start = time.monotonic()
        try:
            found = function(*args) or "ok"
            if dist.get_rank() == 0:
                print(f"{name:52s} {found}  [{time.monotonic() - start:.1f} s]", flush=True)
        except Exception as error:  # a report: one failure must not hide the others
            traceback.print_exc()
            self.failures.append(f"rank {dist.get_rank()}: {name}: {type(error).__name__}: {error}")


def symmetric(report: Report) -> None:
    """Copy engines: the wires, the matrix, and delays."""
    ring = symmetric_ring("zigzag")
    report.attempt("symmetric memory: conformance", lambda: conform(ring.transport, DEVICE))
    report.attempt("symmetric memory: 1,000 rounds with delays", dozing_rounds, 1000)
    report.attempt("symmetric memory: while another device is the current one", rounds_from_elsewhere, 200)
    split = second_group(dist.group.WORLD)
    report.attempt("symmetric memory: of a group split off", lambda: conform(SymmetricTransport(split), DEVICE))
    if dist.get_world_size() == 4:
        report.attempt("symmetric memory: the same in two rings at once", dozing_rounds, 1000, 2)
    report.attempt("symmetric memory: nothing is lost on the way home", nothing_is_lost)
    pulled = [case for case in cases() if case.exchange == "pull"]
    for by_heads in (False, True):
        name = f"symmetric memory: float64 matrix, way home hidden{', by heads' * by_heads}"
        report.attempt(name, matrix_with_hidden_way_home, pulled, by_heads)
    for keep in (False, True):
        report.attempt(
            f"symmetric memory: float64 matrix{', KV kept' * keep}",
            lambda keep=keep: [check(c, symmetric_ring(c.layout, c.kernel, keep), device=DEVICE) for c in pulled] and None,
        )


def nothing_is_lost() -> str:
    """dK and dV that travel as a library rounded them end as those do that travel in fp32, bit by bit."""
    transport, homes = SymmetricTransport(), {}
    *inputs, dout = small_inputs(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for kernel in ("flash2", "auto"):
            found = []
            for dtype in (None, torch.float32):
                ring = ra.Ring(transport, exchange="pull", kernel=kernel, grad_dtype=dtype, replay=False)
                found.append(gradients(partial(ra.ring_attention, ring=ring), inputs, dout))
                homes.setdefault(kernel, next(iter(ring.settled.values())).home)
            assert all(map(torch.equal, *found)), f"{kernel}: {list(map(rel_error, *found))}"
    finally:
        torch.use_deterministic_algorithms(False)
    return ", ".join(f"{kernel} in {dtype}" for kernel, dtype in homes.items())


def matrix_with_hidden_way_home(pulled: list[Case], by_heads: bool) -> None:
    with way_home_hidden(by_heads):
        for case in pulled:
            check(case, symmetric_ring(case.layout, case.kernel), device=DEVICE)


def nodes(report: Report) -> None:
    """Copy engines inside two nodes of two, which stand on one host."""
    if dist.get_world_size() != 4:
        return
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        two_level = [replace(case, exchange="two-level") for case in cases() if case.exchange == "ring"]
        assert ra.Ring.from_group(exchange="two-level").transport.link == "nodes"
        report.attempt("nodes: float64 matrix, two-level", lambda: [run_case(c) for c in two_level] and None)
        report.attempt("nodes: CUDA graph", replays, "two-level")
        report.attempt("nodes: 16 bits", check_16_bits, "zigzag", "two-level", "causal", "auto", torch.bfloat16)
        for seq_len in (8192, 32768):
            for name, copy_engines in (("by copy engines", True), ("by messages", False)):
                wires = None if copy_engines else ProcessGroupTransport()
                options = {"layout": "zigzag", "exchange": "two-level", "ranks_per_node": 2}
                ring = ra.Ring(wires, **options) if wires else ra.Ring.from_group(None, **options)
                report.attempt(f"nodes: time {seq_len}, inside {name}", timing, ring, seq_len)


def graphs(report: Report) -> None:
    """CUDA graphs of whole calls."""
    for exchange in ("pull", "gather", "ring", "two-way"):
        report.attempt(f"CUDA graph, {exchange}", replays, exchange)
        report.attempt(f"graphed callables, {exchange}", graphed_layers, exchange)
    report.attempt("CUDA graph, pull, KV kept", lambda: replays("pull", keep_kv=True))
    report.attempt("CUDA graph, pull in parts", lambda: replays("pull", kv_memory=1 << 18))


def again(report: Report) -> None:
    """Short calls that come again, which are replayed."""
    report.attempt("repeated calls", repeated)
    report.attempt("repeated calls, every other rank replays", lambda: repeated(some=True))
    report.attempt("repeated calls, KV kept", lambda: repeated(keep_kv=True))
    report.attempt("repeated calls, in parts, by Triton", lambda: repeated(kv_memory=1 << 18, kernel="triton"))
    report.attempt("repeated calls, by flash-attn 2", lambda: repeated(kernel="flash2"))
    report.attempt("repeated calls, 16 bits home", lambda: repeated(grad_dtype=torch.bfloat16))
    report.attempt("repeated calls, 32 bits home", lambda: repeated(grad_dtype=torch.float32))
    report.attempt("repeated calls, way home hidden", repeated_with_hidden_way_home)
    report.attempt("repeated calls, a ring for every batch", rings_made_anew)
    report.attempt("captures that fail", failing_captures)
    report.attempt("calls that are abandoned", abandoned_calls)
    report.attempt("few rows, exchange auto", short_by_messages)
    report.attempt("captures that the driver ends", lambda: failing_captures(by_driver=True))


def messages(report: Report) -> None:
    """NCCL: the wires and the matrix."""
    report.attempt("transport conformance", lambda: conform(ProcessGroupTransport(), DEVICE))
    for exchange in EXCHANGES:
        report.attempt(
            f"float64 matrix, {exchange}", lambda e=exchange: [run_case(c) for c in cases() if c.exchange == e] and None
        )
    for exchange in EXCHANGES:
        report.attempt(
            f"float64 matrix, {exchange}, two ranks a process",
            lambda e=exchange: [run_case(c, ranks_per_process=2) for c in cases() if c.exchange == e] and None,
        )
    report.attempt("float64 matrix, by heads", matrix_by_heads)
    two_ways = [replace(case, exchange="two-way") for case in cases() if case.exchange == "ring"]
    report.attempt("float64 matrix, two-way", lambda: [run_case(c) for c in two_ways] and None)
    report.attempt("float64 matrix, two-way, two ranks a process", lambda: [run_case(c, 2) for c in two_ways] and None)
    if dist.get_world_size() % 2 == 0:
        report.attempt("float64 matrix, two axes", lambda: [run_case(c) for c in cases(ulysses=2)[::5]] and None)


def matrix_by_heads() -> None:
    with way_home_hidden(by_heads=True):
        for case in cases():
            run_case(case)


def beside(report: Report) -> None:
    """A second communicator for what goes home: the wires, delays, graphs, memory, and what it is worth.

    On less than four GPUs each hosts two ranks: in a ring of two no KV is left to travel when the first gradients leave.
    """
    each = 2 if dist.get_world_size() < 4 else 1
    alone = ProcessGroupTransport(ranks_per_process=each)
    report.attempt("second communicator: it is one", memory_of_second, alone)
    transport = ProcessGroupTransport(ranks_per_process=each, beside=second_group(dist.group.WORLD))
    report.attempt("second communicator: conformance", lambda: conform(transport.beside, DEVICE))
    report.attempt("second communicator: 1,000 rounds with delays", dozing_on_both, transport, 1000)
    report.attempt("second communicator: CUDA graph, ring", lambda: replays("ring", ranks_per_process=each))
    for seq_len in (8192, 32768, 131072):
        for name, wires in (("in line", alone), ("beside", transport), ("in line again", alone), ("beside again", transport)):
            ring = ra.Ring(wires, layout="zigzag", exchange="ring")
            report.attempt(f"time ring {seq_len}, gradients {name}", timing, ring, seq_len)


def memory_of_second(alone: ProcessGroupTransport) -> str:
    """Memory of the GPU that a communicator takes which only shifts to the next rank."""
    shards = [torch.zeros(1 << 24, device=DEVICE) for _ in alone.hosted]
    alone.shift(shards).wait()
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    second = second_group(alone.group)
    assert second is not alone.group
    split, _ = torch.cuda.mem_get_info()
    ProcessGroupTransport(second, ranks_per_process=alone.ranks_per_process).shift(shards).wait()
    torch.cuda.synchronize()
    connected, _ = torch.cuda.mem_get_info()
    return f"{(free - split) / 2**20:.0f} MiB, {(free - connected) / 2**20:.0f} MiB with connections"


def dozing_on_both(transport: ProcessGroupTransport, count: int) -> None:
    """Shifts over both communicators at once, with random delays on any rank between them and compute beside them."""
    chance, size, (first, *_) = random.Random(dist.get_rank()), transport.ring_size, transport.hosted
    busy = torch.randn(2048, 2048, device=DEVICE)
    for number in range(count):
        sent, ways = [], (transport, transport.beside)
        for n, way in enumerate(ways):
            if chance.random() < 0.3:
                torch.cuda._sleep(int(chance.random() * 2e7))
            shards = [torch.full((1 << 20,), 2 * rank + n + number, device=DEVICE) for rank in transport.hosted]
            sent.append(way.shift(shards, n + 1))
            busy = (busy @ busy).clamp(-1, 1)
        for n in (1, 0) if number % 2 else (0, 1):
            source = (first - n - 1) % size
            assert (sent[n].wait()[0] == 2 * source + n + number).all(), f"round {number}"


def kernels(report: Report) -> None:
    """16 bits, by what auto takes and by kernels."""
    for layout, exchange in product(LAYOUTS, EXCHANGES):
        for mask in ("full", "causal", "causal window", "causal documents", "causal padding"):
            name = f"bf16 auto {layout} {exchange} {mask}"
            report.attempt(name, check_16_bits, layout, exchange, mask, "auto", torch.bfloat16)
    for kernel, dtype in product(("triton", "flash2", "cudnn", "aten", "triton+flash2"), (torch.bfloat16, torch.float16)):
        name = f"{dtype} {kernel} zigzag ring causal".removeprefix("torch.")
        report.attempt(name, check_16_bits, "zigzag", "ring", "causal", kernel, dtype)


def times(report: Report) -> None:
    for seq_len in (8192, 32768, 131072):
        for exchange in (*EXCHANGES, "two-way"):
            ring = ra.Ring(ProcessGroupTransport(), layout="zigzag", exchange=exchange)
            report.attempt(f"time {exchange} {seq_len}", timing, ring, seq_len)
        report.attempt(f"time pull by copy engines {seq_len}", timing, symmetric_ring("zigzag"), seq_len)


STAGES = {stage.__name__: stage for stage in (symmetric, again, nodes, messages, beside, kernels, times, graphs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=STAGES, nargs="+", default=list(STAGES))
    options = parser.parse_args()
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl", device_id=DEVICE, timeout=timedelta(seconds=120))
    report = Report()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
        print("16-bit columns: out dq dk dv as multiples of plain PyTorch's error", flush=True)
    for stage in options.only:
        STAGES[stage](report)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, report.failures)
    wrong = [failure for rank in everyone for failure in rank]
    if dist.get_rank() == 0:
        print("\n".join(wrong) if wrong else "all ranks agree: nothing wrong")
    gc.collect()  # As in `process_group` of ring_attn.comm.start.
    dist.destroy_process_group()
    sys.exit(bool(wrong))


def run_case(case: Case, ranks_per_process: int = 1) -> None:
    options = {"exchange": case.exchange, "kernel": case.kernel, "ulysses": case.ulysses}
    check(case, ra.Ring.from_group(None, case.layout, ranks_per_process=ranks_per_process, **options), device=DEVICE)


if __name__ == "__main__":
    main()
