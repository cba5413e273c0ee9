"""Which methods a cycle trains with, when `strategy = "auto"` leaves it to the daemon.

The shortlist in the snapshot (`combinations.SHORTLIST` of its day) is tried in turn, each by a whole training
from the champion, until the budget is spent; then every trained adapter answers the snapshot's validation
rows of all tasks, old and new, and the best mean wins. The winner's training is the cycle's candidate:
nothing of it is done twice.

How far down the shortlist a cycle comes depends on how fast the machine was that night. So this, alone in a
cycle, is not a function of the snapshot; what was chosen is on record, and a restart abides by it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

from daemon import examination
from daemon.executor import Executor, OnProgress, Stop
from daemon.settings import Settings
from storage.errors import HoldfastError, ModelError, StageError, TrainingError, WorkerError
from storage.records import Candidate
from storage.snapshots import Snapshot
from storage.store import Store
from strategies.contract import StrategySpec, TrainReport, result_files

_ROUNDING = 1e-9

Train = Callable[[StrategySpec, Path], TrainReport]
# What ends a trial, but not its cycle once another one was trained.
ENDS_TRIAL = (StageError, TrainingError, ModelError, WorkerError)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trained strategy."""

    strategy: StrategySpec
    result: Path  # relative to the state directory
    seconds: float  # of training
    scores: Mapping[str, float] = field(default_factory=dict)  # on the validation rows of each task

    @property
    def mean(self) -> float | None:
        """Over tasks; None when it was not examined."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else None


def is_due(snapshot: Snapshot, candidate: Candidate) -> bool:
    """Whether the candidate's strategy is still to be chosen. The base has nothing to forget."""
    meta = snapshot.info["meta"]
    wanted = meta.get("auto") is not None and meta["parent"] is not None
    return wanted and candidate.number == 1 and candidate.strategy is None


def choose(
    store: Store,
    settings: Settings,
    executor: Executor,
    snapshot: Snapshot,
    candidate: Candidate,
    train: Train,
    on_progress: OnProgress,
    stop: Stop,
) -> Candidate:
    """The candidate with the chosen strategy, its training and the reason. Calling it again continues.

    A trial that fails is passed over when there is another; raises the last one's error when there is none.
    """
    folder = Path(candidate.result).parent
    trials, passed_over = _train(snapshot, settings.state_dir, folder, train)
    if len(trials) > 1:
        adapters = {
            trial.strategy.name: result_files(settings.state_dir / trial.result)["adapter"]
            for trial in trials
        }
        out = settings.state_dir / folder / "probe"
        session = examination.probe(store, settings, snapshot, adapters, out)
        examination.sit(store, executor, session, on_progress, stop)
        trials = [
            replace(trial, scores=examination.means(store, session, trial.strategy.name)) for trial in trials
        ]
    winner = best(trials)
    return replace(
        candidate,
        result=str(winner.result),
        strategy=winner.strategy.to_json(),
        change=reason(winner, trials, passed_over),
    )


def _train(snapshot: Snapshot, home: Path, folder: Path, train: Train) -> tuple[list[Trial], dict[str, str]]:
    """What was trained, and why the rest was not, by name."""
    spec, auto = examination.specs(snapshot).strategy, snapshot.info["meta"]["auto"]
    probed = bool(snapshot.rows("probe"))
    trials: list[Trial] = []
    passed_over: dict[str, str] = {}
    failure: HoldfastError | None = None
    lost = 0.0  # seconds of trainings that failed
    for strategy in (replace(spec, methods=tuple(methods)) for methods in auto["shortlist"]):
        result = folder / f"trial-{strategy.name}" / "train"
        if trials and not probed:
            passed_over[strategy.name] = "there are no validation rows to choose by"
        elif not affordable([trial.seconds for trial in trials], auto["minutes"], lost):
            passed_over[strategy.name] = f"not tried, strategy.auto_minutes is {auto['minutes']}"
        else:
            begun = monotonic()
            try:
                report = train(strategy, home / result)
            except ENDS_TRIAL as error:
                if isinstance(error, WorkerError) and not trials:
                    raise  # the cycle knows how to replace a worker
                passed_over[strategy.name], failure = str(error), error
                lost += monotonic() - begun
            else:
                trials.append(Trial(strategy=strategy, result=result, seconds=report.seconds))
    if failure is not None and not trials:
        raise failure
    return trials, passed_over


def affordable(spent: Sequence[float], minutes: float, lost: float = 0.0) -> bool:
    """Whether one more training, as long as the longest so far, fits into the budget. The first one does.

    `spent`: seconds of each training that came to an end; `lost`: of those that failed, since the daemon was
    started. Loading and probing are not counted.
    """
    return not spent or lost + sum(spent) + max(spent) <= minutes * 60


def best(trials: Sequence[Trial]) -> Trial:
    """The best mean over tasks; of equals the first, which the shortlist prefers."""
    top = max(trial.mean or 0.0 for trial in trials)
    return next(trial for trial in trials if (trial.mean or 0.0) >= top - _ROUNDING)


def reason(winner: Trial, trials: Sequence[Trial], passed_over: Mapping[str, str]) -> str:
    """Why this one, in a sentence."""
    tasks = len(winner.scores)
    told = [f"auto chose {winner.strategy.name}"]
    if tasks:
        scores = [f"{t.strategy.name} {(t.mean or 0.0) * 100:.1f} ({t.seconds:.0f} s)" for t in trials]
        plural = "s" * (tasks != 1)
        told.append(f"mean score on the validation rows of {tasks} task{plural}: {', '.join(scores)}")
    else:
        told.append(f"it alone was trained ({winner.seconds:.0f} s)")
    return "; ".join([*told, *(f"{name}: {why}" for name, why in passed_over.items())])
