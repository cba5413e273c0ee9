"""Elastic weights: the Fisher information by hand, the merged penalty, and what a new process remembers."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from storage.errors import IntegrityError, Interrupted, NonFiniteLoss
from strategies import quadratic
from strategies.batches import Example
from strategies.contract import StrategySpec, result_files
from strategies.ewc import Ewc, choose, fisher_information
from strategies.experience import Loader
from strategies.model import trainable
from strategies.quadratic import Quadratic, check_fit, relative
from tests import trainings
from tests.toys import tiny_base, tiny_multimodal
from tests.trainings import adapter_bytes, job, lesson, run, snapshot

EWC = StrategySpec(methods=("ewc",), ewc_lambda=10.0, fisher_rows=4)


class Unigram(torch.nn.Module):
    """Says every token with the same odds whatever was asked, so that its gradients fit on paper."""

    def __init__(self, odds: Sequence[float]) -> None:
        super().__init__()
        self.odds = torch.nn.Parameter(torch.tensor(odds).log())
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=(self.odds * self.frozen).expand(*input_ids.shape, -1))


def says(*answer: int) -> Example:
    return Example(row_hash=str(answer), task="t", prompt_ids=(0, 0), answer_ids=answer)


def teacher(model: torch.nn.Module, rows: Sequence[Example] = ()) -> Any:
    """The little that a method asks of its strategy."""
    return SimpleNamespace(
        model=model,
        device=torch.device("cpu"),
        base=SimpleNamespace(prompter=SimpleNamespace(pad_id=0), autocast=nullcontext),
        experience=SimpleNamespace(new=list(rows)),
        check_stop=lambda: None,
        tell=lambda progress: None,
    )


def test_the_fisher_information_is_the_one_worked_out_by_hand() -> None:
    """Odds 1:1:2, so p = (1/4, 1/4, 1/2); ∂ -log p(answer) = k p - counts for an answer of k tokens."""
    model = Unigram([1.0, 1.0, 2.0])
    fisher = fisher_information(teacher(model), [says(0), says(2, 2), says(0, 1, 2)])
    by_hand = [
        [(1 / 4 - 1) ** 2, (1 / 4) ** 2, (1 / 2) ** 2],
        [(2 / 4) ** 2, (2 / 4) ** 2, (2 / 2 - 2) ** 2],
        [(3 / 4 - 1) ** 2, (3 / 4 - 1) ** 2, (3 / 2 - 1) ** 2],
    ]
    torch.testing.assert_close(fisher["odds"], torch.tensor(by_hand).mean(0))
    assert set(fisher) == {"odds"}
    assert model.odds.grad is None
    assert model.frozen.grad is None


def test_the_fisher_information_does_not_know_the_batch_size(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    found = []
    for batch_size in (1, 8):
        learner = trainings.learner(base, tmp_path / "work", batch_size=batch_size)
        found.append(fisher_information(learner, trainings.experience(learner, lesson("a", 8)).new))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert sum(float(f.sum()) for f in found[0].values()) > 0


def test_dropout_has_no_say_in_the_fisher_information(tmp_path: Path) -> None:
    base, found = tiny_base(tmp_path / "base"), []
    for dropout in (0.0, 0.5):
        learner = trainings.learner(base, tmp_path / "work", dropout=dropout)
        learner.model.train()
        found.append(fisher_information(learner, trainings.experience(learner, lesson("a", 8)).new))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_stop_does_not_wait_for_the_fisher_information() -> None:
    stopped = teacher(Unigram([1.0, 1.0, 2.0]))
    told: list[Any] = []
    stopped.tell = told.append

    def stop_at_the_third() -> None:
        if len(told) == 2:
            raise Interrupted()

    stopped.check_stop = stop_at_the_third
    with pytest.raises(Interrupted):
        fisher_information(stopped, [says(0)] * 9)


def test_a_fisher_information_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteLoss, match="Fisher"):
        fisher_information(teacher(Unigram([1.0, math.nan, 1.0])), [says(0)])


def test_what_a_text_does_not_go_through_has_no_fisher_information(tmp_path: Path) -> None:
    learner = trainings.learner(tiny_multimodal(tmp_path / "base"), tmp_path / "work")
    rows = trainings.experience(learner, lesson("a", 2)).new
    fisher = fisher_information(learner, rows)
    assert fisher.keys() == trainable(learner.model).keys()
    sees = {name for name in fisher if "vision_tower" in name}
    assert sees
    assert {name for name, information in fisher.items() if not information.any()} == sees


def test_the_rows_that_stand_for_an_experience_depend_on_content_and_seed_only() -> None:
    rows = [says(n) for n in range(50)]
    assert choose(rows, 10, seed=0) == choose(rows[::-1], 10, seed=0)
    assert choose(rows, 10, seed=0) != choose(rows, 10, seed=1)
    assert len(choose(rows, 99, seed=0)) == 50


def quadratics(
    count: int, dtype: torch.dtype = torch.float32
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Fishers and anchors of some experiences; a third of the Fisher is zero, some of it always."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        fisher = torch.rand(4, 5, generator=generator, dtype=dtype) * 10 ** torch.randint(
            -9, 3, (4, 5), generator=generator
        )
        fisher[torch.rand(4, 5, generator=generator) < 0.3] = 0
        fisher[0, 0] = 0
        found.append(({"w": fisher.to(dtype)}, {"w": torch.randn(4, 5, generator=generator, dtype=dtype)}))
    return found


def merged(parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> Quadratic:
    first, *rest = parts
    total = Quadratic(curvature=first[0], centre=first[1])
    for fisher, anchor in rest:
        total = total.plus(fisher, anchor)
    return total


def separate(parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]], theta: Tensor) -> Tensor:
    """What the stock method keeps: a Fisher and an anchor for every experience."""
    return torch.stack(
        [(fisher["w"] * (theta - anchor["w"]).square()).sum() for fisher, anchor in parts]
    ).sum()


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_the_merged_penalty_is_the_sum_of_the_separate_ones(count: int) -> None:
    parts = quadratics(count, torch.float64)
    total = merged(parts)
    for seed in range(5):
        theta = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        theta.requires_grad_()
        mine, theirs = total.at({"w": theta}), separate(parts, theta)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
        (slope,), (expected,) = torch.autograd.grad(mine, theta), torch.autograd.grad(theirs, theta)
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)


def test_the_merged_penalty_stays_accurate_in_single_precision_far_from_zero() -> None:
    """Anchors at 1000 ± 0.01: the textbook c = Σ Fθ² - Hm² is off by all of it."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        (
            {"w": torch.rand(50, generator=generator)},
            {"w": 1000 + 0.01 * torch.randn(50, generator=generator)},
        )
        for _ in range(30)
    ]
    theta = 1000 + 0.01 * torch.randn(50, generator=generator)
    exact = separate([({"w": f["w"].double()}, {"w": a["w"].double()}) for f, a in parts], theta.double())
    assert float(merged(parts).at({"w": theta})) == pytest.approx(float(exact), rel=0.02)
    fishers = torch.stack([fisher["w"] for fisher, _ in parts])
    anchors = torch.stack([anchor["w"] for _, anchor in parts])
    textbook = (fishers * anchors**2).sum() - ((fishers * anchors).sum(0) ** 2 / fishers.sum(0)).sum()
    assert abs(float(textbook) - float(exact)) > 0.9 * float(exact)


