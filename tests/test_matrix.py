"""The matrix on a simulated ring, over a hostile transport."""

import pytest

from tests.matrix import Case, cases, check, simulated


@pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c.layout}-{c.exchange}-{c.mask}".replace(" ", "_"))
def test_simulated(case: Case, ring_size: int):
    check(case, simulated(case, ring_size))


@pytest.mark.parametrize(
    "case",
    cases(kernel="auto", head_dims=(6, 6), heads=(4, 2)),
    ids=lambda c: f"{c.layout}-{c.exchange}-{c.mask}".replace(" ", "_"),
)
def test_the_kernel_auto_picks(case: Case):
    check(case, simulated(case, 4))
