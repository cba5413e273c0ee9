"""What a finished training leaves in its result directory: adapter, continual state, report.

Writes into a folder that the caller makes complete; knows the methods only as a catalogue does.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from torch.nn import Module

from strategies import inheritance
from strategies.batches import Example
from strategies.catalogue import METHODS
from strategies.checkpoint import Course
from strategies.contract import TrainJob, TrainReport, result_files
from strategies.method import Method
from strategies.model import save_adapter, trainable
from strategies.replay_memory import memory_hashes


def write(
    folder: Path,
    job: TrainJob,
    *,
    model: Module,
    methods: Sequence[Method],
    course: Course,
    new: Sequence[Example],
    replay_rows: int,
    rehearsed: Collection[str],
) -> None:
    parts = result_files(folder)
    save_adapter(model, parts["adapter"])
    parts["state"].mkdir()
    inheritance.carry_state(
        job, parts["state"], but=[method.file for method in methods if method.file], new=new
    )
    for method in methods:
        method.save(parts["state"])
    report = TrainReport(
        strategy=job.strategy.name,
        rows=len(new),
        replay_rows=replay_rows,
        steps=course.steps,
        epochs=course.epoch,
        stopped_early=course.epoch < job.train.epochs,
        seconds=course.seconds,
        cpu_seconds=course.cpu_seconds,
        final_loss=_last_epoch_loss(course),
        validation_losses=tuple(course.validation_losses),
        curve=tuple(course.curve),
        resumed=course.resumed,
        rehearsed=tuple(sorted(rehearsed)),
        memory_rows=len(memory_hashes(parts["state"])),
        state_bytes=sum(path.stat().st_size for path in parts["state"].iterdir()),
        trainable_parameters=sum(p.numel() for p in trainable(model).values()),
        notes=_notes(job, model, methods, course),
    )
    parts["report"].write_text(report.to_json() + "\n", encoding="utf-8")


def _last_epoch_loss(course: Course) -> float:
    """Mean loss of the steps of the last epoch; a single step's would be mostly noise."""
    steps = course.curve[-(course.steps // course.epoch) :]
    return sum(point.loss for point in steps) / len(steps)


def _notes(job: TrainJob, model: Module, methods: Sequence[Method], course: Course) -> tuple[str, ...]:
    files = {name: METHODS[name].file for name in job.strategy.methods if METHODS[name].file}
    said = [
        *course.notes,
        *inheritance.notes(job, model, files),
        *(note for m in methods for note in m.notes),
    ]
    if not course.validation_losses:
        said.append("no validation rows: every epoch was run and the last adapter kept")
    return tuple(said)
