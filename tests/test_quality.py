"""The quality benchmark: what its streams promise, runs that are interrupted, records, and pages."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.clinc_rows import Sizes
from benchmarks.contenders import CONTENDERS
from benchmarks.quality import clbench, clinc, conclusions, pages, plan, records, synthetic, work
from benchmarks.quality.learning import Work
from benchmarks.quality.plan import Choice, Places, Plan
from benchmarks.quality.records import RunRecord
from benchmarks.quality.run import run
from benchmarks.quality.streams import Stream
from benchmarks.quality.summary import MixedRecords, Stat, boards, growth
from benchmarks.sampling import balanced
from benchmarks.stream import code
from daemon import config
from daemon.experience import lora_spec, strategy_spec, train_spec
from storage.errors import Interrupted
from storage.rows import Row, Split
from strategies.contract import LoraSpec, TrainSpec
from strategies.metrics import measured
from strategies.text import Prompter
from tests.trainings import StopAfter

SMALL = Sizes(domains=3, rows=12, validation=4, suite=4)


@pytest.fixture(scope="module")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy-base")
    synthetic.tiny_base(folder)
    return folder


def one(name: str, **train: Any) -> Plan:
    """A contender on three small experiences."""
    choice = Choice(
        size="small",
        streams=["toy"],
        orders=["given"],
        seeds=[0],
        contenders=[name],
        train={"epochs": 2, **train},
    )
    (found,) = plan.plans(choice)
    return replace(found, sizes={"domains": 3, "rows": 12, "validation": 4, "suite": 4})


def task(base: Path, folder: Path, planned: Plan) -> Work:
    return Work(
        plan=planned,
        model=synthetic.tiny_base(base),
        out=folder / "out",
        places=Places(),
        records=folder / "records",
    )


def quiet(text: str) -> None:
    """Says nothing."""


# Streams.


@pytest.mark.parametrize("order", ["given", "shuffled"])
def test_no_question_is_in_two_splits(order: str) -> None:
    stream = synthetic.toy(SMALL, order=order, seed=0)
    where: dict[str, set[Split]] = {}
    for experience in stream.experiences:
        suites = [row for rows in experience.suites.values() for row in rows]
        for row in [*experience.train, *experience.validation, *suites]:
            assert row.split is not None
            where.setdefault(row.question_key, set()).add(row.split)
    assert all(len(splits) == 1 for splits in where.values())


def test_a_question_of_a_suite_is_taken_out_of_every_training() -> None:
    stream = synthetic.long(SMALL, order="given", seed=0)
    first, *others = stream.experiences
    leaked = replace(stream.experiences[2].suites["skill 2"][0], split=Split.TRAIN, task="skill 0")
    dirty = replace(
        stream, experiences=(replace(first, train=(*first.train, leaked, first.train[0])), *others)
    )
    assert dirty.tidy().experiences == stream.experiences


def test_renamed_rows_are_the_same_questions_and_the_suite_expects_the_new_answer_from_then_on() -> None:
    stream = synthetic.toy(SMALL, order="given", seed=0)
    first, second, _ = stream.experiences
    again = [row for row in second.train if row.task == "skill 0"]
    old = {row.key: row for row in first.train}
    assert again
    assert all(old[row.key].question == row.question and old[row.key].answer != row.answer for row in again)
    assert all(old[row.key].hash != row.hash for row in again)
    before, after = stream.suite("skill 0", 1), stream.suite("skill 0", 2)
    assert [row.key for row in before] == [row.key for row in after]
    changed = [(a.answer, b.answer) for a, b in zip(before, after, strict=True) if a.answer != b.answer]
    assert changed
    assert all(stream.replaced["skill 0", new] == previous for previous, new in changed)
    assert stream.suite("skill 0", 3) == after


def test_an_answer_that_was_given_anew_is_no_longer_remembered() -> None:
    stream = synthetic.toy(SMALL, order="given", seed=0)
    renamed = {row.key for row in stream.experiences[1].train if row.task == "skill 0"}
    assert not renamed & {row.key for row in stream.past(1)}
    held = [row.answer for row in stream.past(2) if row.key in renamed]
    assert held
    assert all(answer.startswith("what was") for answer in held)
    assert len({row.key for row in stream.rows_seen(3)}) == len(stream.rows_seen(3))


def test_joint_training_learns_the_newest_answers_at_once() -> None:
    stream = synthetic.toy(SMALL, order="given", seed=0)
    union = stream.union()
    assert len(union.experiences) == 1
    assert set(union.experiences[0].train) == set(stream.rows_seen(3))
    assert union.learned_at == [1, 1, 1]
    assert union.suite("skill 0", 0) == stream.suite("skill 0", 3)


def test_every_domain_of_the_table_has_one_intent_renamed() -> None:
    rows = [Row(id="1", task="banking", question="stop my card", answer="freeze account", split=Split.TRAIN)]
    (experience,) = clinc.of_domains("x", [rows], "given").experiences
    assert clinc.new_name(experience) == ("freeze account", "lock my money")


def test_orders_are_permutations_of_the_same_tasks() -> None:
    given, shuffled = (synthetic.long(SMALL, order=order, seed=0) for order in ("given", "shuffled"))
    assert sorted(given.tasks) == sorted(shuffled.tasks)
    assert len({frozenset(order) for order in clbench.ORDERS.values()}) == 1


def test_the_text_tasks_are_cut_by_class_and_their_validation_comes_from_training(tmp_path: Path) -> None:
    lines = [
        {"id": f"{t}-{s}-{n}", "task": t, "question": f"{t} {s} {n}", "answer": str(n % 3 == 0), "split": s}
        for t in clbench.ORDERS["order4"]
        for s in ("train", "test")
        for n in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stream = clbench.clbench(
        tmp_path, Sizes(domains=6, rows=20, validation=3, suite=10), order="order4", seed=0
    )
    assert stream.tasks == list(clbench.ORDERS["order4"])
    for experience in stream.experiences:
        assert len(experience.train) == 20
        assert sum(row.answer == "True" for row in experience.train) == 10
        assert all("train" in row.id for row in experience.validation)


def test_a_balanced_cut_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = list(synthetic.long(SMALL, order="given", seed=0).experiences[0].train)
    assert balanced(rows, 5, 1) == balanced(rows[::-1], 5, 1)


# Plans.


def test_work_is_ordered_seed_by_seed_with_the_baselines_first() -> None:
    found = plan.plans(Choice(size="wide"))
    assert [p.seed for p in found] == sorted(p.seed for p in found)
    assert [p.contender for p in found[:2]] == ["naive", "joint"]
    assert len({p.name for p in found}) == len(found)


def test_all_methods_run_once_the_winners_everywhere_and_trials_when_they_are_asked_for() -> None:
    found = plan.plans(Choice(size="wide"))
    assert {p.stock for p in found} == {"", "peft", "avalanche"}
    quality = [p for p in found if p.stream != "long"]
    everywhere = {p.group for p in quality}
    assert {p.group for p in quality if p.contender not in plan.WINNERS} == {"clinc-given-seed0"}
    for name in plan.WINNERS:
        assert {p.group for p in quality if p.contender == name} == everywhere
    assert not any(CONTENDERS[p.contender].trial for p in quality)
    assert plan.plans(Choice(size="wide", contenders=["replay5-both"]))
    asked = plan.plans(Choice(size="wide", streams=["clbench"], contenders=["stock-peft"]))
    assert {p.order for p in asked} == {"order4", "order6"}


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(plan.PlanError, match="replay"):
        plan.plans(Choice(size="wide", contenders=["repaly"]))


def test_the_digest_of_a_plan_survives_json() -> None:
    planned = one("replay5+ewc")
    assert Plan.from_json(planned.to_json()).digest == planned.digest
    assert Plan.from_json(planned.to_json()).specs() == planned.specs()


# Runs.


def test_an_interrupted_run_continues_to_the_same_record_and_is_not_made_again(
    tmp_path: Path, toy_base: Path
) -> None:
    planned = one("replay")
    whole = run(task(toy_base, tmp_path / "whole", planned), say=quiet)
    broken = task(toy_base, tmp_path / "broken", planned)
    stops = 0
    while not records.place(planned, broken.records).exists():
        try:
            run(broken, StopAfter(14), quiet)
        except Interrupted:
            stops += 1
        assert stops < 30
    assert stops >= 3
    resumed = run(broken, StopAfter(0), quiet)  # found, not run
    assert resumed.matrix == whole.matrix
    assert [lesson.memory_rows for lesson in resumed.lessons] == [12, 24, 36]  # without corrected rows
    assert [lesson.rows_seen for lesson in resumed.lessons] == [12, 24, 36]
    assert not list(broken.folder.glob("train-*"))
    assert list(broken.folder.glob("exam-*/predictions.parquet"))


def test_a_record_of_another_plan_does_not_count(tmp_path: Path, toy_base: Path) -> None:
    made = run(task(toy_base, tmp_path, one("naive")), say=quiet)
    assert records.find(one("naive"), tmp_path / "records") == made
    assert records.find(one("naive", epochs=3), tmp_path / "records") is None


def test_joint_is_one_training_and_its_exam_is_the_same(tmp_path: Path, toy_base: Path) -> None:
    made = run(task(toy_base, tmp_path, one("joint")), say=quiet)
    assert len(made.lessons) == 1
    assert made.lessons[0].rows == 36
    assert len(made.matrix) == 2
    assert {"labels_accuracy", "changed_accuracy", "stale_share"} <= set(made.extras)


def test_runs_in_processes_of_their_own_leave_records_and_recorded_runs_are_left_out(
    tmp_path: Path, toy_base: Path
) -> None:
    works = [task(toy_base, tmp_path, one(name, epochs=1)) for name in ("naive", "stock-peft")]
    run(works[0], say=quiet)
    assert work.carry_out(works, jobs=2) == []
    assert all(records.find(each.plan, each.records) for each in works)
    assert not works[0].folder.joinpath("train-1").exists()


@pytest.mark.parametrize(("name", "runs"), [("avalanche-replay", True), ("avalanche-example", False)])
def test_avalanche_beside_us_is_examined_or_leaves_its_exception(
    name: str, runs: bool, tmp_path: Path, toy_base: Path
) -> None:
    made = run(task(toy_base, tmp_path, one(name, epochs=1)), say=quiet)
    assert bool(made.lessons) is runs
    assert ("TypeError" in made.failed) is not runs


def test_foreign_code_gets_the_very_prompt_of_the_exam(toy_base: Path) -> None:
    from benchmarks.stock_peft import encoded, load

    _, tokenizer = load(str(toy_base))
    row = synthetic.long(SMALL, order="given", seed=0).experiences[0].train[0]
    found, prompter = encoded(tokenizer, row, 256), Prompter(tokenizer)
    asked = prompter.prompt_ids(row.question)
    assert found["input_ids"][: len(asked)] == asked
    assert found["labels"].count(-100) == len(asked)


# Pages.


def told(name: str, accuracy: float, seconds: float, *, memory: int = 0, seed: int = 0) -> RunRecord:
    """A record of two experiences, as if it had been run."""
    planned = replace(one(name), seed=seed)
    lesson = records.Lesson(
        name="skill 0",
        rows=100,
        rows_seen=100,
        replayed=0,
        steps=10,
        cpu_seconds=seconds / 2,
        state_bytes=1000,
        memory_rows=memory,
        evaluation_seconds=0.1,
        peak_rss=10**9,
        scores={"skill 0": 1.0},
    )
    matrix = ((0.0, 0.0), (1.0, 0.0), (accuracy, 1.0))
    return RunRecord(
        digest_of_plan=planned.digest,
        plan=planned,
        tasks=("skill 0", "skill 1"),
        learned_at=(1, 2),
        matrix=matrix,
        metrics=measured(matrix, (1, 2)),
        lessons=(lesson, replace(lesson, rows_seen=200)),
        settings={"train": {"epochs": 2, "batch_size": 4}},
        hardware="2 cores",
        date="2026-01-01",
    )


def test_a_page_is_made_from_records_alone(tmp_path: Path) -> None:
    found = [
        told("naive", 0.2, 100, seed=0),
        told("naive", 0.4, 100, seed=1),
        told("joint", 1.0, 90),
        told("joint", 0.9, 90, seed=1),
        told("replay", 0.98, 140, memory=10),
        told("replay5+ewc", 0.9, 200, memory=100),
        *(told("si", 0.6, 100, seed=seed) for seed in (0, 1)),
        replace(
            told("ewc", 0.0, 0), lessons=(), metrics={}, matrix=(), failed="ValueError: no | such\nthing"
        ),
    ]
    for record in found:
        records.save(record, tmp_path / "records")
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    page.write_text("# Benchmarks\n\nBy hand.\n")
    pages.update(page, "small", tmp_path / "records")
    text = page.read_text()
    assert "By hand." in text
    assert "### toy, order given, seeds 0, 1 (size small)" in text
    assert "| `naive` | 65.0 ± 7.1 | -70.0 ± 14.1 |" in text
    assert text.index("seeds 0, 1") < text.index("### toy, order given, seed 0 (size small)")
    assert "| `naive` | 60.0 | -80.0 |" in text, "beside those that ran one seed, that seed alone"
    assert "| 1.40 | 1.00 | 10 (5.0%) | 0.00 MB | 1 |" in text
    assert r"did not run: ValueError: no \| such thing" in text
    assert "Best is `replay` with 99.0, 1.0 points below joint training, in 1.40 x naive's time" in text
    assert "is met by `replay`." in text
    pictures = {path.name: path.read_bytes() for path in (page.parent / "pictures").iterdir()}
    assert set(pictures) == {
        f"quality-small-toy-given-seed{seeds}-{kind}.svg"
        for seeds in ("0", "01")
        for kind in ("curve", "tried", "time")
    }
    pages.update(page, "small", tmp_path / "records")
    assert page.read_text() == text
    assert pictures == {path.name: path.read_bytes() for path in (page.parent / "pictures").iterdir()}


def test_what_hardly_helps_is_named_and_both_spaces_of_ewc_are_compared() -> None:
    (board,) = boards(
        [told("naive", 0.2, 100), told("ewc", 0.28, 100), told("ewc-lora", 0.6, 100), told("si", 0.0, 100)]
    )
    said = "\n".join(conclusions.lines(board))
    assert "Within 5 points of naive, or below: `ewc` 64.0, `si` 50.0." in said
    assert "`ewc-lora` 80.0, forgetting 40.0, state 0.0 MB; `ewc` 64.0, forgetting 72.0" in said


def test_a_part_of_the_target_that_was_not_measured_is_not_called_missed() -> None:
    untimed = replace(told("lwf", 1.0, 100), date="2026-01-02")
    (board,) = boards([told("naive", 0.0, 100), told("joint", 1.0, 90), untimed, told("si", 1.0, 190)])
    said = "\n".join(conclusions.lines(board))
    assert (
        "met by none. The best with such a memory: `lwf` is 0.0 points below joint, forgets 0.0, was not"
        in said
    )
    assert "; `si` is 0.0 points below joint, forgets 0.0, takes 1.90 x naive's time." in said


def test_everybody_is_held_to_the_newest_answer() -> None:
    def renamed(name: str, accuracy: float, newest: float) -> RunRecord:
        extras = {"changed_accuracy": newest, "stale_share": 1 - newest, "unchanged_accuracy": 0.5}
        return replace(told(name, accuracy, 100), extras=extras)

    (board,) = boards([renamed("ewc", 0.5, 1.0), renamed("si", 0.7, 0.9), told("lwf", 0.6, 100)])
    said = "\n".join(conclusions.lines(board))
    assert (
        "answers: `si` gives the newest to 90.0 % of the changed questions, the stale one to 10.0 %" in said
    )
    assert "; `ewc` gives the newest to 100.0 %" in said


def test_what_a_method_keeps_in_memory_is_set_beside_naive(tmp_path: Path) -> None:
    found = told("ewc", 0.5, 100)
    found = replace(found, lessons=(replace(found.lessons[0], peak_rss=3 * 10**9), *found.lessons[1:]))
    for record in (told("naive", 0.5, 100), found):
        records.save(record, tmp_path / "records")
    pages.update(tmp_path / "page.md", "small", tmp_path / "records")
    assert "| 1.00 | 3.00 | 0 |" in (tmp_path / "page.md").read_text()


def test_memory_is_compared_in_the_same_arithmetic_only() -> None:
    naive, ewc = told("naive", 0.5, 100), told("ewc", 0.5, 100)
    slow = replace(ewc, hardware="2 cores in float32")
    for other, found in ((ewc, 1.0), (replace(ewc, hardware="2 cores in bfloat16"), 1.0), (slow, None)):
        (board,) = boards([naive, other])
        entry = board.entry("ewc")
        assert entry is not None
        assert (entry.peak_memory and entry.peak_memory.mean) == found


def test_the_verdict_on_the_target_has_a_line_for_every_board_that_can_be_judged() -> None:
    def clinc(record: RunRecord) -> RunRecord:
        return replace(record, plan=replace(record.plan, stream="clinc"))

    (full,) = boards(
        [clinc(told("naive", 0.0, 100)), clinc(told("joint", 1.0, 90)), clinc(told("lwf", 1.0, 100))]
    )
    (ten,) = boards([clinc(told("joint", 1.0, 90)), clinc(told("lwf", 0.9, 100))])
    (alone,) = boards([clinc(told("lwf", 0.9, 100))])
    head, _, *lines = pages.verdict([("ten", ten), ("ten", alone), ("full", full)]).splitlines()
    assert head.startswith("The target (within 2 points of joint, forgetting at most 2, at most 1.5 x")
    assert lines == [
        "- Size `ten`, order given, seed 0: met by none. The best with such a memory: `lwf` is 5.0 points "
        "below joint, forgets 10.0, was not timed beside naive.",
        "- Size `full`, order given, seed 0: met by `lwf`.",
    ]


def test_a_record_names_the_commit_that_measured_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", code())
    monkeypatch.setenv("PATH", "")
    assert code() == ""


def test_nothing_is_told_as_minus_zero() -> None:
    assert Stat(mean=-0.0004).told(100) == "0.0"
    assert Stat(mean=-0.0006).told(100) == "-0.1"


def test_a_cost_that_grows_is_named_with_whose_it_is() -> None:
    flat, grows = (told(name, 0.5, 100) for name in ("ewc", "replay"))
    lesson = grows.lessons[0]
    steps = [replace(lesson, state_bytes=1000 + 100 * n) for n in range(6)]
    (board,) = boards([replace(flat, lessons=(lesson,) * 6), replace(grows, lessons=tuple(steps))])
    state, *others = conclusions.growths(board)
    assert state == (
        "- The state (kB) grows, in shares of its beginning an experience: `replay` +8.3%. Flat: `ewc`."
    )
    assert len(others) == 4
    assert all("is flat for all" in told for told in others)


def test_a_page_names_the_command_that_measures_all_that_it_shows(tmp_path: Path) -> None:
    for record in (told("naive", 0.5, 100), told("ewc", 0.5, 100), told("replay-bounded", 0.5, 100)):
        records.save(record, tmp_path / "records")
    pages.update(tmp_path / "page.md", "small", tmp_path / "records")
    text = (tmp_path / "page.md").read_text()
    assert "--orders given \\\n  --seeds 0 --contenders naive,replay-bounded,ewc\n" in text


def test_the_command_runs_what_is_asked_for_writes_the_page_and_goes_on_from_its_records(
    tmp_path: Path,
) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "records"
    sizes = ["--domains", "2", "--rows", "8", "--validation", "4", "--suite", "4", "--train", "epochs=1"]
    asked = ["--streams", "toy", "--orders", "given", "--seeds", "0", "--contenders", "naive,joint,replay5"]
    places = ["--out", tmp_path / "out", "--records", folder, "--page", page]

    def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "benchmarks.quality", *map(str, arguments)]
        return subprocess.run(line, check=False, capture_output=True, text=True, timeout=300)

    def made() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.json")}

    ran = command(*asked, *sizes, *places, "--jobs", 2)
    assert ran.returncode == 0, ran.stderr
    first, text = made(), page.read_text()
    assert set(first) == {f"toy-given-seed0-{name}.json" for name in ("naive", "joint", "replay5")}
    assert "### toy, order given, seed 0 (size small)" in text
    assert command(*asked, *sizes, *places).returncode == 0
    assert (made(), page.read_text()) == (first, text)
    shown = command(*asked, *sizes, *places[:4]).stdout
    assert shown.count("| `") == 3, "without a page the table is shown"
    assert "![" not in shown
    assert command(*asked, *sizes, *places, "--list").stdout.count("recorded") == 3
    refused = command("--size", "wide", "--streams", "clinc", *places)
    assert (refused.returncode, "pass --clinc DIR" in refused.stderr) == (1, True)


def test_the_best_and_joint_training_are_compared_among_the_labels_too() -> None:
    def asked(name: str, accuracy: float) -> RunRecord:
        return replace(told(name, accuracy, 100), extras={"labels_accuracy": accuracy + 0.1})

    (board,) = boards([asked("joint", 0.8), asked("ewc", 0.5), asked("si", 0.7), told("lwf", 0.6, 100)])
    said = "\n".join(conclusions.lines(board))
    assert "Asked for one of the task's labels, `si` ends at 80.0 and joint training at 90.0." in said


def test_records_of_different_settings_are_not_put_into_one_table() -> None:
    other = told("ewc", 0, 100)
    mixed = [told("naive", 0, 100), replace(other, plan=replace(other.plan, sizes={"rows": 5}))]
    with pytest.raises(MixedRecords, match="rows = 12"):
        boards(mixed)


def test_time_is_relative_to_naive_of_the_same_seed() -> None:
    (board,) = boards(
        [told("naive", 0, 100, seed=0), told("naive", 0, 50, seed=1), told("ewc", 0, 100, seed=1)]
    )
    entry = board.entry("ewc")
    assert entry is not None
    assert entry.time is not None
    assert entry.time.mean == 2.0


def test_times_of_other_conditions_are_not_compared() -> None:
    found = [told("naive", 0, 100), told("ewc", 0, 200), told("si", 0, 300), told("lwf", 0, 400)]
    found[2] = replace(found[2], date="2026-01-02")
    found[3] = replace(found[3], clock="2026-01-01, a busy evening")

    def times() -> dict[str, float | None]:
        (board,) = boards(found)
        return {entry.name: entry.time and entry.time.mean for entry in board.measured}

    assert times() == {"naive": 1.0, "ewc": 2.0, "si": None, "lwf": None}
    found[0] = replace(found[0], timed_again={found[2].timed_by: 200})
    assert times() == {"naive": 1.0, "ewc": 2.0, "si": 1.5, "lwf": None}, "naive was timed on both days"


def test_nobody_is_compared_over_other_seeds() -> None:
    found = boards(
        [
            *(told(name, 0.5, 100, seed=seed) for name in ("naive", "joint", "ewc") for seed in (0, 1)),
            told("joint", 0.5, 100, seed=2),
            told("si", 0.5, 100, seed=1),
            *(told("lwf", 0.5, 100, seed=seed) for seed in (1, 2)),
        ]
    )
    seen = [(board.seeds, [entry.name for entry in board.entries]) for board in found]
    assert seen == [
        ((1,), ["naive", "joint", "lwf", "ewc", "si"]),
        ((0, 1), ["naive", "joint", "ewc"]),
        ((1, 2), ["joint", "lwf"]),
    ]


def test_who_ran_some_of_the_seeds_is_shown_on_each_alone() -> None:
    ran = {"naive": (0, 1, 2), "ewc": (0, 1, 2), "si": (1, 2)}
    found = boards([told(name, 0.5, 100, seed=seed) for name, seeds in ran.items() for seed in seeds])
    seen = [(board.seeds, [entry.name for entry in board.entries]) for board in found]
    assert seen == [
        ((1,), ["naive", "ewc", "si"]),
        ((2,), ["naive", "ewc", "si"]),
        ((0, 1, 2), ["naive", "ewc"]),
    ]


def test_a_cost_that_grows_has_a_slope_and_the_first_experience_does_not_count() -> None:
    found = growth([100.0, *(10.0 + n for n in range(30))])
    assert found.slope == pytest.approx(1.0)
    assert found.first == pytest.approx(11.0)
    assert growth([5.0] * 20).relative == pytest.approx(0.0)


def test_every_contender_has_specs_that_exist() -> None:
    for contender in CONTENDERS.values():
        planned = one(contender.name)
        assert planned.specs()[1].epochs == (4 if contender.name == "as-shipped" else 2)
        assert "/" not in contender.name


def test_what_is_measured_as_shipped_is_what_a_bot_gets_that_sets_nothing() -> None:
    settings = config.load(Path(__file__).parent.parent / "config.toml")
    strategy, training, lora = CONTENDERS["as-shipped"].specs(TrainSpec(), LoraSpec())
    assert strategy == strategy_spec(settings)
    assert training == train_spec(settings)
    assert lora == lora_spec(settings)


def test_streams_know_when_their_tasks_come() -> None:
    stream: Stream = synthetic.toy(SMALL, order="given", seed=0)
    assert stream.tasks == ["skill 0", "skill 1", "skill 2"]
    assert stream.learned_at == [1, 2, 3]
