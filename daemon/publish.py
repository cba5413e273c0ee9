"""What MLflow is told about a cycle: one run, one model version, one step of the long-lived stream run.

Gathers from the store and the cycle's folder; `storage.registry` does the talking. Calling it again
after a crash finds what is already there.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from daemon import experience, report
from daemon.config import Settings
from daemon.promote import CHALLENGER
from storage import artifacts, snapshots
from storage.records import Cycle, ModelVersion, Score
from storage.registry import CycleRecord, Matrix, Registry
from storage.store import Store
from strategies.contract import TrainReport

SERVED_MODEL = Path(__file__).parent / "served_model.py"


def publish(store: Store, registry: Registry, settings: Settings, cycle: Cycle, folder: Path) -> int:
    """Logs the cycle and registers its adapter; returns the model version. Idempotent.

    Raises `RegistryUnavailable` when MLflow cannot be reached: the verdict is safe in the store, and
    the cycle stays `decided` until this succeeds.
    """
    artifacts.verify(folder / "train")
    record = _record(store, settings, cycle, folder)
    version = registry.publish(record)
    store.add_model(_model(store, cycle, version, folder, settings))
    registry.log_stream(cycle.id, _stream_metrics(store, cycle), record.matrix)
    registry.set_alias(CHALLENGER, version)
    return version


def parameters(settings: Settings) -> dict[str, str]:
    """The configuration, flattened for MLflow's parameter table. Locations and passwords stay out of it."""
    shown = settings.model_dump(mode="json", exclude={"mlflow", "source", "tasks", "schedule"})
    return {
        f"{section}.{key}": str(value) for section, values in shown.items() for key, value in values.items()
    }


def _record(store: Store, settings: Settings, cycle: Cycle, folder: Path) -> CycleRecord:
    training = TrainReport.from_json((folder / "train" / "report.json").read_text())
    told = report.cycle_report(store, cycle.id)
    table = report.matrix(store, cycle_id=cycle.id)
    verdict = told["verdict"]
    words = "\n".join(report.explain(told)) + "\n"
    return CycleRecord(
        cycle_id=cycle.id,
        started_at=cycle.started_at or cycle.requested_at,
        finished_at=store.clock(),
        params=parameters(settings),
        tags=_tags(settings, cycle, training, folder),
        curve=tuple(asdict(point) for point in training.curve),
        validation_losses=training.validation_losses,
        metrics=_metrics(store, cycle, training, table),
        artifacts_json={
            "verdict.json": verdict,
            "matrix.json": asdict(table),
            "training.json": json.loads(training.to_json()),
            "classification.json": report.classification(store, cycle.id),
        },
        texts={"verdict.md": words},
        description=words,
        predictions=_predictions(store, cycle),
        matrix=Matrix(columns=table.tasks, rows=table.rows, values=table.values),
        adapter_dir=folder / "train" / "adapter",
        state_dir=folder / "train" / "state",
        model_config=_model_config(store, settings, cycle, folder),
        version_tags={
            "holdfast.verdict": "passed" if verdict["passed"] else "rejected",
            "holdfast.reason": verdict["summary"],
            "holdfast.parent": str(cycle.parent or "base"),
            "holdfast.snapshot": cycle.snapshot or "",
        },
    )


def _tags(settings: Settings, cycle: Cycle, training: TrainReport, folder: Path) -> dict[str, str]:
    meta = _meta(settings, cycle)
    return {
        "holdfast.snapshot": cycle.snapshot or "",
        "holdfast.parent": str(cycle.parent or "base"),
        "holdfast.strategy": training.strategy,
        "holdfast.base": meta["model"]["fingerprint"],
        "holdfast.tasks": ",".join(meta["new_tasks"]),
        "holdfast.trigger": cycle.trigger,
        "holdfast.adapter": artifacts.sha256_file(folder / "train" / "adapter" / "adapter_model.safetensors"),
    }


def _metrics(store: Store, cycle: Cycle, training: TrainReport, table: report.Matrix) -> dict[str, float]:
    found = {f"suite/{score.task}/{score.label}": score.score for score in store.scores(cycle.id)}
    for task, result in report.classification(store, cycle.id).items():
        found[f"suite/{task}/macro_f1"] = result["macro_f1"]
    return {
        **found,
        **table.metrics(),
        "train/rows": training.rows,
        "train/replay_rows": training.replay_rows,
        "train/seconds": training.seconds,
        "train/state_bytes": training.state_bytes,
    }


def _stream_metrics(store: Store, cycle: Cycle) -> dict[str, float]:
    """Forgetting over time, for the chart: what the bot's line of models would be after this cycle."""
    candidate = {f"suite/{s.task}": s.score for s in store.scores(cycle.id) if s.label == "candidate"}
    verdict = store.verdict(cycle.id)
    return {
        **candidate,
        **report.matrix(store, cycle_id=cycle.id).metrics(),
        "promoted": float(bool(verdict and verdict[0])),
    }


def _predictions(store: Store, cycle: Cycle) -> list[dict[str, Any]]:
    """One line a suite row: the question, the right answer, and what each model said."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for score in store.scores(cycle.id):
        _add_answers(store, score, lines)
    return [lines[key] for key in sorted(lines)]


def _add_answers(store: Store, score: Score, lines: dict[tuple[str, str], dict[str, Any]]) -> None:
    predictions = store.predictions(score.model, score.exam)
    for row in store.rows_by_hash(sorted(predictions)):
        line = lines.setdefault(
            (score.task, row.hash),
            {"task": score.task, "row": row.hash, "question": row.question, "answer": row.answer},
        )
        line[score.label] = predictions[row.hash].prediction
        line[f"{score.label}_score"] = predictions[row.hash].score


def _model(store: Store, cycle: Cycle, version: int, folder: Path, settings: Settings) -> ModelVersion:
    return ModelVersion(
        version=version,
        cycle_id=cycle.id,
        parent=cycle.parent,
        result=str((folder / "train").relative_to(settings.state_dir)),
        adapter_hash=artifacts.sha256_file(folder / "train" / "adapter" / "adapter_model.safetensors"),
        base=_meta(settings, cycle)["model"]["fingerprint"],
        created_at=store.clock(),
    )


def _model_config(store: Store, settings: Settings, cycle: Cycle, folder: Path) -> dict[str, Any]:
    """What the served model needs besides the adapter; the keys are those of daemon/served_model.py."""
    spec = dict(_meta(settings, cycle)["model"])
    tasks = experience.settle_tasks(store, settings)
    return {
        "base_path": spec.pop("path"),
        **spec,
        "tasks": [json.loads(task.to_json()) for task in tasks.values()],
        "max_new_tokens": settings.evaluation.max_new_tokens,
    }


def _meta(settings: Settings, cycle: Cycle) -> dict[str, Any]:
    assert cycle.snapshot is not None
    meta = snapshots.load(settings.state_dir / "snapshots" / cycle.snapshot).info["meta"]
    return dict(meta)
