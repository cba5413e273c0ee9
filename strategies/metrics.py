"""Continual-learning metrics, as pure functions on the accuracy matrix.

R[i][j] is the score on task j after row i; row 0 is the base model. `learned_at[j]` is the row in which
task j was learned (the papers have one task a row, learned_at = 1, 2, …). T is the number of tasks. A
cell may be None (not measured): it is left out of means, and a metric with nothing left is None.

Sources: GEM (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, section 2) and RWalk (Chaudhry et al. 2018,
arXiv 1801.10112, section 3).
"""

from collections.abc import Callable, Iterable, Sequence

Matrix = Sequence[Sequence[float | None]]


def average_accuracy(matrix: Matrix, learned_at: Sequence[int]) -> float | None:
    """ACC = 1/T Σⱼ R[T, j]: the last row's mean (GEM, eq. 2)."""
    return _mean(matrix[-1][j] for j in range(len(learned_at)))


def learning_accuracy(matrix: Matrix, learned_at: Sequence[int]) -> float | None:
    """LA = 1/T Σᵢ R[i, i]: how well each task was known when it was learned (Riemer et al. 2019)."""
    return _mean(matrix[row][j] for j, row in enumerate(learned_at))


def backward_transfer(matrix: Matrix, learned_at: Sequence[int]) -> float | None:
    """BWT = 1/(T−1) Σ_{i<T} (R[T, i] − R[i, i]) (GEM, eq. 3): negative is forgetting.

    Over tasks learned before the last row; ACC = LA + (T−1)/T · BWT when each row brings one task.
    """
    last = len(matrix) - 1
    return _mean(_minus(matrix[last][j], matrix[row][j]) for j, row in enumerate(learned_at) if row < last)


def forgetting(matrix: Matrix, learned_at: Sequence[int]) -> float | None:
    """F_k = 1/(k−1) Σ_{j<k} (max_{l<k} R[l, j] − R[k, j]) (RWalk, section 3).

    The maximum is over the rows from the one that learned the task; negative when a task is now better
    than ever.
    """
    last = len(matrix) - 1
    return _mean(
        _minus(_max(matrix[line][j] for line in range(row, last)), matrix[last][j])
        for j, row in enumerate(learned_at)
        if row < last
    )


def forward_transfer(matrix: Matrix, learned_at: Sequence[int]) -> float | None:
    """FWT = 1/(T−1) Σ_{i≥2} (R[i−1, i] − bᵢ) (GEM, eq. 4): what earlier tasks gave to a later one.

    GEM takes b from a random initialisation; here it is the base model's zero-shot score, row 0.
    """
    return _mean(_minus(matrix[row - 1][j], matrix[0][j]) for j, row in enumerate(learned_at) if row >= 2)


def intransigence(matrix: Matrix, learned_at: Sequence[int], joint: Sequence[float]) -> float | None:
    """I_k = a*_k − R[k, k], averaged (RWalk, section 3): what learning one at a time costs a task
    against `joint`, a model trained on everything at once."""
    return _mean(_minus(joint[j], matrix[row][j]) for j, row in enumerate(learned_at))


METRICS: dict[str, Callable[[Matrix, Sequence[int]], float | None]] = {
    "average_accuracy": average_accuracy,
    "backward_transfer": backward_transfer,
    "forgetting": forgetting,
    "forward_transfer": forward_transfer,
    "learning_accuracy": learning_accuracy,
}


def measured(matrix: Matrix, learned_at: Sequence[int]) -> dict[str, float | None]:
    """All that a matrix can tell by itself."""
    return {name: metric(matrix, learned_at) for name, metric in METRICS.items()}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _max(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
