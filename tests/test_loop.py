"""Learning one experience: the loss, the steps, the end, and what is left behind."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.artifacts import verify
from storage.errors import IntegrityError, NonFiniteLoss, TrainingError
from strategies.batches import Example, collate, encode, nll
from strategies.contract import LoraSpec, Progress, StrategySpec, TrainReport, result_files
from strategies.experience import LanguageExperience, Loader, Step
from strategies.loop import Learner, learning_rate, train
from strategies.method import Method
from strategies.model import load_base, trainable, with_adapter
from tests import trainings
from tests.toys import tiny_model_spec
from tests.trainings import NAIVE, SPEC, adapter, adapter_bytes, job, lesson, run, snapshot, state


def examples(count: int) -> list[Example]:
    return [
        Example(row_hash=f"{n}", task="t", prompt_ids=(5,) * (1 + n * 7 % 5), answer_ids=(6,) * (1 + n % 3))
        for n in range(count)
    ]


def test_every_row_is_learned_once_an_epoch_and_steps_hold_so_many_passes() -> None:
    loader = Loader(examples(21), batch_size=2, accumulation=3, seed=0)
    for epoch in range(3):
        steps = loader.steps(epoch)
        assert sorted(row.row_hash for step in steps for row in step.rows) == sorted(
            str(n) for n in range(21)
        )
        assert len(steps) == 4
        assert sorted(len(step.passes) for step in steps) == [2, 3, 3, 3]
    assert loader.steps(0) == loader.steps(0)
    assert loader.steps(0) != loader.steps(1)


def test_accumulating_changes_memory_and_nothing_else(base: Path, tmp_path: Path) -> None:
    """Rows and answers have different lengths, so that a mean of the passes' means would be wrong."""

    def gradients(batch_size: int, accumulation: int) -> tuple[dict[str, torch.Tensor], float]:
        learner = trainings.learner(base, tmp_path, clip_norm=1e9)
        rows = trainings.experience(learner, lesson("a", 12)).new
        loader = Loader(rows, batch_size=batch_size, accumulation=accumulation, seed=0)
        (step,) = loader.steps(0)
        assert len(step.passes) == accumulation
        learner.learn(step)
        found = {name: p.grad.clone() for name, p in trainable(learner.model).items() if p.grad is not None}
        return found, learner.step_loss.item()

    at_once, loss = gradients(12, 1)
    in_passes, same_loss = gradients(2, 6)
    assert same_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in at_once.items():
        torch.testing.assert_close(in_passes[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_answer_tokens_only(base: Path, tmp_path: Path) -> None:
    learner = trainings.learner(base, tmp_path)
    rows = trainings.experience(learner, lesson("a", 5)).new
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            loss, count = nll(learner.model, collate([row], learner.base.prompter.pad_id))
            total, tokens = total + loss.item(), tokens + count
    learner.learn(Step(passes=(tuple(rows[:3]), tuple(rows[3:]))))
    assert tokens == sum(len(row.answer_ids) for row in rows)
    assert learner.step_loss.item() == pytest.approx(total / tokens, rel=1e-5)


def test_the_rate_rises_to_its_peak_and_falls_towards_zero() -> None:
    spec = replace(SPEC, learning_rate=1.0, warmup=0.2)
    rates = [learning_rate(step, 20, spec) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.02
    assert learning_rate(0, 1, replace(spec, warmup=0.0)) == 1.0
    assert learning_rate(0, 5, replace(spec, warmup=0.3)) == 0.5, "a step that is begun is a step"


def test_a_loss_that_is_not_finite_stops_before_the_update(base: Path, tmp_path: Path) -> None:
    learner = trainings.learner(base, tmp_path)
    rows = trainings.experience(learner, lesson("a", 4)).new
    parameters = trainable(learner.model)
    spoiled = next(iter(parameters))
    parameters[spoiled].data.fill_(math.inf)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(NonFiniteLoss, match=r"the loss became nan at step 1 .*Lower training.learning_rate"):
        learner.learn(Step(passes=(tuple(rows),)))
    assert all(torch.equal(before[name], p) for name, p in parameters.items())
    assert not learner.optimizer.state


class Steep(Method):
    """Adds to the loss what is 0 and has no slope, or what is infinite."""

    def __init__(self, factor: float) -> None:
        super().__init__(NAIVE, seed=0)
        self.factor = factor

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        p = next(iter(trainable(strategy.model).values()))
        strategy.penalise((p - p.detach()).square().sum().sqrt() + self.factor)


@pytest.mark.parametrize(
    ("factor", "told"), [(0.0, "the gradient became nan"), (math.inf, "the penalty became inf")]
)
def test_a_step_that_is_not_finite_stops_before_the_update(
    base: Path, tmp_path: Path, factor: float, told: str
) -> None:
    learner = trainings.learner(base, tmp_path, [Steep(factor)])
    rows = trainings.experience(learner, lesson("a", 4)).new
    with pytest.raises(NonFiniteLoss, match=told):
        learner.learn(Step(passes=(tuple(rows),)))
    assert not learner.optimizer.state


def test_a_validation_loss_that_is_not_finite_stops_the_training(base: Path, tmp_path: Path) -> None:
    learner = trainings.learner(base, tmp_path)
    rows = trainings.experience(learner, lesson("a", 4)).new
    learner.experience = LanguageExperience(new=rows, validation=rows)
    next(iter(trainable(learner.model).values())).data.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="the validation loss became nan after epoch 1"):
        learner.validate()


def test_dropout_rests_while_rows_are_validated(base: Path, tmp_path: Path) -> None:
    learner = trainings.learner(base, tmp_path, dropout=0.5)
    rows = trainings.experience(learner, lesson("a", 4)).new
    learner.experience = LanguageExperience(new=rows, validation=rows)
    assert learner.validate() == learner.validate()
    assert learner.model.training


def test_weights_decay_as_asked(base: Path, tmp_path: Path) -> None:
    """AdamW's: apart from the step that the gradient makes."""
    ends = []
    for decay in (0.0, 0.5):
        learner = trainings.learner(base, tmp_path, weight_decay=decay)
        start = [p.detach().clone() for p in trainable(learner.model).values()]
        learner.learn(Step(passes=(tuple(trainings.experience(learner, lesson("a", 4)).new),)))
        ends.append([p.detach() for p in trainable(learner.model).values()])
    for first, plain, decayed in zip(start, *ends, strict=True):
        torch.testing.assert_close(decayed, plain - SPEC.learning_rate * 0.5 * first)


def test_a_training_that_diverges_leaves_no_result(base: Path, tmp_path: Path) -> None:
    data = snapshot(tmp_path / "snapshot", lesson("a", 12))
    wild = job(base, data, tmp_path / "out", train=replace(SPEC, learning_rate=1e30, warmup=0.0))
    with pytest.raises(NonFiniteLoss):
        run(wild)
    assert not (tmp_path / "out").exists()


def test_the_same_job_gives_the_same_adapter_and_another_seed_another(base: Path, tmp_path: Path) -> None:
    data = snapshot(tmp_path / "snapshot", lesson("a", 12), lesson("a", 4, split="validation", start=50))
    lora = LoraSpec(rank=2, alpha=4, dropout=0.3)
    run(job(base, data, tmp_path / "one", lora=lora))
    torch.rand(7)  # what else happens in the process does not matter
    run(job(base, data, tmp_path / "two", lora=lora))
    run(job(base, data, tmp_path / "three", lora=lora, train=replace(SPEC, seed=1)))
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "two")
    assert adapter_bytes(tmp_path / "one") != adapter_bytes(tmp_path / "three")


def test_a_result_is_whole_says_what_was_done_and_is_made_once(base: Path, tmp_path: Path) -> None:
    data = snapshot(tmp_path / "snapshot", lesson("a", 10), lesson("a", 4, split="validation", start=50))
    asked, told = job(base, data, tmp_path / "out"), []
    report = run(asked, told)
    verify(tmp_path / "out")
    assert (report.strategy, report.rows, report.replay_rows, report.epochs) == ("naive", 10, 0, 2)
    assert (report.steps, len(report.curve), len(report.validation_losses)) == (6, 6, 2)
    assert report.final_loss < report.curve[0].loss
    assert [p.step for p in told if p.stage == "train"] == [1, 2, 3, 4, 5, 6]
    assert all(p.steps == 6 and p.left is not None and p.loss for p in told if p.stage == "train")
    assert [p.left for p in told if p.stage == "train"][-1] == 0
    assert state(tmp_path / "out") == {}
    assert not list(Path(asked.work).iterdir()), "a finished training needs no checkpoint"

    told.clear()
    assert run(asked, told) == report
    assert told == []


def test_training_stops_when_validation_stalls_and_keeps_the_best_adapter(base: Path, tmp_path: Path) -> None:
    watched = [replace(row, answer="quite another answer") for row in lesson("a", 4, split="validation")]
    data = snapshot(tmp_path / "snapshot", lesson("a", 8, start=20), watched)
    spec = replace(SPEC, epochs=40, patience=2, learning_rate=0.05)
    report = run(job(base, data, tmp_path / "out", train=spec))
    losses = report.validation_losses
    assert report.stopped_early
    assert report.epochs == len(losses) == losses.index(min(losses)) + 1 + 2

    loaded = load_base(tiny_model_spec(base))
    kept = with_adapter(loaded, result_files(tmp_path / "out")["adapter"], trainable=False)
    with torch.no_grad():
        loss, tokens = nll(kept, collate(encode(watched, loaded.prompter), loaded.prompter.pad_id))
    assert loss.item() / tokens == pytest.approx(min(losses), rel=1e-4)


class Marks(Method):
    """Notes after which epochs it is told that the adapter is the best so far."""

    learner: Learner

    def __init__(self) -> None:
        super().__init__(NAIVE, seed=0)
        self.epochs: list[int] = []

    def mark_best(self) -> None:
        self.epochs.append(self.learner.course.epoch)


def test_methods_are_told_when_the_adapter_is_the_best_so_far(base: Path, tmp_path: Path) -> None:
    marks = Marks()
    marks.learner = learner = trainings.learner(
        base, tmp_path, [marks], epochs=8, patience=2, learning_rate=0.05
    )
    watched = [replace(row, answer="quite another answer") for row in lesson("a", 4, split="validation")]
    new, validation = (encode(rows, learner.base.prompter) for rows in (lesson("a", 8, start=20), watched))
    learner.train(LanguageExperience(new=new, validation=validation), eval_streams=[])
    losses = learner.course.validation_losses
    assert marks.epochs == [n for n, loss in enumerate(losses) if loss == min(losses[: n + 1])]
    assert 0 < len(marks.epochs) < len(losses)


def test_without_patience_all_epochs_run_and_the_last_adapter_stays(base: Path, tmp_path: Path) -> None:
    watched = [replace(row, answer="quite another answer") for row in lesson("a", 4, split="validation")]
    spec = replace(SPEC, epochs=4, learning_rate=0.05)
    with_rows = snapshot(tmp_path / "with", lesson("a", 8, start=20), watched)
    report = run(job(base, with_rows, tmp_path / "out", train=spec))
    assert (report.epochs, report.stopped_early, report.notes) == (4, False, ())
    without_rows = snapshot(tmp_path / "without", lesson("a", 8, start=20))
    unwatched = run(job(base, without_rows, tmp_path / "unwatched", train=replace(spec, patience=2)))
    assert unwatched.epochs == 4
    assert unwatched.notes == ("no validation rows: every epoch was run and the last adapter kept",)
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "unwatched")


