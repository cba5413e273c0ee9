"""What people and programs are told: the accuracy matrix, forgetting, and verdicts in plain words.

Everything is computed from the store; nothing is remembered here and nothing is decided.
"""

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from daemon import rescue, tradeoff
from storage.errors import ControlError
from storage.records import Cycle, ModelVersion, State
from storage.removals import ANSWERS
from storage.store import Store
from strategies import metrics, scoring
from strategies.contract import Record, TaskKind

NOTE = "note"  # the event that a training says what people should know
_FOR_EVER = 2**62  # after every cycle


@dataclass(frozen=True, kw_only=True)
class Matrix(Record):
    """R[i][j]: score on the suite of task j after row i; row 0 is the base. None: not measured.

    Rows are the base and the model versions in the champion's lineage, columns the tasks in the order
    they were first learned. `learned_at[j]` is the row in which task j was first trained on, or None.
    A column is measured on the rows of the task's first suite version that were in every one since.
    """

    tasks: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    learned_at: tuple[int | None, ...]

    def metrics(self) -> dict[str, float]:
        """Average accuracy, backward transfer, forgetting, forward transfer and learning accuracy.

        Only those that the matrix can tell: nothing can be forgotten before a second cycle.
        """
        learned = [j for j, row in enumerate(self.learned_at) if row is not None]
        values = [[line[j] for j in learned] for line in self.values]
        when = [row for row in self.learned_at if row is not None]
        found = metrics.measured(values, when)
        return {name: value for name, value in found.items() if value is not None}


def matrix(store: Store, *, cycle_id: int | None = None) -> Matrix:
    """The accuracy matrix of the champion's lineage, or, with `cycle_id`, as it is (or would be) after it.

    A cell is filled from the newest exam that its model sat, in whichever cycle that was.
    """
    lineage = _lineage(store, cycle_id)
    cells = store.comparable_scores(cycle_id if cycle_id is not None else _FOR_EVER)
    places = {cycle: row for row, (cycle, _) in enumerate(lineage, start=1)}
    first = {task: places[cycle] for task, cycle in store.first_learned(list(places)).items()}
    tasks = sorted({task for _, task in cells}, key=lambda task: (first.get(task, len(lineage) + 1), task))
    keys = [_base_key(store, cycle_id), *(key for _, key in lineage)]
    return Matrix(
        tasks=tuple(tasks),
        rows=("base", *(f"cycle {cycle}" for cycle, _ in lineage)),
        values=tuple(tuple(cells.get((key, task)) for task in tasks) for key in keys),
        learned_at=tuple(first.get(task) for task in tasks),
    )


def cycle_report(store: Store, cycle_id: int) -> dict[str, Any]:
    """Everything about one cycle as plain JSON values, and in sentences (`words`).

    Raises `ControlError` when there is no such cycle, `IntegrityError` when its record is damaged.
    """
    cycle = store.cycle(cycle_id)
    if cycle is None:
        raise ControlError(f"there is no cycle {cycle_id}; see `daemon history`")
    with store.reading(f"what it has of cycle {cycle_id}"):
        told = _gathered(store, cycle)
        return {**told, "words": explain(told)}


def _gathered(store: Store, cycle: Cycle) -> dict[str, Any]:
    cycle_id, verdict = cycle.id, store.verdict(cycle.id)
    table = matrix(store, cycle_id=cycle_id) if store.scores(cycle_id) else None
    roles = {role: len(store.cycle_rows(cycle_id, role)) for role in ("train", "validation", "replay")}
    return {
        "cycle": _plain(asdict(cycle)),
        "pulled": _pulled(store, cycle_id),
        "notes": _notes(store, cycle_id),
        "rows": roles,
        "scores": [_plain(asdict(score)) for score in store.scores(cycle_id)],
        "verdict": json.loads(verdict[1]) if verdict else None,
        "matrix": _plain(asdict(table)) if table else None,
        "metrics": table.metrics() if table else {},
        "attempts": _attempts(store, cycle_id),
        "pruned": _pruned(store, cycle_id),
        "events": [_plain(asdict(event)) for event in reversed(store.events(limit=50, cycle_id=cycle_id))],
    }


