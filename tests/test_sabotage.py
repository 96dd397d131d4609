"""A matrix that cannot turn red proves nothing: every sabotage must be noticed, and nothing else."""

from contextlib import closing

import pytest

from tests.sabotage import SABOTAGES, red_cases


def test_nothing_is_red_without_sabotage():
    assert list(red_cases(None)) == []


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_turns_the_matrix_red(name: str):
    with closing(red_cases(SABOTAGES[name])) as red:
        assert next(red, None), f"no case of the matrix notices: {name}"
