from __future__ import annotations

import pytest

from lbr_dist.config import Optim
from lbr_dist.training.schedule import factor, moved


def test_warm_up_rises_linearly_from_the_first_step() -> None:
    optim = Optim(warmup=0.2)
    assert [factor(optim, seen, 100) for seen in (1, 5, 10, 19)] == pytest.approx([0.05, 0.25, 0.5, 0.95])


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)]
)
def test_decay_reaches_the_final_rate(schedule: str, middle: float, end: float) -> None:
    optim = Optim(warmup=0.2, schedule=schedule, final_lr=0.1)
    assert factor(optim, 20, 100) == pytest.approx(1)
    assert factor(optim, 60, 100) == pytest.approx(middle)
    assert factor(optim, 100, 100) == pytest.approx(end)
    assert factor(optim, 130, 100) == pytest.approx(end)


def test_cosine_is_above_the_line_early_and_below_it_late() -> None:
    cosine, linear = Optim(warmup=0), Optim(warmup=0, schedule="linear")
    assert factor(cosine, 25, 100) > factor(linear, 25, 100)
    assert factor(cosine, 75, 100) < factor(linear, 75, 100)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_all_warm_up(schedule: str) -> None:
    optim = Optim(warmup=1, schedule=schedule)
    assert factor(optim, 50, 100) == pytest.approx(0.5)
    assert factor(optim, 100, 100) == pytest.approx(1)


def test_only_the_share_counts() -> None:
    optim = Optim()
    assert factor(optim, 37, 100) == factor(optim, 37 * 64, 100 * 64)


@pytest.mark.parametrize(
    ("shape", "found"), [("constant", [2, 2, 2]), ("linear", [2, 3, 6]), ("cosine", [2, 2 + 4 * 0.1464466, 6])]
)
def test_a_moved_value_begins_and_ends_where_it_should(shape: str, found: list[float]) -> None:
    end = None if shape == "constant" else 6.0
    assert [moved(shape, 2.0, end, step, 101) for step in (0, 25, 100)] == pytest.approx(found)
    assert moved(shape, 2.0, end, 0, 1) == 2.0
