"""An ingest that breaks off on the way says what it took before, and again takes the rest."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon import access, operations
from daemon.base import prepare_base
from daemon.control import ControlServer, Request
from daemon.executor import Stop
from storage import files
from storage.errors import ControlError, DaemonSilent, SourceError
from storage.store import Store
from tests.bots import Bot, commands
from tests.daemons import SECONDS, DaemonProcess

COUNT = 50_000  # rows of `table`; a batch has 20,000


def ingest(bot: Bot, *paths: Path) -> dict[str, object]:
    base = prepare_base(bot.settings, bot.executor, lambda progress: None, Stop())
    return operations.ingest(bot.settings, bot.store, paths, lambda: base)


def table(path: Path, count: int = COUNT) -> Path:
    text = pa.array([f"a text {n}" for n in range(count)])
    columns = {"id": text, "question": text, "answer": text}
    pq.write_table(pa.table(columns), path, row_group_size=5000, use_dictionary=False)
    return path


def test_rows_that_came_before_a_damage_are_kept_and_told(bot: Bot, tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", 25_000)
    whole = path.read_bytes()
    place = len(whole) * 9 // 10  # in the last row group
    path.write_bytes(
        whole[:place] + bytes(b ^ 0x5A for b in whole[place : place + 200]) + whole[place + 200 :]
    )
    with pytest.raises(SourceError, match=r"x\.parquet cannot be read.*is kept: 20000 read, 20000 new"):
        ingest(bot, path)
    path.write_bytes(whole)
    assert ingest(bot, path)["accepted"] == 5000


def test_a_second_file_that_cannot_be_read_does_not_hide_what_the_first_brought(
    bot: Bot, tmp_path: Path
) -> None:
    (tmp_path / "one.jsonl").write_text('{"id": 1, "question": "q", "answer": "a"}\n')
    (tmp_path / "two.csv").write_text("id,frage,answer\n2,q,a\n")
    with pytest.raises(SourceError, match=r"two\.csv has no column for question.*is kept: 1 read, 1 new"):
        ingest(bot, tmp_path / "one.jsonl", tmp_path / "two.csv")
    with pytest.raises(SourceError) as told:
        ingest(bot, tmp_path / "two.csv")
    assert "kept" not in str(told.value)


@pytest.mark.parametrize(("name", "reason"), [("two.txt", "unknown kind"), ("none.csv", "no such file")])
def test_a_misspelt_last_path_stops_before_the_first_is_read(
    bot: Bot, tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "one.jsonl").write_text('{"id": 1, "question": "q", "answer": "a"}\n')
    (tmp_path / "two.txt").write_text("id,question,answer\n2,q,a\n")
    with pytest.raises(SourceError, match=reason):
        ingest(bot, tmp_path / "one.jsonl", tmp_path / name)
    assert bot.store.row_counts() == {}


def test_after_kill_9_on_the_way_the_same_ingest_takes_the_rest(bot: Bot, tmp_path: Path) -> None:
    ingest(bot)  # makes the base ready
    bot.store.close()
    path = table(tmp_path / "x.parquet")
    told_so_far = pytest.raises(DaemonSilent, match=r"So far .* 20000 read, 20000 new.*which stay; the same")
    with DaemonProcess(tmp_path / "config.toml") as daemon, told_so_far:
        access.ingest(bot.settings, [path], lambda event: daemon.kill())
    with DaemonProcess(tmp_path / "config.toml") as daemon:
        told = access.ingest(bot.settings, [path], lambda event: None)
        assert daemon.stop() == 0
    assert told["read"] == COUNT == told["accepted"] + told["known"]
    assert 20_000 <= told["known"] < COUNT
    with Store.open(bot.settings.store_path) as store:
        names = [
            row.id for task, splits in store.row_counts().items() for split in splits
            for row in store.task_rows(task, split)
        ]  # fmt: skip
    assert sorted(names) == sorted(f"a text {n}" for n in range(COUNT)), "no row lost, none twice"


@pytest.fixture
def slow(bot: Bot, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bot]:
    """A daemon that answers at the bot's socket, to which every batch is one row and takes a while."""
    ingest(bot)
    whole = files.read_file

    def in_small_batches(*args: Any) -> Iterator[list[Any]]:
        for batch in whole(*args, batch_rows=1):
            threading.Event().wait(0.2)
            yield batch

    monkeypatch.setattr(files, "read_file", in_small_batches)
    server = ControlServer(bot.settings.socket_path, commands(bot))
    server.start()
    yield bot
    server.close()


def few(tmp_path: Path, count: int) -> Path:
    path = tmp_path / "few.csv"
    path.write_text("id,question,answer\n" + "".join(f"{n},question {n},a\n" for n in range(count)))
    return path


def test_news_of_batches_keep_a_client_waiting(
    slow: Bot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "SILENCE_SECONDS", 6.0)
    heard: list[str] = []
    told = access.ingest(slow.settings, [few(tmp_path, 40)], lambda event: heard.append(event["taken"]))
    assert told["accepted"] == 40, "though it took longer than a silence may"
    assert [news.partition(" ")[0] for news in heard] == [str(n) for n in range(1, 41)]


def test_a_daemon_that_falls_silent_is_told_with_what_it_had_taken(
    slow: Bot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    take = files.read_file

    def stuck(*args: Any) -> Iterator[list[Any]]:
        rows = take(*args)
        yield next(rows)
        release.wait(60)

    monkeypatch.setattr(files, "read_file", stuck)
    monkeypatch.setattr(access, "SILENCE_SECONDS", 5.0)
    with pytest.raises(DaemonSilent, match=r"said nothing for 5 s.*1 read, 1 new.*again takes the rest"):
        access.ingest(slow.settings, [few(tmp_path, 2)], lambda event: None)
    release.set()


def test_a_daemon_that_stops_says_what_it_took(bot: Bot, tmp_path: Path) -> None:
    ingest(bot)
    daemon = commands(bot)

    def stops(event: dict[str, Any]) -> None:
        daemon._daemon.stop.request("shutdown")

    args = {"paths": [str(few(tmp_path, 9))]}
    with pytest.raises(ControlError, match=r"is stopping\. What was read .* 9 read, 9 new.*takes the rest"):
        daemon(Request(command="ingest", args=args, who="ann", emit=stops))


def test_who_hangs_up_has_asked_all_the_same(slow: Bot, tmp_path: Path) -> None:
    def hang_up(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        access.ingest(slow.settings, [few(tmp_path, 5)], hang_up)
    deadline = time.monotonic() + SECONDS
    while sum(n for splits in slow.store.row_counts().values() for n in splits.values()) < 5:
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)
