"""A-GEM: the projection by hand, and that no step of a training goes against the remembered rows."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from strategies import replay_memory
from strategies.agem import AGem, _gradient, project
from strategies.batches import Example
from strategies.contract import StrategySpec, result_files
from strategies.experience import LanguageExperience
from strategies.method import Method
from strategies.model import trainable
from strategies.replay import seen
from strategies.replay_memory import Memory, Seen, memory_hashes
from strategies.replay_policies import draw_equally
from tests import trainings
from tests.toys import tiny_multimodal
from tests.trainings import adapter_bytes, job, lesson, run, snapshot, state

AGEM = StrategySpec(methods=("agem",), replay_ratio=0.5, replay_size=6)


def test_a_gradient_against_the_reference_is_projected() -> None:
    """g = (3, -4 | 1), r = (0, 2 | 1): g·r = -7, r·r = 5, so g + 7/5 r = (3, -1.2 | 2.4)."""
    gradient = [torch.tensor([3.0, -4.0]), torch.tensor([1.0])]
    reference = [torch.tensor([0.0, 2.0]), torch.tensor([1.0])]
    found = torch.cat(project(gradient, reference))
    torch.testing.assert_close(found, torch.tensor([3.0, -1.2, 2.4]))
    assert float(found @ torch.cat(reference)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reference", [[0.0, -2.0, 1.0], [4.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
def test_a_gradient_that_harms_nobody_stays(reference: list[float]) -> None:
    """The second is orthogonal, the third is that of rows which are known by heart."""
    gradient = torch.tensor([3.0, -4.0, 1.0])
    (found,) = project([gradient], [torch.tensor(reference)])
    assert torch.equal(found, gradient)


class Watch(Method):
    """Calls `look` where A-GEM does its work."""

    def __init__(self, look: Callable[[Any], None]) -> None:
        super().__init__(AGEM, seed=0)
        self.look = look

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self.look(strategy)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).clone()


def reference_gradient(model: torch.nn.Module, rows: list[Example]) -> Tensor:
    """Of the mean loss of an answer token, row by row and without padding."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([[*row.prompt_ids, *row.answer_ids]])).logits[0]
        told = logits[len(row.prompt_ids) - 1 : -1]
        losses.append(cross_entropy(told, torch.tensor(row.answer_ids), reduction="none"))
    return flat(list(torch.autograd.grad(torch.cat(losses).mean(), list(trainable(model).values()))))


@pytest.mark.parametrize("step", [(4, 1), (1, 4)], ids=["at once", "row by row"])
def test_no_step_goes_against_the_remembered_rows(base: Path, tmp_path: Path, step: tuple[int, int]) -> None:
    """Four rows are remembered and four are drawn for every step, so it is known which. Their questions are
    those of four new rows and their answers are not: what is learned goes against them sooner or later."""
    before: list[Tensor] = []
    projected: list[bool] = []

    def look_before(strategy: Any) -> None:
        before.append(flat([p.grad for p in trainable(strategy.model).values()]))

    def look_after(strategy: Any) -> None:
        given, mine = before[-1], flat([p.grad for p in trainable(strategy.model).values()])
        reference = reference_gradient(strategy.model, old)
        along = float(given @ reference)
        expected = given if along >= 0 else given - along / float(reference @ reference) * reference
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5 * float(given.norm()))
        assert float(mine @ reference) > -1e-4 * float(mine.norm() * reference.norm())
        projected.append(along < 0)

    agem = AGem(replace(AGEM, replay_ratio=1.0), seed=0)
    methods = [Watch(look_before), agem, Watch(look_after)]
    size, passes = step
    learner = trainings.learner(
        base, tmp_path, methods, epochs=12, learning_rate=0.03, batch_size=size, accumulation=passes
    )
    new = trainings.experience(learner, lesson("a", 8)).new
    old = [
        replace(
            row, task="b", answer_ids=tuple(reversed(row.answer_ids[:-1])), row_hash=str(n), replayed=True
        )
        for n, row in enumerate(new[:4])
    ]
    agem.memory = agem.memory.with_rows(seen(row) for row in old)
    learner.train(LanguageExperience(new=new, memory=old), eval_streams=[])
    assert set(projected) == {True, False}, "both happen"


def test_reference_rows_count_as_rehearsed_and_are_not_learned(base: Path, tmp_path: Path) -> None:
    """Two rows a step: after two steps four of the six have helped, after four all."""
    old, new = lesson("a", 16), lesson("b", 8)
    first = run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=AGEM))
    assert first.rehearsed == ()
    remembered = set(memory_hashes(result_files(tmp_path / "one")["state"]))
    data = snapshot(tmp_path / "2", new, memory=[row for row in old if row.hash in remembered])
    for epochs, helped in ((1, 4), (2, 6)):
        out, spec = tmp_path / f"{epochs}", replace(trainings.SPEC, epochs=epochs)
        report = run(job(base, data, out, tmp_path / "one", strategy=AGEM, train=spec))
        assert len(report.rehearsed) == helped
        assert set(report.rehearsed) <= remembered
        assert report.replay_rows == 0
        assert not any(point.replayed for point in report.curve)


