"""Answering suites: complete, reproducible, and the base answers as if no adapter had ever been there."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from storage.artifacts import verify
from storage.errors import ModelError
from storage.parquet import read_rows, write_rows
from strategies import scoring
from strategies.answer import Answerer
from strategies.contract import EvaluateJob, LoraSpec, Metric, Progress, SuiteJob, Task, TaskKind
from strategies.evaluation import SCHEMA, answer, evaluate
from strategies.model import Base, fresh_adapter, load_base, save_adapter, trainable
from tests.toys import teach_to_recite, tiny_base, tiny_gpt2, tiny_model_spec, tiny_rows

FREE = Task(name="free", kind=TaskKind.FREE, metric=Metric.TOKEN_F1)
COLOUR = Task(name="colour", kind=TaskKind.LABELS, metric=Metric.ACCURACY, labels=("blue", "green", "red"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two adapters that change what the base says."""
    saved = {}
    for seed, name in enumerate(("champion", "candidate")):
        model = fresh_adapter(load_base(tiny_model_spec(folder)), LoraSpec(rank=2), seed)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        path = tmp_path_factory.mktemp(name)
        save_adapter(model, path)
        saved[name] = str(path)
    return saved


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuiteJob, ...]:
    root = tmp_path_factory.mktemp("suites")
    write_rows(root / "0.parquet", tiny_rows("free", 5))
    write_rows(root / "1.parquet", tiny_rows("colour", 4, COLOUR.labels))
    return (
        SuiteJob(task=FREE, path=str(root / "0.parquet")),
        SuiteJob(task=COLOUR, path=str(root / "1.parquet")),
    )


