"""The gate: every way in which a candidate must, and must not, be let through."""

import random
from dataclasses import replace

import pytest

from daemon.gate import Finding, SuiteScores, Thresholds, judge, paired_bootstrap, worth_rescuing

LIMITS = Thresholds(max_drop=0.03, min_gain=0.02)


def suite(
    task: str, champion: list[float], candidate: list[float], *, new: bool = False, base: float = 0.0
) -> SuiteScores:
    return SuiteScores(
        task=task,
        suite=f"{task}@v1",
        new=new,
        base=[base] * len(candidate),
        champion=champion,
        candidate=candidate,
    )


LEARNED = suite("shipping", [0.0] * 40, [1.0] * 30 + [0.0] * 10, new=True)


def finding(verdict, task: str) -> Finding:  # type: ignore[no-untyped-def]
    return next(s.finding for s in verdict.suites if s.task == task)


def test_a_candidate_that_learned_and_kept_everything_passes() -> None:
    verdict = judge([suite("billing", [1.0] * 40, [1.0] * 40), LEARNED], LIMITS)
    assert verdict.passed
    assert verdict.gain == pytest.approx(0.75)
    assert finding(verdict, "billing") is Finding.KEPT
    assert finding(verdict, "shipping") is Finding.GAINED


def test_a_task_without_a_suite_is_told_as_one() -> None:
    """It may have rows that are held out, only too few: "0 rows" would be wrong."""
    verdict = judge([suite("billing (no suite yet)", [], [], new=True), LEARNED], LIMITS)
    told = next(s.reason for s in verdict.suites if s.finding is Finding.TOO_FEW_ROWS)
    assert told.endswith("has no say: fewer than gate.min_suite_rows = 8 of its rows are held out")


def test_forgetting_beyond_the_limit_rejects_and_names_the_suite() -> None:
    verdict = judge([suite("billing", [1.0] * 40, [1.0] * 20 + [0.0] * 20), LEARNED], LIMITS)
    assert not verdict.passed
    assert finding(verdict, "billing") is Finding.FORGOT
    assert "billing@v1" in verdict.summary
    assert "-50.0" in verdict.summary


def test_a_task_with_new_rows_may_not_be_forgotten_either() -> None:
    """What another new task gained is no price for it."""
    verdict = judge([suite("poems", [1.0] * 40, [1.0] * 20 + [0.0] * 20, new=True), LEARNED], LIMITS)
    assert verdict.gain == pytest.approx(0.125)
    assert finding(verdict, "poems") is Finding.FORGOT
    assert not verdict.passed


def test_a_drop_of_exactly_the_limit_passes() -> None:
    verdict = judge([suite("billing", [1.0] * 100, [1.0] * 97 + [0.0] * 3), LEARNED], LIMITS)
    assert verdict.passed


def test_a_drop_that_noise_could_explain_is_inconclusive_and_not_passed_silently() -> None:
    old = suite("billing", [1.0] * 9 + [0.0], [1.0] * 8 + [0.0, 1.0])
    worse = suite("billing", [1.0] * 10, [1.0] * 9 + [0.0])
    assert judge([old, LEARNED], LIMITS).passed  # one lost, one won: no drop at all
    verdict = judge([worse, LEARNED], LIMITS)
    assert finding(verdict, "billing") is Finding.INCONCLUSIVE
    assert not verdict.passed
    accepting = Thresholds(max_drop=0.03, min_gain=0.02, accept_inconclusive=True)
    assert judge([worse, LEARNED], accepting).passed


@pytest.mark.parametrize("unset", ["max_drop", "min_gain"])
def test_without_thresholds_nothing_is_promoted(unset: str) -> None:
    limits = Thresholds(**{"max_drop": 0.03, "min_gain": 0.02, unset: None})  # type: ignore[arg-type]
    verdict = judge([LEARNED], limits)
    assert not verdict.passed
    assert f"gate.{unset} is not set" in verdict.summary


