"""Directories that are complete or not there, and snapshots that are what their name says."""

import errno
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from storage import snapshots
from storage.artifacts import (
    MANIFEST,
    atomic_dir,
    is_complete,
    sha256_file,
    verify,
    write_file,
    write_manifest,
)
from storage.errors import IntegrityError
from storage.parquet import SnapshotRow, read_rows, write_rows
from storage.records import StoredRow
from storage.rows import Row, Split

TASKS = [{"name": "billing", "kind": "free", "metric": "token_f1", "labels": []}]


def stored(
    question: str, *, split: Split = Split.TRAIN, answer: str = "yes", task: str = "billing"
) -> StoredRow:
    row = Row(id="1", task=task, question=question, answer=answer)
    return StoredRow(
        hash=row.hash, key=row.key, question_key=row.question_key, words_key=row.words_key,
        seq=1, id=row.id, task=task,
        question=question, answer=answer, context="", created_at=None, split=split, source="test",
        accepted_at=datetime(2026, 3, 1),
    )  # fmt: skip


def frozen(rows: list[StoredRow], version: int = 1) -> snapshots.FrozenSuite:
    return version, snapshots.suite_hash(rows), rows


def write(root: Path, **changes: Any) -> snapshots.Snapshot:
    content: dict[str, Any] = {
        "train": [stored("a"), stored("b"), stored("c")],
        "validation": [stored("v", split=Split.VALIDATION)],
        "memory": [stored("m", task="old")],
        "suites": {
            "billing": frozen([stored("s", split=Split.SUITE), stored("t", split=Split.SUITE)]),
            "../../etc": frozen([stored("e", split=Split.SUITE, task="../../etc")], version=3),
        },
        "tasks": TASKS,
        "meta": {"parent": None, "seed": 0, "tuple": (1, 2)},
    }
    return snapshots.write(root, **{**content, **changes})


# -- artifacts ------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.bin").write_bytes(b"\x00\x01")
    (folder / "sub" / "b.txt").write_text("b")