def job(
    folder: Path, suites: tuple[SuiteJob, ...], out: Path, models: Mapping[str, str | None], **changes: object
) -> EvaluateJob:
    made = EvaluateJob(
        out=str(out),
        model=tiny_model_spec(folder),
        models=dict(models),
        suites=suites,
        plan=tuple((label, suite.task.name) for label in models for suite in suites),
        batch_size=2,
        max_new_tokens=6,
        threads=1,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def told(out: Path) -> list[dict[str, object]]:
    return pq.read_table(out / "predictions.parquet").to_pylist()


def run(job: EvaluateJob) -> list[dict[str, object]]:
    evaluate(job, lambda progress: None)
    return told(Path(job.out))


def test_every_planned_pair_is_answered_for_every_row_and_the_directory_is_complete(
    folder: Path, suites: tuple[SuiteJob, ...], adapters: dict[str, str], tmp_path: Path
) -> None:
    plan = (("base", "free"), ("candidate", "colour"), ("candidate", "free"))
    models = {"base": None, "candidate": adapters["candidate"]}
    lines = run(job(folder, suites, tmp_path / "out", models, plan=plan))
    assert set(verify(tmp_path / "out")["files"]) == {"predictions.parquet"}
    assert pq.read_schema(tmp_path / "out" / "predictions.parquet").equals(SCHEMA)
    rows = {suite.task.name: [row.hash for row in read_rows(Path(suite.path))] for suite in suites}
    expected = {(label, task, row) for label, task in plan for row in rows[task]}
    assert {(line["model"], line["task"], line["row_hash"]) for line in lines} == expected
    assert len(lines) == len(expected)


def test_scores_can_be_computed_again_from_the_stored_predictions(
    folder: Path, suites: tuple[SuiteJob, ...], tmp_path: Path
) -> None:
    metrics = {suite.task.name: suite.task.metric for suite in suites}
    golds = {row.hash: row.answer for suite in suites for row in read_rows(Path(suite.path))}
    for line in run(job(folder, suites, tmp_path / "out", {"base": None})):
        prediction, gold = str(line["prediction"]), golds[str(line["row_hash"])]
        assert line["score"] == scoring.score(metrics[str(line["task"])], prediction, gold)
        assert line["exact_match"] == scoring.exact_match(prediction, gold)
        assert line["token_f1"] == scoring.token_f1(prediction, gold)


def test_the_same_job_gives_the_same_bytes(
    folder: Path, suites: tuple[SuiteJob, ...], adapters: dict[str, str], tmp_path: Path
) -> None:
    for out in ("one", "two"):
        run(job(folder, suites, tmp_path / out, adapters))
    one, two = ((tmp_path / out / "predictions.parquet").read_bytes() for out in ("one", "two"))
    assert one == two


def test_a_finished_job_is_not_done_again(folder: Path, suites: tuple[SuiteJob, ...], tmp_path: Path) -> None:
    asked = job(tmp_path / "base", suites, tmp_path / "out", {"base": None})
    shutil.copytree(folder, tmp_path / "base")
    before = run(asked)
    shutil.rmtree(tmp_path / "base")
    assert run(asked) == before


def test_what_another_job_left_is_not_taken_for_this_ones_answers(
    folder: Path, suites: tuple[SuiteJob, ...], tmp_path: Path
) -> None:
    short = run(job(folder, suites, tmp_path / "out", {"base": None}, max_new_tokens=1))
    asked = job(folder, suites, tmp_path / "out", {"base": None}, max_new_tokens=6)
    assert run(asked) == run(replace(asked, out=str(tmp_path / "fresh"))) != short


def test_the_base_answers_the_same_before_and_after_adapters(
    folder: Path, suites: tuple[SuiteJob, ...], adapters: dict[str, str], tmp_path: Path
) -> None:
    alone = run(job(folder, suites, tmp_path / "alone", {"base": None}))
    mixed = run(job(folder, suites, tmp_path / "mixed", {**adapters, "base": None}))
    by = {label: [line for line in mixed if line["model"] == label] for label in ("base", *adapters)}
    assert by["base"] == alone
    said = {label: [line["prediction"] for line in lines] for label, lines in by.items()}
    assert said["base"] != said["champion"] != said["candidate"] != said["base"]
    again = run(job(folder, suites, tmp_path / "again", {"candidate": adapters["candidate"]}))
    assert again == by["candidate"]  # nothing of the champion was left in it


def test_a_plan_that_names_an_unknown_model_or_suite_is_an_error_not_a_gap(
    folder: Path, suites: tuple[SuiteJob, ...], tmp_path: Path
) -> None:
    for pair in (("champion", "free"), ("base", "nothing")):
        with pytest.raises(ValueError, match=pair[0]):
            run(job(folder, suites, tmp_path / "out", {"base": None}, plan=(pair,)))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_gone_leaves_nothing_half_written(
    folder: Path, suites: tuple[SuiteJob, ...], tmp_path: Path
) -> None:
    with pytest.raises(ModelError):
        run(job(folder, suites, tmp_path / "out", {"base": None, "candidate": str(tmp_path / "gone")}))
    assert not list(tmp_path.iterdir())


def test_progress_counts_to_the_end(folder: Path, suites: tuple[SuiteJob, ...], tmp_path: Path) -> None:
    said: list[Progress] = []
    evaluate(job(folder, suites, tmp_path / "out", {"base": None}), said.append)
    steps = [p for p in said if p.stage == "evaluate"]
    assert [p.step for p in steps] == [2, 4, 5, 7, 9]
    assert {(p.steps, p.detail) for p in steps} == {(9, "base")}
    assert steps[-1].left == 0


# Free answers.


def said_alone(base: Base, question: str, context: str, tokens: int) -> str:
    """Greedy, one row, neither padding nor cache."""
    ids, told = base.prompter.prompt_ids(question, context), list[int]()
    with torch.no_grad():
        while len(told) < tokens and not set(told[-1:]) & set(base.prompter.stop_ids):
            told.append(int(base.model(input_ids=torch.tensor([[*ids, *told]])).logits[0, -1].argmax()))
    return base.prompter.decode(told)


def test_batched_answers_are_those_of_one_row_at_a_time(folder: Path) -> None:
    base = load_base(tiny_model_spec(folder))
    questions = [(row.question, row.context) for row in tiny_rows("free", 6)]
    alone = [said_alone(base, *question, tokens=8) for question in questions]
    for size in (1, 4, 6):
        assert answer(base.model, base, questions, FREE, batch_size=size, max_new_tokens=8) == alone
    assert answer(base.model, base, questions, None, batch_size=4, max_new_tokens=8) == alone
    assert answer(base.model, base, [], FREE, batch_size=4, max_new_tokens=8) == []


def test_a_suite_asks_its_own_rows_each_with_its_context(folder: Path, tmp_path: Path) -> None:
    """Validation rows of all tasks share a file."""
    free, colour = tiny_rows("free", 5), tiny_rows("colour", 4, COLOUR.labels)
    write_rows(tmp_path / "validation.parquet", [*colour, *free])
    shared = tuple(SuiteJob(task=task, path=str(tmp_path / "validation.parquet")) for task in (FREE, COLOUR))
    lines = run(job(folder, shared, tmp_path / "out", {"base": None}))
    by = {
        task.name: {line["row_hash"]: line["prediction"] for line in lines if line["task"] == task.name}
        for task in (FREE, COLOUR)
    }
    assert by["colour"].keys() == {row.hash for row in colour}
    base = load_base(tiny_model_spec(folder))
    assert by["free"] == {row.hash: said_alone(base, row.question, row.context, tokens=6) for row in free}


def recite(base: Base, text: str, *, then: int | None) -> None:
    """Makes the model answer with `text`, and with the token `then` after it (or the text again)."""
    start = base.prompter.pieces.between[-1]
    ids = base.prompter.answer_ids(text)[:-1]
    chain = [start, *ids, then if then is not None else ids[0]]
    teach_to_recite(base.model, dict(pairwise(chain)))  # type: ignore[arg-type]


def test_a_free_answer_ends_with_the_turn(folder: Path) -> None:
    base = load_base(tiny_model_spec(folder))
    recite(base, "Yes!", then=base.prompter.pieces.end[-1])
    passes: list[int] = []
    hook = base.model.register_forward_hook(lambda *_: passes.append(1))
    said = answer(base.model, base, [("Why?", ""), ("How so?", "")], FREE, batch_size=2, max_new_tokens=50)
    hook.remove()
    assert said == ["Yes!", "Yes!"]
    assert len(passes) == 5


def test_a_free_answer_that_never_ends_is_cut(folder: Path) -> None:
    base = load_base(tiny_model_spec(folder))
    recite(base, "abc", then=None)
    assert answer(base.model, base, [("Why?", "")], FREE, batch_size=1, max_new_tokens=7) == ["abcabca"]


def test_a_bases_own_taste_in_generation_is_not_followed(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path)
    taste = (
        '{"do_sample": true, "temperature": 9.0, "no_repeat_ngram_size": 2, "max_length": 3, "num_beams": 2}'
    )
    (folder / "generation_config.json").write_text(taste)
    base = load_base(tiny_model_spec(folder))
    recite(base, "abc", then=None)
    assert answer(base.model, base, [("Why?", "")], FREE, batch_size=1, max_new_tokens=7) == ["abcabca"]


@pytest.mark.parametrize("task", [FREE, COLOUR], ids=lambda task: task.name)
def test_an_answer_has_room_even_where_the_context_is_short(tmp_path: Path, task: Task) -> None:
    base = load_base(tiny_model_spec(tiny_gpt2(tmp_path, positions=64)))
    questions = [(text, "") for text in ("Why?", "Why? " * 6 + "So?", "Why? " * 99)]
    alone = [
        answer(base.model, base, [asked], task, batch_size=1, max_new_tokens=50)[0] for asked in questions
    ]
    assert answer(base.model, base, questions, task, batch_size=3, max_new_tokens=50) == alone
    if task is COLOUR:
        assert set(alone) <= set(COLOUR.labels)


# The answerer of `daemon ask` and MLflow.


def test_the_answerer_keeps_the_order_and_each_tasks_way(folder: Path, adapters: dict[str, str]) -> None:
    answerer = Answerer(
        tiny_model_spec(folder), Path(adapters["candidate"]), [COLOUR, FREE], max_new_tokens=6
    )
    said = answerer.answer([("Sky?", "", "colour"), ("Why?", "", None), ("Sea?", "It is deep.", "colour")])
    assert said[0] in COLOUR.labels
    assert said[2] in COLOUR.labels
    assert said[1] == answerer.answer([("Why?", "", "free")])[0] == answerer.answer([("Why?", "", None)])[0]
    assert answerer.answer([]) == []
