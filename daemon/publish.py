"""What MLflow is told about a cycle: one run, one model version, one step of the long-lived stream run.

Gathers from the store and the cycle's folder; `storage.registry` does the talking. Calling it again
after a crash finds what is already there.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from daemon import examination, promote, report, rescue
from daemon.settings import Settings
from storage import artifacts, snapshots
from storage.records import Candidate, Cycle, ModelVersion, Score
from storage.registry import CycleRecord, Matrix, Registry
from storage.runs import CLASSES, TradeOff
from storage.store import Store
from strategies.contract import StrategySpec, TrainReport, result_files

SERVED_MODEL = Path(__file__).parent / "served_model.py"


def publish(store: Store, registry: Registry, settings: Settings, cycle: Cycle, candidate: Candidate) -> int:
    """Logs the cycle and registers the candidate's adapter; returns the model version. Idempotent.

    Raises `RegistryError` when MLflow cannot be reached or is not the one that has our versions: the
    verdict is safe in the store, and the cycle stays `decided` until this succeeds.
    """
    result = settings.state_dir / candidate.result
    artifacts.verify(result)
    promote.check_is_ours(store, registry)
    info = _info(settings, cycle)
    record = _record(store, settings, cycle, candidate, info)
    version = registry.publish(record)
    store.add_model(_model(store, cycle, candidate, version, record, info))
    registry.log_stream(cycle.id, _stream_metrics(store, cycle, record.metrics), record.matrix)
    registry.set_alias(promote.CHALLENGER, version, record.adapter_hash)
    return version


def parameters(settings: Settings, used: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, str]:
    """The configuration, flattened for MLflow's parameter table. Locations and passwords stay out of it.

    `used` is what a cycle was really run with, by section: it wins over a configuration edited since.
    """
    shown = settings.model_dump(mode="json", exclude={"mlflow", "source", "tasks", "schedule", "retention"})
    return {
        f"{section}.{key}": _parameter((used or {}).get(section, {}).get(key, value))
        for section, values in shown.items()
        for key, value in values.items()
    }


def _parameter(value: Any) -> str:
    """Methods as people write them, `replay+lwf`; no methods as an empty text."""
    return "+".join(value) if isinstance(value, list | tuple) else str(value)


def _record(
    store: Store, settings: Settings, cycle: Cycle, candidate: Candidate, info: dict[str, Any]
) -> CycleRecord:
    result = result_files(settings.state_dir / candidate.result)
    training = TrainReport.read(result["report"])
    told = report.cycle_report(store, cycle.id)
    table = report.Matrix(**told["matrix"]) if told["matrix"] else None  # None: no task has a suite yet
    verdict, meta = told["verdict"], info["meta"]
    classified = report.classification(store, cycle.id)
    used = {
        "model": meta["model"],
        "lora": {**meta["lora"], **_shape(result["adapter"])},
        "training": meta["train"],
        "strategy": {
            **rescue.strategy_of(candidate, StrategySpec.from_dict(meta["strategy"])).__dict__,
            **({"auto_minutes": meta["auto"]["minutes"]} if meta.get("auto") else {}),
        },
        "rescue": meta.get("rescue", {}),
        "evaluation": {"max_new_tokens": meta["max_new_tokens"]},
        "gate": verdict["thresholds"],
    }
    words = "\n".join(told["words"]) + "\n"
    return CycleRecord(
        cycle_id=cycle.id,
        started_at=cycle.started_at or cycle.requested_at,
        finished_at=store.clock(),
        params=parameters(settings, used),
        tags=_tags(cycle, training, meta),
        curve=tuple(asdict(point) for point in training.curve),
        validation_losses=training.validation_losses,
        metrics=_metrics(store, cycle, training, table, classified),
        artifacts_json={
            "verdict.json": verdict,
            "matrix.json": asdict(table) if table else None,
            "training.json": json.loads(training.to_json()),
            CLASSES: classified,
            "attempts.json": told["attempts"],
        },
        texts={"verdict.md": words},
        description=words,
        predictions=_predictions(store, cycle),
        matrix=Matrix(columns=table.tasks, rows=table.rows, values=table.values) if table else None,
        trade_off=_trade_off(told["attempts"]),
        adapter_dir=result["adapter"],
        adapter_hash=examination.adapter_hash(result["adapter"]),
        state_dir=result["state"],
        model_config=_model_config(info),
        version_tags={
            "holdfast.verdict": "passed" if verdict["passed"] else "rejected",
            "holdfast.reason": verdict["summary"],
            "holdfast.parent": str(cycle.parent or "base"),
            "holdfast.snapshot": cycle.snapshot or "",
            "holdfast.attempt": f"{candidate.number}: {rescue.words(candidate)}",
        },
    )


def _shape(adapter: Path) -> dict[str, Any]:
    """What the adapter is like: one that goes on keeps the shape it had, whatever was asked for since."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return {"rank": config["r"], "alpha": config["lora_alpha"], "dropout": config["lora_dropout"]}


