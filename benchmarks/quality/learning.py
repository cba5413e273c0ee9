"""How a contender learns a stream: through the worker's stage, each experience from the one before it.

Also the records that a run passes on. Contenders that are not Holdfast's (`benchmarks.stock_*`) have the same
shape: a work, a stream, a question whether to stop; and one `Trained` after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.quality import records
from benchmarks.quality.plan import Places, Plan
from benchmarks.quality.streams import Stream, free_task, stored
from storage import snapshots
from storage.rows import Row
from storage.snapshots import Snapshot
from strategies.contract import ModelSpec, TrainJob, TrainReport, result_files
from strategies.loop import train
from strategies.replay_memory import memory_hashes

ShouldStop = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A plan and where on this machine it is carried out."""

    plan: Plan
    model: ModelSpec
    out: Path  # absolute; everything that may be deleted
    places: Places
    records: Path = records.FOLDER
    keep: bool = False  # adapters and snapshots after the run

    @property
    def folder(self) -> Path:
        return self.out / self.plan.size / self.plan.group / f"{self.plan.contender}-{self.plan.digest[:8]}"

    @property
    def shared(self) -> Path:
        """What runs of all orders and contenders have in common: the base's answers."""
        return self.out / self.plan.size / f"{self.plan.stream}-seed{self.plan.seed}-base"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An experience has been learned: the adapter's folder, and the training's report."""

    snapshot: Snapshot
    result: Path
    digest: str  # of the job that made it: a path alone does not tell one adapter from another
    report: TrainReport


def holdfast(work: Work, stream: Stream, should_stop: ShouldStop) -> Iterator[Trained]:
    """Experience by experience through the worker's training stage, each from the one before."""
    strategy, training, lora = work.plan.specs()
    parent: Path | None = None
    for number in range(len(stream.experiences)):
        snapshot = write_snapshot(work, stream, number, parent)
        out = work.folder / f"train-{number + 1}"
        job = TrainJob(
            snapshot=str(snapshot.path),
            out=str(out),
            work=str(work.folder / f"checkpoint-{number + 1}"),  # of its own: a finished job clears it
            parent=str(parent) if parent else None,
            model=work.model,
            lora=lora,
            train=training,
            strategy=strategy,
        )
        report = train(job, lambda progress: None, should_stop)
        yield Trained(snapshot=snapshot, result=out, digest=job.digest, report=report)
        parent = out


def write_snapshot(work: Work, stream: Stream, number: int, parent: Path | None) -> Snapshot:
    """Experience `number` (from 0) as the daemon would freeze it: of the past, what the parent remembers."""
    remembered = set(memory_hashes(result_files(parent)["state"])) if parent else set()
    experience = stream.experiences[number]
    suites = {task: stream.suite(task, number + 1) for task in asked(stream, number + 1)}
    return snapshots.write(
        work.folder / "snapshots",
        train=list(map(stored, experience.train)),
        validation=list(map(stored, experience.validation)),
        memory=[stored(row) for row in stream.past(number) if row.hash in remembered],
        suites={task: _frozen(rows) for task, rows in suites.items()},
        tasks=[asdict(free_task(task)) for task in suites],
        meta={"stream": stream.name, "order": stream.order, "experience": number + 1},
    )


def _frozen(rows: Sequence[Row]) -> snapshots.FrozenSuite:
    kept = list(map(stored, rows))
    return 1, snapshots.suite_hash(kept), kept


def asked(stream: Stream, after: int) -> list[str]:
    """Tasks examined after `after` experiences: those learned, and the next, for forward transfer."""
    return [t for t, n in zip(stream.tasks, stream.learned_at, strict=True) if n <= after + 1]


Learns = Callable[[Work, Stream, ShouldStop], Iterator[Trained]]
