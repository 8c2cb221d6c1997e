"""RESULTS.md is written by code alone, and what was not measured again stays."""

from pathlib import Path

from benchmarks.results import update
from benchmarks.timing import Spread, ratio, take_turns


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    update(path, {"b.cpu": "## B\n\n| x |", "a.cpu": "## A, as it was"})
    update(path, {"a.cpu": "## A, new"})
    text = path.read_text()
    assert "## B\n\n| x |" in text and "## A, new" in text and "as it was" not in text
    update(path, {})
    assert path.read_text() == text  # writing nothing changes nothing


def test_contestants_take_turns_at_being_first() -> None:
    order: list[str] = []
    contestants = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = take_turns(contestants, rounds=3, device="cpu")
    assert "".join(order[3:]) == "abcbcacab"  # behind a round of warming up
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_taken_within_a_round() -> None:
    # the machine was ten times slower in the second round
    assert ratio({"a": [2.0, 20.0, 2.0], "b": [1.0, 10.0, 1.0]}, "a", "b") == Spread(2.0, 2.0, 2.0)
