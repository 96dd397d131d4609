"""One rank's share of a ring by pull, on one GPU and without wires: loop, kernels and sums, in variants of the backward.

    python -m tests.gpu.rank [--length 131072] [--mask documents] [--ranks 0 1] [--variants auto parts=2 halves parts=1,whole]

Its numbers are nonsense, its times are not, see Note [bound] of `ring_attn.bench.contenders`. A variant is "auto", or words
with commas: `parts=N` for N parts of the heads, `halves` or `whole` for how the own shard is met. Times are medians of rounds
over all variants, forward and both, on a GPU of replays of CUDA graphs. GiB are those of a forward and backward beside the
inputs. With --profile every GPU kernel of the last variant follows, in order.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

import ring_attn as ra
from ring_attn import call
from ring_attn.bench.contenders import Shape, Silent
from ring_attn.bench.kernels import document_lengths, mask_of
from ring_attn.bench.timing import captured, last_of_some
from ring_attn.call import Call, validate
from ring_attn.settled import Settled
from ring_attn.tiles import tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Inside, what a call comes to is found out as the variant's words say."""
    with ExitStack() as stack:
        for word in name.split(","):
            match word.split("="):
                case ["auto"]:
                    pass
                case ["parts", count]:
                    stack.enter_context(patch.object(call.Call, "_head_parts", lambda *_, n=int(count): n))
                case ["halves" | "whole"]:
                    halved = word == "halves"
                    of_backward = lambda exchange, *_, halved=halved: replace(exchange, halved=halved)  # noqa: E731
                    stack.enter_context(patch.object(call, "for_backward", of_backward))
                case _:
                    raise ValueError(f"{word!r} is not one of auto, parts=N, halves, whole")
        yield


class Share:
    """A rank's inputs, and its calls by variant."""

    def __init__(self, rank: int, options: argparse.Namespace) -> None:
        self.rank, self.length, scale = rank, options.length, min(2.0, options.length / 65536)
        self.documents = tuple(document_lengths(self.length, scale=scale)) if options.mask == "documents" else None
        self.mask = mask_of(options.mask, self.length, min(4096, self.length // 2), self.documents)
        self.wires = SimpleNamespace(link="symmetric", replays=None, ranks_per_node=None, ring_size=options.of, hosted=(rank,))
        shape = Shape(options.heads, options.kv_heads, options.dim, torch.bfloat16, DEVICE)
        *self.inputs, self.dout = shape.random(self.length // options.of, seed=rank)
        cells = sum(tile.cells for tile in tiles((range(self.length),), [(range(self.length),)], self.mask))
        self.tflop = 4 * options.dim * options.heads * cells / options.of / 1e12

    def ring(self, name: str) -> tuple[ra.Ring, Settled]:
        """A ring whose calls go as the variant says, and what they come to."""
        layout = ra.ByDocument(lengths=self.documents) if self.documents else "zigzag"
        ring = ra.Ring(Silent(self.wires), layout=layout, exchange="pull")
        with variant(name):
            return ring, validate(*self.inputs, [], Call.make(ring, self.mask, None, self.inputs[0].shape[-1] ** -0.5))

    def forward(self, ring: ra.Ring) -> None:
        with torch.no_grad():
            ra.ring_attention(*self.inputs, ring=ring, mask=self.mask)

    def both(self, ring: ra.Ring) -> tuple[Tensor, ...]:
        return torch.autograd.grad(ra.ring_attention(*self.inputs, ring=ring, mask=self.mask), self.inputs, self.dout)

    def words(self, settled: Settled) -> str:
        tiles_of = [len(settled.plan_back[self.rank, step]) for step in settled.plan_back.steps]
        return f"{settled.head_parts} parts{', halves' * settled.back.halved}, tiles {tiles_of}"


def gib_of(run: Callable[[], object]) -> float:
    """The most GiB that a run takes, its second."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def show(share: Share, options: argparse.Namespace) -> None:
    # Graphs hold addresses, not what is there: rings keep what came by their wires.
    rings = {name: share.ring(name) for name in options.variants}
    runs, gib = {}, {}
    for name, (ring, _) in rings.items():
        ways = {"forward": partial(share.forward, ring), "both": partial(share.both, ring)}
        gib[name] = gib_of(ways["both"]) if DEVICE.type == "cuda" else float("nan")
        runs |= {(name, way): captured(run)[0] if DEVICE.type == "cuda" else run for way, run in ways.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(options.repeats):
        for key, run in runs.items():
            times[key].append(last_of_some(run, DEVICE))
    for name, (_, settled) in rings.items():
        forward, both = (statistics.median(times[name, way]) for way in ("forward", "both"))
        took = f"{forward:8.3f} {both:8.3f} ms {1e3 * share.tflop / forward:6.1f} {3.5e3 * share.tflop / both:6.1f} TFLOP/s"
        print(f"rank {share.rank} {name:14s} {took} {gib[name]:5.2f} GiB  {share.words(settled)}")
    if options.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            share.both(ring)
            torch.cuda.synchronize()
        on_gpu = (event for event in profile.events() if event.device_type.name == "CUDA")
        for event in sorted(on_gpu, key=lambda event: event.time_range.start):
            print(f"    {event.time_range.elapsed_us():9.1f} us  {event.name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768, help="of the whole sequence")
    parser.add_argument("--of", type=int, default=4, help="how many ranks there are")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--mask", default="causal", choices=("causal", "full", "window", "documents"))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--variants", nargs="+", default=["auto"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'}, {options}")
    for rank in options.ranks:
        show(Share(rank, options), options)


if __name__ == "__main__":
    main()
