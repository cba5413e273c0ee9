"""Which model answers which suite, and what came of it.

An exam is a suite version, a label set and a way of decoding; a model that has sat an exam never
sits it again: its predictions are in the store. The scores written here are means over those
predictions, so every number can be recomputed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from daemon import experience
from daemon.base import located
from daemon.executor import Executor, OnProgress, Stop
from daemon.gate import SuiteScores
from daemon.settings import Settings
from storage import artifacts, snapshots
from storage.errors import IntegrityError
from storage.parquet import SnapshotRow
from storage.records import Cycle, Prediction, Score
from storage.snapshots import Snapshot
from storage.store import Store
from strategies.contract import EvaluateJob, LoraSpec, ModelSpec, StrategySpec, SuiteJob, Task, TrainSpec


@dataclass(frozen=True, kw_only=True)
class Specs:
    """How the cycle was asked to train: fixed in its snapshot, whatever the configuration says later."""

    model: ModelSpec
    lora: LoraSpec
    train: TrainSpec
    strategy: StrategySpec
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Exam:
    """One suite version of one task, and the key under which its predictions are stored."""

    task: Task
    version: int
    key: str


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The rows that an exam asks: where they lie, and the hash over their exact texts."""

    version: int  # of the suite; 0 for validation rows
    hash: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Session:
    """Several models and the exams that they sit: `models` maps labels to the models' store keys."""

    exams: tuple[Exam, ...]
    models: dict[str, str]
    job: EvaluateJob


def specs(snapshot: Snapshot) -> Specs:
    meta = snapshot.info["meta"]
    return Specs(
        model=ModelSpec.from_dict(meta["model"]),
        lora=LoraSpec.from_dict(meta["lora"]),
        train=TrainSpec.from_dict(meta["train"]),
        strategy=StrategySpec.from_dict(meta["strategy"]),
        max_new_tokens=meta["max_new_tokens"],
    )


def check_suites(store: Store, snapshot: Snapshot) -> None:
    """Raises `IntegrityError` when a suite in the store is not what was frozen. The snapshot's own files were
    compared with its manifest when it was loaded."""
    for entry in snapshot.info["suites"]:
        rows = store.suite_rows(entry["task"], entry["version"])
        if snapshots.suite_hash(rows) != entry["hash"]:
            raise IntegrityError(
                f"suite {entry['task']}@v{entry['version']} in the store is not the one that was frozen "
                f"(hash {snapshots.suite_hash(rows)[:12]}, frozen as {entry['hash'][:12]}); restore the "
                "store from a backup, then `daemon retrain-now`"
            )


def plan(
    store: Store, settings: Settings, cycle: Cycle, snapshot: Snapshot, result: Path, out: Path
) -> Session:
    """Everything that base, champion and the candidate in `result` must answer and have not answered yet."""
    adapters: dict[str, Path | None] = {"base": None}
    if cycle.parent is not None:
        adapters["champion"] = experience.parent_result(store, settings, cycle.parent) / "adapter"
    adapters["candidate"] = result / "adapter"
    return _session(store, settings, snapshot, _suite_papers(snapshot), adapters, out)


def probe(
    store: Store, settings: Settings, snapshot: Snapshot, adapters: Mapping[str, Path], out: Path
) -> Session:
    """What these adapters must answer to be chosen by: the snapshot's validation rows, and nothing else."""
    return _session(store, settings, snapshot, _probe_papers(snapshot), adapters, out)


def exams(snapshot: Snapshot) -> tuple[Exam, ...]:
    """One a suite: what the gate's evidence comes from."""
    return _exams(snapshot, _suite_papers(snapshot))


def probe_exams(snapshot: Snapshot) -> tuple[Exam, ...]:
    """The same on validation rows, by which candidates are chosen. Snapshots from before that have none."""
    return _exams(snapshot, _probe_papers(snapshot)) if "probe" in snapshot.info["counts"] else ()


def _suite_papers(snapshot: Snapshot) -> dict[str, Paper]:
    return {
        entry["task"]: Paper(version=entry["version"], hash=entry["hash"], path=snapshot.path / entry["file"])
        for entry in snapshot.info["suites"]
    }


def _probe_papers(snapshot: Snapshot) -> dict[str, Paper]:
    rows: dict[str, list[SnapshotRow]] = {}
    for row in snapshot.rows("probe"):
        rows.setdefault(row.task, []).append(row)
    return {
        task: Paper(version=0, hash=snapshots.suite_hash(found), path=snapshot.path / "probe.parquet")
        for task, found in rows.items()
    }


def _exams(snapshot: Snapshot, papers: Mapping[str, Paper]) -> tuple[Exam, ...]:
    spec = specs(snapshot)
    tasks = [Task.from_dict(task) for task in snapshot.info["tasks"] if task["name"] in papers]
    return tuple(_exam(task, papers[task.name], spec.model, spec.max_new_tokens) for task in tasks)


