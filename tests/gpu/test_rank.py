"""tests/gpu/rank.py runs where there is no GPU, and its variants are what they are called."""

import re
import sys

import pytest

from tests.gpu import rank


@pytest.mark.skipif(rank.DEVICE.type == "cuda", reason="by libraries that take other head dims and lengths")
def test_it_prints_a_line_a_variant(monkeypatch, capsys):
    words = (
        "rank --length 256 --heads 4 --kv-heads 4 --dim 8 --repeats 1 --ranks 1 2 --variants auto parts=2 halves parts=4,whole"
    )
    monkeypatch.setattr(sys, "argv", words.split())
    rank.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rank")]
    told = [re.match(r"rank (\d) (\S+) .*GiB  (.+), tiles", line).groups() for line in lines]
    ways = [("auto", "1 parts"), ("parts=2", "2 parts"), ("halves", "1 parts, halves"), ("parts=4,whole", "4 parts")]
    assert told == [(number, *way) for number in "12" for way in ways]


def test_it_knows_its_words():
    with pytest.raises(ValueError, match="'part=2' is not one of auto, parts=N, halves, whole"), rank.variant("part=2"):
        pass
