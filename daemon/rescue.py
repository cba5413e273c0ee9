"""A candidate that learned but forgot is not thrown away at once: what is tried next, and how.

First blends of champion and candidate, which cost no training; then a training that protects the old
tasks more, and its blends; and so on, as long as attempts are left. Which blend is examined is chosen by
validation rows (`daemon.tradeoff`), and the gate judges each candidate by the same suites. So the gate's no
does start the next attempt, and several candidates sit one exam: that is why attempts are few, and all are
told.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Self

from daemon import examination, experience, gate, tradeoff
from daemon.executor import Executor, OnProgress, Stop, Until
from daemon.settings import Settings
from storage import artifacts
from storage.errors import reading
from storage.records import Candidate, Cycle
from storage.snapshots import Snapshot
from storage.store import Store
from strategies import combinations
from strategies.contract import BlendJob, Record, StrategySpec, TrainReport, blended, result_files
from strategies.strengthen import changes, strengthened


class Kind(StrEnum):
    """How a candidate is made."""

    TRAIN = "train"  # the cycle's own training
    BLEND = "blend"  # between the champion and its source
    PROTECT = "protect"  # the training again, from the champion, with more protection than its source


@dataclass(frozen=True, kw_only=True)
class Limits(Record):
    """What rescuing may cost a cycle; fixed in its snapshot."""

    attempts: int  # candidates after the first
    minutes: int  # for all of them, by the clock

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """Snapshots from before there were rescues allow none."""
        said = snapshot.info["meta"].get("rescue", {})
        return cls(attempts=said.get("attempts", 0), minutes=said.get("minutes", 0))


def first(cycle: Cycle, now: datetime) -> Candidate:
    """The plain training."""
    return Candidate(
        cycle_id=cycle.id,
        number=1,
        kind=Kind.TRAIN,
        source=None,
        result=f"cycles/{cycle.id}/train",
        strategy=None,
        created_at=now,
    )


def following(
    candidates: Sequence[Candidate],
    verdict: gate.Verdict | None,
    limits: Limits,
    strategy: StrategySpec,
    parent: int | None,
    now: datetime,
) -> Candidate | None:
    """The next attempt after these candidates, of which `verdict` judges the last; None: no more.

    Whether there is time for it is `is_cut_short`'s to say. `strategy` and `parent` are the cycle's own.
    Without a champion there is nothing to blend with, and nothing that more protection would know of. An
    adapter that did not grow out of the champion's has no blends with it that would mean anything.
    """
    last = candidates[-1]
    if parent is None or len(candidates) > limits.attempts:
        return None
    if verdict is not None and verdict.passed:
        return None
    trained = candidates[last.source - 1] if last.kind == Kind.BLEND and last.source else last
    before = strategy_of(trained, strategy)
    if last is trained:
        if verdict is None or not gate.worth_rescuing(verdict):
            return None
        if not combinations.UNBLENDABLE.intersection(before.methods):
            return replace(_next(last, Kind.BLEND, last.number, now), strategy=last.strategy)
    stronger = strengthened(before)
    if stronger is None:
        return None
    protect = _next(last, Kind.PROTECT, trained.number, now)
    return replace(protect, strategy=stronger.to_json(), change=changes(before, stronger))


def _next(last: Candidate, kind: Kind, source: int, now: datetime) -> Candidate:
    number = last.number + 1
    return Candidate(
        cycle_id=last.cycle_id,
        number=number,
        kind=kind,
        source=source,
        result=f"cycles/{last.cycle_id}/rescue-{number}/train",
        strategy=None,
        created_at=now,
    )


def concluded(candidates: Sequence[Candidate]) -> Candidate:
    """The one that becomes a version: it passed, or else the plain training, for people to look at."""
    return next((candidate for candidate in candidates if candidate.passed), candidates[0])


def strategy_of(candidate: Candidate, strategy: StrategySpec) -> StrategySpec:
    """What the candidate was, or is to be, trained with, in a cycle of that strategy.

    Raises `IntegrityError` when the store has something else there.
    """
    if candidate.strategy is None:
        return strategy
    with reading("the store", f"the strategy of attempt {candidate.number} of cycle {candidate.cycle_id}"):
        return StrategySpec.from_json(candidate.strategy)


def is_over(candidates: Sequence[Candidate], limits: Limits, now: datetime) -> bool:
    """Whether the time for rescuing, which began with the second candidate, is over."""
    return len(candidates) > 1 and now > candidates[1].created_at + timedelta(minutes=limits.minutes)


def is_cut_short(
    candidates: Sequence[Candidate], attempt: Candidate | None, limits: Limits, now: datetime
) -> bool:
    """Whether the clock ended it: the last attempt, or `attempt`, the next one, before it began."""
    return is_over(candidates, limits, now) and (attempt is not None or candidates[-1].note is not None)


def within(
    candidates: Sequence[Candidate], limits: Limits, stop: Stop, clock: Callable[[], datetime]
) -> Stop:
    """The stop that an attempt works under: it comes by itself when the time for rescuing is over."""
    why = f"the time for rescuing was over (rescue.minutes = {limits.minutes})"
    return Until(stop, lambda: is_over(candidates, limits, clock()), why)


def summary(candidates: Sequence[Candidate], verdict_summary: str, *, over: bool = False) -> str:
    """The cycle's reason: the concluded candidate's verdict, what was tried, and whether time ended it."""
    attempts = candidates[1:]
    if not attempts:
        return verdict_summary
    if candidates[-1].passed:
        return f"{verdict_summary}; rescued by attempt {candidates[-1].number}: {words(candidates[-1])}"
    tried = ", then ".join(words(candidate) for candidate in attempts)
    ended = "; then the time for rescuing was over" if over else ""
    return f"{verdict_summary}; tried to rescue it in vain: {tried}{ended}"


def words(candidate: Candidate) -> str:
    """How the candidate was made, in a few words."""
    if candidate.kind == Kind.BLEND:
        share = f"{candidate.share * 100:.0f} % of the way" if candidate.share is not None else "blends"
        return f"{share} from the champion to attempt {candidate.source}"
    if candidate.kind == Kind.PROTECT:
        return f"trained again with more protection ({candidate.change})"
    return f"plain training: {candidate.change}" if candidate.change else "plain training"


def blend(
    store: Store,
    settings: Settings,
    executor: Executor,
    cycle: Cycle,
    snapshot: Snapshot,
    on_progress: OnProgress,
    stop: Stop,
) -> Candidate:
    """Makes the blends, lets them answer validation rows, and settles the chosen one as a result.

    Returns the candidate with its curve, and with its share, or with a note when no blend is worth an
    exam. Doing it again finds what is there. Raises `ModelError` when the adapters cannot be blended.
    """
    candidates = store.candidates(cycle.id)
    current = candidates[-1]
    assert current.source is not None
    assert cycle.parent is not None
    result = settings.state_dir / current.result
    job = _blend_job(
        home=settings.state_dir,
        champion=experience.parent_result(store, settings, cycle.parent),
        source=settings.state_dir / candidates[current.source - 1].result,
        out=result.parent / "work" / "blends",
    )
    executor.blend(job, on_progress, stop)
    curve = _curve(store, settings, executor, snapshot, job, result.parent / "probe", on_progress, stop)
    limits = gate.Thresholds.from_dict(snapshot.info["meta"]["gate"])
    assert limits.max_drop is not None  # else the gate would not have called it worth rescuing
    choice = tradeoff.choose(curve, limits.max_drop)
    if choice.share is None:
        return replace(current, curve=curve.to_json(), note=choice.why)
    _settle(result, job, choice)
    adapter = examination.adapter_hash(result_files(result)["adapter"])
    return replace(current, curve=curve.to_json(), share=choice.share, model=adapter)


def _blend_job(home: Path, champion: Path, source: Path, out: Path) -> BlendJob:
    hashes = [examination.adapter_hash(result_files(end)["adapter"]) for end in (champion, source)]
    return BlendJob(
        out=str(out),
        champion=str(champion),
        champion_adapter=hashes[0],
        candidate=str(source),
        candidate_adapter=hashes[1],
        shares=tradeoff.GRID,
        home=str(home),
    )


def _curve(
    store: Store,
    settings: Settings,
    executor: Executor,
    snapshot: Snapshot,
    job: BlendJob,
    out: Path,
    on_progress: OnProgress,
    stop: Stop,
) -> tradeoff.Curve:
    """What candidate, blends and champion score on the snapshot's validation rows, task by task."""
    adapters = {
        1.0: result_files(job.candidate)["adapter"],
        **{share: blended(job.out, share) for share in job.shares},
        0.0: result_files(job.champion)["adapter"],
    }
    labels = {f"{share:g}": adapter for share, adapter in adapters.items()}
    session = examination.probe(store, settings, snapshot, labels, out)
    examination.sit(store, executor, session, on_progress, stop)
    asked = Counter(row.task for row in snapshot.rows("probe"))
    return tradeoff.Curve(
        new_tasks=tuple(snapshot.info["meta"]["new_tasks"]),
        rows={exam.task.name: asked[exam.task.name] for exam in session.exams},
        points=tuple(
            tradeoff.Point(share=float(label), scores=examination.means(store, session, label))
            for label in labels
        ),
    )


def _settle(result: Path, job: BlendJob, choice: tradeoff.Choice) -> None:
    """The chosen blend as a training result: its adapter, and the continual state of its candidate.

    What the candidate's training remembers and rehearsed is as true of the blend. Importances, opinions and
    losses in the state are those of the trained adapter, from which the blend is a little away.
    """
    assert choice.share is not None
    made_of = hashlib.sha256(f"{job.digest} {choice.share}".encode()).hexdigest()
    if artifacts.made_for(result, made_of):
        return
    source = result_files(job.candidate)
    told = TrainReport.read(source["report"])
    note = f"blended: {choice.share:g} of the way from the champion to the trained adapter; {choice.why}"
    with artifacts.atomic_dir(result, {"job": made_of}) as folder:
        parts = result_files(folder)
        shutil.copytree(blended(job.out, choice.share), parts["adapter"])
        shutil.copytree(source["state"], parts["state"])
        text = replace(told, notes=(*told.notes, note)).to_json()
        parts["report"].write_text(text + "\n", encoding="utf-8")
