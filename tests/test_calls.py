"""How many of our calls a forward pass makes: the hot path stays short."""

from __future__ import annotations

from benchmarks.calls import measure


def test_calls_of_a_forward_pass_of_a_tiny_sd15() -> None:
    found = measure()
    assert found["hit"].total() <= 60
    assert len({file for file, _ in found["hit"]}) <= 4
    assert found["miss"].total() <= 120
    assert len({file for file, _ in found["miss"]}) <= 6
