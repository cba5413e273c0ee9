"""What answers are worth: SQuAD's rules for text, plain equality for labels, reports per class."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies import scoring
from strategies.contract import Metric


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("Denver Broncos", "Denver Broncos", 1.0, 1.0),
        ("The Denver Broncos!", "denver  broncos", 1.0, 1.0),
        ("an apple a day", "apple day", 1.0, 1.0),
        ("theatre", "atre", 0.0, 0.0),  # articles go as words only
        ("U.S.A.", "USA", 1.0, 1.0),
        ("the Carolina Panthers", "Denver Broncos", 0.0, 0.0),
        ("Santa Clara, California", "Santa Clara", 0.0, 0.8),
        ("gold gold", "gold", 0.0, 2 / 3),  # repeated words count once each
        ("gold gold coins", "gold gold rings", 0.0, 2 / 3),
        ("", "gold", 0.0, 0.0),
        ("gold", "", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("the", "a", 1.0, 1.0),  # both say nothing after normalisation
        ("Zürich", "zürich", 1.0, 1.0),
    ],
)
def test_free_answers_are_scored_as_squad_does(prediction: str, answer: str, exact: float, f1: float) -> None:
    assert scoring.exact_match(prediction, answer) == exact
    assert scoring.token_f1(prediction, answer) == pytest.approx(f1)
    assert scoring.score(Metric.EXACT_MATCH, prediction, answer) == exact
    assert scoring.score(Metric.TOKEN_F1, prediction, answer) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "answer", "value"),
    [
        ("refund", "refund", 1.0),
        (" Refund\n", "refund", 1.0),
        ("a", "the", 0.0),
        ("re_fund", "refund", 0.0),
        ("STRASSE", "straße", 1.0),
    ],
)
def test_labels_differ_by_more_than_squad_sees(prediction: str, answer: str, value: float) -> None:
    assert scoring.score(Metric.ACCURACY, prediction, answer) == value


@given(st.text(), st.text())
def test_scores_lie_between_nothing_and_all_and_do_not_care_which_is_which(left: str, right: str) -> None:
    for metric in Metric:
        value = scoring.score(metric, left, right)
        assert 0.0 <= value <= 1.0
        assert value == pytest.approx(scoring.score(metric, right, left))
        assert scoring.score(metric, left, left) == 1.0


def test_a_report_counts_hits_and_errors_per_class() -> None:
    golds = ["cat", "cat", "cat", "dog", "dog", "eel"]
    told = ["cat", "cat", "dog", "dog", "fox", "dog"]
    report = scoring.classification_report(golds, told, ("cat", "dog", "eel", "fox"))
    assert report.accuracy == pytest.approx(3 / 6)
    cat, dog, eel, fox = report.classes
    assert (cat.precision, cat.recall, cat.f1, cat.support) == pytest.approx((1.0, 2 / 3, 0.8, 3))
    assert (dog.precision, dog.recall, dog.f1, dog.support) == pytest.approx((1 / 3, 1 / 2, 0.4, 2))
    assert (eel.precision, eel.recall, eel.f1, eel.support) == (0.0, 0.0, 0.0, 1)
    assert (fox.precision, fox.recall, fox.f1, fox.support) == (0.0, 0.0, 0.0, 0)
    assert report.macro_f1 == pytest.approx((0.8 + 0.4 + 0.0) / 3)  # no suite row is a fox


def test_a_report_agrees_with_the_scores_of_its_rows() -> None:
    golds, told = ["Yes", "no ", "no"], ["yes", "no", "yes"]
    report = scoring.classification_report(golds, told, ("no", "yes"))
    values = [scoring.score(Metric.ACCURACY, *pair) for pair in zip(told, golds, strict=True)]
    assert report.accuracy == sum(values) / 3
    assert [c.support for c in report.classes] == [2, 1]
    assert [c.label for c in report.classes] == ["no", "yes"]


def test_a_report_on_nothing_is_zero() -> None:
    report = scoring.classification_report([], [], ("a",))
    assert (report.accuracy, report.macro_f1) == (0.0, 0.0)


def test_predictions_and_answers_must_be_as_many() -> None:
    with pytest.raises(ValueError):
        scoring.classification_report(["a"], [], ("a",))
