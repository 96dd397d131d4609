"""What an exchange moves and holds: position order, only the rows that a mask needs, and no more at a time than kv_memory."""

from collections import Counter
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

import ring_attn as ra
from ring_attn import plan as plans
from ring_attn.comm.local import LocalTransport
from ring_attn.comm.transport import Pending
from ring_attn.exchange import EXCHANGES, for_backward, get_exchange, make_plan, pull, two_level
from ring_attn.exchange import ring as ring_exchange
from ring_attn.exchange.base import HowHome, PackedSum
from ring_attn.layout import LAYOUTS, Part, Zigzag, total_rows
from ring_attn.mask import Causal, Documents, Full, KeyPadding, Window
from ring_attn.parts import needed
from ring_attn.tiles import part_positions, tiles
from tests.matrix import Case, cases, check
from tests.scores import Sizes, errors
from tests.support import FLOAT64_LIMIT, forget_plans, random_qkv, way_home_hidden


def held(plan, rank, step):
    """The positions of a visit's rows, in order."""
    parts = plan.meets[step][rank]
    return [p for part in parts for r in part_positions(plan.kv_layout, part) for p in r]


def moved(plan):
    """KV rows that a rank receives, on average."""
    size = plan.layout.ring_size
    others = [part for step in plan.steps for rank in range(size) for part in plan.meets[step][rank] if part.rank != rank]
    return total_rows(others) / size


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("exchange", ["gather", "pull"])
@pytest.mark.parametrize("max_rows", [None, 9, 40])
def test_visits_are_in_position_order(layout, exchange, max_rows):
    plan = make_plan(EXCHANGES[exchange], Causal() & Window(30), LAYOUTS[layout](96, 4), None, max_rows)
    for step in plan.steps:
        for rank in range(4):
            rows = held(plan, rank, step)
            assert rows == sorted(set(rows))


def test_a_gathered_causal_visit_is_one_tile_for_each_query_chunk():
    plan = make_plan(EXCHANGES["gather"], Causal(), Zigzag(256, 8))
    assert [len(plan[rank, 0]) for rank in range(8)] == [2] * 7 + [1]


def test_pull_moves_what_the_mask_needs():
    def share(mask, layout="zigzag"):
        """Of the rows that a ring moves."""
        plan = make_plan(EXCHANGES["pull"], mask, LAYOUTS[layout](4096, 4))
        return moved(plan) / (3 * 1024)

    assert share(Full()) == 1
    assert share(Causal()) == share(Causal(), "contiguous") * 1.5 == 0.75
    # A chunk of 512 rows needs the 100 before it; the two chunks of a rank that are neighbours need them once.
    assert share(Window(100)) == pytest.approx((7 - 1) * 100 / 4 / (3 * 1024))
    assert share(Documents([512] * 8)) == 0


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("keys", ["contiguous", None, "striped"])
@pytest.mark.parametrize(
    "mask",
    [
        Full(),
        Causal(),
        Causal() & Window(9),
        Documents([30, 1, 0, 25, 40]) & Causal(),
        Documents([[50, 46], [3, 93]]),
        KeyPadding([96, 20], starts=[7, 0]),
    ],
    ids=str,
)
def test_what_is_needed_is_what_the_tiles_hold(size, keys, mask):
    for layout in (*(one(96, size) for one in LAYOUTS.values()), ra.ByDocument([30, 1, 0, 25, 40])(96, size)):
        kv_layout = layout if keys is None else LAYOUTS[keys](96, size)
        for rank in range(size):
            rows = {(part.rank, row) for part in needed(layout, kv_layout, mask, rank) for row in part.rows}
            others = (other for other in range(size) if other != rank)
            assert rows == {
                (other, row)
                for other in others
                for tile in tiles(layout.shard(rank), [kv_layout.shard(other)], mask)
                for row in tile.kv_rows
            }


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("hostile", [True, False])
def test_what_is_kept_is_not_pulled_again_and_gradients_go_home_first(size, hostile):
    """What comes home is added to the own keys' gradients when it is waited for."""
    for case in cases():
        if case.exchange == "pull":
            ring, done = ra.Ring.simulated(size, case.layout, exchange="pull", keep_kv=True, hostile=hostile), []
            pull, push = ring.transport.pull, ring.transport.push
            ring.transport.pull = lambda *x, pull=pull, done=done, **o: done.append("pull") or pull(*x, **o)
            ring.transport.push = lambda *x, push=push, done=done, **o: done.append("push") or push(*x, **o)
            check(case, ring)
            assert done in (["pull", "push"], [])
    plan = make_plan(EXCHANGES["pull"], Causal(), Zigzag(64, 4))
    k = torch.zeros(1, 16, 1, 2)
    kept = [torch.zeros(1, total_rows(plan.meets[1][rank]), 4) for rank in range(4)]
    assert [visit.step for visit in EXCHANGES["pull"].again([(k, k)] * 4, plan, kept)] == [1, 0]


