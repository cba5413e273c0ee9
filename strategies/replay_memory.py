"""Which past rows are remembered, and which of them an epoch rehearses.

Free of torch: the daemon asks here whose texts a snapshot must carry. The memory is row hashes and a few
numbers; every choice is a pure function of these and a seed, so that it does not matter in how many
processes the rows were seen. Nor in which order, but for a memory that grows by `replay_share`: what it had
no room for does not come back. The choices themselves: `strategies.replay_policies`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from storage.errors import UNREADABLE, IntegrityError

FILE = "replay.json"
FORMAT = 4
_KNOWN = (2, 3, FORMAT)  # 2 knew neither ranks nor what is shared; in 3, rows that nobody ranked had rank 0


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What is known of one remembered row. Losses are in nats per answer token; None: not measured."""

    answer: str = ""  # a key: rows with the same answer have the same
    learned: float | None = None  # loss when the row was learned, or was first measured
    latest: float | None = None  # loss after the last experience
    is_shared: bool = False  # whether other rows of its task had the same answer
    rank: int | None = None  # among the rows of its answer, the most typical first; None: nobody ranked it

    @property
    def rise(self) -> float:
        """How much the row was forgotten since it was learned."""
        if self.learned is None or self.latest is None:
            return 0.0
        return self.latest - self.learned


@dataclass(frozen=True, kw_only=True)
class Spacing:
    """When a task is rehearsed again, in experiences: every `interval`, next in `wait`."""

    interval: int = 1
    wait: int = 1


Rows = Mapping[str, Trace]  # by row hash, in the order of the draw
Tasks = Mapping[str, Rows]
Seed = int | str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A row of an experience, as the memory takes it in."""

    hash: str
    task: str
    answer: str = ""


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much may be remembered: at most `rows`, and at most `share` of all rows seen so far."""

    rows: int
    share: float = 1.0

    def of(self, seen: int) -> int:
        return min(self.rows, int(self.share * seen))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The remembered rows, by task.

    `seed` is the first cycle's and stays: the draw among all rows ever seen is one draw.
    """

    seed: int
    seen: int = 0  # rows of all experiences together
    tasks: Tasks = field(default_factory=dict)
    spacing: Mapping[str, Spacing] = field(default_factory=dict)

    @property
    def hashes(self) -> list[str]:
        return [row for task in sorted(self.tasks) for row in self.tasks[task]]

    def trace(self, row: str) -> Trace:
        return next(rows[row] for rows in self.tasks.values() if row in rows)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.tasks.values())

    def only(self, known: Collection[str]) -> "Memory":
        """Without rows that are not offered any more."""
        left = {
            task: {row: trace for row, trace in rows.items() if row in known}
            for task, rows in self.tasks.items()
        }
        gone = len(self) - sum(len(rows) for rows in left.values())
        return replace(self, seen=self.seen - gone, tasks={task: rows for task, rows in left.items() if rows})

    def with_rows(self, rows: Iterable[Seen]) -> "Memory":
        """With all rows of an experience. A row that was remembered already keeps its trace."""
        rows = list(rows)
        tasks = {task: dict(kept) for task, kept in self.tasks.items()}
        for row in rows:
            tasks.setdefault(row.task, {}).setdefault(row.hash, Trace(answer=row.answer))
        tasks = {task: _shared(kept) for task, kept in tasks.items()}
        ordered = {
            task: {row: found[row] for row in sorted(found, key=lambda row: (priority(self.seed, row), row))}
            for task, found in sorted(tasks.items())
        }
        return replace(self, tasks=ordered, seen=self.seen + len(rows))

    def ranked(self, ranks: Mapping[str, int]) -> "Memory":
        """With the rows' ranks, where they are known."""
        tasks = {
            task: {row: replace(trace, rank=ranks.get(row, trace.rank)) for row, trace in rows.items()}
            for task, rows in self.tasks.items()
        }
        return replace(self, tasks=tasks)

    def measured(self, losses: Mapping[str, float]) -> "Memory":
        """With the losses (nats per answer token, by row hash) after an experience."""
        tasks = {
            task: {
                row: replace(
                    trace,
                    latest=losses.get(row, trace.latest),
                    learned=losses.get(row) if trace.learned is None else trace.learned,
                )
                for row, trace in rows.items()
            }
            for task, rows in self.tasks.items()
        }
        return replace(self, tasks=tasks)


def _shared(rows: Mapping[str, Trace]) -> dict[str, Trace]:
    """A task's rows, with a mark at those whose answer others have, too. It stays when these are gone."""
    times = Counter(trace.answer for trace in rows.values())
    return {
        row: replace(trace, is_shared=trace.is_shared or times[trace.answer] > 1)
        for row, trace in rows.items()
    }


def priority(seed: Seed, row: str) -> str:
    """A row's place in a draw: uniform, and the same wherever and whenever it is asked for."""
    return hashlib.sha256(f"{seed}/{row}".encode()).hexdigest()


def load(state_dir: Path) -> Memory | None:
    """The memory in a training result's `state/`, or None when there is none."""
    path = Path(state_dir) / FILE
    if not path.exists():
        return None
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")))
    except UNREADABLE as error:
        raise IntegrityError(
            f"the replay memory {path} cannot be read ({error}); run `daemon doctor`"
        ) from None


def _read(values: dict[str, Any]) -> Memory:
    if values["format"] not in _KNOWN:
        raise ValueError(f"format {values['format']}, known are {_KNOWN}")
    told = values["tasks"]
    ranked = values["format"] != 3 or any(
        trace.get("rank") for rows in told.values() for trace in rows.values()
    )
    unsaid = {} if ranked else {"rank": None}
    return Memory(
        seed=int(values["seed"]),
        seen=int(values["seen"]),
        tasks={
            task: {str(row): Trace(**trace | unsaid) for row, trace in rows.items()}
            for task, rows in told.items()
        },
        spacing={task: Spacing(**each) for task, each in values["spacing"].items()},
    )


def save(memory: Memory, state_dir: Path) -> None:
    values = {"format": FORMAT, **asdict(memory)}
    # Rows stay in the order of the draw, so keys are not sorted; every mapping is built in a fixed order.
    text = json.dumps(values, indent=1, ensure_ascii=False)
    (Path(state_dir) / FILE).write_text(text + "\n", encoding="utf-8")


def memory_hashes(state_dir: Path) -> list[str]:
    """The remembered rows of a training result: those that the next snapshot must carry."""
    memory = load(Path(state_dir))
    return memory.hashes if memory else []
