"""Choosing a blend: by validation scores alone, as the rule says, on hand-made numbers."""

import ast
import inspect
from collections.abc import Sequence

import pytest

from daemon import tradeoff
from daemon.tradeoff import Curve, Point, choose


def curve(*points: tuple[float, float, float], new: Sequence[str] = ("new",)) -> Curve:
    """Points (share, score on the old task, score on the new task), from the candidate to the champion."""
    return Curve(
        new_tasks=tuple(new),
        rows={"old": 20, "new": 20},
        points=tuple(Point(share=share, scores={"old": o, "new": n}) for share, o, n in points),
    )


FORGOT = (1.0, 0.2, 1.0)
CHAMPION = (0.0, 1.0, 0.1)


def test_the_blend_that_learned_most_within_the_limit_is_chosen() -> None:
    found = choose(curve(FORGOT, (0.9, 0.8, 1.0), (0.6, 0.97, 0.8), (0.3, 1.0, 0.5), CHAMPION), 0.03)
    assert found.share == 0.6
    assert found.why == (
        "on validation rows 80.0 on the new tasks (champion 10.0), largest change -3.0 (old)"
    )


def test_ties_go_to_the_larger_share() -> None:
    assert choose(curve(FORGOT, (0.6, 1.0, 0.8), (0.5, 1.0, 0.8), CHAMPION), 0.03).share == 0.6
    third = 1 / 3  # equal but for the last bit
    points = [(0.6, 1.0, third), (0.5, 1.0, third + 1e-12)]
    assert choose(curve(FORGOT, *points, CHAMPION), 0.03).share == 0.6
    lost = [(0.6, third, 0.8), (0.5, third + 1e-12, 0.8)]  # and where all lose too much
    assert choose(curve(FORGOT, *lost, CHAMPION), 0.03).share == 0.6


def test_of_tasks_that_lost_alike_the_first_by_name_is_told() -> None:
    points = tuple(Point(share=share, scores={"b": share, "a": share}) for share in (0.5, 1.0))
    assert Curve(new_tasks=(), rows={}, points=points).worst(points[0]) == ("a", -0.5)


def test_when_all_lose_too_much_the_one_that_loses_least_is_tried() -> None:
    found = choose(curve(FORGOT, (0.9, 0.4, 1.0), (0.5, 0.7, 0.6), (0.3, 0.7, 0.5), CHAMPION), 0.03)
    assert found.share == 0.5
    assert "every blend loses too much there" in found.why


def test_a_blend_that_learned_nothing_is_not_worth_an_exam() -> None:
    found = choose(curve(FORGOT, (0.5, 1.0, 0.1), (0.3, 1.0, 0.0), CHAMPION), 0.03)
    assert found.share is None
    assert "none knows more of the new tasks" in found.why
    forgot_as_much = choose(curve(FORGOT, (0.9, 0.2, 1.0), (0.3, 1.0, 0.1), CHAMPION), 0.03)
    assert forgot_as_much.share is None
    assert "forgot as much" in forgot_as_much.why


def test_a_champion_that_knows_all_of_the_new_rows_already_leaves_nothing_to_learn() -> None:
    full = [(1.0, 0.2, 1.0), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0)]
    assert choose(curve(*full), 0.03).share == 0.5


def test_without_validation_rows_of_the_new_tasks_nothing_is_chosen() -> None:
    found = choose(curve(FORGOT, (0.5, 1.0, 0.8), CHAMPION, new=["unseen"]), 0.03)
    assert found.share is None
    assert "no validation rows" in found.why
    empty = Curve(new_tasks=("x",), rows={}, points=tuple(Point(share=s, scores={}) for s in (1, 0.5, 0)))
    assert choose(empty, 0.03).share is None


def test_a_new_task_that_drops_counts_as_lost_too() -> None:
    points = [
        Point(share=1.0, scores={"a": 1.0, "b": 0.0}),
        Point(share=0.7, scores={"a": 1.0, "b": 0.5}),
        Point(share=0.4, scores={"a": 0.5, "b": 0.8}),
        Point(share=0.0, scores={"a": 0.0, "b": 0.8}),
    ]
    both = Curve(new_tasks=("a", "b"), rows={"a": 9, "b": 9}, points=tuple(points))
    assert choose(both, 0.03).share == 0.4
    assert both.old(points[0]) is None


def test_a_curve_survives_its_json() -> None:
    made = curve(FORGOT, (0.5, 0.5, 0.5), CHAMPION)
    assert Curve.from_json(made.to_json()) == made


@pytest.mark.parametrize("name", ["storage", "examination", "store", "gate"])
def test_the_choice_cannot_reach_a_suite(name: str) -> None:
    """It is a pure function of the curve: its module knows no store, no snapshot and no gate."""
    tree = ast.parse(inspect.getsource(tradeoff))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(name in ast.unparse(node) for node in nodes)
