"""EWC of the product: its arithmetic against dense matrices, its Fisher sums against one row at a time."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from storage.errors import IntegrityError, ModelError, NonFiniteLoss
from strategies import ewc_lora
from strategies.batches import Example
from strategies.contract import LoraSpec, StrategySpec
from strategies.ewc import Ewc, choose
from strategies.ewc_lora import EwcLora, Sums, fisher_sums, weighed_square
from strategies.loop import Learner
from strategies.model import LoraLayer, lora_layers, trainable
from strategies.quadratic import Quadratic
from tests import trainings
from tests.toys import tiny_multimodal
from tests.trainings import adapter_bytes, job, lesson, run, run_interrupted, snapshot, state

EWC_LORA = StrategySpec(methods=("ewc-lora",), ewc_lambda=10.0, fisher_rows=4)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def learner(base: Path, tmp_path: Path) -> Learner:
    return trainings.learner(base, tmp_path / "work")


def rows_of(learner: Learner, count: int = 6) -> list[Example]:
    return trainings.experience(learner, lesson("a", count)).new


def parts(learner: Learner) -> dict[str, LoraLayer]:
    return lora_layers(learner.model)


def some_sums(learner: Learner) -> Sums:
    """Importances of every size, zero among them; row and column sums add up to the same."""
    found = {}
    for n, (name, layer) in enumerate(parts(learner).items()):
        rows, columns = random(len(layer.b), seed=n).abs(), random(layer.a.shape[1], seed=99 + n).abs()
        rows[0] = columns[1] = 0
        found[name] = (rows.float(), (columns * rows.sum() / columns.sum()).float())
    return found


def nudge(learner: Learner, seed: int = 0) -> None:
    for n, p in enumerate(trainable(learner.model).values()):
        p.data += 0.1 * random(*p.shape, seed=seed + n).float()


def charge(method: EwcLora | Ewc, learner: Learner, *, last_pass: bool = True) -> Tensor:
    """What the method adds to the loss of a step."""
    terms: list[Tensor] = []
    method.before_backward(SimpleNamespace(model=learner.model, last_pass=last_pass, penalise=terms.append))
    return torch.stack(terms).sum() if terms else torch.zeros(())


def dense(layer: LoraLayer) -> Tensor:
    """ΔW [out, in]."""
    return layer.scaling * layer.b.double() @ layer.a.double()


def outer(sums: tuple[Tensor, Tensor]) -> Tensor:
    """F [out, in], as it is never formed."""
    rows, columns = (part.double() for part in sums)
    return rows[:, None] * columns[None, :] / rows.sum()


@pytest.mark.parametrize(("out", "into", "rank"), [(3, 4, 2), (1, 5, 1), (6, 2, 4)])
def test_the_weighed_square_is_the_sum_over_all_elements(out: int, into: int, rank: int) -> None:
    rows, columns = random(out, seed=0).abs(), random(into, seed=1).abs()
    left, right = random(out, rank, seed=2), random(rank, into, seed=3)
    naive = 0.0
    for i in range(out):
        for j in range(into):
            element = sum(float(left[i, k] * right[k, j]) for k in range(rank))
            naive += float(rows[i]) * float(columns[j]) * element**2
    naive /= sum(rows.tolist())
    assert weighed_square(rows, columns, left, right).item() == pytest.approx(naive, rel=1e-12)


def test_the_weighed_square_of_a_layer_that_never_mattered_is_zero() -> None:
    found = weighed_square(torch.zeros(3), torch.zeros(4), torch.ones(3, 2), torch.ones(2, 4))
    assert found.item() == 0


def test_the_change_of_the_product_is_one_product() -> None:
    a, b, a_then, b_then = (random(*shape, seed=n) for n, shape in enumerate([(2, 5), (4, 2)] * 2))
    layer = LoraLayer(module=torch.nn.Identity(), a=Parameter(a), b=Parameter(b), scaling=3.0)
    left, right = ewc_lora._change(layer, a_then, b_then)
    assert (left.shape, right.shape) == ((4, 4), (4, 5))
    torch.testing.assert_close(left @ right, b @ a - b_then @ a_then, rtol=1e-12, atol=1e-12)


def log_probability(model: Any, row: Example) -> Tensor:
    """Of the answer, without batch, padding or mask."""
    ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
    logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    first = len(row.prompt_ids)
    return torch.stack([logprobs[first + n - 1, token] for n, token in enumerate(row.answer_ids)]).sum()


def naive_sums(learner: Learner, rows: Sequence[Example]) -> Sums:
    """A dense change of every layer's weight, zero so far, and its gradient row by row."""
    changes = {
        name: torch.zeros(len(layer.b), layer.a.shape[1], requires_grad=True)
        for name, layer in parts(learner).items()
    }

    def adding(change: Tensor) -> Any:
        return lambda module, arguments, output: output + arguments[0] @ change.T

    hooks = [
        layer.module.register_forward_hook(adding(changes[name])) for name, layer in parts(learner).items()
    ]
    squares = {name: torch.zeros_like(change) for name, change in changes.items()}
    learner.model.eval()
    for row in rows:
        slopes = torch.autograd.grad(log_probability(learner.model, row), list(changes.values()))
        for square, slope in zip(squares.values(), slopes, strict=True):
            square += slope.square() / len(rows)
    for hook in hooks:
        hook.remove()
    return {name: (square.sum(1), square.sum(0)) for name, square in squares.items()}


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_the_fisher_sums_are_those_of_a_dense_change_one_row_at_a_time(
    base: Path, tmp_path: Path, batch_size: int
) -> None:
    """So they do not know the batch size either."""
    learner = trainings.learner(base, tmp_path / "work", batch_size=batch_size)
    rows = rows_of(learner)
    found, expected = fisher_sums(learner, rows), naive_sums(learner, rows)
    assert list(found) == list(expected) != []
    for name, pair in expected.items():
        for mine, theirs in zip(found[name], pair, strict=True):
            assert float(theirs.sum()) > 0
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * float(theirs.max()))


