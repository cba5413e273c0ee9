"""O-LoRA: the old adapters stay to the last bit, the new one starts from nothing and keeps away."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from storage.errors import ModelError
from strategies.contract import LoraSpec, StrategySpec, TrainReport, result_files
from strategies.experience import Loader, Step
from strategies.loop import Learner
from strategies.model import grown_adapter, load_base, lora_layers, save_adapter, trainable, with_adapter
from strategies.olora import OLora
from tests import trainings
from tests.toys import tiny_model_spec
from tests.trainings import SPEC, adapter, adapter_bytes, job, lesson, run, run_interrupted, snapshot, state

OLORA = StrategySpec(methods=("olora",), olora_lambda=0.5)
DECAYING = replace(SPEC, weight_decay=0.5)


@pytest.fixture(scope="module")
def home(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cycles, one after the other."""
    folder = tmp_path_factory.mktemp("olora")
    parent = None
    for name, task in (("one", "a"), ("two", "b"), ("three", "c")):
        data = snapshot(folder / f"rows-{name}", lesson(task, 8))
        run(job(base, data, folder / name, parent, strategy=OLORA, train=DECAYING))
        parent = folder / name
    return folder


def config(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result_files(out)["adapter"] / "adapter_config.json").read_text())
    return found


def old_part(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What `rank` of old adapters hold: rows of A, columns of B."""
    return {name: t[:rank] if "lora_A" in name else t[:, :rank] for name, t in tensors.items()}


def new_part(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {name: t[rank:] if "lora_A" in name else t[:, rank:] for name, t in tensors.items()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8, 80, 70]])).logits.clone()


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_grown_adapter_says_at_first_what_the_old_one_said(base: Path, home: Path, rank: int) -> None:
    """Whatever rank is added, and whatever alpha is asked for: the scale of the old one stays."""
    folder = result_files(home / "one")["adapter"]
    bare = logits(load_base(tiny_model_spec(base)).model)
    old = with_adapter(load_base(tiny_model_spec(base)), folder, trainable=False)
    grown = grown_adapter(load_base(tiny_model_spec(base)), folder, LoraSpec(rank=rank, alpha=99), seed=3)
    torch.testing.assert_close(logits(grown), logits(old), rtol=1e-5, atol=1e-6)
    assert float((logits(old) - bare).abs().max()) > 1e-3
    for layer in lora_layers(grown).values():
        assert (layer.a.shape[0], layer.b.shape[1]) == (2 + rank, 2 + rank)
        assert not layer.b[:, 2:].any()
        assert bool(layer.a[2:].any(1).all()), "else the new part could never learn"
        assert (layer.a.requires_grad, layer.b.requires_grad) == (True, True)


def test_a_scale_that_no_whole_alpha_gives_is_refused(base: Path, tmp_path: Path) -> None:
    """An adapter of rank 2 with alpha 3, and one rank more: alpha would be 4.5."""
    data, lora = snapshot(tmp_path / "rows", lesson("a", 4)), LoraSpec(rank=2, alpha=3)
    run(job(base, data, tmp_path / "one", lora=lora))
    folder = result_files(tmp_path / "one")["adapter"]
    with pytest.raises(ModelError, match=r"lora\.rank = 1 does not fit beside an adapter of rank 2"):
        grown_adapter(load_base(tiny_model_spec(base)), folder, LoraSpec(rank=1), seed=0)


def test_old_adapters_stay_to_the_last_bit_and_new_ones_learn(home: Path) -> None:
    """Weight decay and all."""
    cycles = [adapter(home / name) for name in ("one", "two", "three")]
    for rank, before, after in zip((2, 4), cycles, cycles[1:], strict=False):
        kept = old_part(after, rank)
        assert kept.keys() == before.keys()
        assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
        learned = new_part(after, rank)
        assert all(bool(tensor.any()) for name, tensor in learned.items() if "lora_B" in name)


def test_each_cycle_adds_its_rank(home: Path) -> None:
    found = [config(home / name) for name in ("one", "two", "three")]
    assert [(values["r"], values["lora_alpha"]) for values in found] == [(2, 4), (4, 8), (6, 12)]
    assert all(not state(home / name) for name in ("one", "two", "three")), "no state but the adapter"


def test_what_is_saved_is_an_ordinary_adapter_and_the_sum_of_its_parts(base: Path, home: Path) -> None:
    """The base with s·BA of each cycle added to its weights says what PEFT makes of the file."""
    folder = result_files(home / "three")["adapter"]
    loaded = PeftModel.from_pretrained(load_base(tiny_model_spec(base)).model, str(folder))
    summed = load_base(tiny_model_spec(base)).model
    tensors = adapter(home / "three")
    with torch.no_grad():
        for name, a in tensors.items():
            if "lora_A" not in name:
                continue
            b = tensors[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = summed.get_submodule(layer).weight
            for start in (0, 2, 4):  # the cycles, each at the scale alpha / rank = 4 / 2
                weight += 2.0 * b[:, start : start + 2] @ a[start : start + 2]
    torch.testing.assert_close(logits(loaded), logits(summed), rtol=1e-4, atol=1e-5)


def test_without_olora_a_grown_adapter_goes_on_as_one(base: Path, home: Path, tmp_path: Path) -> None:
    data = snapshot(tmp_path / "rows", lesson("d", 8))
    run(job(base, data, tmp_path / "out", home / "two"))
    assert config(tmp_path / "out")["r"] == 4


class Adapters(torch.nn.Module):
    """Two layers with an A of their own, named as PEFT names them."""

    def __init__(self, *factors: list[list[float]]) -> None:
        super().__init__()
        for n, factor in enumerate(factors):
            layer = torch.nn.Linear(len(factor[0]), len(factor), bias=False)
            layer.weight.data = torch.tensor(factor)
            other = torch.nn.Linear(len(factor), 3, bias=False)
            parts = {"lora_A": torch.nn.ModuleDict({"default": layer})}
            parts["lora_B"] = torch.nn.ModuleDict({"default": other})
            self.add_module(f"layer{n}", torch.nn.ModuleDict(parts))


def charge(method: OLora, model: torch.nn.Module, *, last_pass: bool = True) -> list[Tensor]:
    terms: list[Tensor] = []
    method.before_backward(SimpleNamespace(model=model, last_pass=last_pass, penalise=terms.append))
    return terms


def test_the_price_of_an_overlap_is_the_one_worked_out_by_hand() -> None:
    """First layer: old (1, 0), new (3, 4) and (0, 2): products 3 and 0. Second: old (1, 2), new (2, −3) and
    (1, 1): products −4 and 3. Squares 9 + 16 + 9 = 34, at ½ a piece."""
    model = Adapters([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]], [[1.0, 2.0], [2.0, -3.0], [1.0, 1.0]])
    method = OLora(OLORA, seed=0)
    assert charge(method, model) == [], "nothing is old in a first cycle"
    method.old = 1
    assert charge(method, model, last_pass=False) == [], "once a step"
    (penalty,) = charge(method, model)
    assert penalty.item() == pytest.approx(34 / 2)
    penalty.backward()
    by_hand = {  # λ · 2 · product · old, and nothing for the old one itself
        "layer0.lora_A.default.weight": [[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]],
        "layer1.lora_A.default.weight": [[0.0, 0.0], [-4.0, -8.0], [3.0, 6.0]],
    }
    for name, p in model.named_parameters():
        if name in by_hand:
            torch.testing.assert_close(p.grad, torch.tensor(by_hand[name]))
        else:
            assert p.grad is None


def one_step(learner: Learner) -> Step:
    rows = trainings.experience(learner, lesson("a", 6)).new
    (step,) = Loader(rows, batch_size=6, accumulation=1, seed=0).steps(0)
    return step


def gradients(learner: Learner) -> dict[str, Tensor]:
    learner.learn(one_step(learner))
    return {name: p.grad.clone() for name, p in trainable(learner.model).items() if p.grad is not None}


def test_old_adapters_have_no_gradient_and_no_say_in_the_clipping(base: Path, tmp_path: Path) -> None:
    whole = gradients(trainings.learner(base, tmp_path / "plain", clip_norm=1e9))
    mine = new_part(whole, 1)
    norm = torch.cat([g.flatten() for g in mine.values()]).norm().item()
    assert norm < 0.95 * torch.cat([g.flatten() for g in whole.values()]).norm().item()

    method = OLora(replace(OLORA, olora_lambda=0.0), seed=0)
    method.old = 1
    learner = trainings.learner(base, tmp_path / "held", [method], clip_norm=norm / 4)
    method.before_training_exp(learner)
    found = gradients(learner)
    assert all(not gradient.any() for gradient in old_part(found, 1).values())
    for name, gradient in new_part(found, 1).items():
        torch.testing.assert_close(gradient, mine[name] / 4, rtol=1e-4, atol=1e-8)


def test_a_step_moves_nothing_old(base: Path, tmp_path: Path) -> None:
    """AdamW's weight decay needs no gradient to shrink a parameter."""
    method = OLora(OLORA, seed=0)
    method.old = 1
    learner = trainings.learner(base, tmp_path, [method], weight_decay=0.5)
    method.before_training_exp(learner)
    before = {name: p.detach().clone() for name, p in trainable(learner.model).items()}
    learner.learn(one_step(learner))
    after = {name: p.detach() for name, p in trainable(learner.model).items()}
    kept, moved = old_part(before, 1), new_part(before, 1)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in old_part(after, 1).items())
    assert all(not torch.equal(tensor, moved[name]) for name, tensor in new_part(after, 1).items())