def explain(report: dict[str, Any]) -> list[str]:
    """A cycle in sentences: what it learned, what became of the old tasks, and why it ended as it did."""
    cycle, rows, verdict = report["cycle"], report["rows"], report["verdict"]
    lines = [_head(cycle)]
    if report["pulled"]:
        lines.append(f"It pulled rows: {report['pulled']}.")
    if rows["train"]:
        trained = verdict or any(attempt["model"] for attempt in report["attempts"])
        verb = "learned" if trained else "was to learn" if cycle["finished_at"] else "is to learn"
        start = "the base model" if cycle["parent"] is None else f"version {cycle['parent']}"
        replayed = f", rehearsing {rows['replay']} remembered ones" if rows["replay"] else ""
        lines.append(f"It {verb} {rows['train']} new rows on top of {start}{replayed}.")
    lines += [f"Mind: {note}." for note in report["notes"]]
    lines += _measures(report["scores"])
    if verdict:
        suites = {s["reason"]: f"  {'new' if s['new'] else 'old'}  {s['reason']}" for s in verdict["suites"]}
        lines += suites.values()
        if not verdict["passed"]:
            lines += [f"  also {reason}" for reason in verdict["reasons"] if reason not in suites]
    lines += _attempts_in_words(report["attempts"])
    if report["metrics"]:
        told = ", ".join(
            f"{name.replace('_', ' ')} {value * 100:.1f}" for name, value in report["metrics"].items()
        )
        lines.append(f"Over all tasks: {told}.")
    if report["pruned"]:
        when = report["pruned"]["answers"][:10]
        lines.append(f"Its answers were pruned on {when}: its numbers stay, and cannot be computed again.")
    return lines


def _head(cycle: dict[str, Any]) -> str:
    """The outcome; of a cycle that is under way only its state. Of a decided one the verdict alone: MLflow
    is told of it then, and keeps what it was told."""
    is_decided = cycle["state"] == State.DECIDED
    state = "" if is_decided else f" is {cycle['state']}"
    has_outcome = cycle["reason"] and (cycle["finished_at"] or is_decided)
    return f"Cycle {cycle['id']}{state}" + (f": {cycle['reason']}" if has_outcome else ".")


def _measures(scores: list[dict[str, Any]]) -> list[str]:
    """What the scores are, by metric."""
    tasks: dict[str, set[str]] = {}
    for score in scores:
        tasks.setdefault(score["metric"], set()).add(score["task"])
    told = [f"{name.replace('_', ' ')} of {', '.join(sorted(its))}" for name, its in sorted(tasks.items())]
    return [f"Scores: {'; '.join(told)}."] if told else []


def _notes(store: Store, cycle_id: int) -> list[str]:
    """What its trainings said that people should know; one that was done again says it again."""
    events = reversed(store.events(limit=50, cycle_id=cycle_id, kind=NOTE))
    return list(dict.fromkeys(str(event.detail.get("text", "")) for event in events))


def _pulled(store: Store, cycle_id: int) -> str:
    """What the cycle's pull found and what it kept out, in words."""
    return next((str(e.detail.get("reason", "")) for e in store.events(1, cycle_id, "pulled")), "")


def _pruned(store: Store, cycle_id: int) -> dict[str, Any]:
    """When the answers behind the candidate's scores were removed on purpose, if they were."""
    pruned, sat = store.pruned(), store.survey().sat()
    gone = [
        pruned[ANSWERS + score.model].at
        for score in store.scores(cycle_id)
        if score.label == "candidate"
        and ANSWERS + score.model in pruned
        and (score.model, score.exam) not in sat  # the same model may have sat another exam since
    ]
    return {"answers": gone[0].isoformat() + "Z"} if gone else {}


