"""A worker that learns nothing, in no time: for tests of the daemon over many cycles.

    python -m tests.toy_worker            speaks as `daemon.worker` does, without torch
    python -m tests.toy_worker daemon …   the daemon's command line, whose workers are this one

Results are whole and true to the contract; whether a candidate knows its rows is a matter of its hash.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from daemon import executor, worker
from storage.artifacts import atomic_dir, sha256_file
from storage.errors import Interrupted
from storage.parquet import read_rows
from strategies import replay_memory, replay_policies, scoring
from strategies.contract import EvaluateJob, Progress, TrainJob, TrainReport, result_files
from strategies.replay_memory import Memory, Room, Seen

STEPS, STEP_SECONDS = 10, 0.02  # long enough to be met in the middle
BYTES = 200_000  # of an adapter


def train(job: dict[str, Any], host: worker.Worker) -> dict[str, Any]:
    told = TrainJob.from_dict(job)
    for step in range(STEPS):
        host.tell(Progress(stage="train", step=step, steps=STEPS))
        time.sleep(STEP_SECONDS)
        if host.should_stop():
            raise Interrupted()
    rows = read_rows(Path(told.snapshot) / "train.parquet")
    rehearsed = sorted(row.hash for row in read_rows(Path(told.snapshot) / "memory.parquet"))
    before = replay_memory.load(result_files(told.parent)["state"]) if told.parent else None
    seen = [Seen(hash=row.hash, task=row.task, answer=row.answer) for row in rows]
    memory = replay_policies.after(before or Memory(seed=0), seen, Room(rows=50), "balanced")
    report = TrainReport(
        strategy=told.strategy.name, rows=len(rows), replay_rows=len(rehearsed), steps=STEPS, epochs=1,
        stopped_early=False, seconds=0.1, cpu_seconds=0.1, final_loss=0.5, rehearsed=tuple(rehearsed),
    )  # fmt: skip
    with atomic_dir(told.out, {"job": told.digest}) as folder:
        parts = result_files(folder)
        parts["adapter"].mkdir()
        weights = np.random.default_rng(int(told.digest[:12], 16)).random(BYTES // 8)
        save_file({"a": weights}, parts["adapter"] / "adapter_model.safetensors")
        shape = {"r": told.lora.rank, "lora_alpha": told.lora.alpha, "lora_dropout": told.lora.dropout}
        (parts["adapter"] / "adapter_config.json").write_text(json.dumps(shape))
        parts["state"].mkdir()
        replay_memory.save(memory, parts["state"])
        parts["report"].write_text(report.to_json() + "\n")
    return dict(json.loads(report.to_json()))


def evaluate(job: dict[str, Any], host: worker.Worker) -> dict[str, Any]:
    told = EvaluateJob.from_dict(job)
    suites = {suite.task.name: suite for suite in told.suites}
    lines = []
    for label, task in told.plan:
        host.tell_or_stop(Progress(stage="evaluate"))
        adapter = told.models[label]
        knows = adapter and int(sha256_file(Path(adapter) / "adapter_model.safetensors")[0], 16) > 3
        for row in read_rows(suites[task].path):
            if row.task == task:
                said = row.answer if knows else "nothing"
                lines.append(
                    {
                        "model": label,
                        "task": task,
                        "row_hash": row.hash,
                        "prediction": said,
                        "exact_match": scoring.exact_match(said, row.answer),
                        "token_f1": scoring.token_f1(said, row.answer),
                        "score": scoring.score(suites[task].task.metric, said, row.answer),
                    }
                )
    with atomic_dir(told.out, {"job": told.digest}) as folder:
        pq.write_table(pa.Table.from_pylist(lines), folder / "predictions.parquet")
    return {}


def run_daemon() -> None:
    from daemon import cli

    real = subprocess.Popen

    def popen(command: Any, *args: Any, **options: Any) -> Any:
        if command[1:] == ["-m", "daemon.worker"]:
            command = [sys.executable, "-m", "tests.toy_worker"]
        return real(command, *args, **options)

    executor.subprocess.Popen = popen  # type: ignore[attr-defined]
    sys.argv = sys.argv[1:]
    cli.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["daemon"]:
        run_daemon()
    else:
        worker.STAGES.update(train=train, evaluate=evaluate)
        os._exit(worker.main())