def _session(
    store: Store,
    settings: Settings,
    snapshot: Snapshot,
    papers: Mapping[str, Paper],
    adapters: Mapping[str, Path | None],
    out: Path,
) -> Session:
    spec = specs(snapshot)
    exams = _exams(snapshot, papers)
    models = {label: model_key(path, spec.model.fingerprint) for label, path in adapters.items()}
    unanswered = tuple(
        (label, exam.task.name)
        for label, model in models.items()
        for exam in exams
        if not store.predictions(model, exam.key)
    )
    job = EvaluateJob(
        out=str(out),
        model=located(settings, spec.model) if unanswered else spec.model,
        models={label: str(path) if path else None for label, path in adapters.items()},
        keys=models,
        suites=tuple(SuiteJob(task=e.task, path=str(papers[e.task.name].path)) for e in exams),
        plan=unanswered,
        batch_size=settings.evaluation.batch_size,
        max_new_tokens=spec.max_new_tokens,
        threads=spec.train.threads,
        home=str(settings.state_dir),
    )
    return Session(exams=exams, models=models, job=job)


def sit(store: Store, executor: Executor, session: Session, on_progress: OnProgress, stop: Stop) -> None:
    """Has the worker answer what is still to be answered, and puts the predictions into the store."""
    if session.job.plan:
        executor.evaluate(session.job, on_progress, stop)
        artifacts.verify(Path(session.job.out))
        _store_predictions(store, session)


def means(store: Store, session: Session, label: str) -> dict[str, float]:
    """A model's mean score on each task of the session, over the predictions in the store."""
    return {exam.task.name: _mean(store, session.models[label], exam)[0] for exam in session.exams}


def scores(store: Store, cycle: Cycle, session: Session) -> list[Score]:
    """The means over the predictions in the store, as the cycle's scores."""
    found = []
    for label, model in session.models.items():
        for exam in session.exams:
            score, size = _mean(store, model, exam)
            found.append(
                Score(
                    cycle_id=cycle.id,
                    label=label,
                    task=exam.task.name,
                    version=exam.version,
                    model=model,
                    exam=exam.key,
                    metric=exam.task.metric.value,
                    score=score,
                    size=size,
                )
            )
    return found


def _mean(store: Store, model: str, exam: Exam) -> tuple[float, int]:
    """Mean and number of the scores of a model in an exam that it has sat."""
    values = [prediction.score for prediction in store.predictions(model, exam.key).values()]
    return sum(values) / len(values), len(values)


def evidence(store: Store, cells: Iterable[Score], new_tasks: Sequence[str]) -> list[SuiteScores]:
    """Per-row scores of the three models on every suite that one cycle's scores name, for the gate.

    A new task without a suite is there with no rows at all, so that the verdict says so.
    """
    found: dict[str, dict[str, Score]] = {}
    for score in cells:
        found.setdefault(score.task, {})[score.label] = score
    suites = [_suite_scores(store, task, labels, task in new_tasks) for task, labels in sorted(found.items())]
    missing = [task for task in new_tasks if task not in found]
    return suites + [
        SuiteScores(task=task, suite=f"{task} (no suite yet)", new=True, base=(), champion=(), candidate=())
        for task in missing
    ]


def model_key(adapter: Path | None, fingerprint: str) -> str:
    """Identity of a model in the store: what it would answer with, not where it lies."""
    if adapter is None:
        return f"base:{fingerprint}"
    return adapter_hash(adapter)


def adapter_hash(adapter: Path) -> str:
    """SHA-256 of an adapter's weights."""
    return artifacts.sha256_file(adapter / "adapter_model.safetensors")


def _exam(task: Task, paper: Paper, model: ModelSpec, max_new_tokens: int) -> Exam:
    parts = {
        "suite": paper.hash,
        "task": json.loads(task.to_json()),
        "prompt": model.system_prompt,
        "limits": [model.max_tokens, max_new_tokens],
        "dtype": model.dtype,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return Exam(task=task, version=paper.version, key=key)


def _store_predictions(store: Store, session: Session) -> None:
    exams = {exam.task.name: exam for exam in session.exams}
    answered: dict[tuple[str, str], list[Prediction]] = {}
    for line in pq.read_table(Path(session.job.out) / "predictions.parquet").to_pylist():
        prediction = Prediction(**{key: line[key] for key in Prediction.__dataclass_fields__})
        answered.setdefault((line["model"], line["task"]), []).append(prediction)
    for (label, task), predictions in answered.items():
        store.put_predictions(session.models[label], exams[task].key, predictions)


def _suite_scores(store: Store, task: str, labels: dict[str, Score], new: bool) -> SuiteScores:
    rows = sorted(store.predictions(labels["candidate"].model, labels["candidate"].exam))

    def of(label: str) -> list[float]:
        score = labels[label]
        predictions = store.predictions(score.model, score.exam)
        return [predictions[row].score for row in rows]

    champion = "champion" if "champion" in labels else "base"
    return SuiteScores(
        task=task,
        suite=f"{task}@v{labels['candidate'].version}",
        new=new,
        base=of("base"),
        champion=of(champion),
        candidate=of("candidate"),
    )
