"""The flash-attn adapters on stand-ins for every supported version: calls, numbers, and the words they refuse with.

The stand-ins check what the CUDA code takes on trust; tests/gpu/kernels.py runs the installed library itself.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import cache, partial
from types import ModuleType

import pytest
import torch

from ring_attn.kernels import KernelUnavailable, Problem, flash, get_kernel, resolve
from ring_attn.mask import Causal, Documents
from ring_attn.score import Scores, SoftCap
from ring_attn.tiles import Band, Tile, tiles
from tests.kernels.comparison import check_half, exact, plain
from tests.kernels.fake_flash import CAPPED, VERSIONS, in_place_of_flash_attn, installed, installed4
from tests.support import BAND_KINDS, band_tiles, random_qkv, run_kernel, split_tiles

DENSE = ["_flash_attn_backward", "_flash_attn_forward"]
PACKED = ["_flash_attn_varlen_backward", "_flash_attn_varlen_forward"]
FLASH2, FLASH4 = get_kernel("flash2"), get_kernel("flash4")
CAP = 0.7


@pytest.fixture(params=VERSIONS)
def calls(request):
    """The calls to a flash-attn of each version, as (function, arguments)."""
    with installed(request.param) as recorded:
        yield recorded


@cache
def example(kind, num_q, num_kv, h=4, g=2, visits=1, dtype=torch.float16, capped=False):
    """(inputs, visits, dense softmax in float64, dense softmax in dtype) of one case; made once for all versions."""
    inputs = random_qkv(2, num_q, num_kv, h, g, 16, dtype=dtype, seed=1)
    tile_lists = split_tiles(band_tiles(kind, num_q, num_kv), visits)
    options = {"scale": 0.25} | ({"modify": lambda scores: CAP * torch.tanh(scores / CAP)} if capped else {})
    return inputs, tile_lists, exact(*inputs, tile_lists, **options), plain(*inputs, tile_lists, **options)


def check(case, forward=FLASH2, backward=FLASH2, score=None):
    inputs, tile_lists, want, dense_half = case
    check_half(run_kernel(forward, *inputs, tile_lists, scale=0.25, backward=backward, score=score), want, dense_half)


@pytest.mark.parametrize("size", [(37, 44), (53, 20)])
@pytest.mark.parametrize("kind", BAND_KINDS)
def test_every_band(calls, kind, size):
    check(example(kind, *size))
    assert calls


@pytest.mark.parametrize("size", [(37, 44), (53, 20)])
@pytest.mark.parametrize("kind", BAND_KINDS)
def test_version_4_takes_every_window_as_it_is(kind, size):
    """But for tiles of single batch rows, which are cut into what goes in two packs."""
    case = example(kind, *size)
    with installed4() as calls:
        check(case, FLASH4, FLASH4)
    (tile_list,) = case[1]
    assert len(calls) <= 2 * (2 if kind == "batch rows" else len(tile_list))


@pytest.mark.parametrize("kind", ["documents", "batch rows", "many"])
def test_several_visits(calls, kind):
    check(example(kind, 37, 44, visits=3))


CAPPING = {version: (FLASH2, partial(installed, version)) for version in CAPPED} | {"4": (FLASH4, installed4)}


@pytest.mark.parametrize("version", CAPPING)
@pytest.mark.parametrize("kind", ["causal", "window", "documents", "batch rows", "many"])
def test_a_softcap_is_the_library_s_own(version, kind):
    kernel, installation = CAPPING[version]
    for cap, score in ((CAP, Scores((SoftCap(CAP),), bound=CAP)), (0.0, Scores(()))):
        with installation() as calls:
            check(example(kind, 37, 44, visits=2, capped=cap > 0), kernel, kernel, score)
            assert {arguments["softcap"] for _, arguments in calls} == {cap}


@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 1), (1, 1)])
def test_grouped_heads(calls, h, g):
    check(example("documents", 37, 44, h, g))


def test_bfloat16(calls):
    check(example("many", 37, 44, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", BAND_KINDS)
def test_forward_of_another_kernel(calls, kind):
    """The backward needs only the final out and lse, whoever made them."""
    check(example(kind, 37, 44, visits=2), forward=get_kernel("reference"))
    assert not any("forward" in name for name, _ in calls)


def test_backward_of_another_kernel(calls):
    check(example("many", 37, 44, visits=2), backward=get_kernel("reference"))
    assert not any("backward" in name for name, _ in calls)


@pytest.mark.parametrize(
    ("kind", "num_q", "num_kv", "dense", "packed"),
    [
        ("full", 37, 44, 1, 0),
        ("window", 37, 44, 1, 0),
        ("causal", 53, 20, 2, 0),  # cut where flash-attn would misread the window
        ("documents", 40, 40, 1, 1),  # a document of one row is full, the others are causal
        ("batch rows", 37, 44, 0, 1),
    ],
)
def test_tiles_with_one_window_go_in_one_call(calls, kind, num_q, num_kv, dense, packed):
    check(example(kind, num_q, num_kv))
    names = [name for name, _ in calls]
    assert {name: names.count(name) for name in (*DENSE, *PACKED)} == dict.fromkeys(DENSE, dense) | dict.fromkeys(
        PACKED, packed
    )


def rectangle(q_rows, kv_rows, batch=None):
    return Tile(range(*q_rows), range(*kv_rows), Band(), ((), ()), batch)


@pytest.mark.parametrize(
    ("batch", "tile_list"),
    [
        # No pack reads a KV row twice: its gradients are written, not added, within a call.
        (1, [rectangle((0, 20), (0, 40)), rectangle((20, 40), (0, 40))]),
        (2, [rectangle(q, kv) for q in ((0, 20), (20, 40)) for kv in ((0, 11), (11, 40))]),
        # Packs with gaps, that begin late or end early, and that go on in another batch row.
        (1, [rectangle((0, 12), (5, 9)), rectangle((20, 40), (10, 40))]),
        (1, [rectangle((7, 20), (0, 9)), rectangle((20, 33), (9, 33))]),
        (2, [rectangle((0, 18), (0, 18), batch=0), rectangle((18, 40), (18, 40), batch=1)]),
    ],
)
def test_rectangles_that_do_and_do_not_go_in_one_pack(batch, tile_list):
    inputs = random_qkv(batch, 40, 40, 4, 2, 16, dtype=torch.float16, seed=3)
    visits = [tuple(tile_list)]
    with installed("2.8.3"):
        check((inputs, visits, exact(*inputs, visits, scale=0.25), plain(*inputs, visits, scale=0.25)))


@pytest.mark.parametrize("before", [[], [(rectangle((30, 40), (0, 9)),)]])
def test_a_pack_that_is_the_whole_visit(calls, before):
    """One batch row, all of whose documents are causal: the library's out and lse are the result as they stand, and its dk and
    dv are written, also where dq is added to that of a visit before.
    """
    inputs = random_qkv(1, 40, 40, 4, 2, 16, dtype=torch.float16, seed=2)
    visits = [*before, tiles((range(40),), [(range(40),)], Causal() & Documents(lengths=[13, 9, 18]))]
    check((inputs, visits, exact(*inputs, visits, scale=0.25), plain(*inputs, visits, scale=0.25)))
    assert [name for name, _ in calls if "varlen" in name] == ["_flash_attn_varlen_forward", "_flash_attn_varlen_backward"]


@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_is_deterministic_where_pytorch_is_asked_to_be(calls, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(example("documents", 40, 40))
    finally:
        torch.use_deterministic_algorithms(False)
    asked = [arguments["deterministic"] for name, arguments in calls if "backward" in name]
    assert asked == [deterministic] * 2


def problem(**change):
    fields = {"direction": "forward", "device": "cuda", "dtype": torch.float16, "num_heads": 4, "num_kv_heads": 2}
    return Problem(**({**fields, "head_dim": 16, "v_head_dim": 16} | change))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_version_supports(calls, direction):
    for dtype in (torch.float16, torch.bfloat16):
        assert resolve("flash2", problem(direction=direction, dtype=dtype, head_dim=256, v_head_dim=256)) is FLASH2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "flash-attn runs on CUDA, not on 'cpu'"),
        ({"dtype": torch.float32}, "it takes float16, bfloat16, not float32"),
        ({"head_dim": 20, "v_head_dim": 20}, "it needs a head_dim that is a multiple of 8, not 20"),
        ({"head_dim": 264, "v_head_dim": 264}, "it takes a head_dim up to 256, not 264"),
        ({"v_head_dim": 8}, "it needs v_head_dim = head_dim, not 8 and 16; triton and reference do not"),
        ({"score": ("alibi",)}, "it has no alibi"),
        ({"direction": "backward", "lse_grad": True}, "no gradient through lse enters; triton and reference take one"),
    ],
)
def test_what_it_refuses(calls, change, reason):
    start = f"kernel 'flash2' cannot do this {change.get('direction', 'forward')}: "
    with pytest.raises(KernelUnavailable, match=f"^{start}.*{reason}; kernel='auto' picks one that can$"):
        resolve("flash2", problem(**change))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("version", [*VERSIONS, "2.6.0", "2.6.2.post1", "2.7.0rc2"])
def test_which_versions_take_a_softcap(version, direction):
    with in_place_of_flash_attn(release(version)):
        said = FLASH2.supports(problem(score=("softcap",), direction=direction))
    if version.startswith(("2.5", "2.6.0", "2.6.2")):
        assert re.fullmatch(r"it takes a softcap from flash_attn 2\.6\.3 on, 2\.[56]\.[029] is installed", said)
    else:
        assert said is None


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_a_flash4_without_a_derivative_of_it_takes_no_softcap(on_hopper):
    asked = problem(score=("softcap",), head_dim=64, v_head_dim=64)
    with installed4():
        assert FLASH4.supports(asked) is None
    with installed4(derivative=False):
        assert FLASH4.supports(asked) == "this flash-attn 4 has no derivative of a softcap, version 4.0.0b36 has"
        assert FLASH4.supports(replace(asked, score=None)) is None


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (("softcap", "softcap"), "it takes one SoftCap, not two; triton and reference take any number"),
        (("softcap", "dropout"), "it has no dropout"),
        (("alibi", "softcap"), "it has no alibi"),
    ],
)
def test_a_softcap_stands_alone(on_hopper, kinds, reason):
    asked = problem(score=kinds, head_dim=64, v_head_dim=64)
    with installed4():
        assert FLASH4.supports(asked) == reason
    with installed("2.8.3"):
        assert FLASH2.supports(asked) == reason


def test_a_gradient_through_lse_is_no_matter_to_the_forward(calls):
    assert FLASH2.supports(problem(lse_grad=True)) is None


def release(version=None, interface=True):
    """A flash_attn package of some version, with or without an interface that imports."""
    package = ModuleType("flash_attn")
    if version is not None:
        package.__version__ = version
    if interface:
        package.flash_attn_interface = ModuleType("flash_attn.flash_attn_interface")
    return {"flash_attn": package}


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({}, "flash_attn is not installed"),
        (release("2.8.3", interface=False), "flash_attn 2 does not import here: cannot import name 'flash_attn_interface'"),
        *(
            (release(version), f"flash_attn {version or 'unknown'} is installed; this adapter is written for 2.5 to 2.8")
            for version in ("2.4.3", "2.9.0", "2.10.1", "2.60", "3.0.0b1", "3.6", "1.7", "2", "2.x", None)
        ),
    ],
)
def test_what_is_installed_and_cannot_be_used(modules, reason):
    with in_place_of_flash_attn(modules), pytest.raises(KernelUnavailable, match=re.escape(reason)):
        resolve("flash2", problem())


@pytest.mark.parametrize("error", ["RuntimeError", "OSError", "AttributeError", "ImportError"])
@pytest.mark.parametrize(("kernel", "module"), [("flash2", "flash_attn_interface"), ("flash4", "cute/interface")])
def test_a_library_that_fails_to_import_is_one_that_cannot_be_used(tmp_path, error, kernel, module):
    """Of whatever kind its error is; auto goes on without it."""
    path = tmp_path.joinpath(f"{module}.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"raise {error}('no toolkit for this driver')")
    package = ModuleType("flash_attn")
    package.__path__, package.__version__ = [str(tmp_path)], "2.8.3"
    with in_place_of_flash_attn({"flash_attn": package}):
        with pytest.raises(KernelUnavailable, match="does not import here: no toolkit for this driver"):
            resolve(kernel, problem())
        assert resolve("auto", problem(device="cpu")) is not None


@pytest.mark.parametrize("version", ["2.5.0", "2.6.0.post1", "2.7.0rc2", "2.8.99"])
def test_patch_releases_are_taken(version):
    with in_place_of_flash_attn(release(version)):
        assert FLASH2.supports(problem()) is None


def traces():
    """What a stand-in may have left: modules, and how much is remembered about the library and of choices."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith("flash_attn")}
    return modules, resolve.cache_info().currsize, flash.load.cache_info().currsize


def test_a_stand_in_leaves_no_trace():
    with installed("2.5.0"):
        pass
    before = traces()
    for stand_in in (installed("2.8.3"), in_place_of_flash_attn({})):
        with stand_in:
            assert traces()[1:] == (0, 0)
            resolve("auto", problem(device="cpu"))
            FLASH2.supports(problem())
            assert traces()[1:] == (1, 1)
        assert traces() == before
    with pytest.raises(KernelUnavailable), in_place_of_flash_attn({}):
        resolve("flash2", problem())
    assert traces() == before
