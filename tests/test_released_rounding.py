"""Where released code rounds: schedules, numbers that merge, default shares."""

from __future__ import annotations

from vtc.methods.framefusion_merge import most_merged
from vtc.methods.tome import per_block
from vtc.recipe import Recipe


def test_tome_rounds_its_first_block_down_before_it_draws_the_line() -> None:
    """5 tokens, slope .5, 12 blocks: from 2 (2.5 rounded down) to 10 - 2."""
    assert per_block((5, 0.5), 12) == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8]
    assert per_block((4, -1.0), 4) == [8, 5, 2, 0]


def test_tomesd_merges_half_by_default() -> None:
    steps = Recipe.build("tomesd", 3).steps
    assert [(step.at, step.keep) for step in steps] == [(f"dit.{i}.attn", 0.5) for i in range(3)]


def test_framefusion_rounds_the_number_that_merges_down() -> None:
    """36 tokens of which 32.4 may stay: 3.6 have to go and 3 do. One always stays."""
    assert most_merged(36, 32.4) == 3
    assert most_merged(36, 33.0) == 3
    assert most_merged(36, 0.5) == 35
    assert most_merged(36, 40.0) == 0
