"""The audit finds nothing in a healthy bot, and each real corruption under the name of what it breaks."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
from mlflow import MlflowClient

from daemon import audit, config, examination, operations, promote
from daemon.evidence import Wrong
from daemon.settings import Settings
from storage import artifacts, snapshots
from storage.artifacts import write_manifest
from storage.parquet import SnapshotRow, write_rows
from storage.records import State
from storage.registry import ADAPTER_TAG, CYCLE_TAG, STORE_TAG
from storage.rows import Row
from storage.runs import PREDICTIONS
from storage.store import Store
from tests.bots import FLAVOURS, Bot, Clock, audited, lesson, make_bot, make_bot_again, put_back
from tests.daemons import DaemonProcess, cli, read_json

SHAPES = ("round", "square", "long", "flat")


class Corrupt:
    """A bot that nobody runs, and the hands of somebody who should not have them."""

    def __init__(self, settings: Settings, now: Clock) -> None:
        self.settings = settings
        self.state = settings.state_dir
        self.clock = now

    def sql(self, statement: str, *values: object) -> list[Any]:
        with duckdb.connect(str(self.settings.store_path)) as connection:
            return connection.execute(statement, list(values)).fetchall()

    def mlflow(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.settings.tracking_uri, registry_uri=self.settings.tracking_uri)

    def findings(self) -> list[audit.Finding]:
        with Store.open(self.settings.store_path, read_only=True, clock=self.clock) as store:
            return list(audit.examine(self.settings, store, operations.open_registry(self.settings, store)))

    def row(self, split: str, task: str = "colours") -> dict[str, Any]:
        found = self.sql(
            "SELECT hash, task, question, answer FROM rows WHERE split = ? AND task = ?", split, task
        )
        return dict(zip(("hash", "task", "question", "answer"), min(found), strict=True))

    def accept(self, split: str, task: str, question: str, answer: str) -> None:
        """A row past all rules, but with the right hashes."""
        made = Row(id="x", task=task, question=question, answer=answer)
        self.sql(
            "INSERT INTO rows SELECT ?, ?, ?, max(seq) + 1, 'x', ?, ?, ?, '', NULL, ?, 'x', "
            "max(accepted_at), ? FROM rows",
            *(made.hash, made.key, made.question_key, task, question, answer, split, made.words_key),
        )

    def resnapshot(
        self,
        cycle: int,
        change: Callable[[dict[str, list[SnapshotRow]]], None] = lambda parts: None,
        **meta: object,
    ) -> None:
        """Another snapshot for a cycle, in order in itself: its name is the hash of what it says."""
        old = snapshots.load(
            self.state / "snapshots" / self.sql("SELECT snapshot FROM cycles WHERE id = ?", cycle)[0][0]
        )
        names = [
            *old.info["counts"],
            *(entry["file"].removesuffix(".parquet") for entry in old.info["suites"]),
        ]
        parts = {name: old.rows(name) for name in names}
        change(parts)
        info = {**old.info, "meta": {**old.info["meta"], **meta}}
        name = snapshots._identify(parts, info)
        with artifacts.atomic_dir(self.state / "snapshots" / name, {"id": name}) as folder:
            (folder / "suites").mkdir()
            for part, rows in parts.items():
                write_rows(folder / f"{part}.parquet", rows)
            (folder / "snapshot.json").write_text(json.dumps({"id": name, **info}))
        self.sql("UPDATE cycles SET snapshot = ? WHERE id = ?", name, cycle)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Bot, Path]:
    """Three cycles: one promoted, one promoted and rolled back, one rejected; and a copy of their state."""
    bot = make_bot(tmp_path_factory.mktemp("bot"), base, source__on_conflict="quarantine")
    bot.collect(lesson("colours"))
    assert bot.run().state is State.PROMOTED
    bot.collect(
        [*lesson("flavours", FLAVOURS), ("again", "colours", "which one is colours 0", "pink", "train")]
    )
    assert bot.run().state is State.PROMOTED
    promote.rollback(bot.store, bot.registry, "ann", "it tastes odd")
    strict = make_bot_again(bot, base, gate__min_gain=1.0, source__on_conflict="quarantine")
    grown = lesson("colours", train=16, suite=24)
    strict.collect([*lesson("shapes", SHAPES), *grown])
    assert strict.run().state is State.REJECTED
    strict.store.close()
    copy = tmp_path_factory.mktemp("copy") / "state"
    shutil.copytree(strict.settings.state_dir, copy)
    return strict, copy


@pytest.fixture
def bot(healthy: tuple[Bot, Path]) -> Iterator[Corrupt]:
    """The healthy bot two hours later, to be broken: afterwards its state is put back."""
    made, copy = healthy
    clock = Clock()
    clock.now = made.clock.now + timedelta(hours=2)
    yield Corrupt(made.settings, clock)
    put_back(made, copy)


def test_a_bot_with_a_promoted_a_rolled_back_and_a_rejected_cycle_has_no_finding(bot: Corrupt) -> None:
    before = files(bot.state)
    assert bot.findings() == []
    assert files(bot.state) == before, "an audit changes nothing"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_byte_of_the_base_that_turned_over_is_found(tmp_path: Path, name: str) -> None:
    bot = make_bot(tmp_path)
    bot.collect(lesson("colours")[:2])
    assert bot.run().state is State.NOTHING
    assert audited(bot) == []
    weights = Path(bot.settings.model.base) / name
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[-2] ^= 1  # of the configuration, its last bracket
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert bot.run().state is State.NOTHING, "no cycle reads every byte"
    (found,) = audited(bot)
    assert found.check == "each_base_is_what_it_was"
    assert f"the base at {weights.parent} is not what it was" in found.message
    bot.store.close()


def files(folder: Path) -> Mapping[str, str]:
    return {str(path): artifacts.sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# Corruptions, each under the name of the one check that must find it.

BREAKS: dict[str, list[tuple[Callable[[Corrupt], object], str]]] = {}


def breaks(check: Callable[..., Iterator[Wrong]], told: str) -> Callable[[Any], Any]:
    """Registers a corruption; `told` must be in what is said of it."""

    def register(corrupt: Callable[[Corrupt], object]) -> Callable[[Corrupt], object]:
        BREAKS.setdefault(check.__name__, []).append((corrupt, told))
        return corrupt

    return register


CHECKS = {check.__name__: check for check in (*audit.FILES, *audit.CHECKS)}


class _Named:
    """Checks by name, so that a corruption reads like a sentence."""

    def __getattr__(self, name: str) -> Callable[..., Iterator[Wrong]]:
        return CHECKS[name]


that = _Named()


@breaks(that.the_state_is_private, "has the mode 755")
def the_state_is_opened(bot: Corrupt) -> None:
    bot.state.chmod(0o755)


@breaks(that.the_state_is_private, "control.sock has the mode 666")
def the_socket_is_opened(bot: Corrupt) -> None:
    bot.settings.socket_path.touch()
    bot.settings.socket_path.chmod(0o666)


@breaks(that.no_file_is_a_pickle, "weights.bin")
def a_pickle_is_put_there(bot: Corrupt) -> None:
    (bot.state / "models" / "weights.bin").write_bytes(b"\x80")


@breaks(that.each_folder_of_a_cycle_is_on_record, "cycles/9 is of no cycle on record")
def the_store_is_an_older_one(bot: Corrupt) -> None:
    (bot.state / "cycles" / "9").mkdir()


@breaks(that.each_base_is_what_it_was, "tokenizer.json was changed after it was written")
def the_bases_tokenizer_is_edited(bot: Corrupt) -> None:
    (path,) = (bot.state / "models").glob("*/tokenizer/tokenizer.json")
    path.write_text(path.read_text() + " ")


@breaks(that.nothing_that_is_needed_was_pruned, "version 1, which serves")
def the_champion_is_on_record_as_pruned(bot: Corrupt) -> None:
    bot.sql("INSERT INTO pruned SELECT result, 'x', created_at, true FROM models WHERE version = 1")


@breaks(that.each_erasure_is_finished, "erasure 1 was begun")
def an_erasure_was_never_finished(bot: Corrupt) -> None:
    bot.sql("INSERT INTO erasures VALUES (1, 'ann', 'x', TIMESTAMP '2026-03-01', false, NULL)")


@breaks(that.no_erased_row_is_left_anywhere, "was erased and is in the store")
def a_row_came_back(bot: Corrupt) -> None:
    bot.sql("INSERT INTO erased VALUES (?, 1)", bot.row("train", "flavours")["hash"])


@breaks(that.no_erased_row_is_left_anywhere, "was erased and is in the store")
def a_superseded_row_came_back(bot: Corrupt) -> None:
    bot.sql("INSERT INTO erased VALUES (?, 1)", a_superseded_answer(bot))


@breaks(that.no_erased_row_is_left_anywhere, "the quarantined row")
def a_row_of_quarantine_came_back(bot: Corrupt) -> None:
    bot.sql("INSERT INTO erased SELECT hash, 1 FROM quarantine")


@breaks(that.no_erased_row_is_left_anywhere, "the quarantined row")
def an_erased_row_came_back_and_was_refused(bot: Corrupt) -> None:
    refused = Row(id="", task="colours", question="which one is colours 0", answer="pink")
    bot.sql("INSERT INTO erased VALUES (?, 1)", refused.hash)


def a_suite_row_is_erased(bot: Corrupt) -> str:
    """Only from the table that has its text."""
    row = bot.row("suite")["hash"]
    bot.sql("INSERT INTO erased VALUES (?, 1)", row)
    bot.sql("DELETE FROM rows WHERE hash = ?", row)
    return str(row)


@breaks(that.no_erased_row_is_left_anywhere, "was erased, and has an answer")
def answers_to_an_erased_row_are_left(bot: Corrupt) -> None:
    a_suite_row_is_erased(bot)


@breaks(that.no_erased_row_is_left_anywhere, "0.parquet has a row that was erased")
def an_erased_row_is_left_in_a_snapshot(bot: Corrupt) -> None:
    bot.sql("DELETE FROM predictions WHERE row_hash = ?", a_suite_row_is_erased(bot))


@breaks(that.no_erased_row_is_left_anywhere, f"{PREDICTIONS} has a row that was erased")
def an_erased_row_is_left_in_a_table_of_mlflow(bot: Corrupt) -> None:
    bot.sql("INSERT INTO erased VALUES (repeat('e', 32), 1)")
    table = min((bot.state / "artifacts").rglob(PREDICTIONS))
    table.write_text(table.read_text().replace("[", f'["{"e" * 32}", ', 1))


@breaks(that.nothing_that_learned_an_erased_row_serves, "version 1, of the champion's lineage")
def a_version_serves_that_learned_what_was_erased(bot: Corrupt) -> None:
    bot.sql("INSERT INTO tainted VALUES (1, 1)")


@breaks(that.each_row_is_what_its_hash_says, "was changed")
def a_training_row_is_rewritten(bot: Corrupt) -> None:
    bot.sql("UPDATE rows SET answer = 'teal' WHERE hash = ?", bot.row("train")["hash"])


@breaks(that.each_row_is_what_its_hash_says, "was changed")
def a_superseded_row_is_rewritten(bot: Corrupt) -> None:
    bot.sql("UPDATE rows SET answer = 'teal' WHERE hash = ?", a_superseded_answer(bot))


@breaks(that.each_question_is_in_one_split, "suite, train")
def a_suite_question_is_accepted_for_training_under_another_task(bot: Corrupt) -> None:
    bot.accept("train", "other", bot.row("suite")["question"], "red")


@breaks(that.each_row_in_quarantine_is_as_it_came, "was changed")
def a_quarantined_row_is_rewritten(bot: Corrupt) -> None:
    bot.sql("UPDATE quarantine SET raw = replace(raw, 'pink', 'rose')")


def a_second_answer(bot: Corrupt) -> tuple[str, str]:
    """(hash of a row, hash of another answer to its question), both of which count."""
    row = bot.row("train")
    bot.accept("train", "colours", row["question"], "pink")
    return row["hash"], Row(id="x", task="colours", question=row["question"], answer="pink").hash


def a_superseded_answer(bot: Corrupt) -> str:
    old, new = a_second_answer(bot)
    bot.sql("INSERT INTO supersessions VALUES (1, ?, ?, now())", new, old)
    return new


@breaks(that.each_question_has_an_answer_that_counts, "are superseded")
def two_answers_have_superseded_each_other(bot: Corrupt) -> None:
    old, new = a_second_answer(bot)
    bot.sql("INSERT INTO supersessions VALUES (1, ?, ?, now()), (2, ?, ?, now())", old, new, new, old)


@breaks(that.each_answer_was_superseded_by_another_of_its_question, "does not answer its question")
def an_answer_is_superseded_by_that_of_another_question(bot: Corrupt) -> None:
    old, _ = a_second_answer(bot)
    bot.sql("INSERT INTO supersessions VALUES (1, ?, ?, now())", old, bot.row("suite")["hash"])


@breaks(that.no_row_was_used_against_its_split, "as a train row")
def a_suite_row_is_put_into_the_training_rows_of_a_cycle(bot: Corrupt) -> None:
    bot.sql("INSERT INTO cycle_rows VALUES (1, ?, 'train')", bot.row("suite")["hash"])


@breaks(that.each_row_of_a_cycle_is_in_the_store, "which is not in the store")
def a_row_is_deleted(bot: Corrupt) -> None:
    bot.sql("DELETE FROM rows WHERE hash = ?", bot.row("validation")["hash"])


@breaks(that.no_row_is_learned_twice_in_a_lineage, "cycles 1 and 2")
def a_row_is_new_to_two_cycles_of_a_lineage(bot: Corrupt) -> None:
    again = bot.sql("SELECT min(row_hash) FROM cycle_rows WHERE cycle_id = 1 AND role = 'train'")[0][0]
    bot.sql("DELETE FROM cycle_rows WHERE cycle_id = 2 AND row_hash = ?", again)
    bot.sql("INSERT INTO cycle_rows VALUES (2, ?, 'train')", again)

    def teach(parts: dict[str, list[SnapshotRow]]) -> None:
        parts["train"] += [row for row in parts["memory"] if row.hash == again]

    bot.resnapshot(2, teach)


@breaks(that.each_frozen_suite_is_what_was_frozen, "colours@v1 is not the one that was frozen")
def a_suite_row_is_rewritten(bot: Corrupt) -> None:
    frozen = bot.sql("SELECT min(row_hash) FROM suite_rows WHERE task = 'colours' AND version = 1")[0][0]
    bot.sql("UPDATE rows SET answer = upper(answer) WHERE hash = ?", frozen)


@breaks(that.each_suite_only_grows, "colours@v3 lost")
def a_suite_shrinks(bot: Corrupt) -> None:
    with Store.open(bot.settings.store_path) as store:
        kept = store.suite_rows("colours", 1)
        store.freeze_suite("colours", [row.hash for row in kept], snapshots.suite_hash(kept), 3)


@breaks(that.each_snapshot_of_a_cycle_is_whole, "train.parquet is missing")
def a_file_of_a_snapshot_is_deleted(bot: Corrupt) -> None:
    name = bot.sql("SELECT snapshot FROM cycles WHERE id = 2")[0][0]
    (bot.state / "snapshots" / name / "train.parquet").unlink()


@breaks(that.each_snapshot_has_the_suites_that_were_frozen, "frozen was")
def a_suite_is_rewritten_in_a_snapshot(bot: Corrupt) -> None:
    def ease(parts: dict[str, list[SnapshotRow]]) -> None:
        parts["suites/0"][0] = replace(parts["suites/0"][0], answer="red herring")

    bot.resnapshot(1, ease)


@breaks(that.each_cycle_was_taught_the_rows_of_its_snapshot, "1 validation rows")
def a_row_of_a_cycle_is_forgotten(bot: Corrupt) -> None:
    bot.sql("DELETE FROM cycle_rows WHERE cycle_id = 1 AND row_hash = ?", bot.row("validation")["hash"])


@breaks(that.no_question_of_a_suite_is_learned_from, "memory.parquet asks what a suite asks")
def a_suite_question_is_rehearsed_in_another_spelling(bot: Corrupt) -> None:
    question = bot.row("suite")["question"].upper()
    made = Row(id="x", task="other", question=f" {question} ", answer="red")

    def leak(parts: dict[str, list[SnapshotRow]]) -> None:
        fields = {name: getattr(made, name) for name in ("id", "task", "question", "answer", "context")}
        parts["memory"].append(SnapshotRow(hash=made.hash, split="train", **fields))

    bot.resnapshot(2, leak)


@breaks(that.no_cycle_is_left_that_nobody_will_continue, "cycle 3 is trained and has ended")
def an_ended_cycle_is_set_back(bot: Corrupt) -> None:
    bot.sql("UPDATE cycles SET state = 'trained' WHERE id = 3")


@breaks(that.no_cycle_is_left_that_nobody_will_continue, "has no verdict")
def a_cycle_waits_to_publish_what_was_never_decided(bot: Corrupt) -> None:
    bot.sql("UPDATE cycles SET state = 'decided', finished_at = NULL WHERE id = 3")
    bot.sql("DELETE FROM verdicts WHERE cycle_id = 3")


@breaks(that.each_ended_cycle_says_why, "cycle 2 is promoted for no reason")
def a_reason_is_deleted(bot: Corrupt) -> None:
    bot.sql("UPDATE cycles SET reason = NULL WHERE id = 2")


@breaks(that.each_cycle_took_only_arrows_that_exist, "trained → decided")
def a_step_is_deleted(bot: Corrupt) -> None:
    bot.sql("DELETE FROM events WHERE cycle_id = 1 AND kind = 'evaluated'")


@breaks(that.each_cycle_ended_as_its_verdict_says, "version 3 was never champion")
def a_rejected_cycle_is_called_promoted(bot: Corrupt) -> None:
    bot.sql("UPDATE cycles SET state = 'promoted' WHERE id = 3")
    bot.sql("UPDATE events SET kind = 'promoted' WHERE cycle_id = 3 AND kind = 'rejected'")


@breaks(that.each_candidate_is_one_that_a_rescue_makes, "its verdict says False")
def a_candidate_is_said_to_have_passed(bot: Corrupt) -> None:
    bot.sql("UPDATE candidates SET passed = true WHERE cycle_id = 3")


@breaks(that.each_candidate_is_one_that_a_rescue_makes, "attempt 2 is a train from None")
def a_second_plain_training_is_a_candidate(bot: Corrupt) -> None:
    other = "2 AS number, NULL AS model, NULL AS passed, NULL AS verdict"
    bot.sql(f"INSERT INTO candidates SELECT * REPLACE ({other}) FROM candidates WHERE cycle_id = 3")


@breaks(that.each_result_is_as_it_was_made, "adapter_model.safetensors was changed")
def an_adapter_is_truncated(bot: Corrupt) -> None:
    path = bot.state / "cycles/2/train/adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


@breaks(that.each_result_is_as_it_was_made, "on record is")
def an_adapter_is_swapped_with_its_manifest(bot: Corrupt) -> None:
    shutil.copy(
        bot.state / "cycles/1/train/adapter/adapter_model.safetensors", bot.state / "cycles/2/train/adapter"
    )
    remanifest(bot.state / "cycles/2/train")


def remanifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("files")
    write_manifest(folder, manifest)


@breaks(that.each_version_is_what_its_cycle_made, "version 1 has the adapter 000")
def another_adapter_is_on_record(bot: Corrupt) -> None:
    bot.sql("UPDATE models SET adapter_hash = repeat('0', 64) WHERE version = 1")


@breaks(that.lineages_have_no_gaps_and_no_loops, "version 2 continues from None, its cycle from 1")
def a_lineage_is_cut(bot: Corrupt) -> None:
    bot.sql("UPDATE models SET parent = NULL WHERE version = 2")


@breaks(that.lineages_have_no_gaps_and_no_loops, "version 1 continues from 3")
def a_lineage_is_a_loop(bot: Corrupt) -> None:
    bot.sql("UPDATE models SET parent = 3 WHERE version = 1")


@breaks(that.each_snapshot_continues_from_its_cycles_parent, "from version 1, its snapshot from 2")
def a_snapshot_is_of_another_parent(bot: Corrupt) -> None:
    bot.resnapshot(3, parent=2)


@breaks(that.each_memory_has_only_rows_that_its_lineage_learned, "version 2 remembers 1 rows")
def a_suite_row_is_remembered(bot: Corrupt) -> None:
    path = bot.state / "cycles/2/train/state/replay.json"
    memory = json.loads(path.read_text())
    memory["tasks"]["colours"][bot.row("suite")["hash"]] = {}
    path.write_text(json.dumps(memory))
    remanifest(path.parent.parent)


@breaks(that.each_promotion_has_a_verdict_or_a_person_behind_it, "cycle 1 has no passing verdict")
def a_verdict_is_deleted(bot: Corrupt) -> None:
    bot.sql("DELETE FROM verdicts WHERE cycle_id = 1")


@breaks(that.each_promotion_has_a_verdict_or_a_person_behind_it, "by rollback at")
def a_person_is_deleted(bot: Corrupt) -> None:
    bot.sql("UPDATE promotions SET who = '' WHERE kind = 'rollback'")


@breaks(that.promotions_follow_one_another, "follows version 7")
def a_line_of_the_history_is_rewritten(bot: Corrupt) -> None:
    bot.sql("UPDATE promotions SET previous = 7 WHERE seq = 2")


@breaks(that.each_prediction_belongs_to_an_exam, "which nobody set")
def an_exam_is_made_up(bot: Corrupt) -> None:
    bot.sql("INSERT INTO predictions SELECT * REPLACE ('feed' AS exam) FROM predictions LIMIT 1")


@breaks(that.each_prediction_belongs_to_an_exam, "which nobody made")
def a_model_is_made_up(bot: Corrupt) -> None:
    bot.sql("INSERT INTO predictions SELECT * REPLACE ('feed' AS model) FROM predictions LIMIT 1")


@breaks(that.each_answered_row_is_in_the_store, "the store has no such row")
def a_row_is_made_up(bot: Corrupt) -> None:
    name = bot.sql("SELECT snapshot FROM cycles WHERE id = 2")[0][0]
    exam = examination.probe_exams(snapshots.load(bot.state / "snapshots" / name))[0].key
    other = f"'{exam}' AS exam, repeat('0', 32) AS row_hash"
    bot.sql(f"INSERT INTO predictions SELECT * REPLACE ({other}) FROM predictions LIMIT 1")


@breaks(that.each_prediction_is_worth_what_its_text_says, "'mauve', has the exact match 1")
def an_answer_is_rewritten(bot: Corrupt) -> None:
    first = "SELECT min((model, exam, row_hash)) FROM predictions WHERE exact_match = 1"
    bot.sql(f"UPDATE predictions SET prediction = 'mauve' WHERE (model, exam, row_hash) = ({first})")


@breaks(that.each_score_is_the_mean_of_its_predictions, "candidate on colours@v1 in cycle 2 is 0.99")
def a_score_is_changed(bot: Corrupt) -> None:
    bot.sql("UPDATE scores SET score = 0.99 WHERE cycle_id = 2 AND label = 'candidate' AND task = 'colours'")


@breaks(that.each_score_is_the_mean_of_its_predictions, "not one for each row")
def an_answer_is_deleted(bot: Corrupt) -> None:
    model, exam = bot.sql(
        "SELECT model, exam FROM scores WHERE cycle_id = 2 AND label = 'candidate' AND task = 'flavours'"
    )[0]
    first = "SELECT min(row_hash) FROM predictions WHERE model = $1 AND exam = $2"
    bot.sql(f"DELETE FROM predictions WHERE model = $1 AND exam = $2 AND row_hash = ({first})", model, exam)


@breaks(that.each_score_is_of_its_cycles_own_models_and_exams, "by token_f1")
def a_metric_is_changed(bot: Corrupt) -> None:
    bot.sql(
        "UPDATE scores SET metric = 'token_f1' WHERE cycle_id = 2 AND label = 'base' AND task = 'colours'"
    )


@breaks(that.each_verdict_can_be_reached_again, "gain 0.5")
def a_verdict_is_improved_wherever_it_stands(bot: Corrupt) -> None:
    verdict = json.loads(bot.sql("SELECT verdict FROM verdicts WHERE cycle_id = 2")[0][0])
    better = json.dumps({**verdict, "gain": 0.5})
    bot.sql("UPDATE verdicts SET verdict = ? WHERE cycle_id = 2", better)
    bot.sql("UPDATE candidates SET verdict = ? WHERE cycle_id = 2", better)


@breaks(that.mlflow_can_be_asked, "is not an SQLite database")
def mlflow_is_overwritten(bot: Corrupt) -> None:
    (bot.state / "mlflow.db").write_text("oops")


@breaks(that.the_alias_champion_is_the_stores_champion, "is at version 3, the champion is version 1")
def the_alias_is_moved_by_hand(bot: Corrupt) -> None:
    bot.mlflow().set_registered_model_alias("test-bot", "champion", "3")


@breaks(that.the_alias_challenger_is_the_newest_candidate, "is at no version")
def the_challenger_is_deleted(bot: Corrupt) -> None:
    bot.mlflow().delete_registered_model_alias("test-bot", "challenger")


@breaks(that.each_version_is_in_mlflow_as_it_was_trained, "version 2 of cycle 2 with the adapter feed")
def a_tag_is_changed(bot: Corrupt) -> None:
    bot.mlflow().set_model_version_tag("test-bot", "2", ADAPTER_TAG, "feed")


@breaks(that.each_version_is_in_mlflow_as_it_was_trained, "version 2 not at all")
def a_version_is_deleted(bot: Corrupt) -> None:
    bot.mlflow().delete_model_version("test-bot", "2")


@breaks(that.each_version_is_in_mlflow_as_it_was_trained, "was changed")
def the_adapter_that_is_served_is_changed(bot: Corrupt) -> None:
    source = bot.mlflow().get_model_version("test-bot", "1").source
    path = Path(source.removeprefix("file://")) / "artifacts/adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes() + b"!")


@breaks(that.no_version_in_mlflow_is_unknown_here, "version 4 of cycle 7")
def a_version_is_made_up(bot: Corrupt) -> None:
    store = bot.sql("SELECT value FROM meta WHERE key = 'store_id'")[0][0]
    bot.mlflow().create_model_version("test-bot", "file:///nowhere", tags={STORE_TAG: store, CYCLE_TAG: "7"})


@breaks(that.each_number_in_mlflow_comes_from_the_predictions, "suite/colours/candidate = 0.99")
def a_number_is_improved(bot: Corrupt) -> None:
    run = bot.mlflow().get_model_version("test-bot", "2").run_id
    assert run is not None
    bot.mlflow().log_metric(run, "suite/colours/candidate", 0.99)


@pytest.mark.parametrize(
    ("check", "corrupt", "told"),
    [(name, *each) for name, found in BREAKS.items() for each in found],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_corruption_is_found_by_the_check_that_names_it_and_by_no_other(
    bot: Corrupt, check: str, corrupt: Callable[[Corrupt], object], told: str
) -> None:
    corrupt(bot)
    found = bot.findings()
    assert {finding.check for finding in found} == {check}, found
    assert all(finding.next for finding in found)
    assert told in found[0].message


def test_there_is_a_corruption_for_every_check() -> None:
    assert set(BREAKS) == set(CHECKS)


# How it is asked, and what it must not complain of.


def test_the_command_tells_a_line_a_finding_and_its_exit_code_says_whether_there_is_one(bot: Corrupt) -> None:
    path = bot.settings.state_dir.parent / "config.toml"
    ran = cli(path, "audit")
    assert (ran.returncode, ran.stdout.count("\n")) == (0, 1), ran.stderr + ran.stdout
    assert "nothing is wrong" in ran.stdout
    a_reason_is_deleted(bot)
    the_state_is_opened(bot)
    ran = cli(path, "audit")
    assert (ran.returncode, ran.stdout.count("\n")) == (1, 2)
    assert f"→ chmod 700 {bot.state}" in ran.stdout
    told = json.loads(cli(path, "audit", "--json").stdout)
    assert {found["check"] for found in told["findings"]} == {
        "the_state_is_private",
        "each_ended_cycle_says_why",
    }
    assert told["cycles"] == 3


@pytest.mark.acceptance
def test_a_running_daemon_audits_itself(bot: Corrupt) -> None:
    path = bot.settings.state_dir.parent / "config.toml"
    with DaemonProcess(path) as daemon:
        ran = cli(path, "audit")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        bot.state.chmod(0o755)
        assert "the state is private" in cli(path, "audit").stdout
        assert daemon.stop() == 0


def test_before_anything_was_done_nothing_is_wrong(tmp_path: Path) -> None:
    assert cli(tmp_path / "none", "init", str(tmp_path)).returncode == 0
    told = read_json(cli(tmp_path / "config.toml", "audit", "--json"))
    assert told["findings"] == []
    state = config.load(tmp_path / "config.toml").state_dir
    assert list(state.iterdir()) == [], "looking makes nothing"
    (state / "cycles" / "1").mkdir(parents=True)
    ran = cli(tmp_path / "config.toml", "audit")
    assert ran.returncode == 1
    assert "there is no store" in ran.stdout


def test_a_check_that_breaks_is_a_finding_and_hides_no_other(
    bot: Corrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(evidence: object) -> Iterator[Wrong]:
        raise ZeroDivisionError("oops")

    a_reason_is_deleted(bot)
    monkeypatch.setattr(audit, "CHECKS", (broken, *audit.CHECKS))
    assert [finding.check for finding in bot.findings()] == ["broken", "each_ended_cycle_says_why"]


def test_a_state_that_no_cycle_has_is_told_in_words(bot: Corrupt) -> None:
    bot.sql("UPDATE cycles SET state = 'asleep' WHERE id = 3")
    found = bot.findings()
    assert [finding.check for finding in found] == ["the_store_can_be_read"]
    assert "asleep" in found[0].message


def test_the_alias_may_lag_behind_a_promotion_for_a_while_and_no_longer(bot: Corrupt) -> None:
    before, line = bot.clock.now, bot.sql('SELECT max("at") FROM promotions')[0][0]
    bot.mlflow().set_registered_model_alias("test-bot", "champion", "2")
    bot.clock.now = line
    assert bot.findings() == []
    bot.clock.now = before
    assert [finding.check for finding in bot.findings()] == ["the_alias_champion_is_the_stores_champion"]


def test_nothing_is_wrong_at_any_moment_of_a_cycle(tmp_path: Path, base: Path) -> None:
    """A daemon may be asked at any time: what is only half done is no disagreement."""
    bot = make_bot(tmp_path, base)
    bot.collect(lesson("colours"))
    bot.run()
    bot.collect(lesson("flavours", FLAVOURS))
    found: list[tuple[str, audit.Finding]] = []
    advance, add_model = bot.store.advance, bot.store.add_model

    def look(moment: str) -> None:
        found.extend((moment, finding) for finding in audited(bot))

    def advancing(cycle: int, to: State, **told: Any) -> object:
        after = advance(cycle, to, **told)
        look(f"as it is {to}")
        return after

    def adding(model: Any) -> None:
        look("in MLflow, and not here")
        add_model(model)
        look("on record")

    bot.store.advance, bot.store.add_model = advancing, adding  # type: ignore[assignment, method-assign]
    bot.executor.after = look
    assert bot.run().state is State.PROMOTED
    assert found == []
    assert audited(bot) == []
    bot.store.close()


def test_nothing_is_wrong_when_answers_change_and_change_back(tmp_path: Path, base: Path) -> None:
    """In training and in the suite: the older answer loses its place, has it back and is learned again."""
    bot = make_bot(tmp_path / "bot", base)
    now = iter(range(100))
    bot.collect(lesson("colours"))
    for answer in ("white", "black", "white"):
        bot.collect(
            [
                (f"{next(now)}", "colours", f"which one is colours {n}", answer, "")
                for n in (*range(8), 20, 21)
            ]
        )
        assert bot.run().state is State.PROMOTED
        assert audited(bot) == []
    survey = bot.store.survey()
    assert survey.ever_superseded()
    assert any(move.by_hash is None for move in bot.store.supersessions())
    assert [suite.version for suite in bot.store.suites() if suite.task == "colours"] == [1, 2, 3]


def test_nothing_is_wrong_where_strategies_were_tried_and_the_base_was_put_back(
    tmp_path: Path, base: Path
) -> None:
    bot = make_bot(tmp_path, base, **{"strategy.methods": "auto"})
    for rows in (lesson("colours"), lesson("flavours", FLAVOURS)):
        bot.collect(rows)
        bot.run()
    assert audited(bot) == []
    for _ in range(2):
        promote.rollback(bot.store, bot.registry, "ann", "back to the start")
    operations.promote(bot.store, bot.registry, 2, "ann", "and on again")
    assert audited(bot) == []
    bot.store.close()


def test_looking_into_mlflow_makes_neither_a_database_nor_an_experiment(tmp_path: Path, base: Path) -> None:
    bot = make_bot(tmp_path, base)
    before = artifacts.sha256_file(bot.settings.state_dir / "mlflow.db")
    assert bot.registry.look().versions == ()
    assert artifacts.sha256_file(bot.settings.state_dir / "mlflow.db") == before
    (bot.settings.state_dir / "mlflow.db").unlink()
    assert audited(bot) == []
    assert not (bot.settings.state_dir / "mlflow.db").exists()
    bot.store.close()


def test_what_the_intake_refused_is_no_finding_unless_it_was_changed(tmp_path: Path) -> None:
    from storage.intake import is_as_it_came, validate
    from storage.records import Rejected, utcnow
    from storage.sources import RawRow, SourceSpec

    for values in (
        {"question": "q é", "id": 1, "answer": ""},
        {"text": "\udcff{", "at": float("nan")},
        {"question": ["q"], "answer": "x" * 9000, "id": b"\xff"},
    ):
        raw = RawRow(values=values, location="x line 1", problem="broken" if "text" in values else "")
        refused = validate(raw, SourceSpec(), source="x", now=utcnow())
        assert isinstance(refused, Rejected)
        assert is_as_it_came(refused)
    whole = validate(RawRow(values={"id": 1}, location="x"), SourceSpec(), source="x", now=utcnow())
    assert isinstance(whole, Rejected)
    assert not is_as_it_came(replace(whole, raw='{"id": 2}'))