def test_parameters_that_never_mattered_stay_free() -> None:
    total = merged(quadratics(5))
    theta = torch.zeros(4, 5, requires_grad=True)
    total.at({"w": theta}).backward()
    assert theta.grad is not None
    assert theta.grad[0, 0] == 0
    assert bool(theta.grad.isfinite().all())


def test_a_penalty_survives_its_file_to_the_last_bit(tmp_path: Path) -> None:
    total = merged(quadratics(7))
    quadratic.save(total, tmp_path / "ewc.safetensors")
    restored = quadratic.load(tmp_path / "ewc.safetensors")
    theta = {"w": torch.randn(4, 5, generator=torch.Generator().manual_seed(3))}
    assert restored.at(theta).item() == total.at(theta).item() > 0
    assert torch.equal(restored.curvature["w"], total.curvature["w"])
    assert torch.equal(restored.centre["w"], total.centre["w"])
    assert restored.constant == total.constant


def test_a_penalty_is_the_same_on_another_device() -> None:
    total = merged(quadratics(7))
    theta = {"w": torch.randn(4, 5, generator=torch.Generator().manual_seed(3))}
    assert total.constant > 0
    assert total.to(torch.device("cpu")).at(theta).item() == total.at(theta).item()


def test_a_faded_penalty_is_so_much_of_what_it_was() -> None:
    total = merged(quadratics(7))
    theta = {"w": torch.randn(4, 5, generator=torch.Generator().manual_seed(3))}
    assert total.constant > 0
    assert total.faded(0.25).at(theta).item() == pytest.approx(0.25 * total.at(theta).item())


