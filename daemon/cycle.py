"""The whole flow of one cycle, as a persisted state machine.

requested → pulled → snapshotted → trained → evaluated → decided → promoted | rejected
(or failed, cancelled, nothing-to-do). A candidate that learned but forgot leads from evaluated back to
snapshotted, with the next candidate (`daemon.rescue`), a bounded number of times. Each step does its
work idempotently, then records the next state in one transaction; after a crash at any point, running
the same step again is always right.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from daemon import auto, erasure, examination, experience, gate, promote, publish, rescue
from daemon.base import check_champions_base, located, prepare_base
from daemon.executor import Executor, Stop
from daemon.pull import pull_source
from daemon.report import NOTE
from daemon.settings import Settings
from storage import artifacts, snapshots
from storage.errors import (
    Cancelled,
    HoldfastError,
    Interrupted,
    ModelError,
    ModelMissing,
    RegistryError,
    SourceBusy,
    SourceMissing,
    StageError,
    StoreError,
    TrainingError,
    WorkerError,
)
from storage.records import Candidate, Cycle, State
from storage.registry import Registry
from storage.snapshots import Snapshot
from storage.store import Store
from strategies.contract import PreparedBase, Progress, StrategySpec, TrainJob, TrainReport, result_files

log = logging.getLogger(__name__)

OUT_OF_TIME = "out-of-time"  # the event that the clock ended a rescue
MAX_ATTEMPTS = 3  # how often a dead worker is replaced before the cycle is given up
# Left to the caller, who tries again later: the cycle stays exactly where it is.
RETRIED_LATER = (Interrupted, SourceBusy, SourceMissing, ModelMissing, RegistryError)
# What ends an attempt to rescue, but not its cycle: a blend that cannot be, a loss that explodes, no time.
ENDS_ATTEMPT = (StageError, TrainingError, ModelError)


class CycleRunner:
    """Takes one cycle from wherever it stands to its end."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        registry: Registry,
        executor: Executor,
        *,
        clock: Callable[[], datetime],
        on_progress: Callable[[int, Progress | None], None] = lambda cycle, progress: None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.registry = registry
        self.executor = executor
        self.clock = clock
        self.on_progress = on_progress
        self._steps = {
            State.REQUESTED: self._pull,
            State.PULLED: self._snapshot,
            State.SNAPSHOTTED: self._train,
            State.TRAINED: self._evaluate,
            State.EVALUATED: self._decide,
            State.DECIDED: self._conclude,
        }

    def run(self, cycle_id: int, stop: Stop) -> Cycle:
        """Advances the cycle to an ended state and returns it.

        Raises `Interrupted` on shutdown, and the others that are `RETRIED_LATER` when waiting, or a person,
        would help; the cycle then continues from the same state at the next call.
        """
        cycle = self._cycle(cycle_id)
        try:
            while not cycle.state.ended:
                stop.check()
                if self.store.is_cancelled(cycle.id):
                    raise Cancelled()
                cycle = self._step(cycle, stop)
                self.on_progress(cycle.id, None)  # who follows the cycle is told of its new state
        except RETRIED_LATER:
            raise
        except Exception as error:
            cycle = self._ended_by(cycle_id, error)
        finally:
            self.executor.close()
        if cycle.state is State.PROMOTED:
            self._show_champion(cycle)
        self._tidy_away(cycle)
        return cycle

    def _step(self, cycle: Cycle, stop: Stop) -> Cycle:
        """One state onwards. A worker that died is replaced; its work continues from the checkpoint."""
        try:
            return self._steps[cycle.state](cycle, stop)
        except ENDS_ATTEMPT as error:
            candidates = self.store.candidates(cycle.id)
            if len(candidates) < 2 or cycle.state not in (State.SNAPSHOTTED, State.TRAINED):
                raise
            return self._set_aside(cycle, candidates[-1], str(error))
        except WorkerError as error:
            attempts = self.store.count_attempt(cycle.id)
            self.store.event("worker-died", cycle.id, state=cycle.state, error=str(error), attempt=attempts)
            if attempts >= MAX_ATTEMPTS:
                raise WorkerError(f"{error} ({attempts} attempts)") from error
            log.warning("worker died, trying again: %s", error, extra=_action("worker-died", cycle))
            return self._cycle(cycle.id)

    # The six steps, in order.

    def _pull(self, cycle: Cycle, stop: Stop) -> Cycle:
        base = self._base(cycle, stop)
        pulled = pull_source(self.settings, self.store, base, self.clock, _waiting(stop))
        champion = self.store.champion()
        log.info("pulled: %s", pulled, extra=_action("pulled", cycle))
        return self.store.advance(
            cycle.id, State.PULLED, parent=champion.version if champion else None, reason=pulled
        )

    def _snapshot(self, cycle: Cycle, stop: Stop) -> Cycle:
        base = self._base(cycle, stop)
        self._check_base(cycle, base)
        new = experience.gather(self.store, cycle.parent)
        wanted = self.settings.training.min_rows
        if len(new.train) < wanted:
            why = f"{len(new.train)} new training rows, training.min_rows is {wanted}; they stay pending"
            return self._end(cycle.id, State.NOTHING, why)
        experience.freeze_suites(self.store, self.settings, cycle.id)
        snapshot, roles = experience.take_snapshot(self.store, self.settings, base, cycle, new)
        if cycle.trigger == "schedule" and (known := self._known_outcome(snapshot.id)):
            why = (
                f"{known}; they stay pending. New rows or settings start a new try, and so does "
                "`daemon retrain-now`"
            )
            return self._end(cycle.id, State.NOTHING, why)
        plain = rescue.first(cycle, self.clock())
        return self.store.advance(
            cycle.id, State.SNAPSHOTTED, snapshot=snapshot.id, rows=roles, candidates=[plain]
        )

    def _train(self, cycle: Cycle, stop: Stop) -> Cycle:
        snapshot = snapshots.load(self._snapshot_of(cycle))
        candidate, stop = self._candidate(cycle, snapshot, stop)
        if candidate.kind == rescue.Kind.BLEND:
            return self._blend(cycle, snapshot, stop)
        job_of, progress = self._jobs(cycle, snapshot), self._progress(cycle)

        def train(strategy: StrategySpec, result: Path) -> TrainReport:
            self._check_same_base(cycle, snapshot, stop)
            return self.executor.train(job_of(strategy, result), progress, stop)

        if auto.is_due(snapshot, candidate):
            candidate = auto.choose(
                self.store, self.settings, self.executor, snapshot, candidate, train, progress, stop
            )
            log.info("%s", candidate.change, extra=_action("strategy-chosen", cycle))
        strategy = rescue.strategy_of(candidate, examination.specs(snapshot).strategy)
        result = self._result(candidate)
        report = train(strategy, result)
        took = f"{report.steps} steps, {report.seconds:.0f} s"
        told = f"{report.rows} rows in {took}, loss {report.final_loss:.4f}"
        log.info("trained: %s", told, extra=_action("trained", cycle))
        for note in report.notes:
            log.warning("mind: %s", note, extra=_action("note", cycle))
            self.store.event(NOTE, cycle.id, text=note)
        made = replace(candidate, model=examination.adapter_hash(result_files(result)["adapter"]))
        return self.store.advance(cycle.id, State.TRAINED, reason=told, candidates=[made])

    def _jobs(self, cycle: Cycle, snapshot: Snapshot) -> Callable[[StrategySpec, Path], TrainJob]:
        """The cycle's training from its champion, for any strategy and place."""
        specs, parent, grown_from = examination.specs(snapshot), None, ""
        if cycle.parent is not None:
            parent = experience.parent_result(self.store, self.settings, cycle.parent)
            artifacts.verify(parent)
            grown_from = examination.adapter_hash(result_files(parent)["adapter"])
        return lambda strategy, result: TrainJob(
            snapshot=str(self._snapshot_of(cycle)),
            out=str(result),
            work=str(result.parent / "work"),
            parent=str(parent) if parent else None,
            parent_adapter=grown_from,
            model=located(self.settings, specs.model),
            lora=specs.lora,
            train=specs.train,
            strategy=strategy,
            home=str(self.settings.state_dir),
        )

    def _blend(self, cycle: Cycle, snapshot: Snapshot, stop: Stop) -> Cycle:
        """The other way to a candidate; when no blend is worth an exam there is nothing to evaluate."""
        self._check_same_base(cycle, snapshot, stop)
        made = rescue.blend(
            self.store, self.settings, self.executor, cycle, snapshot, self._progress(cycle), stop
        )
        if made.note is not None:
            return self._set_aside(cycle, made, made.note)
        told = f"attempt {made.number}: {rescue.words(made)}"
        log.info("blended: %s", told, extra=_action("blended", cycle))
        return self.store.advance(cycle.id, State.TRAINED, reason=told, candidates=[made])

    def _evaluate(self, cycle: Cycle, stop: Stop) -> Cycle:
        snapshot = snapshots.load(self._snapshot_of(cycle))
        self._check_same_base(cycle, snapshot, stop)
        candidate, stop = self._candidate(cycle, snapshot, stop)
        examination.check_suites(self.store, snapshot)
        artifacts.verify(self._result(candidate))  # what sits the exam is what was trained
        exam = self._exam(cycle, candidate, snapshot)
        examination.sit(self.store, self.executor, exam, self._progress(cycle), stop)
        self.store.put_scores(examination.scores(self.store, cycle, exam))
        return self.store.advance(cycle.id, State.EVALUATED)

    def _decide(self, cycle: Cycle, stop: Stop) -> Cycle:
        snapshot = snapshots.load(self._snapshot_of(cycle))
        meta = snapshot.info["meta"]
        candidates = self.store.candidates(cycle.id)
        verdict = None
        if candidates[-1].note is None:
            evidence = examination.evidence(self.store, self.store.scores(cycle.id), meta["new_tasks"])
            verdict = gate.judge(evidence, gate.Thresholds.from_dict(meta["gate"]))
            candidates[-1] = replace(candidates[-1], passed=verdict.passed, verdict=verdict.to_json())
        strategy = StrategySpec.from_dict(meta["strategy"])
        limits = rescue.Limits.of(snapshot)
        now = self.clock()
        attempt = rescue.following(candidates, verdict, limits, strategy, cycle.parent, now)
        over = rescue.is_cut_short(candidates, attempt, limits, now)
        if attempt is None or over:
            return self._close(cycle, candidates, snapshot, over=over)
        why = f"attempt {candidates[-1].number} {_outcome(candidates[-1], verdict)}"
        log.info("%s; next: %s", why, rescue.words(attempt), extra=_action("rescue", cycle))
        return self.store.advance(
            cycle.id, State.SNAPSHOTTED, reason=why, candidates=[candidates[-1], attempt]
        )

    def _close(self, cycle: Cycle, candidates: list[Candidate], snapshot: Snapshot, *, over: bool) -> Cycle:
        """The verdict, the scores and the rehearsed rows of one and the same candidate become the cycle's."""
        chosen = rescue.concluded(candidates)
        assert chosen.verdict is not None
        with self.store.reading(f"a verdict of cycle {cycle.id}"):
            summary = gate.summary_of(chosen.verdict)
        reason = rescue.summary(candidates, summary, over=over)
        report = TrainReport.read(result_files(self._result(chosen))["report"])
        log.info("%s", reason, extra=_action("decided", cycle))
        if over:
            self.store.event(OUT_OF_TIME, cycle.id)
        return self.store.advance(
            cycle.id,
            State.DECIDED,
            verdict=(bool(chosen.passed), chosen.verdict),
            reason=reason,
            rows=[(row, "replay") for row in report.rehearsed],
            scores=examination.scores(self.store, cycle, self._exam(cycle, chosen, snapshot)),
            candidates=[candidates[-1]],
        )

    def _conclude(self, cycle: Cycle, stop: Stop) -> Cycle:
        chosen = rescue.concluded(self.store.candidates(cycle.id))
        version = publish.publish(self.store, self.registry, self.settings, cycle, chosen)
        verdict = self.store.verdict(cycle.id)
        assert verdict is not None
        if not verdict[0]:
            return self._end(cycle.id, State.REJECTED, cycle.reason or "rejected", version)
        with self.store.transaction():  # a rollback or promotion by hand comes before this or after it
            if self.store.is_cancelled(cycle.id):  # by an erasure: it may have learned the row
                raise Cancelled()
            current = self.store.champion()
            serving = current.version if current else None
            by_hand = any(line.version == version for line in self.store.promotions())  # faster than MLflow
            if unchanged := serving == cycle.parent and not by_hand:
                promote.by_gate(self.store, version, cycle)
            if unchanged or serving == version:
                return self._end(cycle.id, State.PROMOTED, cycle.reason or "promoted", version)
        why = f"passed against version {cycle.parent}, but " + (
            f"version {version} was promoted by hand and rolled back meanwhile"
            if serving == cycle.parent
            else f"the champion became {serving} meanwhile; `daemon retrain-now` learns the rows on top of it"
        )
        self.registry.tag_version(version, {"holdfast.verdict": "rejected", "holdfast.reason": why})
        return self._end(cycle.id, State.REJECTED, why, version)

    # What the steps share.

    def _known_outcome(self, snapshot: str) -> str | None:
        """What came of this very snapshot, thresholds and all, and is not wanted again: training it would
        give the same adapter and the same verdict, every night. Where time ran out, another night may do
        better; one more, as a machine may always be too slow."""
        cycles = self.store.cycles_with(snapshot)
        served = {line.version for line in self.store.promotions() if line.version is not None}
        for tried in cycles:  # its champion serves again, so a person went back
            if tried.version in served:
                return f"the same rows made version {tried.version}, which was rolled back, {_see(tried)}"
        rejected = [tried for tried in cycles if (verdict := self.store.verdict(tried.id)) and not verdict[0]]
        tried_all = [tried for tried in rejected if not self.store.events(1, tried.id, OUT_OF_TIME)]
        if tried_all or len(rejected) > 1:
            tried = [*tried_all, *rejected][0]
            return f"the same rows were rejected in cycle {tried.id}, {_see(tried)}"
        return None

    def _candidate(self, cycle: Cycle, snapshot: Snapshot, stop: Stop) -> tuple[Candidate, Stop]:
        """The one that is being made or examined, and the stop that this is done under."""
        candidates = self.store.candidates(cycle.id)
        if len(candidates) == 1:  # the plain training has only the stage's own time limit
            return candidates[0], stop
        limits = rescue.Limits.of(snapshot)
        return candidates[-1], rescue.within(candidates, limits, stop, self.clock)

    def _set_aside(self, cycle: Cycle, candidate: Candidate, why: str) -> Cycle:
        """An attempt of which nothing came. The plain training has been judged, so its cycle goes on."""
        log.info("attempt %d: %s", candidate.number, why, extra=_action("set-aside", cycle))
        return self.store.advance(
            cycle.id, State.EVALUATED, reason=why, candidates=[replace(candidate, note=why)]
        )

    def _exam(self, cycle: Cycle, candidate: Candidate, snapshot: Snapshot) -> examination.Session:
        result = self._result(candidate)
        out = result.parent / "evaluate"
        return examination.plan(self.store, self.settings, cycle, snapshot, result, out)

    def _result(self, candidate: Candidate) -> Path:
        return self.settings.state_dir / candidate.result

    def folder(self, cycle: Cycle) -> Path:
        return self.settings.state_dir / "cycles" / str(cycle.id)

    def _base(self, cycle: Cycle, stop: Stop) -> PreparedBase:
        return prepare_base(self.settings, self.executor, self._progress(cycle), stop)

    def _check_base(self, cycle: Cycle, base: PreparedBase) -> None:
        champion = self.store.model(cycle.parent) if cycle.parent is not None else None
        check_champions_base(self.settings, base, cycle.parent, champion.base if champion else None)

    def _check_same_base(self, cycle: Cycle, snapshot: Snapshot, stop: Stop) -> None:
        self._base(cycle, stop)  # what was only touched is measured again
        located(self.settings, examination.specs(snapshot).model)

    def _snapshot_of(self, cycle: Cycle) -> Path:
        assert cycle.snapshot is not None
        return self.settings.state_dir / "snapshots" / cycle.snapshot

    def _progress(self, cycle: Cycle) -> Callable[[Progress], None]:
        return lambda progress: self.on_progress(cycle.id, progress)

    def _tidy_away(self, cycle: Cycle) -> None:
        """Checkpoints, blends and trials that were not chosen, of an ended cycle.

        What was stopped in the middle is left to `daemon.retention` where somebody wants to look at it.
        """
        if cycle.state in (State.FAILED, State.CANCELLED) and self.settings.retention.checkpoints:
            return
        kept = {self._result(candidate).parent for candidate in self.store.candidates(cycle.id)}
        folder = self.folder(cycle)
        unused = [trial for trial in folder.glob("trial-*") if trial not in kept]
        for path in [*folder.glob("work"), *folder.glob("*/work"), *unused]:
            shutil.rmtree(path, ignore_errors=True)

    def _cycle(self, cycle_id: int) -> Cycle:
        cycle = self.store.cycle(cycle_id)
        if cycle is None:
            raise StoreError(f"there is no cycle {cycle_id}; see `daemon history`")
        return cycle

    def _show_champion(self, cycle: Cycle) -> None:
        """The promotion is on record; the alias may come later, with the daemon's housekeeping."""
        try:
            promote.repair_alias(self.store, self.registry)
        except RegistryError as error:
            log.warning("the champion's alias lags behind: %s", error, extra=_action("alias-late", cycle))

    def _end(self, cycle_id: int, state: State, reason: str, version: int | None = None) -> Cycle:
        reason = reason.removeprefix(f"{state}: ")  # it is told after the state, always
        cycle = self.store.advance(cycle_id, state, reason=reason, version=version)
        log.info("cycle %d %s: %s", cycle_id, state, reason, extra=_action(state, cycle))
        return cycle

    def _ended_by(self, cycle_id: int, error: Exception) -> Cycle:
        """An erasure cancels, and takes rows away from a step in its midst: that is no fault."""
        if isinstance(error, Cancelled) or self.store.is_cancelled(cycle_id):
            return self._end(cycle_id, State.CANCELLED, erasure.why_cancelled(self.store, cycle_id))
        if isinstance(error, HoldfastError):
            return self._fail(cycle_id, str(error))
        if isinstance(error, OSError):
            why = f"{error}; free space or fix the permissions, then `daemon retrain-now`"
            return self._fail(cycle_id, why)
        raise error

    def _fail(self, cycle_id: int, reason: str) -> Cycle:
        cycle = self._end(cycle_id, State.FAILED, reason)
        try:
            self.registry.log_failure(cycle_id, publish.parameters(self.settings), reason)
        except HoldfastError as error:  # the store has the reason; MLflow's copy is a courtesy
            log.warning("could not log the failure to MLflow: %s", error, extra=_action("unlogged", cycle))
        return cycle


def _outcome(candidate: Candidate, verdict: gate.Verdict | None) -> str:
    return f"was {verdict.summary}" if verdict else f"came to nothing: {candidate.note}"


def _see(cycle: Cycle) -> str:
    return f"see `daemon show {cycle.id}`"


def _waiting(stop: Stop) -> Callable[[float], None]:
    """Sleeps, and gives up at once when a stop is requested."""

    def wait(seconds: float) -> None:
        stop.wait(seconds)
        stop.check()

    return wait


def _action(action: str, cycle: Cycle) -> dict[str, object]:
    """Fields of a log line; `journalctl` is a user interface."""
    return {"action": str(action), "cycle": cycle.id, "snapshot": cycle.snapshot}
