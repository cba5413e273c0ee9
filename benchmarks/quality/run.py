"""One run: a contender learns a stream, is examined after every experience, and leaves a record.

Both stages find what they finished before by the digest of the job, so a run that was interrupted goes on
where it stopped, in the middle of a training too. Working files lie in a folder of the run.
"""

import fcntl
import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks import stock_avalanche, stock_peft
from benchmarks.quality import records
from benchmarks.quality.changes import renamed_answers
from benchmarks.quality.learning import Learns, ShouldStop, Trained, Work, asked, holdfast
from benchmarks.quality.records import Lesson, RunRecord
from benchmarks.quality.streams import Stream, free_task, labels_task, stored
from benchmarks.stream import code, hardware
from storage import snapshots
from storage.artifacts import write_file
from storage.errors import Interrupted, TrainingError
from storage.parquet import write_rows
from storage.records import StoredRow
from strategies.contract import (
    EvaluateJob,
    Progress,
    SuiteJob,
    Task,
    result_files,
)
from strategies.evaluation import evaluate
from strategies.metrics import measured

LEARNS: dict[str, Learns] = {"": holdfast, "peft": stock_peft.learn, "avalanche": stock_avalanche.learn}
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def run(work: Work, should_stop: ShouldStop = lambda: False, say: Callable[[str], None] = print) -> RunRecord:
    """The record of the plan: found, or made. Raises `Interrupted`; the next call continues."""
    found = records.find(work.plan, work.records)
    if found is not None:
        return found
    stream = work.plan.load(work.places)
    try:
        record = _measure(work, stream, should_stop, say)
    except TrainingError as error:  # a result too: this contender cannot learn this stream
        record = _record(work, failed=str(error))
    records.save(record, work.records)
    if not work.keep:
        tidy_away(work.folder)
    return record


def _measure(work: Work, stream: Stream, should_stop: ShouldStop, say: Callable[[str], None]) -> RunRecord:
    base = base_scores(work, stream, should_stop)
    lessons: list[Lesson] = []
    answers: list[dict[str, Any]] = []
    for number, trained in enumerate(LEARNS[work.plan.stock](work, stream, should_stop)):
        examined = [(trained.snapshot.suite_path(t), free_task(t)) for t in asked(stream, number + 1)]
        job = _exam(work, work.folder / f"exam-{number + 1}", examined, trained)
        lesson, answers = _lesson(work, stream, number, trained, job, should_stop)
        lessons.append(lesson)
        mean = sum(lesson.scores.values()) / len(lesson.scores)
        say(f"{work.plan.name}: {number + 1}/{len(stream.experiences)} {lesson.name}, {mean:.3f} on its exam")
    matrix = records.matrix(stream.tasks, base, lessons)
    extras = renamed_answers(stream, answers)
    if stream.labels:
        extras["labels_accuracy"] = _labels_accuracy(work, stream, trained, should_stop)
    return _record(
        work,
        tasks=tuple(stream.tasks),
        learned_at=tuple(stream.learned_at),
        matrix=matrix,
        metrics=measured(matrix, stream.learned_at),
        extras=extras,
        lessons=tuple(lessons),
    )


def _record(work: Work, **results: Any) -> RunRecord:
    strategy, training, lora = work.plan.specs()
    settings = {"strategy": asdict(strategy), "train": asdict(training), "lora": asdict(lora)}
    return RunRecord(
        digest_of_plan=work.plan.digest,
        plan=work.plan,
        settings=json.loads(json.dumps(settings)),  # as it will be read back
        hardware=hardware(),
        code=code(),
        date=date.today().isoformat(),
        **results,
    )


# Examining.


def base_scores(work: Work, stream: Stream, should_stop: ShouldStop) -> dict[str, float]:
    """The bare base on every task's first suite; answered once for all orders and contenders of a seed."""
    with _alone(work.shared):
        examined = []
        for task in stream.tasks:
            frozen = snapshots.suite_hash(rows := sorted(map(stored, stream.suite(task, 0)), key=_by_hash))
            path = work.shared / f"suite-{frozen[:16]}.parquet"
            write_rows(path, rows)
            examined.append((path, free_task(task)))
        job = _exam(work, work.shared / "exam", sorted(examined, key=lambda pair: pair[0]))
        evaluate(job, _Watch(should_stop))
    return scores(answers_of(job))


