"""Random calls from the whole space of tests/fuzz.py: each is right, or refused in words. RING_ATTN_FUZZ=5000 runs that many.

The ordinary run takes the same cases every time; a run by RING_ATTN_FUZZ takes new ones.
"""

import os
from collections import Counter

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz import case, cases

PARTS = 4
NUMBER = int(os.environ.get("RING_ATTN_FUZZ", "0"))
EXAMPLES = -(-NUMBER // PARTS) or 500


@pytest.mark.parametrize("part", range(PARTS))
def test_every_case_is_right_or_refused(part):
    counts: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(cases())
    def run(arguments):
        counts[case(**arguments)] += 1

    hypothesis.seed(int.from_bytes(os.urandom(4)) if NUMBER else part)(run)()
    print(f"part {part}: {dict(counts)}")
    assert counts["right"] > EXAMPLES // 4 and counts["refused"] > 0


def test_a_failure_is_a_line_that_runs_it_again(monkeypatch):
    import ring_attn as ra
    from tests import fuzz

    apply = ra.Alibi.apply
    monkeypatch.setattr(ra.Alibi, "apply", lambda self, s, cells: apply(self, s, cells) * 1.0001)
    arguments = {"ring": 2, "kernel": "auto", "mask": (("Window", 3, None),), "scores": (("alibi",), ("sinks",)), "seed": 3}
    with pytest.raises(AssertionError, match=r"out.*: case") as first:
        case(**arguments)
    line = str(first.value).split(": ")[-1].splitlines()[0]
    with pytest.raises(AssertionError) as second:
        eval(line[line.index("case(") :], {"case": fuzz.case})
    assert str(second.value).splitlines()[0] == str(first.value).splitlines()[0]
    monkeypatch.undo()
    assert case(**arguments) == "right"
