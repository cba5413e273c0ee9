"""Of an erased row no copy is left that was refused, and none comes back, whatever is read or set anew."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from daemon import erasure, retention
from daemon.pull import source_spec
from storage.errors import ControlError
from storage.intake import take
from storage.records import State
from storage.sources import RawRow
from tests.bots import FLAVOURS, Bot, audited, lesson, make_bot, make_bot_again
from tests.test_erasure import erase, files_with

SECRET = "quetzalcoatl"


def deliver(bot: Bot, most: int = 0, **values: Any) -> None:
    """A row from a file; with a limit its words count as tokens."""
    take(
        [[RawRow(values={"task": "t", **values}, location="1")]], bot.store, source_spec(bot.settings),
        shares=(0.0, 0.0), source_name="file", max_tokens=most,
        count_tokens=(lambda asked, answer: len(asked.split())) if most else None,
    )  # fmt: skip


def refused(bot: Bot) -> list[str]:
    return [row.raw for row in bot.store.quarantined()]


def test_its_answer_is_no_label_of_a_later_snapshot_that_lacks_the_row(tmp_path: Path, base: Path) -> None:
    bot = make_bot(tmp_path, base, strategy__replay_size=1)
    bot.collect(lesson("colours"))
    assert bot.run().state is State.PROMOTED
    bot.collect([*lesson("flavours", FLAVOURS), ("s", "flavours", "and the secret one", SECRET, "train")])
    assert bot.run().state is State.PROMOTED
    bot.collect(lesson("shapes", FLAVOURS))
    last = bot.run()
    assert last.state is State.PROMOTED
    snapshot = f"snapshots/{last.snapshot}"
    assert [place for place in files_with(bot, SECRET) if place.startswith(snapshot)] == [
        f"{snapshot}/snapshot.json"
    ], "else the test would prove nothing"
    erase(bot, row="s")
    assert files_with(bot, SECRET) == []
    assert audited(bot) == []
    bot.store.close()
    again = make_bot_again(bot, base, strategy__replay_size=1, tasks__flavours__labels=list(FLAVOURS))
    again.run()
    assert refused(again) == [], "the answer is no label now, and the row was read once more"
    assert audited(again) == []
    again.store.close()


def test_it_does_not_come_back_as_refused_when_more_is_read_of_it(bot: Bot) -> None:
    row = {"id": "R", "question": f"who is {SECRET}", "answer": "a", "split": "odd"}
    deliver(bot, **row)
    erase(bot, row="R")
    deliver(bot, **row, context="")
    assert refused(bot) == []


def test_what_could_not_be_taken_apart_is_not_all_one_row(bot: Bot) -> None:
    for text in ('{"id": 1, "que', '{"id": 2, "que'):
        rows = [RawRow(values={"text": text}, location="1", problem="not valid JSON")]
        take([rows], bot.store, source_spec(bot.settings), shares=(0.0, 0.0), source_name="file")
        if len(bot.store.quarantined()) == 1 and "1" in text:
            erase(bot, row=bot.store.quarantined()[0].hash)
    assert len(refused(bot)) == 1
    assert audited(bot) == []


def test_a_shortened_copy_goes_with_the_row(bot: Bot) -> None:
    row = {"id": "L", "question": f"  {SECRET} {'word ' * 900}end\n", "answer": "a"}
    deliver(bot, most=100, **row)
    deliver(bot, most=10_000, **row)
    deliver(bot, most=100, **{**row, "id": "M", "question": f"another {row['question']}"})
    assert len(refused(bot)) == 2
    (stored,) = bot.store.chosen_rows(erasure.choice("L", None, None, None, []))
    erase(bot, row=stored.hash)
    (left,) = refused(bot)
    assert "another" in left


def test_what_only_begins_like_it_stays(bot: Bot) -> None:
    """A long instruction before each question: the quarantine has the instruction alone."""
    before, short = (
        "you are a helpful bot. " * 200,
        {"id": "L", "question": f"who is {SECRET}", "answer": "a"},
    )
    for name, asked in (("1", "who signs?"), ("2", "when does it end?"), ("3", "who sings?")):
        context = "another one" if name == "3" else ""
        deliver(bot, most=100, id=name, question=before + asked, answer="a", context=context)
    deliver(bot, most=10_000, id="1", question=f"{before}who signs?", answer="a")
    deliver(bot, **short)
    for asked in ("… (12 characters)", "w… (1 characters)", " "):
        deliver(bot, id="4", question=asked, answer=" ")
    assert len(refused(bot)) == 6
    erase(bot, row="1")
    erase(bot, row="L")
    assert len(refused(bot)) == 5
    deliver(bot, most=10_000, id="2", question=f"{before}when does it end?", answer="a")
    assert bot.store.row_counts() == {"t": {"train": 1}}


def test_a_shortened_row_about_another_context_is_another_row(bot: Bot) -> None:
    row = {"question": f"{SECRET} {'word ' * 900}end", "answer": "a"}
    deliver(bot, most=100, id="1", **row, context="")
    deliver(bot, most=10_000, id="2", **row, context="about jane")
    erase(bot, where=["context=about jane"])
    assert len(refused(bot)) == 1


def test_of_what_is_shortened_or_asks_nothing_an_erasure_is_of_that_row_alone(bot: Bot) -> None:
    before = "you are a helpful bot. " * 200
    for name, question in (
        ("1", f"{before}who signs?"),
        ("2", f"{before}who sings?"),
        ("3", " "),
        ("4", " "),
    ):
        deliver(bot, id=name, question=question, answer="a", split="odd")
        if name in "13":
            erase(bot, row=name)
    assert len(refused(bot)) == 2
    assert audited(bot) == []


def test_no_name_names_nobody(bot: Bot) -> None:
    deliver(bot, id="", question="who", answer="a")
    with pytest.raises(ControlError, match="no row fits"):
        erase(bot, row="")


@pytest.mark.parametrize(("given", "named"), [(" 77 ", "77"), ("x" * 250, "x" * 250), (True, "true")])
def test_a_refused_row_has_the_name_that_it_would_have(bot: Bot, given: Any, named: str) -> None:
    deliver(bot, id=given, question="who", answer="")
    erase(bot, row=named)
    assert refused(bot) == []


def test_a_file_beside_the_snapshots_does_not_stop_it_and_a_link_is_told(bot: Bot) -> None:
    folder, elsewhere = bot.settings.state_dir / "snapshots", bot.home / "elsewhere"
    folder.mkdir()
    (folder / ".nfs0000000012").write_text("of a file system")
    deliver(bot, id="1", question=f"who is {SECRET}", answer="a")
    erase(bot, row="1")
    print([(r.id, r.raw[:60], r.reason) for r in bot.store.quarantined()])
    assert files_with(bot, SECRET) == []

    elsewhere.mkdir()
    (elsewhere / "train.parquet").write_text("nobody can tell")
    (folder / "0123456789abcdef").symlink_to(elsewhere)
    deliver(bot, id="2", question=f"who else is {SECRET}", answer="a")
    for removing in (
        lambda: erase(bot, row="2"),
        lambda: retention.prune(bot.settings, bot.store, bot.registry),
    ):
        with pytest.raises(OSError, match=f"a link to {elsewhere}; remove both by hand") as told:
            removing()
        assert told.value.errno == errno.ELOOP
    assert (elsewhere / "train.parquet").exists()
    (folder / "0123456789abcdef").unlink()
    shutil.rmtree(elsewhere)
    erasure.finish(bot.settings, bot.store, bot.registry)
    assert files_with(bot, SECRET) == []