def test_only_the_adapter_learns(base: Path, tmp_path: Path) -> None:
    learner = trainings.learner(base, tmp_path)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.train(trainings.experience(learner, lesson("a", 8)), eval_streams=[])
    changed = {n for n, p in learner.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trainable(learner.model))
    assert all("lora_" in name for name in changed)


def test_a_cycle_continues_from_its_parents_adapter(base: Path, tmp_path: Path) -> None:
    first = snapshot(tmp_path / "first", lesson("a", 8))
    run(job(base, first, tmp_path / "one"))
    second = snapshot(tmp_path / "second", lesson("b", 8))
    still = replace(SPEC, learning_rate=1e-12)
    run(job(base, second, tmp_path / "two", tmp_path / "one", train=still))
    run(job(base, second, tmp_path / "fresh", train=still))
    for name, tensor in adapter(tmp_path / "one").items():
        torch.testing.assert_close(adapter(tmp_path / "two")[name], tensor, rtol=0, atol=1e-9)
    assert adapter_bytes(tmp_path / "fresh") != adapter_bytes(tmp_path / "two")


def test_a_parents_shape_wins_over_new_lora_settings_and_that_is_said(base: Path, tmp_path: Path) -> None:
    run(job(base, snapshot(tmp_path / "first", lesson("a", 8)), tmp_path / "one"))
    second = snapshot(tmp_path / "second", lesson("b", 8))
    other = LoraSpec(rank=3, alpha=5, dropout=0.2)
    report = run(job(base, second, tmp_path / "two", tmp_path / "one", lora=other))
    assert report.notes[:3] == (
        "lora.rank = 3 was not used: the champion's adapter continues with 2",
        "lora.alpha = 5 was not used: the champion's adapter continues with 4",
        "lora.dropout = 0.2 was not used: the champion's adapter continues with 0.0",
    )


