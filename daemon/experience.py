"""What one cycle learns and is examined on: pending rows, task kinds, frozen suites, one snapshot.

Everything here is read from or written to the store before any training starts; the snapshot it ends
in is all that the worker ever sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from daemon.settings import Settings
from storage import snapshots
from storage.records import Cycle, StoredRow, Suite, TaskRecord
from storage.rows import Split
from storage.snapshots import Snapshot
from storage.store import Store
from strategies import combinations
from strategies.contract import (
    LoraSpec,
    Metric,
    ModelSpec,
    PreparedBase,
    StrategySpec,
    Task,
    TaskKind,
    TrainSpec,
)
from strategies.replay_memory import memory_hashes

# A task is a closed set of labels when its answers are few, short, and keep coming back.
MOST_LABELS = 300
LONGEST_LABEL_WORDS = 4
ROWS_PER_LABEL = 3
STILL_PER_LABEL = 2  # what once was a closed set stays one a little longer, so that kinds do not flutter


@dataclass(frozen=True, kw_only=True)
class Experience:
    """The new rows of a cycle, in the order they were accepted."""

    train: list[StoredRow]
    validation: list[StoredRow]

    @property
    def tasks(self) -> list[str]:
        return sorted({row.task for row in self.train})


def gather(store: Store, parent: int | None) -> Experience:
    """Rows that no cycle in the parent's lineage has learned; after a rollback they are pending again."""
    lineage = store.lineage(parent)
    train = store.pending(lineage)
    tasks = {row.task for row in train}
    validation = [row for row in store.pending_validation(lineage) if row.task in tasks]
    return Experience(train=train, validation=validation)


def freeze_suites(store: Store, settings: Settings, cycle_id: int) -> None:
    """Freezes a suite for every task that has enough held-out rows, and a new version where they grew or
    one of them was superseded: nobody is marked down for an answer that is right by now.

    A new version keeps every row of the old one that still counts; the successors of the others take their
    places. Which further rows enter a full suite depends on their content alone, never on a model.
    Raises `IntegrityError` when the store does not have the rows of a suite.
    """
    frozen = store.latest_suites()
    for task in sorted(store.row_counts()):
        with store.transaction():  # an ingest that supersedes one of the rows comes before this or after it
            _freeze_suite(store, settings, task, frozen.get(task), cycle_id)


def _freeze_suite(store: Store, settings: Settings, task: str, current: Suite | None, cycle_id: int) -> None:
    limit = settings.evaluation.suite_rows
    held_out = store.task_rows(task, Split.SUITE)
    old = store.suite_rows(task, current.version) if current else []
    stale = store.superseded([row.hash for row in old])
    enough = len(held_out) >= settings.gate.min_suite_rows
    erased = current is not None and len(old) < current.size
    if stale or erased or (enough and _has_grown(len(old), min(limit, len(held_out)), settings)):
        rows = _next_suite(old, stale, held_out, limit)
        if not rows:
            return
        store.freeze_suite(task, [row.hash for row in rows], snapshots.suite_hash(rows), cycle_id)


def _next_suite(
    old: Sequence[StoredRow], stale: set[str], held_out: Sequence[StoredRow], limit: int
) -> list[StoredRow]:
    """The rows of a suite that still count, then the successors of the others, then further ones."""
    kept = [row for row in old if row.hash not in stale]
    examined = {row.hash for row in kept}
    vacant = {row.key for row in old if row.hash in stale}
    fresh = [row for row in held_out if row.hash not in examined]
    fresh.sort(key=lambda row: (row.key not in vacant, row.hash))
    return sorted(kept + fresh[: max(limit, len(old)) - len(kept)], key=lambda row: row.hash)


def _has_grown(before: int, now: int, settings: Settings) -> bool:
    return now >= before * (1 + settings.evaluation.suite_growth)


def settle_tasks(store: Store, settings: Settings, cycle_id: int) -> dict[str, Task]:
    """Kind, metric and labels of every task that has a suite: configured, else inferred from its rows.

    Labels grow with the rows; when answers stop being a closed set, or become one, the kind changes, and
    an event says so.
    """
    known = {task.name: task for task in store.tasks()}
    for name in sorted(store.latest_suites()):
        before = known.get(name)
        record = _settle(store, settings, name, before)
        if record != before:
            store.put_task(record)
            known[name] = record
        if before is not None and before.kind != record.kind:
            store.event("task-kind", cycle_id, task=name, before=before.kind, now=record.kind)
    return {
        name: Task(name=name, kind=TaskKind(t.kind), metric=Metric(t.metric), labels=t.labels)
        for name, t in known.items()
    }


def _settle(store: Store, settings: Settings, name: str, known: TaskRecord | None) -> TaskRecord:
    wish = settings.wish(name)
    if wish and wish.wanted_kind:
        kind = TaskKind(wish.wanted_kind)
    else:
        was_labels = known is not None and known.origin == "inferred" and known.kind == TaskKind.LABELS
        kind = infer_kind(*store.answer_shape(name), was_labels=was_labels)
    metric = Metric.ACCURACY if kind is TaskKind.LABELS else Metric.TOKEN_F1
    if wish and wish.metric:
        metric = Metric(wish.metric)
    labels: tuple[str, ...] = ()
    if kind is TaskKind.LABELS:
        labels = tuple(sorted(wish.labels if wish and wish.labels else store.answers(name)))
    return TaskRecord(
        name=name,
        kind=kind.value,
        metric=metric.value,
        origin="config" if wish and wish.wanted_kind else "inferred",
        labels=labels,
        created_at=known.created_at if known else store.clock(),
    )


