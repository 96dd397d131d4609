"""The matrix on a simulated ring, over a hostile transport."""

import math

import pytest
import torch

from tests.matrix import Case, cases, check, simulated
from tests.support import rel_error


def test_an_error_that_is_no_number_is_the_largest():
    ones, broken = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert max(rel_error(x, ones) for x in (ones + 0.5, broken)) == math.inf
    assert rel_error(ones, broken) == math.inf


@pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c.layout}-{c.exchange}-{c.mask}".replace(" ", "_"))
def test_simulated(case: Case, ring_size: int):
    check(case, simulated(case, ring_size))


@pytest.mark.parametrize(("ulysses", "ring_size"), [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (4, 3)])
def test_heads_against_sequence(ulysses: int, ring_size: int):
    # 5 shares no divisor with the numbers of layouts, exchanges, masks and head counts: all of them come up.
    for case in cases(ulysses=ulysses)[(ulysses + ring_size) % 5 :: 5]:
        check(case, simulated(case, ring_size))


@pytest.mark.parametrize(
    "case",
    cases(kernel="auto", head_dims=(6, 6), heads=(4, 2)),
    ids=lambda c: f"{c.layout}-{c.exchange}-{c.mask}".replace(" ", "_"),
)
def test_the_kernel_auto_picks(case: Case):
    check(case, simulated(case, 4))
