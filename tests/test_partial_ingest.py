"""An ingest that breaks off on the way says what it took before, and again takes the rest."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon import operations
from daemon.base import prepare_base
from daemon.executor import Stop
from storage.errors import SourceError
from tests.bots import Bot


def ingest(bot: Bot, *paths: Path) -> dict[str, object]:
    base = prepare_base(bot.settings, bot.executor, lambda progress: None, Stop())
    return operations.ingest(bot.settings, bot.store, paths, lambda: base)


def test_rows_that_came_before_a_damage_are_kept_and_told(bot: Bot, tmp_path: Path) -> None:
    path, count = tmp_path / "x.parquet", 25_000  # a batch has 20,000
    text = pa.array([f"a text {n}" for n in range(count)])
    pq.write_table(
        pa.table({"id": text, "question": text, "answer": text}), path, row_group_size=5000,
        use_dictionary=False,
    )  # fmt: skip
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
