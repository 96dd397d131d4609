"""The checks of tests/gpu/kernels.py under pytest; skipped without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.kernels import OWN, PAIRS, check_pair

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair_keeps_its_limits(pair):
    rows = check_pair(pair, quick=True)
    assert [failure for row in rows for failure in row.failures] == []
    assert any(row.cases for row in rows) or all(row.refused for row in rows)
    if set(pair) <= OWN:
        assert [reason for row in rows for reason in row.refused] == []