def test_the_manifest_is_written_last_and_names_every_file(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "out", {"kind": "test"}) as folder:
        fill(folder)
        assert not is_complete(folder)
        assert not (tmp_path / "out").exists()
    manifest = verify(tmp_path / "out")
    assert manifest["kind"] == "test"
    assert manifest["files"] == {
        "a.bin": sha256_file(tmp_path / "out" / "a.bin"),
        "sub/b.txt": sha256_file(tmp_path / "out" / "sub" / "b.txt"),
    }
    assert is_complete(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_dir(tmp_path / "out") as folder:  # noqa: PT012
        fill(folder)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_error_at_the_very_end_leaves_the_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_dir(tmp_path / "out") as folder:
        fill(folder)
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name == ".out.tmp":
            raise OSError(errno.ENOSPC, "no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space"), atomic_dir(tmp_path / "out"):
        pass
    assert set(verify(tmp_path / "out")["files"]) == {"a.bin", "sub/b.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_crash_are_cleared_and_an_earlier_result_is_replaced(tmp_path: Path) -> None:
    for name in (".out.tmp", ".out.old", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_text("x")
    with atomic_dir(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
        fill(folder)
    assert set(verify(tmp_path / "out")["files"]) == {"a.bin", "sub/b.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_keeps_the_earlier_result(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "out") as folder:
        fill(folder)
    with pytest.raises(ValueError), atomic_dir(tmp_path / "out") as folder:
        raise ValueError
    verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda d: (d / "sub" / "b.txt").write_text("c"), r"sub/b\.txt was changed"),
        (lambda d: (d / "a.bin").unlink(), r"a\.bin is missing"),
        (lambda d: (d / "new").write_text(""), r"new does not belong there"),
        (lambda d: (d / MANIFEST).unlink(), "is not complete"),
        (lambda d: (d / MANIFEST).write_text("{"), "is damaged"),
        (lambda d: (d / MANIFEST).write_text("[]"), "is damaged"),
    ],
)
def test_a_tampered_directory_is_detected_and_the_file_named(tmp_path: Path, harm: Any, told: str) -> None:
    with atomic_dir(tmp_path / "out") as folder:
        fill(folder)
    harm(tmp_path / "out")
    with pytest.raises(IntegrityError, match=told + r".*`daemon doctor`"):
        verify(tmp_path / "out")


def test_a_manifest_can_be_written_into_a_folder_in_place(tmp_path: Path) -> None:
    fill(tmp_path)
    assert write_manifest(tmp_path, {"step": 3}) == verify(tmp_path)
    write_file(tmp_path / "a.bin", b"new")
    with pytest.raises(IntegrityError):
        verify(tmp_path)
    write_manifest(tmp_path)
    assert "step" not in verify(tmp_path)


# -- parquet --------------------------------------------------------------------------------------


def test_rows_come_back_from_parquet_as_they_were_and_equal_rows_are_equal_bytes(tmp_path: Path) -> None:
    rows = [stored("¿qué?\n\t\"'", answer="漢字 👩‍🚀"), stored("b"), stored("a")]
    for name in ("one", "two"):
        write_rows(tmp_path / name, rows)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    back = read_rows(tmp_path / "one")
    assert [row.hash for row in back] == [row.hash for row in rows]
    assert back[0] == SnapshotRow(
        hash=rows[0].hash, id="1", task="billing", question="¿qué?\n\t\"'", context="", split="train",
        answer="漢字 👩‍🚀",
    )  # fmt: skip
    write_rows(tmp_path / "three", back)
    assert (tmp_path / "three").read_bytes() == (tmp_path / "one").read_bytes()


def test_no_rows_are_rows_too(tmp_path: Path) -> None:
    write_rows(tmp_path / "none", [])
    assert read_rows(tmp_path / "none") == []


def test_a_file_that_is_not_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    for path in (tmp_path / "x", tmp_path / "missing"):
        with pytest.raises(IntegrityError, match="cannot be read as rows"):
            read_rows(path)


# -- snapshots ------------------------------------------------------------------------------------


def test_the_id_depends_on_the_content_and_not_on_the_order_of_arrival(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    two = write(tmp_path / "two", train=[stored("c"), stored("a"), stored("b")])
    assert one.id == two.id
    assert one.path.name == one.id
    assert len(one.id) == 16
    files = json.loads((one.path / MANIFEST).read_text())["files"]
    assert files == json.loads((two.path / MANIFEST).read_text())["files"]


@pytest.mark.parametrize(
    "change",
    [
        {"train": [stored("a"), stored("b")]},
        {"train": [stored("a"), stored("b"), replace(stored("c"), answer="Yes")]},  # same hash, other text
        {"memory": []},
        {"meta": {"parent": 1}},
        {"tasks": [{**TASKS[0], "metric": "exact_match"}]},
        {"suites": {"billing": frozen([stored("s", split=Split.SUITE)])}},
        {"suites": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_other_content_is_another_snapshot(tmp_path: Path, change: dict[str, Any]) -> None:
    assert write(tmp_path).id != write(tmp_path, **change).id


def test_a_complete_snapshot_is_reused_and_an_incomplete_one_is_not(tmp_path: Path) -> None:
    one = write(tmp_path)
    inode = one.path.stat().st_ino
    assert write(tmp_path) == one
    assert one.path.stat().st_ino == inode
    (one.path / MANIFEST).unlink()
    assert write(tmp_path) == one
    verify(one.path)


def test_a_snapshot_is_read_back_whole(tmp_path: Path) -> None:
    written = write(tmp_path)
    loaded = snapshots.load(written.path)
    assert loaded == written
    assert loaded.info["counts"] == {"train": 3, "validation": 1, "memory": 1, "probe": 0}
    assert loaded.info["meta"] == {"parent": None, "seed": 0, "tuple": [1, 2]}
    assert loaded.info["tasks"] == TASKS
    assert [row.question for row in loaded.rows("memory")] == ["m"]
    entries = {entry["task"]: entry for entry in loaded.info["suites"]}
    assert (entries["../../etc"]["version"], entries["../../etc"]["file"]) == (3, "suites/0.parquet")
    rows = read_rows(loaded.suite_path("billing"))
    assert {row.question for row in rows} == {"s", "t"}
    assert snapshots.suite_hash(rows) == entries["billing"]["hash"]
    with pytest.raises(IntegrityError, match="no suite for the task 'nothing'"):
        loaded.suite_path("nothing")


@pytest.mark.parametrize("file", ["train.parquet", "suites/1.parquet", "snapshot.json"])
def test_a_tampered_snapshot_is_not_loaded(tmp_path: Path, file: str) -> None:
    path = write(tmp_path).path
    data = bytearray((path / file).read_bytes())
    data[len(data) // 2] ^= 1
    (path / file).write_bytes(data)
    with pytest.raises(IntegrityError, match=file):
        snapshots.load(path)


@pytest.mark.parametrize("field", ["hash", "id", "task", "context", "question", "answer", "split", "order"])
def test_a_forged_manifest_does_not_help(tmp_path: Path, field: str) -> None:
    path = write(tmp_path).path
    rows = read_rows(path / "suites" / "1.parquet")
    forged = rows[::-1] if field == "order" else [replace(rows[0], **{field: "no"}), *rows[1:]]
    write_rows(path / "suites" / "1.parquet", forged)
    write_manifest(path)
    with pytest.raises(IntegrityError, match="other content than its name says"):
        snapshots.load(path)


def test_a_snapshot_under_another_name_or_with_another_file_in_it_is_not_loaded(tmp_path: Path) -> None:
    path = write(tmp_path).path
    moved = path.rename(tmp_path / ("0" * 16))
    with pytest.raises(IntegrityError, match="other content than its name says"):
        snapshots.load(moved)
    moved.rename(path)
    (path / "extra.parquet").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"extra\.parquet does not belong there"):
        snapshots.load(path)


def test_a_suite_that_is_not_what_was_frozen_stops_the_snapshot(tmp_path: Path) -> None:
    rows = [stored("s", split=Split.SUITE)]
    tampered = [replace(rows[0], answer="yes!")]
    with pytest.raises(IntegrityError, match="billing@v1 is not the one that was frozen"):
        write(tmp_path, suites={"billing": (1, snapshots.suite_hash(rows), tampered)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"train": [stored("s", split=Split.SUITE)]},
        {"memory": [stored("v", split=Split.VALIDATION)]},
        {"train": [stored("S ", task="other")]},  # the suite's question under another task
        {"memory": [stored("v", task="other")]},
        {"suites": {"billing": frozen([stored("x")])}},
    ],
)
def test_a_question_of_a_suite_never_gets_into_training(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="cannot be a"):
        write(tmp_path, **change)
    assert list(tmp_path.iterdir()) == []


def test_the_suite_hash_covers_exact_texts_and_no_order(tmp_path: Path) -> None:
    one, two = stored("s", split=Split.SUITE), stored("t", split=Split.SUITE)
    assert snapshots.suite_hash([one, two]) == snapshots.suite_hash([two, one])
    for field in ("task", "context", "question", "answer"):
        assert snapshots.suite_hash([one]) != snapshots.suite_hash([replace(one, **{field: "S"})]), field
    assert snapshots.suite_hash([one]) != snapshots.suite_hash([one, two])


# -- the probe ------------------------------------------------------------------------------------


def test_probe_rows_are_validation_rows_and_may_be_watched_too(tmp_path: Path) -> None:
    watched, old = stored("v", split=Split.VALIDATION), stored("w", split=Split.VALIDATION, task="old")
    written = write(tmp_path, validation=[watched], probe=[watched, old])
    assert {row.question for row in snapshots.load(written.path).rows("probe")} == {"v", "w"}
    for split in (Split.TRAIN, Split.SUITE):
        with pytest.raises(IntegrityError, match="cannot be a validation row"):
            write(tmp_path, probe=[stored("x", split=split)])
    assert write(tmp_path).id != written.id


def test_a_snapshot_from_before_there_were_probes_still_loads(tmp_path: Path) -> None:
    written = write(tmp_path)
    info = {**written.info, "counts": {k: n for k, n in written.info["counts"].items() if k != "probe"}}
    names = [*info["counts"], "suites/0", "suites/1"]
    old = snapshots._identify({name: written.rows(name) for name in names}, info)
    folder = written.path.rename(tmp_path / old)
    (folder / "probe.parquet").unlink()
    (folder / "snapshot.json").write_text(json.dumps({"id": old, **info}))
    write_manifest(folder)
    assert snapshots.load(folder).id == old