def test_a_higher_price_leaves_less_overlap(base: Path, home: Path, tmp_path: Path) -> None:
    data = snapshot(tmp_path / "rows", lesson("b", 8))

    def overlap(price: float) -> tuple[float, TrainReport]:
        out, spec = tmp_path / str(price), replace(OLORA, olora_lambda=price)
        report = run(job(base, data, out, home / "one", strategy=spec))
        factors = [t for name, t in adapter(out).items() if "lora_A" in name]
        return sum(float((a[2:] @ a[:2].T).square().sum()) for a in factors), report

    free, told = overlap(0.0)
    dear, held = overlap(50.0)
    assert all(point.penalty == 0 for point in told.curve)
    assert all(point.penalty > 0 for point in held.curve)
    assert dear < 0.9 * free


def test_other_targets_do_not_lose_what_the_old_adapters_hold(base: Path, home: Path, tmp_path: Path) -> None:
    """They name fewer layers than the champion's adapter sits on; it would be cut down to those."""
    lora = LoraSpec(rank=2, alpha=4, targets="q_proj")
    data = snapshot(tmp_path / "rows", lesson("b", 8))
    report = run(job(base, data, tmp_path / "out", home / "one", strategy=OLORA, lora=lora))
    before, kept = adapter(home / "one"), old_part(adapter(tmp_path / "out"), 2)
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    assert [note for note in report.notes if "lora." in note] == [
        "lora.targets = q_proj was not used: the champion's adapter continues with "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ]