def test_a_suite_where_everybody_scores_zero_has_no_say_and_is_named() -> None:
    verdict = judge([suite("poems", [0.0] * 20, [0.0] * 20), LEARNED], LIMITS)
    assert verdict.passed
    assert finding(verdict, "poems") is Finding.NO_SIGNAL
    assert any("poems@v1 gives no signal" in reason for reason in verdict.reasons)


def test_a_suite_with_too_few_rows_has_no_say_and_is_named() -> None:
    verdict = judge([suite("tiny", [1.0] * 3, [0.0] * 3), LEARNED], LIMITS)
    assert verdict.passed
    assert finding(verdict, "tiny") is Finding.TOO_FEW_ROWS
    assert any("tiny@v1 has 3 rows" in reason for reason in verdict.reasons)


def test_a_suite_with_just_enough_rows_has_a_say() -> None:
    verdict = judge([suite("tiny", [1.0] * 8, [0.0] * 8), LEARNED], LIMITS)
    assert finding(verdict, "tiny") is Finding.FORGOT
    assert not verdict.passed


def test_a_suite_has_a_say_as_soon_as_one_of_the_three_models_scores_on_it() -> None:
    """Who knew a task alone and lost all of it has forgotten it; that is no lack of signal."""
    lost = judge([suite("poems", [1.0] * 20, [0.0] * 20), LEARNED], LIMITS)
    assert finding(lost, "poems") is Finding.FORGOT
    assert not lost.passed
    only_base = judge([suite("poems", [0.0] * 20, [0.0] * 20, base=1.0), LEARNED], LIMITS)
    assert finding(only_base, "poems") is Finding.KEPT


def test_a_refusal_names_the_suites_that_had_no_say_too() -> None:
    silent = [suite("tiny", [1.0] * 3, [0.0] * 3), suite("poems", [0.0] * 20, [0.0] * 20)]
    lost = [suite(task, [1.0] * 40, [0.0] * 40) for task in ("billing", "claims")]
    verdict = judge([*silent, *lost, LEARNED], LIMITS)
    named = [reason.split()[0] for reason in verdict.reasons]
    assert named == ["billing@v1", "claims@v1", "tiny@v1", "poems@v1"]
    assert verdict.summary.endswith("gate.max_drop = 3.0 (and 1 more)")


def test_a_drop_that_few_rows_cannot_rule_out_is_told() -> None:
    swapped = suite("billing", [1.0] * 9 + [0.0], [1.0] * 8 + [0.0, 1.0])  # none on the mean, 20 perhaps
    same = suite("claims", [1.0] * 10, [1.0] * 10)
    told = {s.task: s.reason for s in judge([swapped, same, LEARNED], LIMITS).suites}
    assert told["billing"].endswith("; a drop beyond 3.0 cannot be ruled out")
    assert "ruled out" not in told["claims"]


def test_a_pass_tells_the_worst_change_on_an_older_task() -> None:
    worse = suite("billing", [1.0] * 100, [1.0] * 98 + [0.0] * 2)
    better = suite("claims", [0.5] * 40, [1.0] * 40)
    new = suite("shipping", [1.0] * 100, [1.0] * 97 + [0.0] * 3, new=True)
    verdict = judge([better, worse, new], replace(LIMITS, min_gain=-1.0))
    assert verdict.summary == "passed: -3.0 on the new tasks, largest change on an older task -2.0 (billing)"


def test_without_evidence_on_the_new_task_nothing_is_promoted() -> None:
    nothing = suite("shipping", [], [], new=True)
    verdict = judge([suite("billing", [1.0] * 40, [1.0] * 40), nothing], LIMITS)
    assert not verdict.passed
    assert "no evidence" in verdict.summary


def test_too_small_a_gain_rejects() -> None:
    verdict = judge([suite("shipping", [0.5] * 40, [0.51] * 40, new=True)], LIMITS)
    assert not verdict.passed
    assert "gate.min_gain" in verdict.summary


