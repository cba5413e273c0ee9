"""What may go, so that a machine that nobody watches does not fill up: `[retention]`.

Never what the champion answers with, what a rollback returns to, what an unfinished cycle needs, or what the
accuracy matrix is computed from; rows, scores, verdicts and history stay for ever. A removal is put on record
first, and every pass removes whatever is on record and still there: a kill in between leaves nothing half.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from daemon import examination
from daemon.promote import champions, check_is_ours
from daemon.settings import Settings
from storage import artifacts, snapshots
from storage.errors import HoldfastError
from storage.records import Cycle, ModelVersion, State
from storage.registry import Registry
from storage.removals import ANSWERS, MLFLOW
from storage.runs import PREDICTIONS
from storage.snapshots import Snapshot
from storage.store import ALL, Store

log = logging.getLogger(__name__)

_SEARCHED = "retention.searched"  # up to which cycle MLflow was searched for what the store has not
# Of a version's run in MLflow, by the last part of its path.
_FILES = {"model": ("model",), "answers": (PREDICTIONS,)}


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Something that may go, and why. The path is the one that is put on record."""

    path: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What must stay. Results are directories relative to the state directory, answers are of models."""

    cycles: frozenset[int]  # everything of these
    results: frozenset[str]
    snapshots: frozenset[str]
    answers: frozenset[str]
    versions: frozenset[int]
    busy: bool  # whether a cycle is unfinished


def prune(settings: Settings, store: Store, registry: Registry) -> list[Removal]:
    """Removes what may go, and what an earlier pass began to remove; returns what is new of that.

    Not while a cycle runs: between two is the time. Raises `RegistryError` when MLflow cannot be asked; all
    else is removed by then.
    """
    with store.transaction():
        kept = what_stays(settings, store)
        removals = list(_removals(store, kept))
        exams = _forgotten_exams(settings, store, kept, removals)
        store.prune([(one.path, one.why) for one in removals], exams)
    _remove_files(settings, store, kept)
    _remove_from_mlflow(store, registry)
    _remove_strays(store, registry)
    if removals:
        log.info("pruned %d things", len(removals), extra={"action": "pruned"})
    return removals


def plan(settings: Settings, store: Store) -> list[Removal]:
    """What the next pass would remove."""
    return list(_removals(store, what_stays(settings, store)))


def what_stays(settings: Settings, store: Store) -> Kept:
    """By the settings, and by what everything else relies on."""
    keep = settings.retention
    cycles = store.cycles(ALL)  # the newest first
    models = {model.version: model for model in store.models()}
    busy = [cycle for cycle in cycles if cycle.finished_at is None]
    stopped = [cycle for cycle in cycles if cycle.state in (State.FAILED, State.CANCELLED)]
    whole = {cycle.id for cycle in (*busy, *stopped[: keep.checkpoints])}
    served = {line.version for line in store.promotions()}
    tainted = store.tainted()
    rejected = [model for version, model in sorted(models.items(), reverse=True) if version not in served]
    versions = set(_champions(store, keep.champions))
    versions -= tainted
    versions |= {model.version for model in rejected[: keep.rejected]} | set(sorted(models)[-1:])
    versions |= {cycle.parent for cycle in busy if cycle.parent is not None}
    mine = {models[version].cycle_id for version in versions}
    taken = dict.fromkeys(cycle.snapshot for cycle in cycles if cycle.snapshot)
    wanted = {cycle.snapshot for cycle in cycles if cycle.snapshot and cycle.id in whole | mine}
    wanted |= set(islice((name for name in taken if name not in wanted), keep.snapshots))
    judged = whole | {model.cycle_id for model in rejected[: keep.predictions]}
    return Kept(
        cycles=frozenset(whole),
        results=frozenset(models[version].result for version in versions),
        snapshots=frozenset(wanted),
        answers=_answers(store, cycles, models, judged | mine),
        versions=frozenset(versions),
        busy=bool(busy),
    )


def _champions(store: Store, past: int) -> Iterator[int]:
    """The champion, those that rollbacks return to, and those that served last."""
    lines = store.promotions()
    yield from champions(lines)[-1 - past :]
    recent = dict.fromkeys(line.version for line in reversed(lines) if line.version is not None)
    yield from islice(recent, past + 1)


def _answers(
    store: Store, cycles: list[Cycle], models: dict[int, ModelVersion], judged: set[int]
) -> frozenset[str]:
    """Models that have ever served, with their ancestors, which every matrix shows; and those of `judged`."""
    line, left = set(), {line.version for line in store.promotions()}
    while left:
        model = models.get(left.pop() or 0)
        if model is not None and model.version not in line:
            line.add(model.version)
            left.add(model.parent)
    found = {models[version].adapter_hash for version in line}
    for cycle in cycles:
        if cycle.id in judged:
            found |= {candidate.model for candidate in store.candidates(cycle.id) if candidate.model}
    return frozenset(found)


def _removals(store: Store, kept: Kept) -> Iterator[Removal]:
    """What is not on record as removed yet."""
    again = {ANSWERS + model for model, _ in store.survey().sat()}  # a model that sat another exam since
    known = store.pruned().keys() - again
    return (one for one in _all_removals(store, kept) if one.path not in known)


def _all_removals(store: Store, kept: Kept) -> Iterator[Removal]:
    versions = {model.cycle_id: model for model in store.models()}
    gone: dict[str, Removal] = {}  # two cycles may have one snapshot, and one model two candidates
    for cycle in reversed(store.cycles(ALL)):
        if not cycle.state.ended or cycle.id in kept.cycles:
            continue
        why = f"cycle {cycle.id}, {cycle.state}"
        paths = []
        if cycle.snapshot and cycle.snapshot not in kept.snapshots:
            paths.append(f"snapshots/{cycle.snapshot}")
        version = versions.get(cycle.id)
        if version and version.version not in kept.versions:
            paths.append(f"{MLFLOW}{version.version}/model")
        if version and version.adapter_hash not in kept.answers:
            paths.append(f"{MLFLOW}{version.version}/answers")
        for candidate in store.candidates(cycle.id):
            if candidate.model and candidate.result not in kept.results:
                paths.append(candidate.result)
            if candidate.model and candidate.model not in kept.answers and not kept.busy:
                paths.append(ANSWERS + candidate.model)
        gone |= {path: Removal(path=path, why=why) for path in paths}
    yield from gone.values()


def _forgotten_exams(settings: Settings, store: Store, kept: Kept, removals: list[Removal]) -> list[str]:
    """Exams on validation rows that only the snapshots to remove have set: nothing is computed from them."""
    if kept.busy or not any(one.path.startswith("snapshots/") for one in removals):
        return []
    known = {score.exam for score in store.scores()}
    for name in kept.snapshots - {path.removeprefix("snapshots/") for path in store.pruned()}:
        path = settings.state_dir / "snapshots" / name
        try:
            info = json.loads((path / snapshots.INFO).read_text(encoding="utf-8"))
            known |= {exam.key for exam in examination.probe_exams(Snapshot(id=name, path=path, info=info))}
        except (HoldfastError, OSError, ValueError, KeyError):
            return []  # an audit must be able to say what is broken here
    return sorted({exam for _, exam in store.survey().sat()} - known)


def _remove_files(settings: Settings, store: Store, kept: Kept) -> None:
    """What is on record as removed, and all else of cycles that made nothing that is kept."""
    for path in store.pruned():
        if path.startswith("snapshots/"):
            _remove(settings.state_dir / path)
        elif path.startswith("cycles/"):
            _remove_result(settings.state_dir / path)
    for cycle in store.cycles(ALL):
        made = {candidate.result for candidate in store.candidates(cycle.id)}
        if cycle.state.ended and cycle.id not in kept.cycles and not made & kept.results:
            _remove(settings.state_dir / "cycles" / str(cycle.id))
    if not kept.busy:
        for orphan in _orphans(settings, store):
            artifacts.remove(orphan)


def _orphans(settings: Settings, store: Store) -> list[Path]:
    """Snapshots that no cycle has, whole or half: it was killed before it noted them, and did not go on.
    A folder of another name is somebody else's."""
    taken = {cycle.snapshot for cycle in store.cycles(ALL)}
    ours = {path: snapshots.id_of(path) for path in (settings.state_dir / "snapshots").glob("*")}
    return [path for path, name in ours.items() if name and name not in taken]