@pytest.mark.parametrize(
    ("size", "by_heads", "hostile"), [(1, False, True), (2, True, False), (4, False, True), (4, True, True)]
)
def test_gradients_go_home_once_a_part_of_the_heads(size, by_heads, hostile):
    """Those of each part of the heads leave once, and what they bring home is right."""
    for case in (case for case in cases() if case.exchange == "pull"):
        with way_home_hidden(by_heads):
            ring, done = ra.Ring.simulated(size, case.layout, exchange="pull", hostile=hostile), []
            for name in ("pull", "push"):
                post = getattr(ring.transport, name)
                noted = lambda *x, name=name, post=post, done=done, **o: done.append(name) or post(*x, **o)  # noqa: E731
                setattr(ring.transport, name, noted)
            check(case, ring)
        parts = case.heads[1] if by_heads else 1
        forward = ["pull"] * (2 if by_heads and case.heads[1] % 2 == 0 else 1)
        begun = ["pull", "push"] if parts > 1 else []
        assert done in ([*forward, "pull", *begun, "push", *["pull", "push"] * (parts - 2)], [])
        if size == 4 and case.mask == "full":
            assert done


class Noting(LocalTransport):
    """Notes what goes over it, and when what came home is waited for. `beside`: what else it has for that."""

    def __init__(self, ring_size, seen, where="", beside=None):
        super().__init__(ring_size)
        self.seen, self.where, self.others, self.pieces = seen, where, beside, set()

    @property
    def beside(self):
        return self.others

    def pull(self, *x, **options):
        self.seen.append("pull" + self.where)
        self.pieces.update(map(len, x[0]))
        return super().pull(*x, **options)

    def push(self, *x, **options):
        self.seen.append("push" + self.where)
        pushed = super().push(*x, **options)
        return Pending(pushed.received, lambda: self.seen.append("home") or (pushed.wait() and None), "push")


@pytest.mark.parametrize(
    ("by_heads", "rows", "moved"),
    [
        (False, None, "pull, own, push, visit, own, home"),
        (True, None, "pull, own, pull, push beside, visit, push beside, visit, home, own, home"),
        (False, 15, "pull, own, pull, push beside, visit, home, push beside, visit, own, home"),
        (
            True,
            15,
            "pull, own, pull, push beside, visit, pull, home, push beside, visit, pull, push beside, visit, home, "
            "home, push beside, visit, own, home",
        ),
    ],
)
def test_gradients_are_on_their_way_while_others_are_worked_out(by_heads, rows, moved):
    """Over wires beside where more KV is to come; the last are waited for after the last visit. Of two parts of the heads the
    second, whose KV comes while the first is met, ends with the own shard.
    """
    seen, add = [], pull._PullHomeward.add

    def noted(way, visit):
        own = visit.step in way.plan.own_rows
        add(way, visit)
        seen.append("own" if own else "visit")

    case = Case("contiguous", "pull", "full")
    assert case.seq_len(4) == 40, "of 30 rows of others a visit is to hold 15"
    row_bytes = 2 * case.heads[1] * sum(case.head_dims) * 8
    ring = ra.Ring(Noting(4, seen, beside=Noting(4, seen, " beside")), exchange="pull", kv_memory=rows and 2 * rows * row_bytes)
    with way_home_hidden(by_heads), patch.object(pull._PullHomeward, "add", noted):
        check(case, ring)
    assert ", ".join(seen[2 if rows or by_heads else 1 :]) == moved, "after the pulls of the forward"
    assert ring.transport.pieces == {1 if rows else 2}, "what is put up again and again is packed once"