def test_other_lora_targets_than_the_parents_are_said(base: Path, tmp_path: Path) -> None:
    data = [snapshot(tmp_path / task, lesson(task, 4)) for task in "abc"]
    everywhere, some = LoraSpec(rank=2, alpha=4), LoraSpec(rank=2, alpha=4, targets="q_proj, v_proj")
    run(job(base, data[0], tmp_path / "all", lora=everywhere))
    run(job(base, data[0], tmp_path / "some", lora=some))

    def said(parent: str, lora: LoraSpec) -> list[str]:
        report = run(job(base, data[1], tmp_path / f"{parent} {lora.targets}", tmp_path / parent, lora=lora))
        return [note for note in report.notes if note.startswith("lora.")]

    kept = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert said("all", everywhere) == said("some", some) == []
    assert said("all", some) == [
        f"lora.targets = q_proj, v_proj was not used: the champion's adapter continues with {kept}"
    ]
    assert said("some", everywhere) == [
        "lora.targets = all-linear was not used: the champion's adapter continues with q_proj, v_proj"
    ]


def test_a_change_of_strategy_works_and_is_said(base: Path, tmp_path: Path) -> None:
    replay = StrategySpec(methods=("replay",))
    both = StrategySpec(methods=("replay", "ewc"), fisher_rows=3)
    old, new = lesson("a", 8), lesson("b", 8)
    run(job(base, snapshot(tmp_path / "first", old), tmp_path / "one", strategy=replay))
    second = snapshot(tmp_path / "second", new, memory=old)
    report = run(job(base, second, tmp_path / "two", tmp_path / "one", strategy=both))
    assert report.notes[:2] == (
        "strategy changed from replay to replay+ewc",
        "ewc begins with this cycle and knows nothing of earlier ones",
    )
    assert (report.replay_rows, report.memory_rows) == (4, 16)
    assert report.state_bytes == sum(len(data) for data in state(tmp_path / "two").values())
    assert set(state(tmp_path / "two")) == {"replay.json", "ewc.safetensors"}