def _exam(
    work: Work, out: Path, examined: Sequence[tuple[Path, Task]], trained: Trained | None = None
) -> EvaluateJob:
    """All suites at once, by an adapter or the bare base. What differs has another folder."""
    label = "model"
    adapter = result_files(trained.result)["adapter"] if trained else None
    made_of = [str(trained.digest if trained else ""), *(f"{path} {task.digest}" for path, task in examined)]
    told = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:12]
    return EvaluateJob(
        out=str(out.with_name(f"{out.name}-{told}")),
        model=work.model,
        models={label: str(adapter) if adapter else None},
        suites=tuple(SuiteJob(task=task, path=str(path)) for path, task in examined),
        plan=tuple((label, task.name) for _, task in examined),
        batch_size=work.plan.batch_size,
        max_new_tokens=work.plan.max_new_tokens,
        threads=1,
    )


def _lesson(
    work: Work, stream: Stream, number: int, trained: Trained, job: EvaluateJob, should_stop: ShouldStop
) -> tuple[Lesson, list[dict[str, Any]]]:
    """The exam's outcome; what was measured while it ran is kept beside it, for a run that is resumed."""
    kept = work.folder / f"lesson-{job.digest[:16]}.json"
    watch = _Watch(should_stop)
    evaluate(job, watch)
    answers = answers_of(job)
    if kept.exists():
        return Lesson.from_json(kept.read_text(encoding="utf-8")), answers
    report, experience = trained.report, stream.experiences[number]
    lesson = Lesson(
        name=experience.name,
        rows=len(experience.train),
        rows_seen=len(stream.rows_seen(number + 1)),
        replayed=report.replay_rows,
        steps=report.steps,
        cpu_seconds=report.cpu_seconds,
        state_bytes=report.state_bytes,
        memory_rows=report.memory_rows,
        evaluation_seconds=watch.seconds_per_row,
        peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
        scores=scores(answers),
        adapter_bytes=sum(file.stat().st_size for file in result_files(trained.result)["adapter"].iterdir()),
    )
    write_file(kept, lesson.to_json())
    return lesson, answers


def _labels_accuracy(work: Work, stream: Stream, trained: Trained, should_stop: ShouldStop) -> float:
    """The last model with its decoding constrained to each task's own answers; mean over tasks."""
    examined = [(trained.snapshot.suite_path(task), labels_task(stream, task)) for task in stream.tasks]
    job = _exam(work, work.folder / "exam-labels", examined, trained)
    evaluate(job, _Watch(should_stop))
    found = scores(answers_of(job))
    return sum(found.values()) / len(found)


def answers_of(job: EvaluateJob) -> list[dict[str, Any]]:
    """The predictions, one dictionary a row (columns: `strategies.evaluation.SCHEMA`)."""
    found: list[dict[str, Any]] = pq.read_table(Path(job.out) / "predictions.parquet").to_pylist()
    return found


def scores(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean score of each task."""
    by_task: dict[str, list[float]] = {}
    for answer in answers:
        by_task.setdefault(answer["task"], []).append(answer["score"])
    return {task: sum(values) / len(values) for task, values in by_task.items()}


class _Watch:
    """Listens to an exam: stops it when asked to, and counts its CPU seconds after the first batch."""

    def __init__(self, should_stop: ShouldStop) -> None:
        self.should_stop = should_stop
        self.marks: list[tuple[int, float]] = []  # rows answered, CPU seconds

    def __call__(self, progress: Progress) -> None:
        if self.should_stop():
            raise Interrupted()
        if progress.stage == "evaluate":
            self.marks.append((progress.step, time.process_time()))

    @property
    def seconds_per_row(self) -> float:
        if len(self.marks) < 2:
            return 0.0
        (first, began), (last, ended) = self.marks[0], self.marks[-1]
        return (ended - began) / (last - first)


def _by_hash(row: StoredRow) -> str:
    return row.hash


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; a lock that its owner's end releases, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tidy_away(folder: Path) -> None:
    """Removes what a finished run needs no more; predictions and measurements stay."""
    for path in [*folder.glob("train-*"), *folder.glob("checkpoint-*"), folder / "snapshots"]:
        shutil.rmtree(path, ignore_errors=True)