def test_more_targets_than_the_old_adapters_have_do_not_break_them(base: Path, tmp_path: Path) -> None:
    data = snapshot(tmp_path / "rows", lesson("a", 4))
    run(job(base, data, tmp_path / "one", lora=LoraSpec(rank=2, alpha=4, targets="q_proj")))
    report = run(job(base, data, tmp_path / "two", tmp_path / "one", strategy=OLORA))
    assert config(tmp_path / "two")["target_modules"] == ["q_proj"]
    assert any("lora.targets = all-linear was not used" in note for note in report.notes)


def test_an_adapter_on_the_head_grows_and_one_on_embeddings_says_that_it_cannot(
    base: Path, tmp_path: Path
) -> None:
    for targets in ("lm_head", "embed_tokens"):
        lora = LoraSpec(rank=2, alpha=4, targets=f"{targets},q_proj")
        one, two = tmp_path / targets / "one", tmp_path / targets / "two"
        run(job(base, snapshot(tmp_path / targets / "a", lesson("a", 4)), one, lora=lora))
        assert all(".lora_" in name for name in adapter(one)), "nothing of the base is in it"
        more = job(base, snapshot(tmp_path / targets / "b", lesson("b", 4)), two, one, strategy=OLORA)
        if targets == "lm_head":
            run(more)
            assert config(two)["r"] == 2 + more.lora.rank
        else:
            with pytest.raises(ModelError, match="olora needs adapters on linear layers alone"):
                run(more)


@pytest.mark.parametrize(
    ("alpha", "said"),
    [(2, []), (9, ["lora.alpha = 9 was not used: the champion's adapter continues with 4"])],
)
def test_growing_by_another_rank_is_no_news_but_another_scale_is(
    base: Path, home: Path, tmp_path: Path, alpha: int, said: list[str]
) -> None:
    data = snapshot(tmp_path / "rows", lesson("b", 8))
    lora = LoraSpec(rank=1, alpha=alpha)
    asked = job(base, data, tmp_path / "out", home / "one", strategy=OLORA, lora=lora)
    assert [note for note in run(asked).notes if "lora." in note] == said
    assert config(tmp_path / "out")["r"] == 3


def test_interrupted_anywhere_it_ends_in_the_same_adapter(base: Path, home: Path, tmp_path: Path) -> None:
    rows = snapshot(tmp_path / "rows", lesson("b", 8), lesson("b", 4, split="validation", start=40))
    for name, how in (("whole", run), ("parts", run_interrupted)):
        how(job(base, rows, tmp_path / name, home / "one", strategy=OLORA, train=DECAYING))
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "whole")


def test_the_same_seed_grows_the_same_adapter(base: Path, home: Path, tmp_path: Path) -> None:
    folder = result_files(home / "one")["adapter"]
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        grown = grown_adapter(load_base(tiny_model_spec(base)), folder, LoraSpec(rank=2, alpha=4), seed)
        save_adapter(grown, tmp_path / name)
    one, again, other = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "again", "other")
    ]
    assert one == again != other
