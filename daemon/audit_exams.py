"""Audit of predictions, scores and verdicts: every number can be made again from what is on record.

One function an invariant; each yields what contradicts it. Reads, and changes nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from daemon import examination, gate
from daemon.audit_cycles import SHOW
from daemon.audit_rows import STORE
from daemon.evidence import Evidence, Wrong, same
from storage.records import Candidate, Cycle, Prediction, Score, StoredRow
from storage.removals import VEILED
from storage.snapshots import Snapshot
from strategies import scoring
from strategies.contract import Metric


def each_prediction_belongs_to_an_exam(evidence: Evidence) -> Iterator[Wrong]:
    """An exam that a snapshot asks for; and a suite is only ever put to a model that is on record.

    Models that only answered validation rows are gone: blends and trials that were not chosen.
    """
    scored = {score.exam for score in evidence.scores}
    models = {c.model for tried in evidence.candidates.values() for c in tried}
    models |= {model.adapter_hash for model in evidence.models.values()}
    for (model, exam), count in evidence.sat.items():
        known = evidence.exams.get(exam)
        if known is None and exam not in scored and not evidence.broken_snapshots:
            told = f"{count} predictions of model {model[:12]} are for the exam {exam}, which nobody set"
            yield Wrong(message=told, next=STORE)
        elif known and known.version and model not in models and not model.startswith("base:"):
            told = f"{known.task.name}@v{known.version} was answered by model {model[:12]}, which nobody made"
            yield Wrong(message=told, next=STORE)


def each_prediction_is_worth_what_its_text_says(evidence: Evidence) -> Iterator[Wrong]:
    for model, key in evidence.sat:
        evidence.tick()
        exam, answers = evidence.exams.get(key), evidence.store.predictions(model, key)
        known = evidence.store.survey().known(list(answers)) - evidence.untrue_rows
        for row in evidence.store.rows_by_hash(sorted(known)):
            wrong = _misjudged(answers[row.hash], row, exam.task.metric if exam else None)
            if wrong:
                name = f"the answer of model {model[:12]} to row {row.hash} in exam {key}"
                yield Wrong(message=f"{name}, {wrong}", next=STORE)


def _misjudged(told: Prediction, row: StoredRow, metric: Metric | None) -> str | None:
    if told.prediction == VEILED:
        return None
    for name, value, worth in (
        ("exact match", told.exact_match, scoring.exact_match(told.prediction, row.answer)),
        ("token F1", told.token_f1, scoring.token_f1(told.prediction, row.answer)),
        ("score", told.score, scoring.score(metric, told.prediction, row.answer) if metric else told.score),
    ):
        if not same(value, worth):
            return f"{told.prediction[:40]!r}, has the {name} {value:g}, and is worth {worth:g}"
    return None


def each_answered_row_is_in_the_store(evidence: Evidence) -> Iterator[Wrong]:
    """Rows of broken suites, and erased ones, are told there."""
    elsewhere = (evidence.members.get(suite, set()) for suite in evidence.broken_suites)
    examined = evidence.store.erased().union(*elsewhere)
    for model, exam in evidence.sat:
        answered = set(evidence.store.predictions(model, exam)) - examined
        for row in sorted(answered - evidence.store.survey().known(sorted(answered))):
            told = f"model {model[:12]} answered row {row} in exam {exam}, and the store has no such row"
            yield Wrong(message=told, next=STORE)


def each_score_is_the_mean_of_its_predictions(evidence: Evidence) -> Iterator[Wrong]:
    for score in evidence.scores:
        answers = evidence.store.predictions(score.model, score.exam).values()
        mean = sum(answer.score for answer in answers) / len(answers) if answers else None
        told = None
        if evidence.is_pruned(score):
            continue
        if not evidence.is_whole(score) or score.size != len(answers):
            told = f"is over {score.size} rows; {len(answers)} answers are on record, not one for each row"
        elif not same(score.score, mean):
            told = f"is {score.score:g}, the mean of its predictions is {mean:g}"
        if told:
            yield Wrong(message=f"{_name(score)} {told}", next=SHOW.format(cycle=score.cycle_id))


def each_score_is_of_its_cycles_own_models_and_exams(evidence: Evidence) -> Iterator[Wrong]:
    for score in evidence.scores:
        cycle = evidence.cycles.get(score.cycle_id)
        snapshot = evidence.snapshot_of(cycle) if cycle else None
        told = _foreign(evidence, cycle, snapshot, score) if cycle and snapshot else None
        if cycle is None or told:
            told = told or "is of a cycle that is not on record"
            yield Wrong(message=f"{_name(score)} {told}", next=SHOW.format(cycle=score.cycle_id))


def _foreign(evidence: Evidence, cycle: Cycle, snapshot: Snapshot, score: Score) -> str | None:
    exam = next((e for e in examination.exams(snapshot) if e.task.name == score.task), None)
    asked = (exam.key, exam.version, exam.task.metric.value) if exam else None
    if asked != (score.exam, score.version, score.metric):
        return f"is of the exam {score.exam} by {score.metric}, the snapshot asks {asked}"
    sound = score.label != "champion" or evidence.is_sound(cycle.parent)
    if sound and score.model not in _sitters(evidence, cycle, snapshot, score.label):
        return f"is of model {score.model[:12]}, which is not the cycle's {score.label}"
    return None


def _sitters(evidence: Evidence, cycle: Cycle, snapshot: Snapshot, label: str) -> set[str | None]:
    """Who may sit under a label; before the verdict that may be any of the candidates."""
    if label == "base":
        return {examination.model_key(None, snapshot.info["meta"]["model"]["fingerprint"])}
    if label == "champion":
        return {m.adapter_hash for m in evidence.ancestry(cycle.parent)[:1]}
    candidates = evidence.candidates[cycle.id]
    chosen = evidence.concluded(cycle.id)
    decided = chosen is not None and cycle.id in evidence.verdicts
    return {chosen.model} if chosen and decided else {candidate.model for candidate in candidates}


def each_verdict_can_be_reached_again(evidence: Evidence) -> Iterator[Wrong]:
    """The gate, asked again with the same thresholds and predictions, says the same of every candidate."""
    for cycle in evidence.cycles.values():
        evidence.tick()
        snapshot = evidence.snapshot_of(cycle)
        cells = [score for score in evidence.scores if score.cycle_id == cycle.id]
        if snapshot is None or not cells:
            continue
        for candidate in evidence.candidates[cycle.id]:
            if candidate.verdict and candidate.model:
                with evidence.store.reading(f"a verdict of cycle {cycle.id}"):
                    told = _judged_otherwise(evidence, candidate, snapshot, cells)
                if told:
                    name = f"cycle {cycle.id}, attempt {candidate.number}: the verdict on record says"
                    yield Wrong(message=f"{name} {told}", next=SHOW.format(cycle=cycle.id))


def _judged_otherwise(
    evidence: Evidence, candidate: Candidate, snapshot: Snapshot, cells: list[Score]
) -> str | None:
    """Incomplete answers are told of by `each_score_is_the_mean_of_its_predictions`."""
    model = candidate.model or ""
    own = [replace(cell, model=model) if cell.label == "candidate" else cell for cell in cells]
    if not all(evidence.is_whole(cell) for cell in own):
        return None
    meta = snapshot.info["meta"]
    proof = examination.evidence(evidence.store, own, meta["new_tasks"])
    again = gate.judge(proof, gate.Thresholds.from_dict(meta["gate"]))
    before, now = json.loads(candidate.verdict or ""), json.loads(again.to_json())
    now["thresholds"] = {
        name: now["thresholds"].get(name) for name in before["thresholds"]
    }  # newer ones aside
    for name in ("passed", "gain", "thresholds"):
        if not _alike(before[name], now[name]):
            return f"{name} {before[name]}, the predictions say {now[name]}"
    return _suites_otherwise(before["suites"], now["suites"])


def _suites_otherwise(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str | None:
    if [suite["suite"] for suite in before] != [suite["suite"] for suite in now]:
        return f"{len(before)} suites, the predictions are on {len(now)}"
    for old, new in zip(before, now, strict=True):
        for name in ("new", "rows", "base", "champion", "candidate", "change", "low", "high", "finding"):
            if not _alike(old[name], new[name]):
                return f"{name} {old[name]} on {old['suite']}, the predictions say {new[name]}"
    return None


def _alike(one: Any, other: Any) -> bool:
    return same(one, other) if isinstance(one, float) and isinstance(other, float) else bool(one == other)


def _name(score: Score) -> str:
    return f"the score of the {score.label} on {score.task}@v{score.version} in cycle {score.cycle_id}"
