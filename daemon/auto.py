"""Which methods a cycle trains with, when `strategy = "auto"` leaves it to the daemon.

Those of `combinations.SHORTLIST` are tried in turn, each by a whole training from the champion, until the
budget is spent; then every trained adapter answers the snapshot's validation rows of all tasks, old and
new, and the best mean wins. The winner's training is the cycle's candidate: nothing of it is done twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from daemon import examination
from daemon.executor import Executor, OnProgress, Stop
from daemon.settings import Settings
from storage.errors import TrainingError
from storage.records import Candidate
from storage.snapshots import Snapshot
from storage.store import Store
from strategies import combinations
from strategies.contract import StrategySpec, TrainJob, TrainReport, result_files

_ROUNDING = 1e-9

JobOf = Callable[[StrategySpec, Path], TrainJob]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trained strategy."""

    strategy: StrategySpec
    result: Path  # relative to the state directory
    seconds: float  # of training
    scores: Mapping[str, float]  # on the validation rows of each task

    @property
    def mean(self) -> float:
        return sum(self.scores.values()) / len(self.scores) if self.scores else 0.0


def is_due(snapshot: Snapshot, candidate: Candidate) -> bool:
    """Whether the candidate's strategy is still to be chosen. The base has nothing to forget."""
    meta = snapshot.info["meta"]
    wanted = meta.get("auto_minutes") is not None and meta["parent"] is not None
    return wanted and candidate.number == 1 and candidate.strategy is None


def choose(
    store: Store,
    settings: Settings,
    executor: Executor,
    snapshot: Snapshot,
    candidate: Candidate,
    job_of: JobOf,
    on_progress: OnProgress,
    stop: Stop,
) -> Candidate:
    """The candidate with the chosen strategy, its training and the reason. Calling it again continues.

    A strategy that cannot learn the rows is passed over; raises its `TrainingError` when all are like that.
    """
    folder = Path(candidate.result).parent
    reports, passed_over = _train(settings, executor, snapshot, folder, job_of, on_progress, stop)
    adapters = {
        spec.name: result_files(settings.state_dir / _place(folder, spec))["adapter"] for spec in reports
    }
    scores: dict[str, dict[str, float]] = {}
    if len(adapters) > 1:
        session = examination.probe(
            store, settings, snapshot, adapters, settings.state_dir / folder / "probe"
        )
        if session.job.plan:
            executor.evaluate(session.job, on_progress, stop)
        examination.keep(store, session)
        scores = {name: examination.means(store, session, name) for name in adapters}
    trials = [
        Trial(
            strategy=spec,
            result=_place(folder, spec),
            seconds=report.seconds,
            scores=scores.get(spec.name, {}),
        )
        for spec, report in reports.items()
    ]
    winner = best(trials)
    return replace(
        candidate,
        result=str(winner.result),
        strategy=winner.strategy.to_json(),
        change=reason(winner, trials, passed_over),
    )


def _train(
    settings: Settings,
    executor: Executor,
    snapshot: Snapshot,
    folder: Path,
    job_of: JobOf,
    on_progress: OnProgress,
    stop: Stop,
) -> tuple[dict[StrategySpec, TrainReport], dict[str, str]]:
    """Reports of what was trained, and why the rest was not, by name."""
    meta = snapshot.info["meta"]
    spec = StrategySpec.from_dict(meta["strategy"])
    probed = bool(snapshot.rows("probe"))
    reports: dict[StrategySpec, TrainReport] = {}
    passed_over: dict[str, str] = {}
    failure: TrainingError | None = None
    for strategy in (replace(spec, methods=methods) for methods in combinations.SHORTLIST):
        if reports and not probed:
            passed_over[strategy.name] = "there are no validation rows to choose by"
        elif not affordable([report.seconds for report in reports.values()], meta["auto_minutes"]):
            passed_over[strategy.name] = f"not tried, strategy.auto_minutes is {meta['auto_minutes']}"
        else:
            out = settings.state_dir / _place(folder, strategy)
            try:
                reports[strategy] = executor.train(job_of(strategy, out), on_progress, stop)
            except TrainingError as error:
                passed_over[strategy.name], failure = str(error), error
    if failure is not None and not reports:
        raise failure
    return reports, passed_over


def _place(folder: Path, strategy: StrategySpec) -> Path:
    return folder / f"trial-{strategy.name}" / "train"


def affordable(spent: Sequence[float], minutes: float) -> bool:
    """Whether one more training, as long as the longest so far, fits into the budget. The first one does."""
    return not spent or sum(spent) + max(spent) <= minutes * 60


def best(trials: Sequence[Trial]) -> Trial:
    """The best mean over tasks; of equals the first, which the shortlist prefers."""
    top = max(trial.mean for trial in trials)
    return next(trial for trial in trials if trial.mean >= top - _ROUNDING)


def reason(winner: Trial, trials: Sequence[Trial], passed_over: Mapping[str, str]) -> str:
    """Why this one, in a sentence."""
    told = [f"{trial.strategy.name} {trial.mean * 100:.1f} ({trial.seconds:.0f} s)" for trial in trials]
    tasks = len(winner.scores)
    seen = f"mean score on the validation rows of {tasks} task{'s' * (tasks != 1)}: {', '.join(told)}"
    rest = "".join(f"; {name}: {why}" for name, why in passed_over.items())
    return f"auto chose {winner.strategy.name}; {seen if tasks else ', '.join(told)}{rest}"