def _remove_result(result: Path) -> None:
    """And what was made for it, beside it: checkpoints, and answers that the store has."""
    for name in (result.name, "work", "evaluate", "probe"):
        _remove(result.parent / name)
    for folder in (result.parent, result.parent.parent):
        if folder.name != "cycles" and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _remove(path: Path) -> None:
    for each in (path, path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")):
        artifacts.remove(each)


def _remove_from_mlflow(store: Store, registry: Registry) -> None:
    for path, told in store.pruned().items():
        if path.startswith(MLFLOW) and not told.done:
            version, _, what = path.removeprefix(MLFLOW).partition("/")
            registry.prune(int(version), _FILES[what], {f"holdfast.pruned.{what}": f"{told.at:%Y-%m-%d}"})
            store.pruning_done(path)


def _remove_strays(store: Store, registry: Registry) -> None:
    """Files of versions that MLflow has and the store does not: their cycle was cancelled in between."""
    searched = int(store.get_meta(_SEARCHED) or 0)
    strays = {
        cycle.id: str(cycle.state)
        for cycle in store.cycles(ALL)
        if cycle.id > searched and cycle.state in (State.FAILED, State.CANCELLED) and store.verdict(cycle.id)
    }
    if not strays:
        return  # searching asks for every version
    check_is_ours(store, registry)
    for listed in registry.look().versions:
        if listed.cycle_id in strays and store.model(listed.version) is None:
            registry.prune(listed.version, _FILES["model"], {"holdfast.verdict": strays[listed.cycle_id]})
    store.set_meta(_SEARCHED, str(max(strays)))