def test_a_penalty_at_rest_is_carried_along_and_what_it_missed_is_said(base: Path, tmp_path: Path) -> None:
    both = StrategySpec(methods=("replay", "ewc"), fisher_rows=3)
    run(job(base, snapshot(tmp_path / "first", lesson("a", 8)), tmp_path / "one", strategy=both))
    second = snapshot(tmp_path / "second", lesson("b", 8), memory=lesson("a", 8))
    replay = StrategySpec(methods=("replay",))
    run(job(base, second, tmp_path / "two", tmp_path / "one", strategy=replay))
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert two["ewc.safetensors"] == one["ewc.safetensors"]
    assert two["replay.json"] != one["replay.json"]
    third = snapshot(tmp_path / "third", lesson("c", 8), memory=[*lesson("a", 8), *lesson("b", 8)])
    report = run(job(base, third, tmp_path / "three", tmp_path / "two", strategy=both))
    assert report.notes[:2] == (
        "strategy changed from replay to replay+ewc",
        "ewc was at rest and knows nothing of the cycles that were learned meanwhile",
    )


def test_a_method_is_not_taken_for_another_whose_name_begins_like_it(base: Path, tmp_path: Path) -> None:
    parent = None
    for n, method in enumerate(("ewc", "ewc-lora", "ewc")):
        strategy = StrategySpec(methods=(method,), fisher_rows=3)
        data = snapshot(tmp_path / f"data {n}", lesson(f"task {n}", 8))
        report = run(job(base, data, tmp_path / f"{n}", parent, strategy=strategy))
        parent = tmp_path / f"{n}"
    assert "ewc was at rest and knows nothing of the cycles that were learned meanwhile" in report.notes


