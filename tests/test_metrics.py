"""The formulas of the continual-learning metrics, against matrices worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies import metrics

# Rows: base, then after task 0, 1, 2. Columns: tasks.
R = [
    [0.10, 0.20, 0.30],
    [0.80, 0.25, 0.30],
    [0.60, 0.90, 0.50],
    [0.70, 0.50, 1.00],
]
WHEN = [1, 2, 3]
SCORES = st.floats(0, 1)


def test_average_accuracy_is_the_mean_of_the_last_row() -> None:
    assert metrics.average_accuracy(R, WHEN) == pytest.approx((0.7 + 0.5 + 1.0) / 3)


def test_learning_accuracy_is_the_mean_of_the_diagonal() -> None:
    assert metrics.learning_accuracy(R, WHEN) == pytest.approx((0.8 + 0.9 + 1.0) / 3)


def test_backward_transfer_compares_the_end_with_the_learning_of_earlier_tasks() -> None:
    assert metrics.backward_transfer(R, WHEN) == pytest.approx((-0.1 - 0.4) / 2)


def test_forgetting_compares_the_end_with_the_best_ever() -> None:
    assert metrics.forgetting(R, WHEN) == pytest.approx((0.1 + 0.4) / 2)
    rebound = [[0.0, 0.0], [0.5, 0.0], [0.9, 0.7], [0.6, 0.8]]
    # Task 0 peaked after it was learned: its forgetting is from there, its backward transfer is not.
    assert metrics.forgetting(rebound, [1, 2]) == pytest.approx((0.3 - 0.1) / 2)
    assert metrics.backward_transfer(rebound, [1, 2]) == pytest.approx((0.1 + 0.1) / 2)


def test_the_base_models_score_is_nothing_to_forget() -> None:
    assert metrics.forgetting([[1.0, 0.0], [0.4, 0.0], [0.4, 0.5]], [1, 2]) == 0.0


def test_forward_transfer_compares_with_the_base_just_before_a_task_is_learned() -> None:
    assert metrics.forward_transfer(R, WHEN) == pytest.approx((0.05 + 0.2) / 2)


def test_intransigence_compares_with_joint_training() -> None:
    assert metrics.intransigence(R, WHEN, [0.9, 0.9, 0.9]) == pytest.approx((0.1 + 0.0 - 0.1) / 3)
    assert metrics.intransigence(R, WHEN, [1.0, 0.9, 1.0]) == pytest.approx(0.2 / 3), "above 0: a price"


def test_tasks_may_come_together_and_columns_in_any_order() -> None:
    matrix = [[0.0, 0.1, 0.2], [0.0, 0.6, 0.8], [0.5, 0.4, 0.9]]
    when = [2, 1, 1]  # the two last tasks were learned in the first row
    assert metrics.learning_accuracy(matrix, when) == pytest.approx((0.5 + 0.6 + 0.8) / 3)
    assert metrics.backward_transfer(matrix, when) == pytest.approx((-0.2 + 0.1) / 2)
    assert metrics.forward_transfer(matrix, when) == 0.0


def test_cells_that_were_not_measured_are_left_out() -> None:
    matrix = [[None, 0.2], [0.8, None], [None, 0.5], [0.6, None]]
    assert metrics.average_accuracy(matrix, [1, 2]) == 0.6
    assert metrics.learning_accuracy(matrix, [1, 2]) == pytest.approx(0.65)
    assert metrics.backward_transfer(matrix, [1, 2]) == pytest.approx(-0.2)
    assert metrics.forgetting(matrix, [1, 2]) == pytest.approx(0.2)
    assert metrics.forward_transfer(matrix, [1, 2]) is None


def test_a_metric_with_nothing_to_measure_is_none_not_zero() -> None:
    one = [[0.1], [0.9]]
    assert metrics.average_accuracy(one, [1]) == 0.9
    assert metrics.backward_transfer(one, [1]) is None
    assert metrics.forgetting(one, [1]) is None
    assert metrics.forward_transfer(one, [1]) is None
    empty: list[list[float | None]] = [[None], [None]]
    assert metrics.average_accuracy(empty, [1]) is None
    assert metrics.average_accuracy([], []) is None
    assert metrics.forgetting([], []) is None


@given(
    st.integers(1, 6).flatmap(
        lambda t: st.lists(st.lists(SCORES, min_size=t, max_size=t), min_size=t + 1, max_size=t + 1)
    )
)
def test_final_accuracy_is_learning_accuracy_and_what_came_after(matrix: list[list[float]]) -> None:
    tasks = len(matrix[0])
    when = list(range(1, tasks + 1))
    final, learned = metrics.average_accuracy(matrix, when), metrics.learning_accuracy(matrix, when)
    later = metrics.backward_transfer(matrix, when) or 0.0
    assert final is not None
    assert learned is not None
    assert final == pytest.approx(learned + (tasks - 1) / tasks * later)


@given(
    st.integers(1, 6).flatmap(
        lambda t: st.lists(st.lists(SCORES, min_size=t, max_size=t), min_size=t + 1, max_size=t + 1)
    )
)
def test_forgetting_is_never_less_than_lost_backward_transfer(matrix: list[list[float]]) -> None:
    when = list(range(1, len(matrix[0]) + 1))
    lost, moved = metrics.forgetting(matrix, when), metrics.backward_transfer(matrix, when)
    if lost is not None and moved is not None:
        assert lost >= -moved - 1e-12