def test_who_counts_as_rehearsed_has_helped_in_every_epoch_with_others(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helped: list[set[str]] = []

    def gradient(strategy: Any, rows: list[Example], parameters: list[Tensor]) -> list[Tensor]:
        helped.append({row.row_hash for row in rows})
        return _gradient(strategy, rows, parameters)

    monkeypatch.setattr("strategies.agem._gradient", gradient)
    old, new = lesson("a", 16), lesson("b", 8)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=AGEM))
    data = snapshot(tmp_path / "2", new, memory=old)
    report = run(job(base, data, tmp_path / "two", tmp_path / "one", strategy=AGEM))
    memory = replay_memory.load(result_files(tmp_path / "one")["state"])
    assert memory is not None
    assert helped == [set(draw_equally(memory, 2, "0/16", step)) for step in range(report.steps)]
    assert set(report.rehearsed) == {row for rows in helped for row in rows}
    assert len(report.rehearsed) == 6, "two rows a step, the third step's are the last of six"


def test_how_a_step_is_cut_does_not_change_who_helps(base: Path, tmp_path: Path) -> None:
    old, new = lesson("a", 16), lesson("b", 8)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=AGEM))
    data = snapshot(tmp_path / "2", new, memory=old)
    rehearsed = []
    for size, passes in ((8, 1), (2, 4)):
        out, spec = tmp_path / f"{size}", replace(trainings.SPEC, batch_size=size, accumulation=passes)
        rehearsed.append(run(job(base, data, out, tmp_path / "one", strategy=AGEM, train=spec)).rehearsed)
    assert rehearsed[0] == rehearsed[1]
    assert len(rehearsed[0]) > 1


def test_a_policy_that_asks_what_was_forgotten_measures_it_for_agem_too(base: Path, tmp_path: Path) -> None:
    hardest = replace(AGEM, replay_policy="hardest")
    run(job(base, snapshot(tmp_path / "1", lesson("a", 8)), tmp_path / "one", strategy=hardest))
    memory = replay_memory.load(result_files(tmp_path / "one")["state"])
    assert memory is not None
    assert all(trace.latest is not None for trace in memory.tasks["a"].values())


def test_its_memory_is_that_of_replay(base: Path, tmp_path: Path) -> None:
    old, new = lesson("a", 16), lesson("b", 8)
    data = snapshot(tmp_path / "2", new, memory=old)
    for name in ("agem", "replay"):
        spec = replace(AGEM, methods=(name,))
        run(job(base, snapshot(tmp_path / f"1 {name}", old), tmp_path / f"{name} 1", strategy=spec))
        run(job(base, data, tmp_path / f"{name} 2", tmp_path / f"{name} 1", strategy=spec))
    assert adapter_bytes(tmp_path / "agem 1") == adapter_bytes(tmp_path / "replay 1")
    assert state(tmp_path / "agem 2") == state(tmp_path / "replay 2") != {}


def test_what_a_text_does_not_go_through_has_no_say_and_does_not_learn(tmp_path: Path) -> None:
    base, old = tiny_multimodal(tmp_path / "base"), lesson("a", 4)
    once = replace(trainings.SPEC, epochs=1)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=AGEM, train=once))
    data = snapshot(tmp_path / "2", lesson("b", 4), memory=old)
    report = run(job(base, data, tmp_path / "two", tmp_path / "one", strategy=AGEM, train=once))
    assert report.rehearsed
    before, after = (trainings.adapter(tmp_path / name) for name in ("one", "two"))
    sees = {name for name in before if "vision_tower" in name}
    assert sees
    assert {name for name in before if torch.equal(before[name], after[name])} == sees


THREE_TASKS = Memory(seed=0).with_rows(
    Seen(hash=f"{task}{n}", task=task) for task, size in (("a", 2), ("b", 3), ("c", 5)) for n in range(size)
)


@pytest.mark.parametrize("count", [2, 3, 7, 23])
def test_steps_draw_on_where_the_step_before_ended(count: int) -> None:
    drawn = Counter[str]()
    for step in range(12):
        rows = draw_equally(THREE_TASKS, count, seed=0, epoch=step)
        assert len(rows) == count
        drawn.update(rows)
        for task in THREE_TASKS.tasks.values():
            times = [drawn[row] for row in task]
            assert max(times) - min(times) <= 1, "nothing comes again before everything came"


def test_a_late_step_draws_as_soon_as_an_early_one() -> None:
    """Walking through all steps before would make long trainings quadratic; here it would never end."""
    assert sorted(row[0] for row in draw_equally(THREE_TASKS, 3, seed=0, epoch=10**9)) == ["a", "b", "c"]