def test_looking_at_rows_leaves_the_model_as_it_was(learner: Learner) -> None:
    learner.model.train()
    before = {name: p.detach().clone() for name, p in trainable(learner.model).items()}
    fisher_sums(learner, rows_of(learner))
    assert learner.model.training
    assert all(not layer.module._forward_hooks for layer in parts(learner).values())
    for name, p in trainable(learner.model).items():
        assert p.grad is None
        assert torch.equal(p, before[name])


def test_what_a_text_does_not_go_through_has_no_fisher_sums(tmp_path: Path) -> None:
    learner = trainings.learner(tiny_multimodal(tmp_path / "base"), tmp_path / "work")
    found = fisher_sums(learner, rows_of(learner, 2))
    assert found.keys() == parts(learner).keys()
    sees = {name for name in found if "vision_tower" in name}
    assert sees
    assert {name for name, (rows, _) in found.items() if not rows.any()} == sees


def test_a_layer_that_sees_tokens_without_their_rows_is_refused(learner: Learner) -> None:
    """As in a mixture of experts: tokens of all rows would be taken for those of one."""
    expert = learner.model.get_submodule("base_model.model.model.layers.0.mlp")
    whole = expert.forward
    expert.forward = lambda x: whole(x.flatten(0, 1)).view_as(x)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp.* take it out of strategy\.methods"):
        fisher_sums(learner, rows_of(learner))


def test_fisher_sums_that_are_not_finite_are_refused(learner: Learner) -> None:
    next(iter(parts(learner).values())).b.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLoss, match="Fisher"):
        fisher_sums(learner, rows_of(learner, 2))


def test_the_penalty_is_the_dense_one_and_so_is_its_gradient(learner: Learner) -> None:
    method = EwcLora(EWC_LORA, seed=0)
    method.sums = some_sums(learner)
    method.before_training_exp(learner)
    then = {name: dense(layer).detach() for name, layer in parts(learner).items()}
    assert charge(method, learner).item() == 0, "nothing has moved yet"
    nudge(learner)
    assert charge(method, learner, last_pass=False).item() == 0, "once a step"
    penalty = charge(method, learner)
    naive = torch.stack(
        [
            (outer(method.sums[name]) * (dense(layer) - then[name]).square()).sum()
            for name, layer in parts(learner).items()
        ]
    ).sum()
    assert penalty.item() == pytest.approx(10.0 / 2 * naive.item(), rel=1e-5)
    assert penalty.item() > 0
    learned = list(trainable(learner.model).values())
    mine, theirs = torch.autograd.grad(penalty, learned), torch.autograd.grad(10.0 / 2 * naive, learned)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def rewritten(learner: Learner) -> None:
    """Other factors, the same products: B M⁻¹ and M A."""
    for n, layer in enumerate(parts(learner).values()):
        mixing = random(len(layer.a), len(layer.a), seed=500 + n) + 3 * torch.eye(len(layer.a))
        layer.b.data = (layer.b.double() @ mixing.inverse()).float()
        layer.a.data = (mixing @ layer.a.double()).float()