def _trade_off(attempts: list[dict[str, Any]]) -> tuple[TradeOff, ...]:
    """Every attempt's curve that has both a new task and an old one to show."""
    return tuple(
        TradeOff(
            name=f"attempt {attempt['number']}",
            shares=tuple(point["share"] for point in attempt["curve"]),
            old=tuple(point["old"] for point in attempt["curve"]),
            new=tuple(point["new"] for point in attempt["curve"]),
            chosen=attempt["share"],
        )
        for attempt in attempts
        if attempt["curve"] and None not in (attempt["curve"][0]["old"], attempt["curve"][0]["new"])
    )


def _tags(cycle: Cycle, training: TrainReport, meta: dict[str, Any]) -> dict[str, str]:
    return {
        "holdfast.snapshot": cycle.snapshot or "",
        "holdfast.parent": str(cycle.parent or "base"),
        "holdfast.strategy": training.strategy,
        "holdfast.base": meta["model"]["fingerprint"],
        "holdfast.tasks": ",".join(meta["new_tasks"]),
        "holdfast.trigger": cycle.trigger,
    }


def _metrics(
    store: Store,
    cycle: Cycle,
    training: TrainReport,
    table: report.Matrix | None,
    classified: dict[str, Any],
) -> dict[str, float]:
    found = {}
    for score in store.scores(cycle.id):
        found[f"suite/{score.task}/{score.label}"] = score.score
        if score.label == "candidate":
            answers = store.predictions(score.model, score.exam).values()
            found[f"suite/{score.task}/exact_match"] = sum(a.exact_match for a in answers) / len(answers)
            found[f"suite/{score.task}/token_f1"] = sum(a.token_f1 for a in answers) / len(answers)
    for task, result in classified.items():
        found[f"suite/{task}/macro_f1"] = result["macro_f1"]
    return {
        **found,
        **(table.metrics() if table else {}),
        "train/rows": training.rows,
        "train/replay_rows": len(training.rehearsed),
        "train/final_loss": training.final_loss,
        "train/seconds": training.seconds,
        "train/state_bytes": training.state_bytes,
    }


def _stream_metrics(store: Store, cycle: Cycle, metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Forgetting over time, for the chart: what the bot's line of models would be after this cycle."""
    whole = {name: value for name, value in metrics.items() if "/" not in name and value is not None}
    candidate = {f"suite/{s.task}": s.score for s in store.scores(cycle.id) if s.label == "candidate"}
    verdict = store.verdict(cycle.id)
    return {
        **candidate,
        **whole,
        "passed": float(bool(verdict and verdict[0])),
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
            {
                "task": score.task,
                "row": row.hash,
                "context": row.context,
                "question": row.question,
                "answer": row.answer,
            },
        )
        line[score.label] = predictions[row.hash].prediction
        line[f"{score.label}_score"] = predictions[row.hash].score


def _model(
    store: Store, cycle: Cycle, candidate: Candidate, version: int, record: CycleRecord, info: dict[str, Any]
) -> ModelVersion:
    return ModelVersion(
        version=version,
        cycle_id=cycle.id,
        parent=cycle.parent,
        result=candidate.result,
        adapter_hash=record.adapter_hash,
        base=info["meta"]["model"]["fingerprint"],
        created_at=store.clock(),
    )


def _model_config(info: dict[str, Any]) -> dict[str, Any]:
    """What the served model needs besides the adapter; the keys are those of daemon/served_model.py."""
    spec = dict(info["meta"]["model"])
    return {
        "base_path": spec.pop("path"),
        **spec,
        "tasks": info["tasks"],
        "max_new_tokens": info["meta"]["max_new_tokens"],
    }


def _info(settings: Settings, cycle: Cycle) -> dict[str, Any]:
    """What the snapshot says; every byte of it is checked, so it is asked once."""
    assert cycle.snapshot is not None
    return snapshots.load(settings.state_dir / "snapshots" / cycle.snapshot).info
