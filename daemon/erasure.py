"""`daemon erase`: rows that must be forgotten, and every model that learned one of them.

What a moment must show together is one transaction (`begin`): the rows are gone from the store but for their
hashes, the versions that learned them are marked, and the champion is the last one that never saw them. The
rest takes longer (`finish`): snapshots, results, MLflow's files, and the store's own file, written anew. A
start goes on with what was begun; everything may be done twice.
"""

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from daemon import promote
from daemon.settings import Settings
from storage import artifacts
from storage.errors import ControlError
from storage.intake import SHOWN, content_hash, said, shortened
from storage.records import Choice, Erasure, Rejected, State, StoredRow
from storage.registry import Registry
from storage.removals import ANSWERS, MLFLOW, Fits, fitting
from storage.rows import Row, normalise
from storage.store import ALL, Store

log = logging.getLogger(__name__)

_LINE_END = 2  # characters after a question as it was delivered, of which a shortened copy tells nothing
COLUMNS = ("task", "source", "question", "answer", "context")  # what --where may compare


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an erasure would do."""

    rows: list[StoredRow]
    quarantined: list[Rejected]
    cycles: set[int]  # that used one of the rows, or grew out of one that did
    versions: list[int]  # that these made
    champion: int | None  # who serves afterwards
    moves: bool  # whether that is another one than now
    suites: list[str]  # frozen ones that lose a row


def choice(
    row: str | None, task: str | None, before: str | None, contains: str | None, where: list[str]
) -> Choice:
    """The rows that somebody means. Raises `ControlError` for what is no condition, and for none at all."""
    given: dict[str, Any] = {"row": row, "task": task, "contains": contains}
    if contains is not None and not normalise(contains):
        raise ControlError(f"--contains {contains!r} is in every row; give some text, or leave it out")
    for condition in where:
        column, sign, value = condition.partition("=")
        if not sign or column.strip() not in COLUMNS:
            raise ControlError(f"--where {condition!r} is not COLUMN=VALUE; columns: {', '.join(COLUMNS)}")
        other = given.get(column.strip())
        if other is not None and normalise(other) != normalise(value):
            raise ControlError(
                f"{column.strip()} cannot be both {other!r} and {value!r}: all conditions must hold; "
                "erase the one, then the other"
            )
        given[column.strip()] = value
    try:
        given["before"] = datetime.fromisoformat(before) if before else None
    except ValueError:
        raise ControlError(f"--before {before!r} is no date; write it as 2026-03-01") from None
    if given["before"] is not None and given["before"].tzinfo is not None:
        raise ControlError(f"--before {before!r} has a time zone; give it in UTC, without one")
    if all(value is None for value in given.values()):
        raise ControlError("which rows? Name one with --row ID, or some with --where, --task, --contains")
    return Choice(**given)


def plan(settings: Settings, store: Store, wanted: Choice) -> Plan:
    """What `begin` would do. Raises `ControlError` when no row is meant."""
    rows = list(store.chosen_rows(wanted))
    questions = {normalise(row.question) for row in rows}
    long = [row for row in rows if len(row.question) > SHOWN - 100]  # white space around it may be gone
    words, fits = {row.words_key for row in rows}, fitting(wanted)
    quarantined = [
        refused
        for refused in store.quarantined(ALL)
        if _is_meant(refused, wanted, fits, questions, words, settings.source.default_task)
        or _is_copy(refused, long)
    ]
    if not rows and not quarantined:
        raise ControlError("no row fits; `daemon status` names the tasks, `daemon quarantine` refused rows")
    hashes = [row.hash for row in rows]
    cycles = _affected(store, store.taught(hashes))
    models = {model.version: model for model in store.models()}
    line = store.champion()
    serving = champion = line.version if line else None
    pruned = store.pruned()
    while champion is not None and (models[champion].cycle_id in cycles or models[champion].result in pruned):
        champion = models[champion].parent
    moves = serving is not None and models[serving].cycle_id in cycles
    members = store.survey().suite_members()
    return Plan(
        rows=rows,
        quarantined=quarantined,
        cycles=cycles,
        versions=[version for version, model in models.items() if model.cycle_id in cycles],
        champion=champion if moves else serving,
        moves=moves,
        suites=[f"{task}@v{version}" for (task, version), its in members.items() if its & {*hashes}],
    )


def begin(settings: Settings, store: Store, wanted: Choice, who: str, why: str) -> Erasure:
    """From here on no row is there, nothing that learned one serves, and a running cycle is cancelled."""
    with store.transaction():
        found = plan(settings, store, wanted)
        gone = _hashes(settings, store, found)
        erasure = store.erase(gone, found.versions, rebuild=found.moves, who=who, why=why)
        if found.moves:
            told = f"erasure {erasure.id}: {why}"
            store.promote(found.champion, cycle_id=None, kind="erasure", who=who, why=told)
        for cycle in store.unfinished():
            if cycle.state is not State.REQUESTED:  # it may have read the rows
                store.event("cancel", cycle.id, by=who, erasure=erasure.id)
        _forget_labels(settings, store)
    log.info("erasure %d: %d rows", erasure.id, len(gone), extra={"action": "erased"})
    return erasure


def why_cancelled(store: Store, cycle_id: int) -> str:
    """Who asked first: what an erasure does to a cycle that a person has cancelled is not its reason."""
    asked = store.events(ALL, cycle_id, "cancel")
    told = asked[-1].detail if asked else {}
    by = f"erasure {told['erasure']}" if "erasure" in told else told.get("by", "a request")
    return f"by {by}; its rows stay pending"


def is_due(store: Store) -> bool:
    return any(erasure.done_at is None for erasure in store.erasures())


def finish(settings: Settings, store: Store, registry: Registry) -> None:
    """Removes what is left of everything that was erased, wherever it is, and asks for the rebuild.

    Between two cycles only. Raises `RegistryError` when MLflow cannot be asked; the next try goes on.
    """
    if not is_due(store):
        return
    begun = [erasure for erasure in store.erasures() if erasure.done_at is None]
    for cycle in store.unfinished():
        if store.is_cancelled(cycle.id):
            store.advance(cycle.id, State.CANCELLED, reason=why_cancelled(store, cycle.id))
    erased = store.erased()
    holding = list(_snapshots_with(settings, erased))  # reads much: nobody has to wait for the store
    with store.transaction():
        cycles = _affected(store, store.taught())
        # Those without the row, too: they list the labels of all that was learned.
        names = {cycle.snapshot for cycle in store.cycles(ALL) if cycle.id in cycles and cycle.snapshot}
        snapshots = sorted({*holding, *(settings.state_dir / "snapshots" / name for name in names)})
        models = {model.cycle_id: model.version for model in store.models() if model.cycle_id in cycles}
        store.taint(list(models.values()), begun[0].id)
        why = f"erasure {begun[-1].id}"
        paths = [f"snapshots/{path.name}" for path in snapshots if not path.name.startswith(".")]
        paths += [path for cycle in cycles for path in _made_by(store, cycle, models.get(cycle))]
        known = store.pruned().keys()
        store.prune([(path, why) for path in dict.fromkeys(paths) if path not in known])
    for folder in [*snapshots, *_files_with(settings, store, cycles)]:
        artifacts.remove(folder)
    for parent in ("snapshots", "cycles"):  # a kill may have come after a removal and before its sync
        artifacts.sync(settings.state_dir / parent)
    promote.check_is_ours(store, registry)  # another MLflow would have nothing to erase
    promote.repair_alias(store, registry)  # first: no alias may point to a version without files
    registry.erase(erased, cycles, {"holdfast.erased": why})
    for path, told in store.pruned().items():
        if path.startswith(MLFLOW) and int(path.split("/")[1]) in models.values() and not told.done:
            store.pruning_done(path)
    store.rewrite()
    with store.transaction():
        for erasure in begun:
            store.erasure_done(erasure.id)
        waiting = any(cycle.state is State.REQUESTED for cycle in store.unfinished())
        if any(erasure.rebuild for erasure in begun) and not waiting:
            store.request_cycle("erasure", begun[-1].who)
    log.info("erased, everywhere", extra={"action": "erasure-done"})


def _is_meant(
    refused: Rejected,
    wanted: Choice,
    fits: Fits,
    questions: Collection[str],
    words: Collection[str],
    default_task: str,
) -> bool:
    """Whether a quarantined row fits, or asks what one of the rows asks, be it in other words' order: then
    it has their text too, and would be taken in once they are gone."""
    told = said(refused.raw)
    ids = {refused.hash, refused.id, told.get("id", "").strip()} - {""}
    texts = {name: told.get(name, "") for name in ("question", "answer", "context")}
    texts["task"] = (refused.task or "").strip() or default_task  # as the intake would read it
    asked = Row(id="", task="", question=texts["question"], answer="", context=texts["context"])
    if normalise(asked.question) in questions or asked.words_key in words:
        return True
    return (
        (wanted.row is None or wanted.row in ids)
        and wanted.source in (None, refused.source)
        and (wanted.before is None or refused.at < wanted.before)
        and fits(texts, [told.get(name, "") for name in _SEARCHED])
    )


# Where `--contains` looks, as in stored rows; "text" is what could not be taken apart.
_SEARCHED = ("id", "context", "question", "answer", "text")


def _is_copy(refused: Rejected, rows: Collection[StoredRow]) -> bool:
    """Whether a row that was refused and shortened is one of these: it begins alike and is as long."""
    told = said(refused.raw)
    if (short := shortened(told.get("question", ""))) is None:
        return False
    head, length = short
    begins = head.lstrip()
    length -= len(head) - len(begins)
    context = told.get("context", "")
    around, size = shortened(context) or (context, len(context))
    return any(
        0 <= length - len(row.question) <= _LINE_END
        and len(row.context) == size
        and row.question.startswith(begins)
        and row.context.startswith(around)
        for row in rows
    )


def _hashes(settings: Settings, store: Store, found: Plan) -> list[str]:
    """What is left of them. A refused row might be taken in once what it contradicted is gone; what was taken
    in meanwhile is a row of its own, and stays unless it is meant itself."""
    rows = [row.hash for row in found.rows]
    contents = [content_hash(each.raw, settings.source.default_task) for each in found.quarantined]
    alive = store.survey().known([one for one in contents if one]) - {*rows}
    gone = [one for one in contents if one and one not in alive]
    return [*rows, *(each.hash for each in found.quarantined), *gone]


def _affected(store: Store, taught: set[int]) -> set[int]:
    """These cycles, and those that continued from a version of one of them."""
    made = {model.version: model.cycle_id for model in store.models()}
    found = set(taught)
    for cycle in reversed(store.cycles(ALL)):
        if cycle.parent is not None and made.get(cycle.parent) in found:
            found.add(cycle.id)
    return found


def _forget_labels(settings: Settings, store: Store) -> None:
    """Labels that only an erased row had."""
    for task in store.tasks():
        wish = settings.wish(task.name)
        if task.labels and not (wish and wish.labels):
            left = set(store.answers(task.name)) & set(task.labels)
            if len(left) < len(task.labels):
                store.put_task(replace(task, labels=tuple(left)))


def _made_by(store: Store, cycle_id: int, version: int | None) -> Iterator[str]:
    """Everything that a cycle has made, as paths of the record of what was removed."""
    for candidate in store.candidates(cycle_id):
        if candidate.model:
            yield candidate.result
            yield ANSWERS + candidate.model
    if version is not None:
        yield f"{MLFLOW}{version}/model"
        yield f"{MLFLOW}{version}/answers"


def _snapshots_with(settings: Settings, erased: Collection[str]) -> Iterator[Path]:
    """Snapshots that hold one of the rows, and those of which nobody can tell."""
    for folder in sorted((settings.state_dir / "snapshots").glob("*/")):
        if folder.name.startswith(".") or any(holds(file, erased) for file in folder.rglob("*.parquet")):
            yield folder


def holds(file: Path, erased: Collection[str]) -> bool:
    """Whether a Parquet file of rows or of answers has one of them; an unreadable one may have."""
    try:
        names = pq.read_schema(file).names
        column = "hash" if "hash" in names else "row_hash"
        return not set(erased).isdisjoint(pq.read_table(file, columns=[column])[column].to_pylist())
    except (OSError, KeyError, pa.ArrowException):
        return True


def _files_with(settings: Settings, store: Store, cycles: Collection[int]) -> Iterator[Path]:
    """Folders of cycles that used one of the rows; of all others, what is only needed while one runs."""
    for cycle in store.cycles(ALL):
        folder = settings.state_dir / "cycles" / str(cycle.id)
        if not cycle.state.ended or not folder.exists():
            continue
        if cycle.id in cycles:
            yield folder
        else:
            for name in ("evaluate", "probe", "work", ".*"):
                yield from [path for path in (*folder.glob(name), *folder.glob(f"*/{name}")) if path.is_dir()]