def _attempts(store: Store, cycle_id: int) -> list[dict[str, Any]]:
    """Every candidate of a cycle: how it was made, what the gate said, and a blend's trade-off curve."""
    candidates = store.candidates(cycle_id)
    chosen = rescue.concluded(candidates) if candidates else None
    ended = store.verdict(cycle_id) is not None
    return [
        {
            **_plain(asdict(candidate)),
            "words": rescue.words(candidate),
            "strategy": json.loads(candidate.strategy) if candidate.strategy else None,
            "verdict": json.loads(candidate.verdict) if candidate.verdict else None,
            "curve": _curve(candidate.curve, candidate.share),
            "concluded": ended and candidate == chosen,
        }
        for candidate in candidates
    ]


def _curve(text: str | None, chosen: float | None) -> list[dict[str, Any]]:
    """The curve as a table: means over new and old tasks, the task that lost most, and every score."""
    if text is None:
        return []
    curve = tradeoff.Curve.from_json(text)
    return [
        {
            "share": point.share,
            "new": curve.new(point),
            "old": curve.old(point),
            "worst_task": curve.worst(point)[0],
            "worst_change": curve.worst(point)[1],
            "chosen": point.share == chosen,
            "scores": dict(point.scores),
        }
        for point in curve.points
    ]


def _attempts_in_words(attempts: list[dict[str, Any]]) -> list[str]:
    """A sentence an attempt, where there was more than the plain training, and why that was as it was."""
    if len(attempts) < 2:
        return [f"Its strategy: {attempt['change']}." for attempt in attempts if attempt["change"]]
    lines = [f"It took {len(attempts)} attempts:"]
    for attempt in attempts:
        outcome = attempt["note"] or (attempt["verdict"] or {}).get("summary") or "under way"
        chosen = next((point for point in attempt["curve"] if point["chosen"]), None)
        seen = f", on validation rows {_seen(chosen)}" if chosen else ""
        kept = "; this one is the version" if attempt["concluded"] else ""
        lines.append(f"  {attempt['number']}  {attempt['words']}{seen}: {outcome}{kept}")
    return lines


def _seen(point: dict[str, Any]) -> str:
    new, change = point["new"] * 100, point["worst_change"] * 100
    return f"{new:.1f} on the new tasks and {change:+.1f} on {point['worst_task']}"


def classification(store: Store, cycle_id: int) -> dict[str, Any]:
    """Macro-F1 and per-class precision and recall of the candidate, for tasks with closed labels."""
    kinds = {task.name: task for task in store.tasks()}
    found = {}
    for score in store.scores(cycle_id):
        task = kinds[score.task]
        if score.label != "candidate" or task.kind != TaskKind.LABELS:
            continue
        answers = store.predictions(score.model, score.exam)
        golds = {row.hash: row.answer for row in store.rows_by_hash(list(answers))}
        pairs = [(golds[row], answers[row].prediction) for row in sorted(answers)]
        report = scoring.classification_report([g for g, _ in pairs], [p for _, p in pairs], task.labels)
        found[score.task] = _plain(asdict(report))
    return found


def _lineage(store: Store, cycle_id: int | None) -> list[tuple[int, str]]:
    """(cycle, model key) from the oldest ancestor to the newest, the candidate of `cycle_id` last."""
    models = {model.version: model for model in store.models()}
    if cycle_id is None:
        champion = store.champion()
        return _ancestors(models, champion.version if champion else None)
    cycle = store.cycle(cycle_id)
    candidate = next((s.model for s in store.scores(cycle_id) if s.label == "candidate"), None)
    above = _ancestors(models, cycle.parent if cycle else None)
    return [*above, (cycle_id, candidate)] if candidate else above


def _ancestors(models: dict[int, ModelVersion], version: int | None) -> list[tuple[int, str]]:
    line = []
    while version is not None:
        model = models[version]
        line.append((model.cycle_id, model.adapter_hash))
        version = model.parent
    return line[::-1]


def _base_key(store: Store, cycle_id: int | None) -> str:
    scores = store.scores(cycle_id)
    return next((s.model for s in reversed(scores) if s.label == "base"), "base")


def _plain(value: Any) -> Any:
    """JSON types only: times as ISO text, tuples as lists."""
    return json.loads(
        json.dumps(value, default=lambda v: f"{v:%Y-%m-%dT%H:%M:%S}Z" if isinstance(v, datetime) else str(v))
    )
