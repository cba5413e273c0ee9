"""Which past rows are remembered, and which of them an epoch rehearses.

Free of torch: the daemon asks here whose texts a snapshot must carry. The memory is row hashes only;
every choice is a pure function of hashes and a seed, so that it does not matter in how many processes,
or in which order, the rows were seen.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from storage.errors import IntegrityError

FILE = "replay.json"
FORMAT = 1

Tasks = Mapping[str, tuple[str, ...]]  # task → row hashes


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The remembered rows, by task.

    `seed` is the first cycle's and stays: the draw among all rows ever seen is one draw.
    """

    seed: int
    tasks: Tasks = field(default_factory=dict)

    @property
    def hashes(self) -> list[str]:
        return [row for task in sorted(self.tasks) for row in self.tasks[task]]

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.tasks.values())

    def only(self, known: Collection[str]) -> "Memory":
        """Without rows that exist no more."""
        return self._with((row, task) for task, rows in self.tasks.items() for row in rows if row in known)

    def updated(self, rows: Iterable[tuple[str, str]], *, size: int, policy: str) -> "Memory":
        """The memory after an experience of (hash, task) rows, cut to `size` by `policy`."""
        grown = self._with([*rows, *((row, task) for task, kept in self.tasks.items() for row in kept)])
        return replace(grown, tasks=POLICIES[policy](grown.tasks, size, self.seed))

    def rehearse(self, count: int, *, seed: int, epoch: int) -> list[str]:
        """The rows that an epoch draws: as equally from all tasks as they allow.

        Each task's rows form an endless stream: all of them in one order, then in another, and so on; an
        epoch continues where the one before it ended.
        """
        drawn = []
        for task, rows in sorted(self.tasks.items()):
            start = sum(self._quotas(count, past)[task] for past in range(epoch))
            stop = start + self._quotas(count, epoch)[task]
            drawn += _stream(rows, start, stop, f"{seed}/{task}")
        return drawn

    def _quotas(self, count: int, epoch: int) -> dict[str, int]:
        """Rows of each task in an epoch. Nothing comes twice before everything came once."""
        rounds, rest = divmod(count, len(self))
        sizes = {task: len(rows) for task, rows in self.tasks.items()}
        shares = share_out(rest, sizes, turn=epoch)
        return {task: rounds * size + shares[task] for task, size in sizes.items()}

    def _with(self, rows: Iterable[tuple[str, str]]) -> "Memory":
        tasks: dict[str, set[str]] = {}
        for row, task in rows:
            tasks.setdefault(task, set()).add(row)
        ordered = {task: tuple(sorted(found, key=_by(self.seed))) for task, found in sorted(tasks.items())}
        return replace(self, tasks=ordered)


def balanced(tasks: Tasks, size: int, seed: int) -> Tasks:
    """Equal room for every task; what a small task leaves free goes to the others."""
    room = share_out(size, {task: len(rows) for task, rows in tasks.items()})
    return {task: rows[: room[task]] for task, rows in tasks.items() if room[task]}


def reservoir(tasks: Tasks, size: int, seed: int) -> Tasks:
    """A uniform sample of all rows ever seen (Vitter 1985, algorithm R).

    R keeps each of the n rows so far with probability size / n. So does keeping the `size` smallest of
    n independent random priorities; and with priorities made from hashes, order does not matter.
    """
    everything = sorted((row for rows in tasks.values() for row in rows), key=_by(seed))
    kept = set(everything[:size])
    left = {task: tuple(row for row in rows if row in kept) for task, rows in tasks.items()}
    return {task: rows for task, rows in left.items() if rows}


POLICIES: dict[str, Callable[[Tasks, int, int], Tasks]] = {"balanced": balanced, "reservoir": reservoir}


def share_out(room: int, wants: Mapping[str, int], turn: int = 0) -> dict[str, int]:
    """Divides room equally; who wants less than an equal share leaves the rest to the others.

    Room that cannot be divided equally goes to some, one each; `turn` moves on who they are.
    """
    level = (
        bisect_right(range(room + 1), room, key=lambda n: sum(min(n, want) for want in wants.values())) - 1
    )
    given = {name: min(level, want) for name, want in wants.items()}
    rest = room - sum(given.values())
    hungry = [name for name in sorted(wants) if wants[name] > level]
    for n in range(min(rest, len(hungry))):
        given[hungry[(turn * rest + n) % len(hungry)]] += 1
    return given


def priority(seed: int | str, row: str) -> str:
    """A row's place in a draw: uniform, and the same wherever and whenever it is asked for."""
    return hashlib.sha256(f"{seed}/{row}".encode()).hexdigest()


def load(state_dir: Path) -> Memory | None:
    """The memory in a training result's `state/`, or None when there is none."""
    path = Path(state_dir) / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, known is {FORMAT}")
        tasks = {str(task): tuple(map(str, rows)) for task, rows in values["tasks"].items()}
        return Memory(seed=int(values["seed"]), tasks=tasks)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"the replay memory {path} cannot be read ({error}); run `daemon doctor`"
        ) from None


def save(memory: Memory, state_dir: Path) -> None:
    values = {
        "format": FORMAT,
        "seed": memory.seed,
        "tasks": {task: list(r) for task, r in memory.tasks.items()},
    }
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False)
    (Path(state_dir) / FILE).write_text(text + "\n", encoding="utf-8")


def memory_hashes(state_dir: Path) -> list[str]:
    """The remembered rows of a training result: those that the next snapshot must carry."""
    memory = load(Path(state_dir))
    return memory.hashes if memory else []


def _by(seed: int | str) -> Callable[[str], tuple[str, str]]:
    return lambda row: (priority(seed, row), row)


def _stream(rows: tuple[str, ...], start: int, stop: int, seed: str) -> list[str]:
    """Places `start` to `stop` of: all rows in one order, all rows in another order, and so on."""
    turns = range(start // len(rows), (stop - 1) // len(rows) + 1)
    ordered = [row for turn in turns for row in sorted(rows, key=_by(f"{seed}/{turn}"))]
    skipped = turns.start * len(rows)
    return ordered[start - skipped : stop - skipped]
