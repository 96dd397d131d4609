"""The layout for packed documents: its promises for any lengths, attention on it against a dense softmax, and what takes it."""

import random
from itertools import pairwise, product
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ring_attn as ra
from ring_attn import by_document, tiles
from ring_attn.call import Call
from ring_attn.exchange import get_exchange, make_plan
from ring_attn.exchange.pull import PullExchange
from ring_attn.layout import Zigzag
from ring_attn.mask import Causal, Documents
from ring_attn.plan_report import balance_of
from tests.scores import Sizes, errors, pieces_of
from tests.support import FLOAT64_LIMIT, rel_error, way_home_hidden
from tests.test_module import layers
from tests.test_sharding import check_loss, check_shard_and_unshard


def packed(t):
    """Two documents that are cut, an empty one, one of a single token, and short ones."""
    long = [t * 3 // 7, 1, 0, t // 4]
    rest = t - sum(long)
    return [*long, *[4, 3] * (rest // 7), rest % 7]


def log_normal(t, seed, scale=2.0):
    generator, lengths = random.Random(seed), []
    while (left := t - sum(lengths)) > 0:
        lengths.append(min(left, t // 4, int(scale * generator.lognormvariate(7.6, 1.0))))
    return lengths


def shards_of(lengths, ring_size):
    layout = ra.ByDocument(lengths)(sum(lengths), ring_size)
    return [layout.shard(rank) for rank in range(ring_size)]


@st.composite
def packings(draw):
    """(lengths that a ring divides, its size): of any lengths, of like ones, of long ones beside short ones."""
    ring_size = draw(st.integers(1, 8))
    one = draw(st.sampled_from([st.integers(0, 400), st.integers(9, 11), st.sampled_from([0, 1, 2, 3, 150])]))
    lengths = draw(st.lists(one, max_size=60))
    return [*lengths, -sum(lengths) % ring_size], ring_size


@given(packings())
def test_a_partition_into_equal_shards_of_joined_ranges(packing):
    lengths, ring_size = packing
    shards = shards_of(lengths, ring_size)
    flat = [[p for r in shard for p in r] for shard in shards]
    assert {len(rows) for rows in flat} == {sum(lengths) // ring_size}
    assert sorted(p for rows in flat for p in rows) == list(range(sum(lengths)))
    for shard in shards:
        assert all(r.step == 1 for r in shard) and (all(shard) or not sum(lengths))
        assert all(before.stop < after.start for before, after in pairwise(shard))


def rows_by_document(lengths, shards):
    """Of each document, the longest first, how many of its rows each rank holds."""
    found, start = [], 0
    for n in lengths:
        stop = start + n
        found.append([sum(len(range(max(r.start, start), min(r.stop, stop))) for r in shard) for shard in shards])
        start = stop
    return sorted(found, key=sum, reverse=True)


@given(packings())
def test_the_longest_are_cut_evenly_and_others_stay_whole(packing):
    """But for those that fill a rank up: each rank is filled once, the last of them by what is left."""
    lengths, ring_size = packing
    rows = rows_by_document(lengths, shards_of(lengths, ring_size))
    cells = [n * (n + 1) for n in lengths]
    too_long = sum(n * ring_size > 1.02 * sum(cells) for n in cells)
    pieces = [sum(x > 0 for x in of_one) > 1 for of_one in rows]
    evenly = next((n for n, of_one in enumerate(rows) if max(of_one) - min(of_one) > 1), len(rows))
    assert evenly >= too_long and sum(pieces[evenly:]) < ring_size


@pytest.mark.parametrize(
    ("lengths", "cut"),
    [
        ([50] * 8, 0),
        ([50] * 9, 1),
        ([100, *[50] * 4, *[1] * 100], 1),
        ([130, 100, *[50] * 4, *[1] * 110], 2),
        ([60, 50, 50, 50, *[1] * 30], 4),
        ([*[30] * 100, *[31] * 3, 27], 0),
    ],
)
def test_no_more_are_cut_than_it_takes(lengths, cut):
    lengths = [*lengths, -sum(lengths) % 4]
    rows = rows_by_document(lengths, shards_of(lengths, 4))
    assert [n for n, of_one in enumerate(rows) if min(of_one) > 0] == list(range(cut))


def test_where_no_number_of_cut_ones_is_near_enough_the_best_is_taken():
    """With none cut, and the third in two to fill the ranks up, 16 and 17 cells; with two or all of them cut, 18."""
    layout = ra.ByDocument([5, 5, 2])(12, 2)
    plan = make_plan(get_exchange("ring", None), Causal() & Documents([5, 5, 2]), layout)
    assert max(sum(plan.cells(rank, step) for step in plan.steps) for rank in range(2)) == 17


def test_documents_that_have_no_row_for_every_rank_are_not_tried():
    with patch.object(by_document, "_with_cut", wraps=by_document._with_cut) as tried:
        shards_of([1] * 1000 + [8] * 3, 64 // 4)
    assert tried.call_count == 1


def test_whole_documents_go_the_largest_first_to_the_fewest_cells_where_they_fit():
    lengths = [2, 3, 4, 6, *[1] * 1201]
    shards = shards_of(lengths, 2)
    # 6; 4 beside it; 3, where 10 cells are fewer than 21; 2, where 16 are fewer than 21 though there are more rows.
    assert range(9, 15) in shards[0] and range(9) in shards[1]


@pytest.mark.parametrize("ring_size", [4, 8])
def test_the_busiest_rank_has_little_more_than_the_average(ring_size):
    for seed in range(12):
        lengths = log_normal(131072, seed)
        mask, size = Causal() & Documents(lengths), ring_size
        layouts = ra.ByDocument(lengths)(131072, size), Zigzag(131072, size)
        ours, zigzag = (balance_of(make_plan(get_exchange("pull", None), mask, layout)) for layout in layouts)
        busiest, before = (max(one.ranks) * size / sum(one.ranks) for one in (ours, zigzag))
        assert busiest < 1.021 and busiest < before
        assert ours.efficiency > 0.94, "own and other ranks' rows, each balanced alone"


def test_one_document_is_zigzag():
    for ring_size in range(1, 9):
        zigzag = Zigzag(48 * ring_size, ring_size)
        ours = ra.ByDocument([zigzag.seq_len])(zigzag.seq_len, ring_size)
        plans = [make_plan(get_exchange("ring", None), Causal(), layout) for layout in (ours, zigzag)]
        assert plans[0].steps == plans[1].steps
        for rank, step in product(range(ring_size), plans[0].steps):
            assert plans[0].cells(rank, step) == plans[1].cells(rank, step)


def test_thousands_of_documents():
    """Plans and tiles, forward and backward."""
    lengths = [*random.Random(0).choices(range(100, 300), k=4999)]
    lengths.append(4 - sum(lengths) % 4)
    layout = ra.ByDocument(lengths)(sum(lengths), 4)
    for exchange in (PullExchange(), PullExchange(halved=True)):
        plan = make_plan(exchange, Causal() & Documents(lengths), layout)
        assert sum(len(plan[rank, step]) for rank, step in product(range(4), plan.steps)) < 5100


def test_a_shard_is_laid_out_once_for_all_its_parts():
    lengths = log_normal(131072, 0)
    layout, mask = ra.ByDocument(lengths)(131072, 8), Causal() & Documents(lengths)
    with patch.object(tiles, "_pieces", wraps=tiles._pieces) as laid_out:
        plan = make_plan(get_exchange("pull", None), mask, layout)
        visits = len([plan[rank, step] for rank, step in product(range(8), range(2))])
    assert sum(map(len, plan.meets[1])) > 800
    # The queries and the keys of every pair of ranks and of every visit, and each shard.
    assert laid_out.call_count <= 2 * (8 * 7 + visits) + 8


def test_a_choice_compares_by_value_and_its_layout_is_made_once():
    choice = ra.ByDocument([5, 0, 7])
    assert choice == ra.ByDocument(torch.tensor([5, 0, 7])) == ra.ByDocument(cu_seqlens=torch.tensor([0, 5, 5, 12]))
    assert len({choice, ra.ByDocument([[5, 0, 7]]), ra.ByDocument([5, 7])}) == 2
    assert choice(12, 3) is ra.ByDocument([5, 0, 7])(12, 3)
    assert choice(12, 3) != choice(12, 4) and choice(12, 3).shard(0) is choice(12, 3).shard(0)
    ring = ra.Ring.simulated(3, choice)
    assert ring.layout(12) is choice(12, 3) and (ring.layout_name, ring.shard_multiple) == ("by-document", 3)
    assert "layout=by-document" in repr(ring)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ra.ByDocument(), r"ByDocument takes exactly one of lengths=... and cu_seqlens=..."),
        (lambda: ra.ByDocument([1], cu_seqlens=[0, 1]), r"ByDocument takes exactly one of lengths=... and cu_seqlens=..."),
        (lambda: ra.ByDocument([3, 1.5]), r"ByDocument takes whole numbers, got 1.5"),
        (lambda: ra.ByDocument([3, -1]), r"document lengths must be at least 0, got \[3, -1\]"),
        (
            lambda: ra.ByDocument([[4], [4]]),
            r"one packing for all batch rows.*got 2; put the rows one behind the other",
        ),
        (
            lambda: ra.ByDocument([5, 7])(11, 1),
            r"documents of the by-document layout add up to 12 positions, but seq_len is 11",
        ),
        (lambda: ra.ByDocument([])(8, 2), r"add up to 0 positions, but seq_len is 8; count padding as one more document"),
        (lambda: ra.ByDocument([10])(10, 4), r"seq_len 10 must be a multiple of ring_size = 4 for the by-document layout; pad"),
        (lambda: ra.ByDocument([8])(8, 4).shard(4), r"rank 4 is not in a ring of 4"),
        (lambda: ra.Ring.simulated(2, "by-document"), r"'by-document' is not one of .*, or a ring_attn.ByDocument\(lengths\)"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def hostile(ring_size, t, **options):
    return ra.Ring.simulated(ring_size, ra.ByDocument(packed(t)), kernel="reference", hostile=True, **options)


MASKS = {
    "causal, documents": lambda t: ra.Causal() & ra.Documents(packed(t)),
    "documents": lambda t: ra.Documents(packed(t)),
    "window, documents": lambda t: ra.Window(9, 2) & ra.Documents(packed(t)),
    "causal": lambda t: ra.Causal(),
    "other documents by row": lambda t: ra.Causal() & ra.Documents([[t // 3, t - t // 3], [t - 2, 2]]),
}


@pytest.mark.parametrize("ring_size", [3, 4])
@pytest.mark.parametrize("exchange", ["ring", "gather", "pull", "two-way"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention(ring_size, exchange, mask):
    n = Sizes(t=24 * ring_size)
    found = errors(hostile(ring_size, n.t, exchange=exchange), n, MASKS[mask](n.t), [])
    assert max(found.values()) <= FLOAT64_LIMIT, found


@pytest.mark.parametrize(
    "options",
    [
        {"exchange": "two-level", "ranks_per_node": 2},
        {"exchange": "pull", "keep_kv": True},
        {"exchange": "pull", "kv_memory": 10000},
        {"exchange": "gather", "kv_memory": 10000},
        {"exchange": "ring", "ulysses": 2},
        {"exchange": "pull", "ulysses": 2},
        {"exchange": "auto", "ulysses": 4},
    ],
    ids=str,
)
def test_other_ways_of_a_ring(options):
    n = Sizes(t=96)
    ring = hostile(4 * options.get("ulysses", 1), n.t, **options)
    found = errors(ring, Sizes(t=96, h=8), MASKS["causal, documents"](n.t), pieces_of("alibi", Sizes(t=96, h=8)))
    assert max(found.values()) <= FLOAT64_LIMIT, found


def test_gradients_that_go_home_in_parts():
    with way_home_hidden(by_heads=True):
        found = errors(hostile(4, 96, exchange="pull"), Sizes(t=96), MASKS["causal, documents"](96), [])
    assert max(found.values()) <= FLOAT64_LIMIT, found


@pytest.mark.parametrize("exchange", ["ring", "gather", "pull"])
@pytest.mark.parametrize("own", ["by document", "zigzag", "striped"])
def test_keys_of_another_sequence(own, exchange):
    t, keys = 48, 60
    lengths, kv_lengths = [20, 1, 0, 9, 9, 9], [40, 0, 3, 12, 4, 1]
    ring = ra.Ring.simulated(
        3, ra.ByDocument(lengths) if own == "by document" else own, exchange=exchange, kernel="reference", hostile=True
    )
    mask = ra.Documents(lengths, kv_lengths=kv_lengths)
    n = Sizes(t=t, kv_len=keys, kv_layout=ra.ByDocument(kv_lengths))
    for one in (mask, ra.Window(20, 3) & mask, ra.Causal()):
        found = errors(ring, n, one, [])
        assert max(found.values()) <= FLOAT64_LIMIT, found
    if own == "by document":
        found = errors(ring, Sizes(t=t, kv_len=keys, kv_layout="striped"), mask, [])
        assert max(found.values()) <= FLOAT64_LIMIT, found


@pytest.mark.parametrize(("ring_size", "ulysses"), [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (6, 2), (3, 3)])
def test_shard_unshard_and_the_loss(ring_size, ulysses):
    choice = ra.ByDocument([13, 0, 4, 1, 6])
    ring = ra.Ring.simulated(ring_size, choice, ulysses=ulysses, hostile=True)
    check_shard_and_unshard(ring)
    check_loss(ring)
    other, x = ra.Ring.simulated(ring_size, "contiguous", ulysses=ulysses), torch.randn(2, 24)
    local = other.shard(x, layout=choice)
    assert torch.equal(local, ring.shard(x)) and torch.equal(other.unshard(local, layout=choice), x)
    assert torch.equal(other.positions(24, layout=choice), ring.positions(24))


def test_another_layout_over_the_same_wires():
    lengths = packed(96)
    options = {"exchange": "pull", "kernel": "reference", "kv_memory": 9000, "grad_dtype": torch.float64}
    for more in ({"ulysses": 2}, {}):
        ring = ra.Ring.simulated(4, "zigzag", **options, **more, hostile=True)
        other = ring.with_layout(ra.ByDocument(lengths))
        assert other.transport is ring.transport and (ring.layout_name, other.layout_name) == ("zigzag", "by-document")
        assert [part.transport for part in other.of_parts.values()] == [part.transport for part in ring.of_parts.values()]
        rings = (other, *other.of_parts.values())
        assert all({name: getattr(one, name) for name in options} == options for one in rings)
        assert all(one.layout_choice == ra.ByDocument(lengths) for one in rings)
        assert other.with_layout("striped").positions(96).tolist() == ring.positions(96, layout="striped").tolist()
        n, mask = Sizes(t=96), MASKS["causal, documents"](96)
        for one in (other, ring, other.with_layout("contiguous")):
            assert max(errors(one, n, mask, []).values()) <= FLOAT64_LIMIT
    kept = ra.Ring.simulated(4, exchange="pull", keep_kv=True).with_layout("striped")
    assert kept.keep_kv and kept.exchange == "pull"
    nodes = ra.Ring.simulated(8, exchange="two-level", ranks_per_node=4, ulysses=2).with_layout("striped")
    assert nodes.ranks_per_node == 4 and nodes.of_parts[0].ranks_per_node == 2
    with pytest.raises(ValueError, match="layout 'spiral' is not one of contiguous, striped, zigzag"):
        ring.with_layout("spiral")


def test_what_ranks_agree_on_holds_the_lengths():
    ring, x = ra.Ring.simulated(2), torch.randn(1, 12, 1, 4)
    signatures = set()
    for lengths, kv_layout in (([5, 7], None), ([7, 5], None), ([7, 5], ra.ByDocument([12])), ([7, 5], ra.ByDocument([6, 6]))):
        call = Call.make(ring.with_layout(ra.ByDocument(lengths)), ra.Causal(), None, 1.0, kv_layout)
        signatures.add(repr(call.signature(x, x, x, [])))
    assert len(signatures) == 4


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    choice, mask = ra.ByDocument([13, 0, 4, 1, 6]), ra.Documents([13, 0, 4, 1, 6])
    ring = ra.Ring.simulated(3, choice, kernel="reference")
    q, k, v = (torch.randn(1, 24, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def function(q, k, v):
        return ra.ring_attention(q * 2, k, v, ring=ring, mask=mask, kv_layout=choice)

    found = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        out = run(q, k, v)
        found.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    assert all(rel_error(x, y) < FLOAT64_LIMIT for x, y in zip(*found, strict=True))


def test_a_module_takes_the_ring_of_a_batch():
    ring = ra.Ring.simulated(3, hostile=True)
    plain, ringed = layers(ring)
    for lengths in ([20, 3, 0, 13], [1, 30, 5]):
        mask, of_batch = ra.Causal() & ra.Documents(lengths), ring.with_layout(ra.ByDocument(lengths))
        x, up = (torch.randn(2, 36, 24, dtype=torch.float64) for _ in range(2))
        x.requires_grad_()
        want, got = plain(x, mask=mask), of_batch.unshard(ringed(of_batch.shard(x), mask=mask, ring=of_batch))
        assert rel_error(got, want) < FLOAT64_LIMIT
        grads, wants = (torch.autograd.grad(out, [x, *layer.parameters()], up) for out, layer in ((got, ringed), (want, plain)))
        assert all(rel_error(grad, ref) < FLOAT64_LIMIT for grad, ref in zip(grads, wants, strict=True))
    with pytest.raises(
        ValueError, match=r"in another layout, made by its with_layout; Ring.* is of other wires than the layer's Ring"
    ):
        ringed(x, ring=ra.Ring.simulated(3))


@pytest.mark.parametrize("own", ["zigzag", "by document"])
def test_decoding_goes_on_from_packed_documents(own):
    """The last document goes on: the first ones are there, and every row at its position."""
    lengths = [20, 3, 0, 13]
    ring = ra.Ring.simulated(3, "zigzag" if own == "zigzag" else ra.ByDocument(lengths), hostile=True)
    of_batch = ring.with_layout(ra.ByDocument(lengths))
    plain, ringed = layers(ring)
    x = torch.randn(2, 39, 24, dtype=torch.float64)
    with torch.no_grad():
        cache = ra.KVCache(ring)
        ringed(of_batch.shard(x[:, :36]), mask=ra.Causal() & ra.Documents(lengths), cache=cache, ring=of_batch)
        found = []
        for n in range(36, 39):
            mask = ra.Causal() & ra.Documents([20, 3, n + 1 - 23])
            found.append(ringed.decode(x[:, n : n + 1], cache, mask=mask))
        want = plain(x, mask=ra.Causal() & ra.Documents([20, 3, 16]))
        assert rel_error(torch.cat(found, 1), want[:, 36:]) < FLOAT64_LIMIT
        elsewhere = r"the cache was made for another Ring object than this Ring.*a `with_layout` of it is another one"
        with pytest.raises(ValueError, match=elsewhere):
            ringed(of_batch.shard(x[:, :36]), cache=ra.KVCache(of_batch), ring=of_batch)
        with pytest.raises(ValueError, match=elsewhere):
            ra.tree_decode(x[:, 36:37].unflatten(2, (4, 6)), ra.KVCache(of_batch), ring=ring)
