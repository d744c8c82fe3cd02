"""The picture of a test is drawn also where all its numbers are the same: a handful of patients gives such tests."""

from __future__ import annotations

import numpy as np
import pytest

from privacy_audit.charts import histogram_svg
from privacy_audit.result import histogram


@pytest.mark.parametrize("spread", [0.0, 1e-9, 4e-7, 1e-3])
def test_numbers_that_hardly_differ_can_be_drawn(spread: float) -> None:
    null = np.array([0.5, 0.5 + spread])
    drawn = histogram(
        null,
        np.array([0.5]),
        axis="score",
        null_name="permuted",
        observed_name="observed",
        threshold=0.5 + spread,
    )
    assert drawn is not None
    assert drawn.edges[0] < drawn.edges[-1]
    assert sum(drawn.null) == pytest.approx(1.0, abs=1e-4)
    assert "<svg" in histogram_svg(drawn, "a test")
