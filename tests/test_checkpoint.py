"""A training that is interrupted, or killed, ends in the adapter of one that was not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storage.errors import IntegrityError, Interrupted
from strategies.checkpoint import INFO, Checkpoints, Course
from strategies.contract import CurvePoint, LoraSpec, Progress, StrategySpec, TrainJob, TrainReport
from strategies.loop import train
from tests.trainings import SPEC, StopAfter, adapter_bytes, job, lesson, run, snapshot, state


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A second cycle with everything on: replay, EWC, dropout, validation, best adapter; run in one go."""
    home = tmp_path_factory.mktemp("whole")
    strategy = StrategySpec(methods=("replay", "ewc"), fisher_rows=5, ewc_lambda=100.0)
    lora = LoraSpec(rank=2, alpha=4, dropout=0.3)
    first = snapshot(home / "first", lesson("a", 8))
    run(job(base, first, home / "one", strategy=strategy, lora=lora))
    second = snapshot(
        home / "second", lesson("b", 8), lesson("b", 6, split="validation", start=40), lesson("a", 8)
    )
    spec = replace(SPEC, epochs=3, accumulation=2, batch_size=2, patience=2)
    asked = job(base, second, home / "two", home / "one", strategy=strategy, lora=lora, train=spec)
    run(asked)
    return asked


def again(whole: TrainJob, home: Path) -> TrainJob:
    return replace(whole, out=str(home / "out"), work=str(home / "work"))


def assert_same(one: TrainJob, other: TrainJob) -> None:
    assert adapter_bytes(one.out) == adapter_bytes(other.out)
    assert state(one.out) == state(other.out)


def test_interrupted_anywhere_it_ends_in_the_same_adapter(whole: TrainJob, tmp_path: Path) -> None:
    """Stopped every few questions, so between steps, in validations, and in the Fisher estimate."""
    asked, interruptions = again(whole, tmp_path), 0
    while True:
        try:
            report = train(asked, lambda progress: None, StopAfter(3 + interruptions // 3))
            break
        except Interrupted:
            interruptions += 1
            assert interruptions < 50, "no progress is made"
    assert report.resumed == interruptions > 4
    assert_same(asked, whole)
    uninterrupted = run(whole)
    assert [point.loss for point in report.curve] == [point.loss for point in uninterrupted.curve]
    assert report.validation_losses == uninterrupted.validation_losses
    assert report.rehearsed == uninterrupted.rehearsed != ()


def test_a_stop_before_the_training_goes_on_leaves_the_checkpoint_as_it_was(
    whole: TrainJob, tmp_path: Path
) -> None:
    """A method may look at rows first, while the model is the parent's still and not where it was stopped."""
    lwf = replace(whole, strategy=replace(whole.strategy, methods=("lwf",)))
    asked, without = again(lwf, tmp_path / "parts"), again(lwf, tmp_path / "whole")
    run(without)
    with pytest.raises(Interrupted):
        train(asked, lambda progress: None, StopAfter(4 + 3))  # 4 batches of 2 rows to look at, then steps
    before = Checkpoints(Path(asked.work), asked).load()
    assert before is not None
    assert before[0].steps == 2, "an epoch: two steps of four rows"
    for questions in (0, 2):
        with pytest.raises(Interrupted):
            train(asked, lambda progress: None, StopAfter(questions))
    after = Checkpoints(Path(asked.work), asked).load()
    assert after is not None
    assert after[0] == before[0]
    assert all(torch.equal(after[1][name], tensor) for name, tensor in before[1].items())
    run(asked)
    assert_same(asked, without)


class Killed(BaseException):
    """What a kill looks like from inside: nothing more is done."""


@pytest.mark.parametrize("step", [2, 5, 9])
def test_killed_in_a_step_it_ends_in_the_same_adapter(whole: TrainJob, tmp_path: Path, step: int) -> None:
    def kill(progress: Progress) -> None:
        if progress.stage == "train" and progress.step == step:
            raise Killed

    asked = again(whole, tmp_path)
    with pytest.raises(Killed):
        train(asked, kill, lambda: False)
    report = run(asked)
    assert report.resumed == (1 if step > SPEC.checkpoint_steps else 0)
    assert [point.step for point in report.curve] == list(range(1, report.steps + 1))
    assert_same(asked, whole)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "nonsense"])
