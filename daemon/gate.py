"""Scores and thresholds in, a verdict with reasons out. Pure: no clock, no store, no model.

The gate answers one question: may this candidate replace the champion? It compares the two on
every suite, row by row, and says how sure it is (paired bootstrap, Efron & Tibshirani 1993, ch. 16:
rows are resampled, both models' scores of a row together). A suite on which nobody scores, or with
too few rows, has no say and is named; without thresholds, or without a single suite of the new
tasks that can speak, nothing is promoted.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from strategies.contract import Record


class Finding(StrEnum):
    """What one suite has to say."""

    KEPT = "kept"  # the drop is within the limit
    GAINED = "gained"
    FORGOT = "forgot"  # drop beyond the limit, and distinguishable from noise
    INCONCLUSIVE = "inconclusive"  # drop beyond the limit, but noise could have made it
    TOO_FEW_ROWS = "too few rows"
    NO_SIGNAL = "no signal"  # base, champion and candidate all at zero


@dataclass(frozen=True, kw_only=True)
class Thresholds(Record):
    """The operator's limits, as shares (0.03 is 3 points). None: not set, so nothing is promoted."""

    max_drop: float | None
    min_gain: float | None
    min_suite_rows: int = 8
    confidence: float = 0.95
    bootstrap: int = 2000
    accept_inconclusive: bool = False


@dataclass(frozen=True, kw_only=True)
class SuiteScores:
    """Per-row scores in [0, 1] of the three models on one suite, in the same row order.

    `champion` is the base's scores where no champion exists yet.
    """

    task: str
    suite: str  # task@vN
    new: bool  # the task has rows in this cycle's experience
    base: Sequence[float]
    champion: Sequence[float]
    candidate: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class SuiteVerdict(Record):
    """One line of the verdict. Scores are means; `change` is candidate minus champion."""

    task: str
    suite: str
    new: bool
    rows: int
    base: float
    champion: float
    candidate: float
    change: float
    low: float  # bootstrap interval of `change`
    high: float
    finding: Finding
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict(Record):
    """The blessing, or its refusal, with every reason. Stored before anything is promoted."""

    passed: bool
    summary: str
    reasons: tuple[str, ...]
    suites: tuple[SuiteVerdict, ...]
    gain: float | None  # mean change over the new tasks' suites that can speak
    thresholds: Thresholds


def judge(suites: Sequence[SuiteScores], thresholds: Thresholds, *, seed: int = 0) -> Verdict:
    """The verdict on a candidate. Same input and seed, same verdict."""
    judged = tuple(_judge_suite(suite, thresholds, seed) for suite in suites)
    speaking = _speaking(judged)
    new = [s for s in speaking if s.new]
    gain = sum(s.change for s in new) / len(new) if new else None

    against = _missing_thresholds(thresholds)
    against += [s.reason for s in judged if _speaks_against(s, thresholds)]
    against += _too_small_gain(new, gain, thresholds)
    notes = [s.reason for s in judged if s not in speaking]
    passed = not against
    return Verdict(
        passed=passed,
        summary=_summary(passed, against, speaking, gain),
        reasons=tuple(against + notes) if against else tuple([s.reason for s in judged]),
        suites=judged,
        gain=gain,
        thresholds=thresholds,
    )


def summary_of(verdict: str) -> str:
    """The summary of a verdict that was stored as JSON."""
    return str(json.loads(verdict)["summary"])


def worth_rescuing(verdict: Verdict) -> bool:
    """Whether the candidate learned enough and was refused for nothing but what it forgot."""
    limits = verdict.thresholds
    other_reasons = _missing_thresholds(limits)
    other_reasons += _too_small_gain([s for s in _speaking(verdict.suites) if s.new], verdict.gain, limits)
    return not verdict.passed and not other_reasons


def _speaking(suites: Sequence[SuiteVerdict]) -> list[SuiteVerdict]:
    """Those that have a say."""
    return [s for s in suites if s.finding not in (Finding.TOO_FEW_ROWS, Finding.NO_SIGNAL)]


