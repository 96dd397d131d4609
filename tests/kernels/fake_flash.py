"""Stand-ins for flash-attn 2.5 to 2.8 and 4 in plain PyTorch: signatures, returns, shapes, windows, softcap, on any device.

They check what the CUDA code takes on trust: that lse is contiguous and of the one right shape, and that dq, dk, dv are buffers
of the right dtype. A window is read as the CUDA code reads it: by version 2 sides of Sk or more as open, by version 4 as given.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ring_attn.kernels import flash, resolve

_QKV, _LENGTHS = "q, k, v", "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_BACKWARD = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
_COMMON = "dropout_p, softmax_scale, causal"


def _signatures(window: str, softcap: str, varlen_forward_end: str, varlen_backward_end: str = "") -> dict[str, str]:
    backward_end = f"{_COMMON}, {window}, {softcap}alibi_slopes, deterministic, rng_state=None"
    return {
        "_flash_attn_forward": f"{_QKV}, {_COMMON}, {window}, {softcap}alibi_slopes, return_softmax",
        "_flash_attn_backward": f"{_BACKWARD}, {backward_end}",
        "_flash_attn_varlen_forward": f"{_QKV}, {_LENGTHS}, {_COMMON}, {varlen_forward_end}",
        "_flash_attn_varlen_backward": f"{_BACKWARD}, {_LENGTHS}, {backward_end}{varlen_backward_end}",
    }


_LATE = "alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None"
_SIDES = "window_size_left, window_size_right"
_LATE_SIDES = "window_size_left=-1, window_size_right=-1, softcap=0.0"
_SIGNATURES = {
    "2.5.0": _signatures("window_size", "", "window_size, alibi_slopes, return_softmax"),
    "2.5.9.post1": _signatures("window_size", "", "window_size, alibi_slopes, return_softmax, block_table"),
    "2.6.3": _signatures("window_size", "softcap, ", f"window_size=(-1, -1), softcap=0.0, {_LATE}"),
    "2.7.4.post1": _signatures(_SIDES, "softcap, ", f"{_LATE_SIDES}, {_LATE}, zero_tensors=False", ", zero_tensors=False"),
}
_SIGNATURES["2.8.3"] = _SIGNATURES["2.7.4.post1"]
VERSIONS = tuple(_SIGNATURES)
CAPPED = VERSIONS[2:]  # those with a softcap


_PACKAGE, _INTERFACE = "flash_attn", "flash_attn.flash_attn_interface"


@contextmanager
def installed(version: str) -> Iterator[list[tuple[str, dict]]]:
    """Inside, flash-attn is this fake; yields the (function, arguments) of its calls so far."""
    modules = fake_flash_attn(version)
    with in_place_of_flash_attn(modules):
        yield modules[_INTERFACE].calls


@contextmanager
def in_place_of_flash_attn(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """Inside, `import flash_attn` finds these modules only. What is remembered about the library is forgotten at both ends."""
    _forget()
    # Not the whole of sys.modules: that, put back, would drop what others imported meanwhile.
    before = {name: sys.modules[name] for name in _present()}
    try:
        _replace({_PACKAGE: None} | modules)
        yield
    finally:
        _replace(before)
        _forget()


def _replace(modules: dict[str, ModuleType | None]) -> None:
    for name in _present():
        del sys.modules[name]
    sys.modules.update(modules)


def _present() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == _PACKAGE]


def _forget() -> None:
    for remembered in (flash.load, flash.load4, resolve):
        remembered.cache_clear()


def fake_flash_attn(version: str) -> dict[str, ModuleType]:
    """The modules `flash_attn` and `flash_attn.flash_attn_interface` of a version, for `sys.modules`; each call is recorded."""
    package, interface = ModuleType(_PACKAGE), ModuleType(_INTERFACE)
    package.__version__, package.flash_attn_interface = version, interface
    interface.calls = []
    for name, parameters in _SIGNATURES[version].items():
        setattr(interface, name, _function(name, parameters, version, interface.calls))
    return {_PACKAGE: package, _INTERFACE: interface}


def _function(name: str, parameters: str, version: str, calls: list):
    signature = inspect.signature(eval(f"lambda {parameters}: None"))
    body = {
        "_flash_attn_forward": _forward,
        "_flash_attn_backward": _backward,
        "_flash_attn_varlen_forward": _varlen_forward,
        "_flash_attn_varlen_backward": _varlen_backward,
    }[name]

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append((name, bound.arguments))
        return body(version, **bound.arguments)

    if version < "2.7":
        function.__signature__ = signature
    return function


def _forward(version, q, k, v, **options):
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    for b in range(len(q)):
        out[b], lse[b] = _attend(q[b], k[b], v[b], _Rule.of(version, options, k.shape[1]))
    return _forward_result(version, q, k, v, out, lse)


def _backward(version, dout, q, k, v, out, softmax_lse, dq, dk, dv, **options):
    _check_lse(softmax_lse, (q.shape[0], q.shape[2], q.shape[1]))
    for b in range(len(q)):
        rows = dout[b], q[b], k[b], v[b], out[b], softmax_lse[b]
        _fill((dq[b], dk[b], dv[b]), _differentiate(*rows, _Rule.of(version, options, k.shape[1])))
    return _backward_result(version, dq, dk, dv)


def _varlen_forward(version, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    padded = torch.full((len(cu_seqlens_q) - 1, q.shape[1], max_seqlen_q), torch.nan)
    for i, (a, b) in enumerate(_members(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)):
        out[a], lse[:, a] = _attend(q[a], k[b], v[b], _Rule.of(version, options, max_seqlen_k))
        padded[i, :, : a.stop - a.start] = lse[:, a]
    return _forward_result(version, q, k, v, out, padded if version < "2.6" else lse)


def _varlen_backward(
    version, dout, q, k, v, out, softmax_lse, dq, dk, dv,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options,
):  # fmt: skip
    pads = version < "2.6"
    shape = (len(cu_seqlens_q) - 1, q.shape[1], max_seqlen_q) if pads else (q.shape[1], q.shape[0])
    _check_lse(softmax_lse, shape)
    for i, (a, b) in enumerate(_members(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)):
        lse = softmax_lse[i, :, : a.stop - a.start] if pads else softmax_lse[:, a]
        rows = dout[a], q[a], k[b], v[b], out[a], lse
        _fill((dq[a], dk[b], dv[b]), _differentiate(*rows, _Rule.of(version, options, max_seqlen_k)))
    return _backward_result(version, dq, dk, dv)


@dataclass(frozen=True)
class _Rule:
    """What the options of a call say of its scores; `sides` (left, right) as that version reads them, None for no window."""

    scale: float
    softcap: float
    sides: tuple[int, int] | None

    @staticmethod
    def of(version: str, options: dict, max_kv: int) -> _Rule:
        """The other options must be off."""
        assert (options["dropout_p"], options["alibi_slopes"], options["causal"]) == (0.0, None, False)
        left, right = options.get("window_size") or (options["window_size_left"], options["window_size_right"])
        hides = f"window ({left}, {right}) would hide a whole row"
        if version == "4":
            sides = tuple(sys.maxsize if side is None else side for side in (left, right))
            assert min(sides) >= 0, hides
        else:
            assert min(left, right) >= -1, hides
            sides = tuple(-1 if side >= max_kv else side for side in (left, right))
            sides = None if max(sides) < 0 else tuple(max_kv if side < 0 else side for side in sides)
        return _Rule(options["softmax_scale"], options.get("softcap", 0.0), sides)

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | float]:
        """([h, i, j] in float64, -inf outside the bottom-right aligned window; their derivative by scaled products)."""
        scores, slope = torch.einsum("ihd,jhd->hij", q.double(), _expand(k, q).double()) * self.scale, 1.0
        if self.softcap > 0:
            ratio = (scores / self.softcap).tanh()
            scores, slope = ratio * self.softcap, 1 - ratio**2
        if self.sides is None:
            return scores, slope
        offset = torch.arange(len(k)) - torch.arange(len(q)).unsqueeze(1) - (len(k) - len(q))
        return scores.masked_fill((offset < -self.sides[0]) | (offset > self.sides[1]), -torch.inf), slope


def _attend(q, k, v, rule: _Rule) -> tuple[Tensor, Tensor]:
    scores, _ = rule.scores(q, k)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), _expand(v, q).double())
    return out.to(q.dtype), scores.logsumexp(-1).float()


def _differentiate(dout, q, k, v, out, lse, rule: _Rule) -> tuple[Tensor, Tensor, Tensor]:
    scores, slope = rule.scores(q, k)
    p = (scores - lse.double().unsqueeze(-1)).exp()
    dout = dout.double()
    delta = (dout * out.double()).sum(-1).T.unsqueeze(-1)
    ds = p * (torch.einsum("ihd,jhd->hij", dout, _expand(v, q).double()) - delta) * slope * rule.scale
    dq = torch.einsum("hij,jhd->ihd", ds, _expand(k, q).double())
    dk, dv = torch.einsum("hij,ihd->jhd", ds, q.double()), torch.einsum("hij,ihd->jhd", p, dout)
    return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))


def _expand(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _members(q, k, cu_q, cu_kv, max_q, max_kv):
    for cu, x, most in ((cu_q, q, max_q), (cu_kv, k, max_kv)):
        assert cu.dtype == torch.int32
        assert (cu[0], cu[-1], cu.diff().max()) == (0, len(x), most)
        assert cu.diff().min() > 0
    assert len(cu_q) == len(cu_kv)
    slices = [[slice(a, b) for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False)] for cu in (cu_q, cu_kv)]
    return zip(*slices, strict=True)


def _check_lse(lse: Tensor, shape: tuple[int, ...]) -> None:
    assert lse.shape == shape, f"lse has shape {tuple(lse.shape)}, the kernel reads {shape}"
    assert lse.is_contiguous(), "lse is read through its raw pointer"
    assert lse.dtype == torch.float32


def _fill(targets, values) -> None:
    for target, value in zip(targets, values, strict=True):
        assert target.dtype in (torch.float16, torch.bfloat16)
        target.copy_(value)


def _forward_result(version, q, k, v, out, lse):
    p, state = torch.empty(0), torch.empty(2, dtype=torch.int64)
    return (out, lse, p, state) if version >= "2.7" else (out, q, k, v, out, lse, p, state)


def _backward_result(version, dq, dk, dv):
    softmax_d = torch.full((1,), torch.nan)
    return softmax_d if version >= "2.7" else (dq, dk, dv, softmax_d)


@contextmanager
def installed4(derivative: bool = True) -> Iterator[list[tuple[str, dict]]]:
    """Inside, flash-attn 4 is a stand-in; without `derivative`, one that leaves a softcap out of its gradients."""
    cute, interface, utils = (ModuleType(f"flash_attn.cute{name}") for name in ("", ".interface", ".utils"))
    cute.interface, interface.utils, interface.calls = interface, utils, []
    if derivative:
        utils.create_softcap_scoremod_bwd = None
    for name, body in (("_flash_attn_fwd", _forward4), ("_flash_attn_bwd", _backward4)):
        setattr(interface, name, _recorded(name, body, interface.calls))
    with in_place_of_flash_attn({_PACKAGE: ModuleType(_PACKAGE), cute.__name__: cute}):
        yield interface.calls


def _recorded(name: str, body: Callable, calls: list) -> Callable:
    def function(*args, **kwargs):
        calls.append((name, kwargs))
        return body(*args, **kwargs)

    return function


def _forward4(q, k, v, *, return_lse, cu_seqlens_q=None, **options):
    assert return_lse
    if cu_seqlens_q is None:
        return *_forward("4", q, k, v, **_OFF, **options)[:2], None
    return *_varlen_forward("4", q, k, v, cu_seqlens_q, **_OFF, **options)[:2], None


def _backward4(q, k, v, out, dout, lse, *, deterministic, dlse, cu_seqlens_q=None, **options):
    assert dlse is None
    grads = [torch.empty_like(x) for x in (q, k, v)]
    arguments = dout, q, k, v, out, lse, *grads
    if cu_seqlens_q is None:
        _backward("4", *arguments, **_OFF, **options)
    else:
        _varlen_backward("4", *arguments, cu_seqlens_q, **_OFF, **options)
    return *grads, None


_OFF = {"dropout_p": 0.0, "alibi_slopes": None, "causal": False}