def test_a_damaged_checkpoint_is_discarded_and_that_is_said(
    whole: TrainJob, tmp_path: Path, damage: str
) -> None:
    asked = again(whole, tmp_path)
    with pytest.raises(Interrupted):
        train(asked, lambda progress: None, StopAfter(4))
    work = Path(asked.work)
    (tensors,) = work.glob("checkpoint-*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "flipped": lambda: tensors.write_bytes(data),
        "truncated": lambda: tensors.write_bytes(data[:1000]),
        "gone": tensors.unlink,
        "nonsense": lambda: (work / INFO).write_text('{"format": 1'),
    }[damage]()
    report = run(asked)
    assert report.resumed == 0
    assert "was discarded and the training began again" in report.notes[0]
    assert_same(asked, whole)


def test_a_checkpoint_of_another_job_is_not_taken_up(whole: TrainJob, tmp_path: Path) -> None:
    asked = again(whole, tmp_path)
    with pytest.raises(Interrupted):
        train(replace(asked, train=replace(asked.train, seed=7)), lambda progress: None, StopAfter(4))
    report = run(asked)
    assert (report.resumed, report.notes) == (0, ())
    assert_same(asked, whole)


def a_course(steps: int) -> Course:
    return Course(steps=steps, curve=[CurvePoint(step=1, loss=0.1, learning_rate=1e-4)], best_epoch=0)


def test_what_is_saved_is_what_is_loaded(base: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "work", job(base, tmp_path, tmp_path / "out"))
    assert checkpoints.load() is None
    tensors = {"a": torch.tensor([0.1, float("inf")]), "b": torch.tensor(3.0), "c": torch.get_rng_state()}
    checkpoints.save(a_course(12), tensors)
    found = checkpoints.load()
    assert found is not None
    assert found[0] == a_course(12)
    assert found[1].keys() == tensors.keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in tensors.items())


def test_a_checkpoint_of_another_arithmetic_is_not_continued(
    whole: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that was not up at the first start, a virtual machine on another processor, a new torch."""
    asked = again(whole, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("strategies.checkpoint.uses_bfloat16", lambda dtype, device: True)
        with pytest.raises(Interrupted):
            train(asked, lambda progress: None, StopAfter(9))
    report = run(asked)
    assert report.resumed == 0
    assert any("was made on cpu in bfloat16" in note and "began again" in note for note in report.notes)
    assert_same(asked, whole)


def test_a_crash_while_saving_leaves_the_checkpoint_before(base: Path, tmp_path: Path) -> None:
    """Until `checkpoint.json` is replaced, the old one and its tensors stand."""
    checkpoints = Checkpoints(tmp_path, job(base, tmp_path, tmp_path / "out"))
    checkpoints.save(a_course(1), {"a": torch.ones(1)})
    (tmp_path / "checkpoint-2-00000000.safetensors").write_bytes(b"half a fi")
    (tmp_path / f".{INFO}.tmp").write_text('{"course": ')
    found = checkpoints.load()
    assert found is not None
    assert found[0].steps == 1
    checkpoints.save(a_course(3), {"a": torch.ones(1)})
    assert len(list(tmp_path.iterdir())) == 2, "leftovers are tidied away"
    checkpoints.clear()
    assert not list(tmp_path.iterdir())


def test_tensors_that_were_changed_are_an_integrity_error(base: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, job(base, tmp_path, tmp_path / "out"))
    checkpoints.save(a_course(1), {"a": torch.ones(3)})
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityError, match="is damaged"):
        checkpoints.load()


def test_seconds_add_up_over_interruptions(whole: TrainJob, tmp_path: Path) -> None:
    asked = again(whole, tmp_path)
    with pytest.raises(Interrupted):
        train(asked, lambda progress: None, StopAfter(5))
    found = Checkpoints(Path(asked.work), asked).load()
    assert found is not None
    report: TrainReport = run(asked)
    assert report.seconds > found[0].seconds > 0