def infer_kind(rows: int, distinct: int, longest: int, *, was_labels: bool = False) -> TaskKind:
    """`labels` when the different answers are few, short (words), and each seen several times.

    Only rows outside the suite count: a label that is never taught is no choice.
    """
    wanted = STILL_PER_LABEL if was_labels else ROWS_PER_LABEL
    few = 1 < distinct <= MOST_LABELS and rows >= wanted * distinct
    return TaskKind.LABELS if few and longest <= LONGEST_LABEL_WORDS else TaskKind.FREE


def take_snapshot(
    store: Store, settings: Settings, base: PreparedBase, cycle: Cycle, experience: Experience
) -> tuple[Snapshot, list[tuple[str, str]]]:
    """Writes the cycle's snapshot; returns it and the (row hash, role) of its new rows.

    Which remembered rows are rehearsed is known only when the training has drawn them.
    """
    tasks = settle_tasks(store, settings, cycle.id)
    strategy = strategy_spec(settings)
    memory = _memory(store, settings, cycle.parent)
    suites = {
        task: (suite.version, suite.hash, store.suite_rows(task, suite.version))
        for task, suite in sorted(store.latest_suites().items())
    }
    snapshot = snapshots.write(
        settings.state_dir / "snapshots",
        train=experience.train,
        validation=experience.validation,
        memory=memory,
        suites=suites,
        probe=_probe(store, settings, cycle.parent, list(suites)),
        tasks=[
            {"name": t.name, "kind": t.kind.value, "metric": t.metric.value, "labels": list(t.labels)}
            for t in tasks.values()
            if t.name in suites
        ],
        meta={
            "parent": cycle.parent,
            "new_tasks": experience.tasks,
            "model": model_spec(settings, base).__dict__,
            "lora": lora_spec(settings).__dict__,
            "train": train_spec(settings).__dict__,
            "strategy": {**strategy.__dict__, "methods": list(strategy.methods)},
            "auto": _auto(settings),
            "max_new_tokens": settings.evaluation.max_new_tokens,
            "gate": settings.gate.model_dump(),
            "rescue": settings.rescue.model_dump(),
        },
    )
    roles = [(row.hash, "train") for row in experience.train]
    roles += [(row.hash, "validation") for row in experience.validation]
    return snapshot, roles


def _auto(settings: Settings) -> dict[str, object] | None:
    """What the choice of a strategy is made from (`daemon.auto`); None where the configuration made it."""
    if not settings.strategy.auto:
        return None
    return {
        "minutes": settings.strategy.auto_minutes,
        "shortlist": [list(methods) for methods in combinations.SHORTLIST],
    }


def _memory(store: Store, settings: Settings, parent: int | None) -> list[StoredRow]:
    """The rows that the parent's training remembers, when they are to be rehearsed and still count."""
    if parent is None or not combinations.REMEMBER.intersection(strategy_spec(settings).methods):
        return []
    remembered = memory_hashes(parent_result(store, settings, parent) / "state")
    stale = store.superseded(remembered)
    return store.rows_by_hash([row_hash for row_hash in remembered if row_hash not in stale])


def _probe(store: Store, settings: Settings, parent: int | None, tasks: Sequence[str]) -> list[StoredRow]:
    """Validation rows of every task, old and new, to choose candidates by; their content decides which.

    None where there is no champion, or nothing to be chosen.
    """
    if parent is None or not (settings.rescue.attempts or settings.strategy.auto):
        return []
    rows = {task: store.task_rows(task, Split.VALIDATION) for task in tasks}
    limit = settings.rescue.probe_rows
    return [row for task in tasks for row in sorted(rows[task], key=lambda row: row.hash)[:limit]]


def parent_result(store: Store, settings: Settings, version: int) -> Path:
    """Result directory of the training that made a model version."""
    model = store.model(version)
    assert model is not None
    return settings.state_dir / model.result


def model_spec(settings: Settings, base: PreparedBase) -> ModelSpec:
    model = settings.model
    return ModelSpec(
        path=base.path,
        fingerprint=base.fingerprint,
        system_prompt=model.system_prompt,
        max_tokens=min(model.max_tokens, base.context_tokens),
        dtype=model.dtype,
        device=model.device,
    )


def lora_spec(settings: Settings) -> LoraSpec:
    return LoraSpec(**settings.lora.model_dump())


def train_spec(settings: Settings) -> TrainSpec:
    return TrainSpec(**settings.training.model_dump(exclude={"min_rows", "time_limit"}))


def strategy_spec(settings: Settings) -> StrategySpec:
    """The first of the shortlist when it is still to be chosen."""
    chosen = settings.strategy.model_dump(exclude={"auto_minutes"})
    if settings.strategy.auto:
        chosen["methods"] = combinations.SHORTLIST[0]
    return StrategySpec(**chosen)
