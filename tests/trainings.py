"""Small trainings for tests: rows, snapshot directories, jobs; the model is `tests.toys.tiny_base`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from storage.artifacts import atomic_dir
from storage.errors import Interrupted
from storage.parquet import SnapshotRow, write_rows
from storage.rows import Row
from strategies.batches import encode
from strategies.checkpoint import Checkpoints
from strategies.contract import (
    LoraSpec,
    Progress,
    StrategySpec,
    TrainJob,
    TrainReport,
    TrainSpec,
    result_files,
)
from strategies.experience import LanguageExperience
from strategies.loop import Learner, train
from strategies.model import fresh_adapter, load_base, trainable
from tests.toys import tiny_model_spec

ANSWERS = ("red", "green", "a long blue answer", "white")
NAIVE = StrategySpec(methods=())
SPEC = TrainSpec(
    learning_rate=0.01, epochs=2, batch_size=4, patience=0, checkpoint_steps=3, threads=1, warmup=0.2
)


def lesson(task: str, count: int, *, split: str = "train", start: int = 0) -> list[SnapshotRow]:
    """Rows of a task, in some order that is not that of their numbers; lengths differ."""
    rows = []
    for n in range(start, start + count):
        question, answer = f"{task} {n}?" + "!" * (n % 5), ANSWERS[n % len(ANSWERS)]
        row = Row(id=str(n), task=task, question=question, answer=answer)
        rows.append(
            SnapshotRow(
                hash=row.hash, id=row.id, task=task, question=question, answer=answer, context="", split=split
            )
        )
    return sorted(rows, key=lambda row: row.hash)


def snapshot(
    folder: Path,
    train: Sequence[SnapshotRow],
    validation: Sequence[SnapshotRow] = (),
    memory: Sequence[SnapshotRow] = (),
) -> Path:
    with atomic_dir(folder) as aside:
        for name, rows in (("train", train), ("validation", validation), ("memory", memory)):
            write_rows(aside / f"{name}.parquet", rows)
    return folder


def job(base: Path, snapshot: Path, out: Path, parent: Path | None = None, **changes: Any) -> TrainJob:
    """A naive training of the tiny base; `changes` replace fields of the job."""
    return replace(
        TrainJob(
            snapshot=str(snapshot),
            out=str(out),
            work=str(out.with_name(f"{out.name}-work")),
            parent=str(parent) if parent else None,
            model=tiny_model_spec(base),
            lora=LoraSpec(rank=2, alpha=4),
            train=SPEC,
            strategy=NAIVE,
        ),
        **changes,
    )


def run(job: TrainJob, told: list[Progress] | None = None) -> TrainReport:
    """The job, without interruption."""
    return train(job, (told if told is not None else []).append, lambda: False)


class StopAfter:
    """A `should_stop` that says yes at its n-th question."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def run_interrupted(job: TrainJob, questions: int = 2) -> TrainReport:
    """The job, stopped and taken up again every few questions, a little later each time."""
    interruptions = 0
    while True:
        try:
            report = train(job, lambda progress: None, StopAfter(questions + interruptions // 3))
        except Interrupted:
            interruptions += 1
            assert interruptions < 50, "no progress is made"
        else:
            assert interruptions > 1
            return report


def adapter_bytes(out: str | Path) -> bytes:
    return (result_files(out)["adapter"] / "adapter_model.safetensors").read_bytes()


def adapter(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(result_files(out)["adapter"] / "adapter_model.safetensors")


def state(out: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(result_files(out)["state"].iterdir())}


def learner(
    base: Path, work: Path, methods: Sequence[Any] = (), *, dropout: float = 0.0, **changes: Any
) -> Learner:
    """A learner with a fresh adapter, for a look at single steps; `changes` replace fields of the spec."""
    loaded = load_base(tiny_model_spec(base))
    model = fresh_adapter(loaded, LoraSpec(rank=2, alpha=4, dropout=dropout), seed=0)
    for parameter in trainable(model).values():  # B is zero at first, which hides half of the gradients
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    spec = replace(SPEC, **changes)
    checkpoints = Checkpoints(work, job(base, work, work, train=spec))
    return Learner(
        base=loaded,
        model=model,
        spec=spec,
        methods=methods,
        checkpoints=checkpoints,
        tell=lambda progress: None,
        should_stop=lambda: False,
    )


def experience(learner: Learner, rows: Sequence[SnapshotRow]) -> LanguageExperience:
    return LanguageExperience(new=encode(rows, learner.base.prompter))