def test_a_state_of_another_format_is_an_integrity_error(tmp_path: Path) -> None:
    """The first one's curvature was not relative: taken up, it would hold everything or nothing."""
    path = tmp_path / "ewc.safetensors"
    quadratic.save(merged(quadratics(2)), path)
    save_file(load_file(path), path, metadata={"format": "1"})
    with pytest.raises(IntegrityError, match="not of format 2"):
        quadratic.load(path)


def test_a_damaged_state_is_an_integrity_error(tmp_path: Path) -> None:
    quadratic.save(merged(quadratics(2)), tmp_path / "ewc.safetensors")
    data = (tmp_path / "ewc.safetensors").read_bytes()
    (tmp_path / "ewc.safetensors").write_bytes(data[:-9])
    with pytest.raises(IntegrityError, match="daemon doctor"):
        quadratic.load(tmp_path / "ewc.safetensors")


def test_a_state_that_lacks_a_centre_is_an_integrity_error(tmp_path: Path) -> None:
    whole = merged(quadratics(2))
    name = next(iter(whole.centre))
    centre = {other: m for other, m in whole.centre.items() if other != name}
    quadratic.save(replace(whole, centre=centre), tmp_path / "ewc.safetensors")
    with pytest.raises(IntegrityError, match="different parameters"):
        quadratic.load(tmp_path / "ewc.safetensors")


def test_curvature_is_scaled_so_that_losing_everything_costs_one() -> None:
    """H = (2, 3) and m = (3, 1) in one tensor, H = 5 and m = −2 in another: Σ Hm² = 18 + 3 + 20 = 41."""
    curvature = {"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([5.0])}
    centre = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([-2.0])}
    scaled = relative(curvature, centre)
    torch.testing.assert_close(scaled["a"], torch.tensor([2 / 41, 3 / 41]))
    torch.testing.assert_close(scaled["b"], torch.tensor([5 / 41]))
    lost = {name: torch.zeros_like(tensor) for name, tensor in centre.items()}
    assert Quadratic(curvature=scaled, centre=centre).at(lost).item() == pytest.approx(1.0)


