"""Snapshots: what a cycle trains on and is examined with, frozen in a directory named by its content.

Layout: `train.parquet`, `validation.parquet`, `memory.parquet`, `probe.parquet` (validation rows of every
task, to choose by; the oldest snapshots have none), `suites/<n>.parquet`, `snapshot.json` (tasks,
suites, counts, meta) and `manifest.json`, written last. Knows no database and no model.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.artifacts import atomic_dir, is_complete, verify
from storage.errors import UNREADABLE, IntegrityError
from storage.parquet import RowLike, SnapshotRow, read_rows, write_rows
from storage.records import StoredRow
from storage.rows import Split

# A frozen suite: its version, the hash it was frozen with, its rows.
FrozenSuite = tuple[int, str, Sequence[StoredRow]]

INFO = "snapshot.json"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A complete snapshot on disk. `info` is its `snapshot.json`."""

    id: str
    path: Path
    info: dict[str, Any] = field(repr=False)

    def rows(self, part: str) -> list[SnapshotRow]:
        """The rows of `train`, `validation`, `memory` or `probe`."""
        return read_rows(self.path / f"{part}.parquet")

    def suite_path(self, task: str) -> Path:
        """The Parquet file of a task's suite."""
        for suite in self.info["suites"]:
            if suite["task"] == task:
                return self.path / str(suite["file"])
        raise IntegrityError(f"snapshot {self.id} has no suite for the task {task!r}; run `daemon doctor`")


def id_of(path: Path) -> str | None:
    """The id of the snapshot that the folder is, or was to become; None: it is something else."""
    named = re.fullmatch(r"([0-9a-f]{16})|\.([0-9a-f]{16})\.tmp", path.name)
    return named and (named[1] or named[2])


def suite_hash(rows: Iterable[RowLike]) -> str:
    """SHA-256 over a suite's rows, sorted by hash, with their exact texts: one letter makes another suite."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.hash):
        digest.update(_line([row.hash, row.task, row.context, row.question, row.answer]))
    return digest.hexdigest()


def write(
    root: str | Path,
    *,
    train: Sequence[StoredRow],
    validation: Sequence[StoredRow],
    memory: Sequence[StoredRow],
    suites: Mapping[str, FrozenSuite],
    tasks: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    probe: Sequence[StoredRow] = (),
) -> Snapshot:
    """Write a snapshot below `root`, or find the one with the same content.

    The id covers all of it: rows, tasks, suites and `meta`. Raises `IntegrityError` when a suite is
    not what was frozen, or a question is in two parts, which must not happen.
    """
    _check_suites(suites)
    examined = {task: rows for task, (_, _, rows) in suites.items()}
    _check_splits(train=train, validation=[*validation, *probe], memory=memory, suites=examined)
    learned = {"train": train, "validation": validation, "memory": memory, "probe": probe}
    parts = {name: _sorted(rows) for name, rows in {**learned, **_numbered(examined)}.items()}
    info = {
        "tasks": sorted(({**task} for task in tasks), key=lambda task: str(task["name"])),
        "suites": _describe(suites),
        "counts": {name: len(rows) for name, rows in parts.items() if "/" not in name},
        "meta": {**meta},
    }
    info = json.loads(json.dumps(info))  # as it will be read back
    snapshot_id = _identify(parts, info)
    final = Path(root) / snapshot_id
    if is_complete(final):
        return load(final)
    with atomic_dir(final, {"id": snapshot_id}) as folder:
        (folder / "suites").mkdir()
        for name, rows in parts.items():
            write_rows(folder / f"{name}.parquet", rows)
        text = json.dumps({"id": snapshot_id, **info}, indent=1, sort_keys=True, ensure_ascii=False)
        (folder / INFO).write_text(text + "\n", encoding="utf-8")
    return Snapshot(id=snapshot_id, path=final, info=info)


def load(path: str | Path) -> Snapshot:
    """A snapshot whose every byte is what was written, under the name that its content gave it."""
    path = Path(path)
    verify(path)
    try:
        info = json.loads((path / INFO).read_text(encoding="utf-8"))
        snapshot = Snapshot(id=info.pop("id"), path=path, info=info)
        names = [*info["counts"], *(suite["file"].removesuffix(".parquet") for suite in info["suites"])]
        found = _identify({name: snapshot.rows(name) for name in names}, info)
    except UNREADABLE as error:
        raise IntegrityError(
            f"{path / INFO} is damaged ({error!r}); move the snapshot aside and run `daemon doctor`"
        ) from None
    if not found == snapshot.id == path.name:
        raise IntegrityError(
            f"the snapshot {path} has other content than its name says ({found}); "
            "move it aside and run `daemon doctor`"
        )
    return snapshot


def _numbered(suites: Mapping[str, Sequence[StoredRow]]) -> dict[str, Sequence[StoredRow]]:
    """Every suite's rows, by its file's name without suffix: task names are any text, files get numbers."""
    return {f"suites/{number}": suites[task] for number, task in enumerate(sorted(suites))}


def _describe(suites: Mapping[str, FrozenSuite]) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "file": f"suites/{number}.parquet",
            "version": version,
            "hash": frozen,
            "size": len(rows),
        }
        for number, (task, (version, frozen, rows)) in enumerate(sorted(suites.items()))
    ]


def _identify(parts: Mapping[str, Sequence[RowLike]], info: Mapping[str, Any]) -> str:
    """16 hex digits over everything that the snapshot says."""
    digest = hashlib.sha256(_line(info))
    for name in sorted(parts):
        digest.update(_line([name, len(parts[name])]))
        for row in parts[name]:
            digest.update(
                _line([row.hash, row.id, row.task, row.context, row.question, row.answer, row.split])
            )
    return digest.hexdigest()[:16]


def _sorted(rows: Sequence[StoredRow]) -> list[StoredRow]:
    """By hash: the content alone decides the files, not the order in which rows arrived."""
    return sorted(rows, key=lambda row: row.hash)


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _check_suites(suites: Mapping[str, FrozenSuite]) -> None:
    for task, (version, frozen, rows) in suites.items():
        found = suite_hash(rows)
        if found != frozen:
            raise IntegrityError(
                f"the suite {task}@v{version} is not the one that was frozen (hash {found[:12]}, frozen as "
                f"{frozen[:12]}); restore the store from a backup and run `daemon doctor`"
            )


def _check_splits(
    *,
    train: Sequence[StoredRow],
    validation: Sequence[StoredRow],
    memory: Sequence[StoredRow],
    suites: Mapping[str, Sequence[StoredRow]],
) -> None:
    """Every row is in the part that its split says, and no question is in two parts."""
    examined = [row for rows in suites.values() for row in rows]
    seen: dict[str, Split] = {}
    for split, rows in (
        (Split.TRAIN, train),
        (Split.TRAIN, memory),
        (Split.VALIDATION, validation),
        (Split.SUITE, examined),
    ):
        for row in rows:
            if row.split != split or seen.setdefault(row.question_key, split) != split:
                raise IntegrityError(
                    f"row {row.hash} ({row.split}) cannot be a {split} row of a snapshot, or its question is "
                    "in another part too; the store is inconsistent: run `daemon doctor`"
                )