@pytest.mark.parametrize("name", ["ring", "two-way", "two-level"])
@pytest.mark.parametrize(("size", "ranks_per_node"), [(2, 1), (3, 1), (4, 2), (6, 2)])
def test_a_backward_in_a_ring_ends_with_the_own_shard(size, ranks_per_node, name):
    """While it is met, what the last visit of others gathered goes home; as many shifts as ever, all but that one beside KV."""
    homeward, nodes, last, operation = ring_exchange._RingHomeward, {}, size, "pull" if name == "two-way" else "shift"
    if name == "two-level":
        homeward, nodes, last = two_level._TwoLevelHomeward, {"ranks_per_node": ranks_per_node}, size // ranks_per_node * 2
    moved, add = set(), homeward.add
    for case in (case for case in cases() if case.exchange == "ring"):
        with way_home_hidden(by_heads=False):
            ring, seen = ra.Ring.simulated(size, case.layout, exchange=name, hostile=True, **nodes), []
            post = getattr(ring.transport, operation)

            def noted(*x, seen=seen, post=post, what, **options):
                kind = "home" if "home" in what else "on" if "dK" in what else "KV"
                pending = post(*x, what=what, **options)
                seen.append(f"{kind} asked")
                return Pending(pending.received, lambda: seen.append(f"{kind} waited") or (pending.wait() and None), what)

            setattr(ring.transport, operation, noted)
            visited = lambda way, visit, seen=seen: add(way, visit) or seen.append(f"visit {visit.step}")  # noqa: E731
            with patch.object(homeward, "add", visited):
                check(case, ring)
        if "home asked" in seen:
            asked, others, own, waited = seen[-4:]
            assert (asked, own, waited) == ("home asked", f"visit {last}", "home waited") and others.startswith("visit "), seen
            moved.add(case.mask)
    assert "full" in moved


@pytest.mark.parametrize("name", ["ring", "two-way", "two-level", "pull"])
def test_of_a_backward_that_ends_with_the_own_shard_that_alone_is_planned_anew(name):
    nodes = {"ranks_per_node": 2} if name == "two-level" else {}
    ring, made = ra.Ring.simulated(4, "zigzag", exchange=name, **nodes), []
    noted = lambda q, kv, mask: made.append((q, *kv)) or tiles(q, kv, mask)  # noqa: E731
    forget_plans()
    with way_home_hidden(by_heads=False), patch.object(plans, "tiles", noted):
        check(Case("zigzag", name, "full"), ring)
    assert made and len(set(made)) == len(made)


def test_parts_whose_first_visit_waits_for_others_go_one_by_one():
    """Two parts of the heads by gather: begun ahead, the second would hold its KV beside the first's."""
    ring, done = ra.Ring.simulated(4, exchange="gather", hostile=True), []
    for name in ("all_gather", "reduce_scatter"):
        post = getattr(ring.transport, name)
        noted = lambda *x, name=name, post=post, **o: done.append(name) or post(*x, **o)  # noqa: E731
        setattr(ring.transport, name, noted)
    case = Case("contiguous", "gather", "full")
    with way_home_hidden(by_heads=True):
        check(case, ring)
    assert done[1:5] == ["all_gather", "reduce_scatter"] * 2


def test_a_backward_by_pull_begins_and_ends_with_the_own_shard():
    whole = make_plan(get_exchange("pull", None), Causal(), Zigzag(256, 4))
    back = for_backward(get_exchange("pull", None), whole, 8 << 20)
    plan = make_plan(back, Causal(), Zigzag(256, 4))
    own, _, rest = ([plan.meets[step][rank] for rank in range(4)] for step in plan.steps)
    assert own == [(Part(rank, range(32, 64)),) for rank in range(4)] and rest == [
        (Part(rank, range(32)),) for rank in range(4)
    ]
    assert plan.cells(0, plan.steps[0]) * 3 == plan.cells(0, plan.steps[-1]) + 32
    for rank in range(4):
        assert sum(plan.cells(rank, step) for step in plan.steps) == sum(whole.cells(rank, step) for step in whole.steps)
    assert for_backward(get_exchange("pull", None), whole, 100) == get_exchange("pull", None), "little is quickly home"
    gather = get_exchange("gather", None)
    assert for_backward(gather, whole, 8 << 20) is gather


def test_rows_that_are_one_ranks_own_alone_are_not_the_own_shard_of_all():
    own, first = tuple((Part(rank, range(8)),) for rank in range(3)), ((Part(0, range(8)),),) * 3
    plan = plans.Plan(Zigzag(48, 3), Zigzag(48, 3), Full(), (own, first, ((), *own[1:])))
    assert plan.own_rows == {0: slice(0, 8), 2: slice(0, 8)} and plan.steps_away == (1,) and plan.begins_at_home
    assert not plans.Plan(Zigzag(48, 3), Zigzag(48, 3), Full(), (first, own)).begins_at_home


