"""The layout by document between processes: right there too; lengths that differ by rank are found before anything moves."""

import pytest

import ring_attn as ra
from tests.dist.harness import run_processes
from tests.scores import Sizes, errors
from tests.support import FLOAT64_LIMIT, random_qkv
from tests.test_by_document import MASKS, packed
from tests.test_sharding import check_shard_and_unshard


def _attention(rank: int, ulysses: int) -> None:
    n = Sizes(t=96)
    for exchange in ("ring", "gather", "pull"):
        ring = ra.Ring.from_group(None, exchange=exchange, kernel="reference", ulysses=ulysses)
        of_batch = ring.with_layout(ra.ByDocument(packed(n.t)))
        for mask in ("causal, documents", "causal"):
            found = errors(of_batch, n, MASKS[mask](n.t), [])
            assert max(found.values()) <= FLOAT64_LIMIT, (exchange, mask, found)
        found = errors(ring, Sizes(t=96, kv_layout=ra.ByDocument(packed(n.t))), MASKS["documents"](n.t), [])
        assert max(found.values()) <= FLOAT64_LIMIT, (exchange, found)
    check_shard_and_unshard(ring.with_layout(ra.ByDocument([13, 0, 4, 1, 6])))


@pytest.mark.parametrize(("num_processes", "ulysses"), [(3, 1), (4, 2)])
def test_attention(num_processes: int, ulysses: int):
    run_processes(_attention, num_processes, ulysses)


def _unequal(rank: int) -> None:
    ring, mask = ra.Ring.from_group(None, "contiguous"), ra.Documents([7, 9])
    q, k, v, _ = random_qkv(1, 8, 8, 2, 1, 4)
    mine = ra.ByDocument([9, 7] if rank else [7, 9])

    def call(ring: ra.Ring, **options):
        return ra.ring_attention(q, k, v, ring=ring, mask=mask, **options)

    # Those of rank 1 alone do not add up.
    short = ra.ByDocument([15] if rank else [16])
    for one, options in ((ring.with_layout(mine), {}), (ring, {"kv_layout": mine}), (ring.with_layout(short), {})):
        with pytest.raises(
            ValueError, match=r"every rank must call with the same shapes, dtype, mask and scale, but ranks differ"
        ) as found:
            call(one, **options)
    assert rank == 0 or "add up to 15 positions, but seq_len is 16" in str(found.value.__cause__)
    call(ring.with_layout(ra.ByDocument([7, 9])))


def test_lengths_that_differ_are_found_and_the_ring_goes_on():
    run_processes(_unequal, 2)