def test_what_goes_on_beside_an_adapter_that_grows_was_not_left_behind(base: Path, tmp_path: Path) -> None:
    strategy = StrategySpec(methods=("ewc-lora", "olora"), fisher_rows=3)
    for task, parent in (("a", None), ("b", tmp_path / "a")):
        data = snapshot(tmp_path / f"data {task}", lesson(task, 8))
        report = run(job(base, data, tmp_path / task, parent, strategy=strategy))
    assert "ewc_lora.safetensors" in state(tmp_path / "b")
    assert not any("was left behind" in note for note in report.notes)


def test_what_another_job_left_is_not_taken_for_this_ones_result(base: Path, tmp_path: Path) -> None:
    old, new = (snapshot(tmp_path / task, lesson(task, 8)) for task in "ab")
    run(job(base, old, tmp_path / "out"))
    before = adapter_bytes(tmp_path / "out")
    run(job(base, new, tmp_path / "out"))
    run(job(base, new, tmp_path / "fresh"))
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "fresh") != before


def test_a_snapshot_that_was_changed_is_refused(base: Path, tmp_path: Path) -> None:
    data = snapshot(tmp_path / "snapshot", lesson("a", 8))
    info = json.loads((data / "manifest.json").read_text())
    info["files"]["train.parquet"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(info))
    with pytest.raises(IntegrityError, match=r"train.parquet was changed"):
        run(job(base, data, tmp_path / "out"))


def test_a_parent_that_was_changed_is_refused(base: Path, tmp_path: Path) -> None:
    data = snapshot(tmp_path / "snapshot", lesson("a", 8))
    run(job(base, data, tmp_path / "one"))
    info = json.loads((tmp_path / "one" / "manifest.json").read_text())
    info["files"]["adapter/adapter_model.safetensors"] = "0" * 64
    (tmp_path / "one" / "manifest.json").write_text(json.dumps(info))
    with pytest.raises(IntegrityError, match=r"adapter_model.safetensors was changed"):
        run(job(base, data, tmp_path / "two", tmp_path / "one"))


def test_a_snapshot_without_training_rows_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has no training rows"):
        run(job(base, snapshot(tmp_path / "snapshot", []), tmp_path / "out"))


def test_reports_cross_the_process_boundary_unchanged(base: Path, tmp_path: Path) -> None:
    report = run(job(base, snapshot(tmp_path / "snapshot", lesson("a", 8)), tmp_path / "out"))
    assert TrainReport.from_json(report.to_json()) == report
    progress = Progress(stage="train", step=1, steps=2, loss=0.5)
    assert Progress.from_json(progress.to_json()) == progress


@pytest.mark.parametrize("between", ["joint", "olora"])
@pytest.mark.parametrize("method", ["ewc", "si"])
def test_importances_stay_behind_when_the_adapter_does_not_go_on(
    base: Path, tmp_path: Path, method: str, between: str
) -> None:
    """Else they would pull at parameters that they know nothing of, or not fit them at all."""
    course = ([method, "replay"], [between], [method, "replay"])
    parent = None
    for n, methods in enumerate(course):
        strategy = StrategySpec(methods=tuple(methods), fisher_rows=3)
        data = snapshot(tmp_path / f"data {n}", lesson(f"task {n}", 8))
        report = run(job(base, data, tmp_path / f"{n}", parent, strategy=strategy))
        parent = tmp_path / f"{n}"
        if methods == [between]:
            assert set(state(parent)) == {"replay.json"}
            assert any(note.startswith(f"{method}.safetensors was left behind") for note in report.notes)
    assert f"{method} begins with this cycle and knows nothing of earlier ones" in report.notes
    assert all(point.penalty == 0.0 for point in report.curve)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_adapter_twice(base: Path, tmp_path: Path) -> None:
    data = snapshot(tmp_path / "snapshot", lesson("a", 64), lesson("a", 4, split="validation", start=80))
    gpu = tiny_model_spec(base, device="cuda", dtype="bfloat16")
    ewc = StrategySpec(methods=("ewc",))
    for out in ("one", "two"):
        run(job(base, data, tmp_path / out, model=gpu, strategy=ewc))
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "two")
    assert state(tmp_path / "one") == state(tmp_path / "two")


def test_train_is_what_the_worker_calls() -> None:
    assert train.__module__ == "strategies.loop"