def test_memory_bounds_parts_as_well():
    plan = make_plan(pull.PullExchange(halved=True), Causal(), Zigzag(256, 4), None, 5)
    most = max(total_rows(parts) for step in plan.steps[1:-1] for parts in plan.meets[step])
    assert most <= 5


@pytest.mark.parametrize("options", [{"exchange": "ring"}, {"exchange": "auto"}, {"exchange": "pull", "kv_memory": 1000}])
def test_only_a_whole_pull_is_kept(options):
    with pytest.raises(ValueError, match="keep_kv=True is for exchange='pull' without kv_memory, not for"):
        ra.Ring.simulated(2, keep_kv=True, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("exchange", "rows"), [("gather", 5), ("gather", 17), ("pull", 1), ("pull", 5), ("pull", 30)])
def test_less_memory_takes_more_visits_and_gives_the_same(layout, exchange, rows):
    n = Sizes(d=6, dv=5)
    row_bytes = n.b * n.g * (n.d + n.dv) * 8
    ring = ra.Ring.simulated(3, layout, exchange=exchange, kv_memory=2 * rows * row_bytes, hostile=True)
    seen = []
    operation = "pull" if exchange == "pull" else "all_gather"
    posted = getattr(ring.transport, operation)

    def counted(shards, *rest, what):
        pending = posted(shards, *rest, what=what)
        if "KV" in what:
            seen.append(max(x.shape[1] for x in pending.received) * (1 if exchange == "pull" else ring.size))
        return pending

    setattr(ring.transport, operation, counted)
    for mask in (ra.Causal(), ra.Window(5, 2), ra.Causal() & ra.Documents([[7, 17], [20, 4]])):
        found = errors(ring, n, mask, [])
        assert max(found.values()) <= FLOAT64_LIMIT, (mask, found)
    assert 0 < max(seen) <= rows


def test_too_little_memory_is_named():
    q, k, v, _ = random_qkv(1, 24, 24, 2, 1, 4, dtype=torch.float64)
    for memory, exchange, message in (
        (127, "pull", r"kv_memory 127 is below the 128 bytes that one KV row at a time takes"),
        (4 * 128, "gather", r"a row of all 3 ranks at a time, three times over, but kv_memory is enough for 8 rows"),
        (7 * 128, "ring", r"a whole shard of 8 KV rows at a time, but kv_memory is enough for 7; exchange='pull' and 'gather'"),
        (7 * 128, "two-way", r"the two-way exchange holds a whole shard of 8 KV rows at a time"),
    ):
        ring = ra.Ring.simulated(3, "contiguous", exchange=exchange, kv_memory=memory)
        with pytest.raises(ValueError, match=message):
            ra.ring_attention(q, k, v, ring=ring)
    for memory in (0, 0.5, True):
        words = f"kv_memory must be a whole number of bytes, at least 1, or None for no limit, got {memory}"
        with pytest.raises(ValueError, match=words):
            ra.Ring.simulated(3, kv_memory=memory)
    for choice in ("keep_kv", "replay"):
        with pytest.raises(TypeError, match=f"{choice} must be True or False, got 'no'"):
            ra.Ring.simulated(3, exchange="pull", **{choice: "no"})


@pytest.mark.parametrize(("ring_size", "ranks_per_node"), [(4, 2), (6, 2), (6, 3), (3, 1), (3, 3)])
@pytest.mark.parametrize("halved", [False, True])
def test_two_levels(ring_size, ranks_per_node, halved):
    """The matrix, where what travels between nodes is as much as a ring of nodes moves, and pulls stay inside a node."""
    with way_home_hidden(by_heads=False) if halved else nullcontext():
        _two_levels(ring_size, ranks_per_node)


