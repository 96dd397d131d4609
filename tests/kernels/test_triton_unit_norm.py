"""Rows of unit norm, in the interpreter or on a GPU, and in plain PyTorch, against float64."""

import pytest
import torch

pytest.importorskip("triton")
from ring_attn import unit_norm
from ring_attn.kernels.triton_kernel import interpreted
from ring_attn.unit_norm import of_unit_norm
from tests.support import rel_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # in 16 bits those of one rounding


@pytest.fixture(
    params=[
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs CUDA, or TRITON_INTERPRET=1")
        ),
    ]
)
def fused(request, monkeypatch):
    monkeypatch.setattr(unit_norm, "_fuses", lambda x: request.param)


def both(x, groups, dy):
    x = x.detach().requires_grad_()
    y = of_unit_norm(x, groups)
    return y.detach(), *torch.autograd.grad(y, x, dy)


def plainly(x, groups, dy):
    """The same in float64 the plain way."""
    x = x.detach().double().requires_grad_()
    y = torch.nn.functional.normalize(x.unflatten(-1, (groups, -1)), dim=-1, eps=0).flatten(-2)
    return y.detach(), *torch.autograd.grad(y, x, dy.double())


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("heads", "dim", "groups"), [(3, 64, 1), (2, 66, 3), (4, 24, 8)])
def test_values_and_gradients(heads, dim, groups, dtype, fused):
    """Of slices and transposed tensors as well, whose heads and rows do not follow each other in memory."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=gen, device=DEVICE).to(dtype)  # noqa: E731
    whole, dy = make(2, 40, heads + 1, dim), make(2, 37, heads, dim)
    sliced = whole[:, 3:, 1:]
    for x in (sliced.contiguous(), sliced, sliced.transpose(1, 2).contiguous().transpose(1, 2)):
        for found, want in zip(both(x, groups, dy), plainly(x, groups, dy), strict=True):
            assert found.dtype == dtype and found.shape == want.shape
            assert rel_error(found, want) < LIMITS[dtype]


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_no_size_leaves_the_range_of_its_square(size, fused):
    x, dy = (torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in range(2))
    for found, want in zip(both(x * size, 2, dy), plainly(x * size, 2, dy), strict=True):
        assert rel_error(found, want) < LIMITS[torch.float32]


def test_zeros_stay_and_get_no_gradient(fused):
    x = torch.ones(1, 3, 2, 8, device=DEVICE)
    x[:, 1, :, :4] = 0
    found, grad = both(x, 2, torch.ones_like(x) + x.cumsum(-1))
    assert found[:, 1, :, :4].eq(0).all() and grad[:, 1, :, :4].eq(0).all()
    assert torch.equal(found[:, 1, :, 4:], found[:, 0, :, 4:]) and grad[:, 0].ne(0).any()