def paired_bootstrap(
    differences: Sequence[float], *, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of the mean of paired differences (Efron & Tibshirani 1993, ch. 13 and 16).

    Returns (low, high) at the two-sided `confidence`; (0, 0) when there are no differences.
    """
    if not differences:
        return 0.0, 0.0
    rng = random.Random(seed)
    n = len(differences)
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(resamples))
    cut = int((1 - confidence) / 2 * resamples)  # as many below as above: losses are judged like gains
    return means[cut], means[-1 - cut]


def _judge_suite(suite: SuiteScores, limits: Thresholds, seed: int) -> SuiteVerdict:
    rows = len(suite.candidate)
    differences = [new - old for new, old in zip(suite.candidate, suite.champion, strict=True)]
    base, champion, candidate = _mean(suite.base), _mean(suite.champion), _mean(suite.candidate)
    low, high = paired_bootstrap(
        differences, confidence=limits.confidence, resamples=limits.bootstrap, seed=seed
    )
    change = candidate - champion
    if rows < limits.min_suite_rows:
        finding = Finding.TOO_FEW_ROWS
        few = f"fewer than gate.min_suite_rows = {limits.min_suite_rows}"
        reason = f"{suite.suite} has {rows} rows, {few}: no say"
        if not rows:  # a task without a suite yet
            reason = f"{suite.suite} has no say: {few} of its rows are held out"
    elif max(base, champion, candidate) == 0:
        finding = Finding.NO_SIGNAL
        reason = f"{suite.suite} gives no signal: base, champion and candidate all score 0 on {rows} rows"
    else:
        finding, reason = _weigh(suite.suite, champion, candidate, rows, low, high, limits)
    return SuiteVerdict(
        task=suite.task,
        suite=suite.suite,
        new=suite.new,
        rows=rows,
        base=base,
        champion=champion,
        candidate=candidate,
        change=change,
        low=low,
        high=high,
        finding=finding,
        reason=reason,
    )


def _weigh(
    name: str, champion: float, candidate: float, rows: int, low: float, high: float, limits: Thresholds
) -> tuple[Finding, str]:
    change = candidate - champion
    told = (
        f"{name} went from {_points(champion)} to {_points(candidate)} "
        f"({change * 100:+.1f}, {limits.confidence * 100:g}% interval {low * 100:+.1f} to {high * 100:+.1f}, "
        f"{rows} rows)"
    )
    if limits.max_drop is None or -change <= limits.max_drop + 1e-9:
        if low > 0:
            return Finding.GAINED, told
        unsure = limits.max_drop is not None and -low > limits.max_drop
        return Finding.KEPT, told + (
            f"; a drop beyond {_points(limits.max_drop or 0)} cannot be ruled out" if unsure else ""
        )
    beyond = f"{told}, a drop of more than gate.max_drop = {_points(limits.max_drop)}"
    if high < 0:
        return Finding.FORGOT, beyond
    return Finding.INCONCLUSIVE, f"{beyond}, though noise could explain it; more suite rows would tell"


def _speaks_against(suite: SuiteVerdict, limits: Thresholds) -> bool:
    if suite.finding is Finding.INCONCLUSIVE:
        return not limits.accept_inconclusive
    return suite.finding is Finding.FORGOT


def _missing_thresholds(limits: Thresholds) -> list[str]:
    unset = [name for name in ("max_drop", "min_gain") if getattr(limits, name) is None]
    return [f"gate.{name} is not set, and without thresholds nothing is promoted" for name in unset]


def _too_small_gain(new: Sequence[SuiteVerdict], gain: float | None, limits: Thresholds) -> list[str]:
    if gain is None:
        return [
            "no suite of the new rows' tasks can speak, so there is no evidence that anything was learned"
        ]
    if limits.min_gain is None:
        return []
    # A champion at 99 points cannot gain 2: the room that is left is enough.
    room = 1 - sum(s.champion for s in new) / len(new)
    if gain >= min(limits.min_gain, room) - 1e-9:
        return []
    return [
        f"the mean gain on the new tasks is {gain * 100:+.1f}, "
        f"less than gate.min_gain = {_points(limits.min_gain)}"
    ]


def _summary(
    passed: bool, against: Sequence[str], speaking: Sequence[SuiteVerdict], gain: float | None
) -> str:
    if not passed:
        return f"rejected: {against[0]}" + (f" (and {len(against) - 1} more)" if len(against) > 1 else "")
    old = [s for s in speaking if not s.new]
    worst = min(old, key=lambda s: s.change, default=None)
    kept = (
        "no older task to forget"
        if worst is None
        else f"largest change on an older task {worst.change * 100:+.1f} ({worst.task})"
    )
    return f"passed: {(gain or 0) * 100:+.1f} on the new tasks, {kept}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _points(share: float) -> str:
    return f"{share * 100:.1f}"