def _two_levels(ring_size, ranks_per_node):
    for case in cases():
        if case.exchange == "ring":
            choice = {"exchange": "two-level", "ranks_per_node": ranks_per_node, "kernel": case.kernel}
            ring = ra.Ring.simulated(ring_size, case.layout, hostile=True, **choice)
            pull, shift, shifts = ring.transport.pull, ring.transport.shift, []

            def inside(shards, parts, *, what, pull=pull):
                ranks = [(rank, part.rank) for rank, wanted in enumerate(parts) for part in wanted]
                assert all(a // ranks_per_node == b // ranks_per_node for a, b in ranks), ranks
                return pull(shards, parts, what=what)

            def between(shards, offset=1, *, what, shift=shift, shifts=shifts):
                assert offset % ranks_per_node == 0
                shifts.append(what)
                return shift(shards, offset, what=what)

            ring.transport.pull, ring.transport.shift = inside, between
            check(case, ring)
            assert len([what for what in shifts if "forward" in what]) <= ring_size // ranks_per_node - 1


def test_what_a_node_waits_for_is_posted_before_what_comes_from_the_next_one():
    """NCCL moves what was posted first first, and between nodes it takes longest."""
    ring, posted = ra.Ring.simulated(6, exchange="two-level", ranks_per_node=2, hostile=True), []
    for name in ("pull", "shift"):
        post = getattr(ring.transport, name)
        setattr(ring.transport, name, lambda *x, name=name, post=post, **o: posted.append(name) or post(*x, **o))
    q, k, v, _ = random_qkv(1, 24, 24, 2, 1, 4, dtype=torch.float64)
    ra.ring_attention(q, k, v, ring=ring, mask=ra.Full())
    assert posted == ["pull", "shift"] * 2 + ["pull"]


@pytest.mark.parametrize("ring_size", range(1, 8))
def test_two_ways(ring_size):
    """The matrix, where rows travel to ranks as far to the one side as to the other, and half of them to each."""
    for case in cases():
        if case.exchange == "ring":
            ring = ra.Ring.simulated(ring_size, case.layout, exchange="two-way", kernel=case.kernel, hostile=True)
            pull = ring.transport.pull

            def both_ways(rows, parts, *, what, pull=pull):
                for rank, wanted in enumerate(parts):
                    shares = Counter((part.rank - rank) % ring_size for part in wanted for _ in part.rows)
                    assert set(shares) == {min(shares), ring_size - min(shares)} and shares.total() == rows[0][0].shape[1]
                    assert max(shares.values()) - min(shares.values()) <= 2
                return pull(rows, parts, what=what)

            ring.transport.pull, ring.transport.shift = both_ways, None
            check(case, ring)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size", [4, 7])
def test_two_ways_are_as_balanced_as_one_for_a_tile_more(layout, ring_size):
    one, two = (
        make_plan(get_exchange(name, None), Causal(), LAYOUTS[layout](64 * ring_size, ring_size))
        for name in ("ring", "two-way")
    )
    for step in one.steps:
        worst_one, worst_two = (max(plan.cells(rank, step) for rank in range(ring_size)) for plan in (one, two))
        assert worst_two == pytest.approx(worst_one, rel=0.04)
        assert all(len(two[rank, step]) <= 2 for rank in range(ring_size))


def test_nodes_are_named():
    with pytest.raises(ValueError, match=r"exchange='two-level' needs ranks_per_node"):
        ra.Ring.simulated(4, exchange="two-level")
    for given in (0, "2", 2.0, True):
        with pytest.raises(
            ValueError, match=f"ranks_per_node must be a whole number of ranks, at least 1, or None, got {given!r}"
        ):
            ra.Ring.simulated(4, exchange="two-level", ranks_per_node=given)
    with pytest.raises(ValueError, match=r"ranks_per_node 3 must divide the ring size 4"):
        ra.Ring.simulated(4, exchange="two-level", ranks_per_node=3)
    with pytest.raises(ValueError, match=r"ranks_per_node=2 is for exchange='two-level' or 'auto', not for 'ring'"):
        ra.Ring.simulated(4, exchange="ring", ranks_per_node=2)
    q, k, v, _ = random_qkv(1, 24, 24, 2, 1, 4, dtype=torch.float64)
    ring = ra.Ring.simulated(4, "contiguous", exchange="two-level", ranks_per_node=2, kv_memory=11 * 128)
    with pytest.raises(ValueError, match=r"the shards of a node, 12 KV rows, but kv_memory is enough for 11"):
        ra.ring_attention(q, k, v, ring=ring)


@pytest.mark.parametrize("exchange", ["ring", "gather", "pull", "two-way", "two-level"])
def test_gradients_travel_in_the_dtype_asked_for(exchange):
    """float64 inputs over a wire of fp32: dK and dV as exact as that, the rest as ever."""
    choice = {"exchange": exchange, "ranks_per_node": 2 if exchange == "two-level" else None}
    ring = ra.Ring.simulated(4, "zigzag", grad_dtype=torch.float32, hostile=True, **choice)
    sent = set()

    def watch(name):
        send = getattr(ring.transport, name)

        def watched(payloads, *rest, what):
            if "dK and dV" in what:
                sent.update(x.dtype for row in payloads for x in ([row] if hasattr(row, "dtype") else row))
            return send(payloads, *rest, what=what)

        setattr(ring.transport, name, watched)

    for name in ("shift", "reduce_scatter", "pull", "push"):
        watch(name)
    found = errors(ring, Sizes(), ra.Causal() & ra.Window(20), [])
    assert sent == {torch.float32}
    assert all(1e-10 < found.pop(name) < 1e-6 for name in ("dk", "dv"))
    assert max(found.values()) <= FLOAT64_LIMIT
    for dtype in (torch.int32, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(ValueError, match=rf"grad_dtype must be a floating torch\.dtype, .*, got {dtype!r}"):
            ra.Ring.simulated(4, grad_dtype=dtype)


@pytest.mark.parametrize("wire", [torch.float64, torch.float32])
def test_a_total_in_the_dtype_of_the_wire_travels_as_it_is(wire):
    k, v = (torch.zeros(2, 5, 3, d, dtype=torch.float64) for d in (4, 2))
    one = PackedSum((k, v), 5, HowHome(torch.float64, wire))
    (dk, dv), _ = one.sum.claim(range(5))
    for number, x in enumerate((dk, dv)):
        x.fill_(number + 1.0)
    rows = one.packed()
    assert (rows.data_ptr() == dk.data_ptr()) == (wire == torch.float64)
    assert rows.dtype == wire and torch.equal(rows, torch.tensor([1.0] * 12 + [2.0] * 6, dtype=wire).expand(2, 5, 18))


class Living:
    """How many rows of a rank's payloads live at a time: `watch` a transport's operation, `peak` is the most that was seen."""

    def __init__(self):
        self.storages, self.peak = [], 0

    def watch(self, transport, operation, what, payloads_of):
        post = getattr(transport, operation)

        def watched(payloads, *rest, **named):
            pending = post(payloads, *rest, **named)
            if what in named["what"]:
                self.note(payloads_of(payloads, pending.received))
            return pending

        setattr(transport, operation, watched)

    def note(self, payloads):
        self.storages += [(x.untyped_storage()._weak_ref(), x.shape[1]) for x in payloads]
        self.peak = max(self.peak, self.count())
        return payloads

    def count(self):
        """Rows whose memory is still held by anyone."""
        held = [(torch.UntypedStorage._new_with_weak_ptr(storage), rows) for storage, rows in self.storages]
        return sum(rows for storage, rows in held if storage is not None)


@pytest.mark.parametrize(
    ("exchange", "operation"), [("pull", "pull"), ("gather", "all_gather"), ("ring", "shift"), ("two-way", "pull")]
)
def test_a_forward_holds_a_visit_and_the_next_one(exchange, operation):
    q, k, v, _ = random_qkv(1, 192, 192, 1, 1, 4, dtype=torch.float64)
    rows = 48 if exchange in ("ring", "two-way") else 16
    ring, living = ra.Ring.simulated(4, "contiguous", exchange=exchange, kv_memory=2 * rows * 64, hostile=True), Living()
    living.watch(ring.transport, operation, "KV", lambda sent, got: got if exchange == "gather" else got[:1])
    ra.ring_attention(q, k, v, ring=ring, mask=ra.Full())
    assert 0 < living.peak <= 2 * rows


@pytest.mark.parametrize("exchange", ["pull", "gather"])
def test_a_backward_keeps_one_way_home_at_a_time(exchange, monkeypatch):
    q, k, v, dout = (x.requires_grad_() for x in random_qkv(1, 192, 192, 1, 1, 4, dtype=torch.float64))
    ring, living = ra.Ring.simulated(4, "contiguous", exchange=exchange, kv_memory=2 * 16 * 64, hostile=True), Living()
    packed = PackedSum.packed
    monkeypatch.setattr(PackedSum, "packed", lambda self: living.note([packed(self)])[0])
    ra.ring_attention(q, k, v, ring=ring, mask=ra.Full()).backward(dout)
    assert 0 < living.peak <= 2 * 4 * 16, "of four ranks"