def test_the_same_product_from_other_factors_costs_the_same(learner: Learner) -> None:
    """Which is what sets it apart from EWC on the factors."""
    method, factors = EwcLora(EWC_LORA, seed=0), Ewc(EWC_LORA, seed=0)
    method.sums = some_sums(learner)
    method.before_training_exp(learner)
    anchor = {name: p.detach().clone() for name, p in trainable(learner.model).items()}
    factors.past = Quadratic(curvature={n: torch.ones_like(p) for n, p in anchor.items()}, centre=anchor)
    nudge(learner)
    moved, moved_factors = charge(method, learner).item(), charge(factors, learner).item()
    rewritten(learner)
    assert moved > 0
    assert charge(method, learner).item() == pytest.approx(moved, rel=1e-3)
    assert charge(factors, learner).item() > 1.5 * moved_factors


def ended(learner: Learner, method: EwcLora, count: int = 6) -> None:
    learner.experience = trainings.experience(learner, lesson("a", count))
    method.after_training_exp(learner)


def test_half_of_lambda_is_the_price_of_losing_all_that_an_experience_taught(learner: Learner) -> None:
    method = EwcLora(EWC_LORA, seed=0)
    ended(learner, method)
    method.before_training_exp(learner)
    for layer in parts(learner).values():
        layer.b.data.zero_()
    assert charge(method, learner).item() == pytest.approx(10.0 / 2, rel=1e-4)


def test_the_seed_of_the_training_chooses_the_rows_that_are_measured(learner: Learner) -> None:
    method = EwcLora(EWC_LORA, seed=1)
    ended(learner, method, count=12)
    assert method.sums is not None
    for seed in (0, 1):
        rows = choose(rows_of(learner, 12), EWC_LORA.fisher_rows, seed)
        measured = ewc_lora._relative(fisher_sums(learner, rows), parts(learner))
        same = [torch.equal(pair[0], measured[name][0]) for name, pair in method.sums.items()]
        assert all(same) == any(same) == (seed == 1)


def test_importances_of_experiences_add_up(learner: Learner) -> None:
    """The second comes from other rows and another adapter."""
    first, second, both = (EwcLora(EWC_LORA, seed=0) for _ in range(3))
    ended(learner, first)
    ended(learner, both)
    nudge(learner)
    ended(learner, second, count=3)
    ended(learner, both, count=3)
    assert first.sums is not None
    assert second.sums is not None
    assert both.sums is not None
    for name, pair in both.sums.items():
        for n, total in enumerate(pair):
            torch.testing.assert_close(total, first.sums[name][n] + second.sums[name][n])


def test_an_adapter_that_learned_nothing_is_not_divided_by(learner: Learner) -> None:
    method = EwcLora(EWC_LORA, seed=0)
    for layer in parts(learner).values():
        layer.b.data.zero_()
    ended(learner, method)
    assert method.sums is not None
    assert all(bool(part.isfinite().all()) for pair in method.sums.values() for part in pair)


def test_what_is_saved_is_what_is_loaded(learner: Learner, tmp_path: Path) -> None:
    method, restarted, fresh = (EwcLora(EWC_LORA, seed=0) for _ in range(3))
    fresh.save(tmp_path)
    assert not list(tmp_path.glob("*.safetensors")), "nothing is known yet"
    fresh.load(tmp_path)
    assert fresh.sums is None
    method.sums = some_sums(learner)
    method.save(tmp_path)
    restarted.load(tmp_path)
    assert restarted.sums is not None
    assert restarted.sums.keys() == method.sums.keys()
    for name, pair in method.sums.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, restarted.sums[name], strict=True))


def test_a_damaged_state_is_an_integrity_error(learner: Learner, tmp_path: Path) -> None:
    path = tmp_path / EwcLora.file
    ewc_lora.save(some_sums(learner), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="daemon doctor"):
        EwcLora(EWC_LORA, seed=0).load(tmp_path)


