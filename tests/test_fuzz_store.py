"""Records in the store that are no longer what was written: every command says so or does its work.

DuckDB's own pages have checksums; this is what a curious hand, or a bug of another version, leaves in them.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import console, operations, report
from storage.errors import ControlError, HoldfastError, Interrupted
from storage.records import State
from storage.store import Store
from tests.bots import Bot, audited, fails, lesson, make_bot, put_back, two_promoted
from tests.fuzzing import JSON, examples
from tests.test_fuzz_damage import changed

RECORDS = (
    ("verdicts", "verdict"), ("candidates", "verdict"), ("candidates", "curve"), ("candidates", "strategy"),
    ("events", "detail"), ("tasks", "labels"), ("tasks", "kind"), ("cycles", "state"), ("cycles", "snapshot"),
    ("models", "result"), ("scores", "metric"), ("meta", "value"),
)  # fmt: skip
# What says where something lies, and what it must be: no text to be taken apart, but followed.
POINTERS = (
    ("candidates", "result"), ("candidates", "model"), ("models", "adapter_hash"), ("models", "base"),
    ("suites", "hash"), ("predictions", "exam"),
)  # fmt: skip
COMMANDS: dict[str, Callable[[Bot], object]] = {
    "status": lambda bot: console.status(console.harmless(operations.status(bot.settings, bot.store))),
    "history": lambda bot: console.history(console.harmless(operations.history(bot.store, 20))),
    "show": lambda bot: console.show(console.harmless(operations.show(bot.store, 2))),
    "ask": lambda bot: operations.serving(bot.settings, bot.store),
    "prune": lambda bot: operations.prunable(bot.settings, bot.store),
    "audit": audited,
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[tuple[Bot, Path]]:
    """A bot of two cycles that is paused, with its store closed, and a copy of its state."""
    home = tmp_path_factory.mktemp("grown")
    bot = make_bot(home / "bot", base, training__epochs=1)
    two_promoted(bot)
    operations.pause(bot.store, "ann")
    bot.store.close()
    shutil.copytree(bot.settings.state_dir, home / "copy")
    yield bot, home / "copy"
    bot.store.close()


def spoil(bot: Bot, table: str, column: str, make: Callable[[str], str]) -> None:
    with duckdb.connect(str(bot.settings.store_path)) as connection:
        (kept,) = connection.execute(f"SELECT max({column}) FROM {table}").fetchall()[0]
        connection.execute(f"UPDATE {table} SET {column} = ?", [make(kept or "{}")])
    bot.store = Store.open(bot.settings.store_path, clock=bot.clock)


def in_words(bot: Bot, command: str) -> str:
    """What the command says is wrong; nothing when it does its work."""
    try:
        COMMANDS[command](bot)
    except ControlError:  # of what is not there: the answer to any wrong name
        return "said"
    except HoldfastError as error:
        said = str(error)
        assert str(bot.settings.state_dir) in said, said
        assert "`" in said, said
        return said
    return ""


ERASED: dict[str, Any] = {"row": None, "task": "flavours", "before": None, "contains": None, "where": []}
MOVES: dict[str, Callable[[Bot], object]] = {
    "cycle": lambda bot: bot.run(bot.store.cycles(1)[0]),
    "promote": lambda bot: operations.promote(bot.store, bot.registry, 1, "ann", "a test"),
    "rollback": lambda bot: operations.rollback(bot.store, bot.registry, "ann", "a test"),
    "erase": lambda bot: operations.erase(bot.settings, bot.store, "ann", "a test", **ERASED),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[tuple[Bot, Path]]:
    """A bot whose third cycle was stopped after its training, and a copy of its state."""
    home = tmp_path_factory.mktemp("begun")
    bot = make_bot(home / "bot", base, training__epochs=1)
    two_promoted(bot)
    bot.collect(lesson("shapes", ("round", "square")))
    bot.executor.before = fails("evaluate", Interrupted())
    with pytest.raises(Interrupted):
        bot.run()
    bot.executor.before = lambda stage: None
    bot.store.close()
    shutil.copytree(bot.settings.state_dir, home / "copy")
    yield bot, home / "copy"
    bot.store.close()


@pytest.mark.parametrize("move", MOVES)
@examples(6, times=10)
@given(record=st.sampled_from(RECORDS + POINTERS), data=st.data())
def test_what_goes_on_from_a_damaged_record_ends_or_says_so(
    begun: tuple[Bot, Path], move: str, record: tuple[str, str], data: st.DataObject
) -> None:
    bot, copy = begun
    put_back(bot, copy)
    spoil(
        bot, *record, lambda kept: data.draw(st.sampled_from(["", "{", "null", "[]", "\0", "7", '{"a": 1}']))
    )
    bot.registry = operations.open_registry(bot.settings, bot.store)
    try:
        with suppress(HoldfastError):
            MOVES[move](bot)
    finally:
        bot.store.close()


@pytest.mark.parametrize("kept", ["", "{", "null", '{"a": 1}'])
def test_a_cycle_whose_strategy_cannot_be_read_fails_and_the_audit_names_it(
    begun: tuple[Bot, Path], kept: str
) -> None:
    bot, copy = begun
    put_back(bot, copy)
    spoil(bot, "candidates", "strategy", lambda _: kept)
    bot.registry = operations.open_registry(bot.settings, bot.store)
    told = operations.audit(bot.settings, bot.store, bot.registry)
    found = {finding["check"]: finding["message"] for finding in told["findings"]}
    assert "an attempt of cycle 1 cannot be read" in found["each_candidate_is_one_that_a_rescue_makes"]
    ended = bot.run(bot.store.cycles(1)[0])
    assert ended.state is State.FAILED
    assert "of cycle 3 cannot be read" in str(ended.reason)
    bot.store.close()


@pytest.mark.parametrize("record", RECORDS, ids=" ".join)
@examples(12, times=10)
@given(data=st.data())
def test_a_record_that_is_no_longer_what_was_written_is_told_by_every_command(
    grown: tuple[Bot, Path], record: tuple[str, str], data: st.DataObject
) -> None:
    def other(kept: str) -> str:
        if data.draw(st.booleans()):
            return data.draw(st.sampled_from(["", "{", "[" * 100_000, "null", "[]", "\0", "1e999"]))
        value: Any = json.loads(kept) if kept[:1] in "{[" else kept
        return json.dumps(changed(value, data) if data.draw(st.booleans()) else data.draw(JSON))

    bot, copy = grown
    put_back(bot, copy)
    spoil(bot, *record, other)
    try:
        for command in COMMANDS:
            in_words(bot, command)
    finally:
        bot.store.close()


@pytest.mark.parametrize(
    ("table", "column", "command"),
    [
        ("verdicts", "verdict", "show"),
        ("candidates", "verdict", "show"),
        ("events", "detail", "show"),
        ("cycles", "state", "status"),
        ("tasks", "labels", "ask"),
    ],
)
def test_the_error_names_the_store_and_what_is_damaged(
    grown: tuple[Bot, Path], table: str, column: str, command: str
) -> None:
    bot, copy = grown
    put_back(bot, copy)
    spoil(bot, table, column, lambda kept: "{")
    said = in_words(bot, command)
    assert f"the store {bot.settings.store_path} is damaged" in said
    assert "put your newest backup in its place" in said
    bot.store.close()


def test_the_audit_names_a_damaged_verdict_and_checks_the_rest(grown: tuple[Bot, Path]) -> None:
    bot, copy = grown
    put_back(bot, copy)
    spoil(bot, "candidates", "verdict", lambda kept: "{")
    told = operations.audit(bot.settings, bot.store, bot.registry)
    found = {finding["check"]: finding["message"] for finding in told["findings"]}
    assert "a verdict of cycle 1 cannot be read" in found["each_verdict_can_be_reached_again"]
    assert "each_row_is_what_its_hash_says" not in found
    bot.store.close()


def test_a_pause_that_cannot_be_read_is_a_pause_and_can_be_ended(grown: tuple[Bot, Path]) -> None:
    bot, copy = grown
    put_back(bot, copy)
    spoil(bot, "meta", "value", lambda kept: "{")
    told = operations.status(bot.settings, bot.store)["paused"]
    assert told == {"by": "somebody (the record is damaged)", "at": None}
    with pytest.raises(ControlError, match="daemon resume"):
        operations.check_not_paused(bot.store)
    assert operations.resume(bot.store, "ann") == {"paused": None, "already": False}
    assert operations.paused(bot.store) is None
    assert report.cycle_report(bot.store, 2)["words"]
    bot.store.close()
