"""Synaptic intelligence: importances worked out by hand, whose gradient counts, and what a restart keeps."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from storage.errors import IntegrityError
from strategies import quadratic
from strategies.contract import LoraSpec, StrategySpec
from strategies.experience import Loader, Step
from strategies.loop import Learner
from strategies.model import trainable
from strategies.quadratic import Quadratic
from strategies.si import DAMPING, Si
from tests import trainings
from tests.toys import tiny_multimodal
from tests.trainings import adapter_bytes, job, lesson, run, run_interrupted, snapshot, state

SI = StrategySpec(methods=("si",), si_lambda=10.0)


class Point(torch.nn.Module):
    """Some parameters, and one that must not learn."""

    def __init__(self, *theta: float) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta))
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)


def teacher(model: torch.nn.Module) -> Any:
    """The little that the method asks of its strategy."""
    terms: list[Tensor] = []
    return SimpleNamespace(
        model=model, device=torch.device("cpu"), last_pass=True, penalise=terms.append, terms=terms
    )


def descend(method: Si, model: Point, slope: Tensor, *, steps: int, rate: float = 0.25) -> None:
    """An experience with the loss ½ Σ slope θ², by plain gradient descent on loss and penalty."""
    strategy = teacher(model)
    method.before_training_exp(strategy)
    for _ in range(steps):
        model.theta.grad = None
        strategy.terms.clear()
        method.before_backward(strategy)
        loss = (slope * model.theta.square()).sum() / 2 + sum(strategy.terms)
        loss.backward()
        method.before_update(strategy)
        with torch.no_grad():
            assert model.theta.grad is not None
            model.theta -= rate * model.theta.grad
        method.after_update(strategy)
    method.after_training_exp(strategy)


def test_importances_are_those_worked_out_by_hand() -> None:
    """½(2x² + y²) from (1, 2), rate ¼: gradients (2, 2) and (1, 3/2), so steps of −(1/2, 1/2) and
    −(1/4, 3/8): ω = (2/2 + 1/4, 2/2 + 9/16), Δ = −(3/4, 7/8), and it ends at (1/4, 9/8)."""
    method, model = Si(SI, seed=0), Point(1.0, 2.0)
    descend(method, model, torch.tensor([2.0, 1.0]), steps=2)
    torch.testing.assert_close(method.path["theta"], torch.tensor([5 / 4, 25 / 16]))
    importance = torch.tensor([(5 / 4) / (9 / 16 + 1e-6), (25 / 16) / (49 / 64 + 1e-6)])
    end = torch.tensor([1 / 4, 9 / 8])
    assert method.past is not None
    assert set(method.past.curvature) == {"theta"}
    torch.testing.assert_close(method.past.centre["theta"], end)
    torch.testing.assert_close(method.past.curvature["theta"], importance / (importance * end.square()).sum())
    assert method.past.constant == 0


def test_the_way_counts_as_far_as_the_epoch_that_is_kept() -> None:
    """Two steps, of which the second made validation worse: it is as if there had been one."""
    one, two = Si(SI, seed=0), Si(SI, seed=0)
    slope, start = torch.tensor([2.0, 1.0]), (1.0, 2.0)
    descend(one, Point(*start), slope, steps=1)

    model, strategy = Point(*start), teacher(Point())
    strategy.model = model
    two.before_training_exp(strategy)
    for kept in (True, False):
        model.theta.grad = slope * model.theta.detach()
        two.before_update(strategy)
        with torch.no_grad():
            model.theta -= 0.25 * model.theta.grad
        two.after_update(strategy)
        if kept:
            two.mark_best()
            best = model.theta.detach().clone()
    with torch.no_grad():
        model.theta.copy_(best)
    two.after_training_exp(strategy)
    assert one.past is not None
    assert two.past is not None
    torch.testing.assert_close(two.past.curvature["theta"], one.past.curvature["theta"])
    assert two.midway().keys() == {"path/theta", "best/theta"}


def test_a_resumed_training_knows_both_ways_to_now_and_to_the_best_epoch() -> None:
    strategy = teacher(Point(1.0, 2.0))
    stopped, resumed = Si(SI, seed=0), Si(SI, seed=0)
    for method in (stopped, resumed):
        method.before_training_exp(strategy)
    stopped.path = {"theta": torch.tensor([1.0, 2.0])}
    stopped.mark_best()
    stopped.path["theta"] += 5.0
    resumed.resume(stopped.midway())
    assert resumed.path["theta"].tolist() == [6.0, 7.0]
    assert resumed.best["theta"].tolist() == [1.0, 2.0]


def test_importances_of_experiences_add_up_each_around_its_own_end() -> None:
    """Ω of the second: half of ½·4x² from x = 1 in one step of ¼·(4 + 10·H(1 − ½)), and so on by hand."""
    method, model = Si(SI, seed=0), Point(2.0)
    descend(method, model, torch.tensor([2.0]), steps=1)  # 2 → 1
    # One parameter: Σ Hm² = 1 at m = 1, so H = 1 whatever ω was.
    assert method.past is not None
    torch.testing.assert_close(method.past.curvature["theta"], torch.tensor([1.0]))
    model.theta.data += 1.0  # somebody else's training: 1 → 2
    descend(method, model, torch.tensor([1.0]), steps=1, rate=0.125)
    # Gradient 2 of the loss and 10·1·(2 − 1) of the penalty, so 2 → 2 − 12/8 = 1/2, and ω = 2·12/8.
    torch.testing.assert_close(method.path["theta"], torch.tensor([3.0]))
    # H = 1/(½)² = 4 around ½ beside 1 around 1, at 0: 4·¼ + 1.
    assert method.past.at({"theta": torch.zeros(1)}).item() == pytest.approx(2.0)
    assert method.past.at({"theta": torch.ones(1)}).item() == pytest.approx(1.0)


def test_what_only_made_the_loss_worse_has_no_importance() -> None:
    """The second parameter is pushed uphill, as weight decay or momentum may push one."""
    method, model = Si(SI, seed=0), Point(1.0, 1.0)
    strategy = teacher(model)
    method.before_training_exp(strategy)
    model.theta.grad = torch.tensor([1.0, 1.0])
    method.before_update(strategy)
    model.theta.data += torch.tensor([-0.5, 0.5])
    method.after_update(strategy)
    method.after_training_exp(strategy)
    torch.testing.assert_close(method.path["theta"], torch.tensor([0.5, -0.5]))
    assert method.past is not None
    assert method.past.curvature["theta"][0] > 0
    assert method.past.curvature["theta"][1] == 0


def test_what_hardly_moved_is_not_infinitely_important() -> None:
    """A step a thousandth as long as √ξ: undamped, ω/Δ² would be as large as that of the other."""
    method, model = Si(SI, seed=0), Point(1.0, 0.0, 1.0)
    strategy = teacher(model)
    method.before_training_exp(strategy)
    short = DAMPING**0.5 / 1000
    model.theta.grad = torch.tensor([0.5, short, 7.0])
    method.before_update(strategy)
    model.theta.data -= torch.tensor([0.5, short, 0.0])
    method.after_update(strategy)
    method.after_training_exp(strategy)
    assert method.past is not None
    moved, hardly, never = method.past.curvature["theta"].tolist()
    assert moved > 0
    assert 0 < hardly < 1e-5 * moved
    assert never == 0


def test_what_a_text_does_not_go_through_has_no_importance(tmp_path: Path) -> None:
    base = tiny_multimodal(tmp_path / "base")
    run(job(base, snapshot(tmp_path / "1", lesson("a", 4)), tmp_path / "one", strategy=SI))
    past = quadratic.load(tmp_path / "one" / "state" / Si.file)
    sees = {name for name in past.curvature if "vision_tower" in name}
    assert sees
    assert {name for name, importance in past.curvature.items() if not importance.any()} == sees


def one_step(learner: Learner, passes: int) -> Step:
    rows = trainings.experience(learner, lesson("a", 6)).new
    (step,) = Loader(rows, batch_size=6 // passes, accumulation=passes, seed=0).steps(0)
    return step


@pytest.mark.parametrize("clip_norm", [1e9, 0.05], ids=["whole", "clipped"])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_slope_is_that_of_the_loss_alone_and_unclipped(
    base: Path, tmp_path: Path, clip_norm: float, passes: int
) -> None:
    """Clipping and the penalty change the step that is taken, not what it is credited with."""
    plain = trainings.learner(base, tmp_path / "plain", clip_norm=1e9)
    plain.learn(one_step(plain, passes))
    slope = {name: p.grad.clone() for name, p in trainable(plain.model).items() if p.grad is not None}

    method = Si(SI, seed=0)
    learner = trainings.learner(base, tmp_path / "held", [method], clip_norm=clip_norm)
    start = {name: p.detach().clone() for name, p in trainable(learner.model).items()}
    method.past = Quadratic(
        curvature={name: torch.full_like(p, 0.1) for name, p in start.items()},
        centre={name: p - 0.5 for name, p in start.items()},
    )
    method.before_training_exp(learner)
    learner.learn(one_step(learner, passes))
    count = sum(p.numel() for p in start.values())
    assert learner.penalty.item() == pytest.approx(10.0 / 2 * count * 0.1 * 0.25, rel=1e-5)
    taken = torch.cat([p.grad.flatten() for p in trainable(learner.model).values() if p.grad is not None])
    assert taken.norm() <= 0.05 * 1.01 or clip_norm > 1, "the clipped step is another one"
    for name, p in trainable(learner.model).items():
        by_hand = -slope[name] * (p.detach() - start[name])
        assert bool(by_hand.any())
        torch.testing.assert_close(method.path[name], by_hand, rtol=1e-3, atol=1e-7)


def test_a_step_without_a_last_pass_is_not_charged() -> None:
    method, strategy = Si(SI, seed=0), teacher(Point(1.0))
    method.past = Quadratic(curvature={"theta": torch.ones(1)}, centre={"theta": torch.zeros(1)})
    strategy.last_pass = False
    method.before_backward(strategy)
    assert strategy.terms == []
    strategy.last_pass = True
    method.before_backward(strategy)
    assert [term.item() for term in strategy.terms] == [10.0 / 2]


def test_a_restart_between_experiences_does_not_show(tmp_path: Path) -> None:
    slopes = [torch.tensor([2.0, 1.0]), torch.tensor([0.5, 3.0])]
    stayed = Si(SI, seed=0)
    model = Point(1.0, 2.0)
    for slope in slopes:
        descend(stayed, model, slope, steps=3)

    restarted = Si(SI, seed=0)
    restarted.save(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is known yet"
    again = Point(1.0, 2.0)
    for slope in slopes:
        restarted = Si(SI, seed=0)
        restarted.load(tmp_path)
        descend(restarted, again, slope, steps=3)
        restarted.save(tmp_path)
    assert stayed.past is not None
    assert restarted.past is not None
    assert torch.equal(stayed.past.curvature["theta"], restarted.past.curvature["theta"])
    assert torch.equal(stayed.past.centre["theta"], restarted.past.centre["theta"])
    assert stayed.past.constant == restarted.past.constant > 0


def test_a_damaged_state_is_an_integrity_error(tmp_path: Path) -> None:
    method = Si(SI, seed=0)
    descend(method, Point(1.0, 2.0), torch.ones(2), steps=1)
    method.save(tmp_path)
    path = tmp_path / Si.file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="daemon doctor"):
        Si(SI, seed=0).load(tmp_path)


def test_a_state_of_another_shape_is_an_integrity_error() -> None:
    method = Si(SI, seed=0)
    descend(method, Point(1.0, 2.0), torch.ones(2), steps=1)
    with pytest.raises(IntegrityError, match=r"the SI state .* another shape.* take si out"):
        method.before_training_exp(teacher(Point(1.0, 2.0, 3.0)))


def test_a_second_cycle_is_held_back(base: Path, tmp_path: Path) -> None:
    run(job(base, snapshot(tmp_path / "1", lesson("a", 8)), tmp_path / "one", strategy=SI))
    assert set(state(tmp_path / "one")) == {Si.file}
    second = snapshot(tmp_path / "2", lesson("b", 8))

    def moved(name: str) -> float:
        old, new = (trainings.adapter(tmp_path / each) for each in ("one", name))
        return sum(float((new[key] - old[key]).square().sum()) for key in old)

    strong = StrategySpec(methods=("si",), si_lambda=1e4)
    held = run(job(base, second, tmp_path / "strong", tmp_path / "one", strategy=strong))
    assert held.curve[0].penalty == 0, "nothing has moved yet"
    assert all(point.penalty > 0 for point in held.curve[1:])
    run(job(base, second, tmp_path / "naive", tmp_path / "one"))
    assert moved("strong") < moved("naive")


@pytest.mark.parametrize(
    "methods", [("si",), ("replay", "lwf", "si", "merge")], ids=["alone", "beside others"]
)
def test_interrupted_anywhere_it_ends_in_the_same_adapter_and_state(
    base: Path, tmp_path: Path, methods: Sequence[str]
) -> None:
    """The way so far (ω) is in the checkpoints; a look at rows before the training may be stopped too."""
    spec = StrategySpec(methods=tuple(methods), si_lambda=10.0)
    lora = LoraSpec(rank=2, alpha=4, dropout=0.3)
    first, a = snapshot(tmp_path / "1", lesson("a", 8)), lesson("a", 8)
    run(job(base, first, tmp_path / "one", strategy=spec, lora=lora))
    second = snapshot(tmp_path / "2", lesson("b", 8), lesson("b", 4, split="validation", start=40), a)
    for name, how in (("whole", run), ("parts", run_interrupted)):
        how(job(base, second, tmp_path / name, tmp_path / "one", strategy=spec, lora=lora))
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "whole")
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