def test_the_gain_is_the_mean_over_the_new_tasks() -> None:
    idle = suite("poems", [0.5] * 40, [0.5] * 40, new=True)
    verdict = judge([LEARNED, idle], replace(LIMITS, min_gain=0.5))
    assert verdict.gain == pytest.approx(0.375)
    assert not verdict.passed


def test_a_gain_of_exactly_the_limit_passes() -> None:
    exactly = suite("shipping", [1.0] * 14 + [0.0] * 36, [1.0] * 15 + [0.0] * 35, new=True)
    assert judge([exactly], LIMITS).passed, "0.3 - 0.28 is a little less than 0.02"


def test_a_champion_without_room_to_gain_is_not_asked_for_more_than_the_room() -> None:
    nearly = suite("shipping", [1.0] * 99 + [0.0], [1.0] * 100, new=True)
    assert judge([nearly], LIMITS).passed
    perfect = suite("shipping", [1.0] * 40, [1.0] * 40, new=True)
    assert judge([perfect], LIMITS).passed
    idle = suite("poems", [0.5] * 40, [0.5] * 40, new=True)
    assert not judge([perfect, idle], LIMITS).passed, "the other new task leaves room enough"


def test_only_what_learned_enough_and_was_refused_for_what_it_forgot_is_worth_rescuing() -> None:
    forgot = suite("billing", [1.0] * 40, [1.0] * 20 + [0.0] * 20)
    assert worth_rescuing(judge([forgot, LEARNED], LIMITS))
    assert not worth_rescuing(judge([LEARNED], LIMITS)), "it passed"
    assert not worth_rescuing(judge([forgot], LIMITS)), "it learned nothing that can be seen"
    assert not worth_rescuing(judge([forgot, LEARNED], replace(LIMITS, min_gain=0.8)))
    assert not worth_rescuing(judge([forgot, LEARNED], replace(LIMITS, min_gain=None)))


def test_the_same_input_gives_the_same_verdict() -> None:
    suites = [suite("billing", [1.0, 0.0] * 20, [0.0, 1.0, 1.0, 0.0] * 10), LEARNED]
    assert judge(suites, LIMITS) == judge(suites, LIMITS)


def test_the_verdict_survives_json() -> None:
    import json

    verdict = judge([LEARNED], LIMITS)
    values = json.loads(verdict.to_json())
    assert values["passed"] is True
    assert values["suites"][0]["finding"] == "gained"


def test_the_paired_interval_is_that_of_the_mean_difference() -> None:
    # Mean 0.5, standard error 0.05: the normal approximation gives 0.402 to 0.598.
    low, high = paired_bootstrap([0.0, 1.0] * 50, confidence=0.95, resamples=4000, seed=1)
    assert low == pytest.approx(0.402, abs=0.01)  # at 90 % it would be 0.418 to 0.582
    assert high == pytest.approx(0.598, abs=0.01)


def test_losses_and_gains_have_mirrored_intervals() -> None:
    """The rows' differences change their sign, and nothing else."""
    rng = random.Random(0)
    gained = [rng.choice([-1.0, 0.0, 0.0, 1.0, 0.3]) for _ in range(41)]
    low, high = paired_bootstrap(gained, confidence=0.95, resamples=2000, seed=5)
    mirrored = paired_bootstrap([-one for one in gained], confidence=0.95, resamples=2000, seed=5)
    assert mirrored == pytest.approx((-high, -low), abs=1e-12)


def test_the_level_of_an_interval_is_told_as_it_is() -> None:
    verdict = judge([LEARNED], replace(LIMITS, confidence=0.975))
    assert "97.5% interval" in verdict.suites[0].reason


def test_identical_models_have_an_interval_of_zero_width() -> None:
    assert paired_bootstrap([0.0] * 30, confidence=0.95, resamples=200, seed=0) == (0.0, 0.0)
