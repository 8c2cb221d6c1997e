"""What a user's ``count`` says is checked in one place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_bn.functional.samples import counted_by, samples_in


@pytest.mark.parametrize("said", [4, 4.0, np.int64(4), torch.tensor(4)])
def test_whole_numbers_of_any_type_are_counts(said: Any) -> None:
    assert counted_by(lambda _: said)(None) == 4
    assert counted_by(None) is samples_in


@pytest.mark.parametrize("said", [-1, float("nan"), float("inf"), 2.5, torch.tensor(-1)])
def test_what_is_no_number_of_samples_is_refused(said: Any) -> None:
    with pytest.raises(ValueError, match=r"count must return .* but returned (-1|nan|inf|2\.5|tensor)"):
        counted_by(lambda _: said)(None)


@pytest.mark.parametrize("said", [None, "4", True, torch.zeros(2)])
def test_what_is_no_number_is_refused(said: Any) -> None:
    with pytest.raises(TypeError, match="count must return"):
        counted_by(lambda _: said)(None)


def test_what_is_no_function_and_a_stop_iteration_are_refused() -> None:
    with pytest.raises(TypeError, match=r"count must be a function .* but is 5"):
        counted_by(5)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="count raised StopIteration"):
        counted_by(lambda _: next(iter([])))(None)