def test_a_state_of_another_format_is_refused_and_one_without_a_number_read(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sums = tmp_path / EwcLora.file, some_sums(learner)
    parts = {
        f"{kind}/{name}": t
        for name, pair in sums.items()
        for kind, t in zip(("rows", "columns"), pair, strict=True)
    }
    ewc_lora.save_file(parts, path)
    assert ewc_lora.load(path).keys() == sums.keys()
    with monkeypatch.context() as later:
        later.setattr(ewc_lora, "FORMAT", "9")
        ewc_lora.save(sums, path)
    with pytest.raises(IntegrityError, match="format 9, known is 1"):
        EwcLora(EWC_LORA, seed=0).load(tmp_path)


def test_a_state_that_lacks_a_part_is_an_integrity_error(learner: Learner, tmp_path: Path) -> None:
    path = tmp_path / EwcLora.file
    name, (rows, _) = next(iter(some_sums(learner).items()))
    ewc_lora.save_file({f"rows/{name}": rows}, path)
    with pytest.raises(IntegrityError, match="daemon doctor"):
        EwcLora(EWC_LORA, seed=0).load(tmp_path)


@pytest.mark.parametrize("change", ["a layer less", "a layer more", "wider", "taller"])
def test_a_state_of_other_layers_is_an_integrity_error(learner: Learner, change: str) -> None:
    method = EwcLora(EWC_LORA, seed=0)
    sums = some_sums(learner)
    name, (rows, columns) = next(iter(sums.items()))
    if change == "a layer less":
        del sums[name]
    else:
        sums |= {
            "a layer more": {"another": (rows, columns)},
            "wider": {name: (rows, torch.ones(len(columns) + 1))},
            "taller": {name: (torch.ones(len(rows) + 1), columns)},
        }[change]
    method.sums = sums
    with pytest.raises(IntegrityError, match=r"other layers; roll back .* or take ewc-lora out"):
        method.before_training_exp(learner)


def test_an_adapter_on_embeddings_is_refused(base: Path, tmp_path: Path) -> None:
    """It would learn, and nothing would hold it."""
    lora = LoraSpec(rank=2, alpha=4, targets="embed_tokens,q_proj")
    first = job(
        base, snapshot(tmp_path / "1", lesson("a", 4)), tmp_path / "one", lora=lora, strategy=EWC_LORA
    )
    with pytest.raises(ModelError, match="ewc-lora needs adapters on linear layers alone"):
        run(first)


def test_a_second_cycle_is_held_back_in_its_products(base: Path, tmp_path: Path) -> None:
    run(job(base, snapshot(tmp_path / "1", lesson("a", 8)), tmp_path / "one", strategy=EWC_LORA))
    assert set(state(tmp_path / "one")) == {EwcLora.file}
    second = snapshot(tmp_path / "2", lesson("b", 8))

    def taught(name: str, **changes: Any) -> list[float]:
        report = run(job(base, second, tmp_path / name, tmp_path / "one", **changes))
        return [point.penalty for point in report.curve]

    def moved(name: str) -> float:
        """In products, importances aside."""
        old, new = (trainings.adapter(tmp_path / each) for each in ("one", name))
        left = {key: key.replace("lora_A", "lora_B") for key in old if "lora_A" in key}
        return sum(float((new[b] @ new[a] - old[b] @ old[a]).square().sum()) for a, b in left.items())

    strong = StrategySpec(methods=("ewc-lora",), ewc_lambda=1e4, fisher_rows=4)
    penalties = taught("strong", strategy=strong)
    assert penalties[0] == 0, "nothing has moved yet"
    assert all(penalty > 0 for penalty in penalties[1:]), "the restored importances must not be zero"
    assert taught("naive") == [0] * len(penalties)
    assert moved("strong") < 0.5 * moved("naive")


def test_interrupted_anywhere_it_ends_in_the_same_adapter_and_state(base: Path, tmp_path: Path) -> None:
    run(job(base, snapshot(tmp_path / "1", lesson("a", 8)), tmp_path / "one", strategy=EWC_LORA))
    second = snapshot(tmp_path / "2", lesson("b", 8), lesson("b", 4, split="validation", start=40))
    for name, how in (("whole", run), ("parts", run_interrupted)):
        how(job(base, second, tmp_path / name, tmp_path / "one", strategy=EWC_LORA))
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "whole")
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