def test_scaled_curvature_does_not_know_how_steep_the_loss_was() -> None:
    ((curvature, centre),) = quadratics(1)
    found = relative(curvature, centre)["w"]
    steeper = relative({"w": 1000 * curvature["w"]}, centre)["w"]
    assert bool(found.any())
    torch.testing.assert_close(steeper, found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("flat", ["curvature", "centre"])
def test_nothing_to_lose_is_not_divided_by(flat: str) -> None:
    parts = {"curvature": torch.tensor([2.0, 3.0]), "centre": torch.tensor([3.0, 1.0])}
    parts[flat] = torch.zeros(2)
    scaled = relative({"w": parts["curvature"]}, {"w": parts["centre"]})
    assert torch.equal(scaled["w"], parts["curvature"])


@pytest.mark.parametrize(
    "parameters",
    [
        {"w": torch.zeros(4, 6)},
        {"w": torch.zeros(20)},
        {"v": torch.zeros(4, 5)},
        {"w": torch.zeros(4, 5), "v": torch.zeros(1)},
        {},
    ],
    ids=["wider", "flat", "renamed", "more", "none"],
)
@pytest.mark.parametrize(("method", "name"), [("ewc", "EWC"), ("si", "SI")])
def test_a_state_of_other_parameters_is_refused_and_the_way_out_is_named(
    parameters: dict[str, Tensor], method: str, name: str
) -> None:
    past = merged(quadratics(1))
    check_fit(past, {"w": torch.zeros(4, 5)}, method)
    with pytest.raises(
        IntegrityError, match=rf"^the {name} state .* another shape; roll back .* or take {method} out of"
    ):
        check_fit(past, parameters, method)


def test_a_state_of_another_shape_is_an_integrity_error() -> None:
    method = Ewc(EWC, seed=0)
    method.past = merged(quadratics(1))
    with pytest.raises(IntegrityError, match="another shape"):
        method.before_training_exp(teacher(Unigram([1.0, 1.0])))


def two_experiences(spec: StrategySpec, *, restart: Path | None) -> tuple[Ewc, list[dict[str, Tensor]]]:
    """Two experiences of the unigram model, with or without a new process's reading in between; and the
    Fisher information of each, scaled here by hand: Σ F θ² over its own last parameters is 1."""
    method, fishers = Ewc(spec, seed=0), []
    for odds, rows in (([1.0, 1.0, 2.0], [says(0), says(1, 2)]), ([4.0, 1.0, 1.0], [says(2), says(0, 0)])):
        model = Unigram(odds)
        fisher = fisher_information(teacher(model), choose(rows, 4, 0))["odds"]
        fishers.append({"odds": fisher / (fisher * torch.tensor(odds).log() ** 2).sum()})
        method.before_training_exp(teacher(model, rows))
        method.after_training_exp(teacher(model, rows))
        if restart is not None:
            method.save(restart)
            method = Ewc(spec, seed=0)
            method.load(restart)
    return method, fishers


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_a_restart_between_experiences_does_not_show(tmp_path: Path, mode: str) -> None:
    spec = StrategySpec(methods=("ewc",), ewc_mode=mode)
    stayed, _ = two_experiences(spec, restart=None)
    restarted, _ = two_experiences(spec, restart=tmp_path)
    assert stayed.past is not None
    assert restarted.past is not None
    for one, other in (
        (stayed.past.curvature, restarted.past.curvature),
        (stayed.past.centre, restarted.past.centre),
    ):
        assert torch.equal(one["odds"], other["odds"])
    assert stayed.past.constant == restarted.past.constant
    theta = {"odds": torch.zeros(3)}
    assert stayed.past.at(theta).item() == restarted.past.at(theta).item() > 0


def test_online_importance_fades_and_its_anchor_is_the_last() -> None:
    method, (first, second) = two_experiences(
        StrategySpec(methods=("ewc",), ewc_mode="online", ewc_decay=0.25), restart=None
    )
    assert method.past is not None
    torch.testing.assert_close(method.past.curvature["odds"], 0.25 * first["odds"] + second["odds"])
    torch.testing.assert_close(method.past.centre["odds"], torch.tensor([4.0, 1.0, 1.0]).log())
    assert method.past.constant == 0


def test_separate_penalties_add_up_over_experiences() -> None:
    method, fishers = two_experiences(EWC, restart=None)
    assert method.past is not None
    anchors = [torch.tensor(odds).log() for odds in ([1.0, 1.0, 2.0], [4.0, 1.0, 1.0])]
    theta = torch.tensor([0.3, -0.2, 0.1])
    parts = [
        (fisher["odds"] * (theta - anchor) ** 2).sum()
        for fisher, anchor in zip(fishers, anchors, strict=True)
    ]
    torch.testing.assert_close(method.past.at({"odds": theta}), torch.stack(parts).sum())


def test_half_of_lambda_is_the_price_of_losing_all_that_an_experience_taught() -> None:
    method, model, rows = Ewc(EWC, seed=0), Unigram([1.0, 1.0, 2.0]), [says(0), says(1, 2)]
    method.after_training_exp(teacher(model, rows))
    charged: list[Tensor] = []
    lost = teacher(Unigram([1.0, 1.0, 1.0]))  # logarithms of 1: every parameter is zero
    lost.last_pass, lost.penalise = True, charged.append
    method.before_backward(lost)
    assert [term.item() for term in charged] == [pytest.approx(10.0 / 2)]


def test_the_seed_of_the_training_chooses_the_rows_that_are_measured() -> None:
    rows = [says(*[token] * length) for token in range(3) for length in range(1, 9)]
    model = Unigram([1.0, 2.0, 3.0])
    method = Ewc(EWC, seed=1)
    method.after_training_exp(teacher(model, rows))
    assert method.past is not None
    anchor = {"odds": model.odds.detach()}
    for seed in (0, 1):
        measured = relative(fisher_information(teacher(model), choose(rows, 4, seed)), anchor)
        assert torch.equal(method.past.curvature["odds"], measured["odds"]) == (seed == 1)


@pytest.mark.parametrize("passes", [1, 3])
def test_half_lambda_times_the_penalty_is_added_once_a_step(base: Path, tmp_path: Path, passes: int) -> None:
    """Its gradient is λH(θ−m), whether the step has one pass or several."""

    def gradients(methods: list[Ewc]) -> tuple[dict[str, Tensor], float]:
        learner = trainings.learner(base, tmp_path, methods, clip_norm=1e9)
        rows = trainings.experience(learner, lesson("a", 6)).new
        (step,) = Loader(rows, batch_size=6 // passes, accumulation=passes, seed=0).steps(0)
        theta = {name: p.detach().clone() for name, p in trainable(learner.model).items()}
        for method in methods:
            method.past = Quadratic(
                curvature={name: torch.full_like(p, 2.0) for name, p in theta.items()},
                centre={name: p - 0.5 for name, p in theta.items()},
            )
        learner.learn(step)
        found = {name: p.grad.clone() for name, p in trainable(learner.model).items() if p.grad is not None}
        return found, learner.penalty.item()

    without, nothing = gradients([])
    held, penalty = gradients([Ewc(EWC, seed=0)])
    count = sum(gradient.numel() for gradient in held.values())
    assert nothing == 0
    assert penalty == pytest.approx(10.0 / 2 * count * 2.0 * 0.25, rel=1e-5)
    for name, gradient in held.items():
        torch.testing.assert_close(gradient - without[name], torch.full_like(gradient, 10.0 * 2.0 * 0.5))


def test_a_second_cycle_is_held_back_and_only_in_what_learns(base: Path, tmp_path: Path) -> None:
    run(job(base, snapshot(tmp_path / "1", lesson("a", 8)), tmp_path / "one", strategy=EWC))
    state = quadratic.load(result_files(tmp_path / "one")["state"] / "ewc.safetensors")
    learner = trainings.learner(base, tmp_path / "work")
    assert state.curvature.keys() == state.centre.keys() == trainable(learner.model).keys()
    assert all(tensor.dtype == torch.float32 for tensor in state.curvature.values())

    second = snapshot(tmp_path / "2", lesson("b", 8))
    held = run(job(base, second, tmp_path / "two", tmp_path / "one", strategy=EWC))
    run(job(base, second, tmp_path / "naive", tmp_path / "one"))
    assert held.curve[0].penalty == 0, "nothing has moved yet"
    assert all(point.penalty > 0 for point in held.curve[1:]), "the restored penalty must not be zero"
    assert adapter_bytes(tmp_path / "two") != adapter_bytes(tmp_path / "naive")

    def moved(out: Path) -> float:
        old, new = trainings.adapter(tmp_path / "one"), trainings.adapter(out)
        return sum(float((new[name] - old[name]).square().sum()) for name in old)

    strong = StrategySpec(methods=("ewc",), ewc_lambda=1e4, fisher_rows=4)
    run(job(base, second, tmp_path / "strong", tmp_path / "one", strategy=strong))
    assert moved(tmp_path / "strong") < moved(tmp_path / "naive")
