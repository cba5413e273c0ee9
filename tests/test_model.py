"""Base and adapters: the base never moves, adapters come back bit for bit, damage is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.errors import ModelError
from strategies import model
from strategies.batches import collate, encode, nll
from strategies.contract import LoraSpec
from strategies.model import (
    Base,
    fresh_adapter,
    load_base,
    save_adapter,
    trainable,
    with_adapter,
    without_adapter,
)
from tests.toys import tiny_base, tiny_gpt2, tiny_model_spec, tiny_rows

LORA = LoraSpec(rank=2, alpha=4)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def base(folder: Path) -> Base:
    return load_base(tiny_model_spec(folder))


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter that changes the base."""
    saved = tmp_path_factory.mktemp("adapter")
    made = fresh_adapter(load_base(tiny_model_spec(folder)), LORA, seed=0)
    with torch.no_grad():
        for parameter in trainable(made).values():
            parameter += 0.1
    save_adapter(made, saved)
    return saved


@torch.no_grad()
def logits(module: torch.nn.Module) -> torch.Tensor:
    return module(input_ids=torch.tensor([[5, 6, 7]])).logits.clone()


def test_a_fresh_adapter_changes_nothing_and_is_drawn_from_the_seed(folder: Path) -> None:
    made = [fresh_adapter(load_base(tiny_model_spec(folder)), LORA, seed) for seed in (0, 0, 1)]
    before = logits(load_base(tiny_model_spec(folder)).model)
    assert all(torch.equal(logits(one.eval()), before) for one in made)
    same, again, other = [torch.cat([p.flatten() for p in trainable(one).values()]) for one in made]
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_an_orthogonal_start_changes_nothing_and_both_factors_learn_at_once(folder: Path) -> None:
    base = load_base(tiny_model_spec(folder))
    rows = collate(encode(tiny_rows("a", 4), base.prompter), base.prompter.pad_id)
    before = nll(base.model, rows)[0].item()
    made = fresh_adapter(base, LoraSpec(rank=4, alpha=8, init="orthogonal"), seed=0)
    loss, _ = nll(made, rows)
    assert loss.item() == pytest.approx(before, rel=1e-5)
    loss.backward()
    assert all(p.abs().max() > 0 for p in trainable(made).values())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable(made).values())


def test_only_lora_parameters_train(base: Base) -> None:
    made = fresh_adapter(base, LORA, seed=0)
    assert trainable(made)
    assert all("lora_" in name for name in trainable(made))
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B is zero at first, and then A has no gradient
        optimizer.zero_grad()
        nll(made, collate(encode(tiny_rows("a", 2), base.prompter), 0))[0].backward()
        optimizer.step()
    changed = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainable(made))


def test_targets_may_be_named(base: Base) -> None:
    made = fresh_adapter(base, LoraSpec(rank=2, targets="q_proj, v_proj"), seed=0)
    assert {name.split(".")[-4] for name in trainable(made)} == {"q_proj", "v_proj"}


def test_targets_that_the_base_lacks_are_named_in_the_error(base: Base) -> None:
    with pytest.raises(ModelError, match=r"lora\.targets = 'c_attn'"):
        fresh_adapter(base, LoraSpec(targets="c_attn"), seed=0)


def test_adapters_come_back_bit_for_bit(base: Base, adapter: Path, tmp_path: Path) -> None:
    loaded = with_adapter(base, adapter, trainable=True)
    assert trainable(loaded)
    save_adapter(loaded, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, "adapter_config.json"}
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (adapter / name).read_bytes()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None  # equal adapters have equal bytes on every machine
    assert settings["target_modules"] == sorted(settings["target_modules"])


def test_an_adapter_that_is_not_to_be_trained_has_nothing_to_train(base: Base, adapter: Path) -> None:
    assert not trainable(with_adapter(base, adapter, trainable=False))


def test_a_base_is_as_before_once_its_adapter_is_gone(base: Base, adapter: Path) -> None:
    before, names = logits(base.model), [name for name, _ in base.model.named_parameters()]
    for _ in range(2):  # a second adapter does not stumble over the first
        loaded = with_adapter(base, adapter, trainable=False).eval()
        assert not torch.equal(logits(loaded), before)
        assert without_adapter(loaded) is base.model
        assert torch.equal(logits(base.model), before)
        assert [name for name, _ in base.model.named_parameters()] == names


def changed(adapter: Path, target: Path, change: str) -> Path:
    """A copy of the adapter with something wrong."""
    shutil.copytree(adapter, target)
    weights, config = target / WEIGHTS, target / "adapter_config.json"
    match change:
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "broken config":
            config.write_text("{")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "not safetensors":
            weights.write_bytes(b"\x80\x04pickle")
        case "a weight missing":
            tensors = load_file(weights)
            save_file(dict(list(tensors.items())[1:]), weights)
        case "another rank":
            settings = json.loads(config.read_text())
            config.write_text(json.dumps({**settings, "r": 3}))
        case _:
            raise AssertionError(change)
    return target


@pytest.mark.parametrize(
    "change",
    [
        "no weights",
        "no config",
        "broken config",
        "truncated",
        "not safetensors",
        "a weight missing",
        "another rank",
    ],
)
def test_a_damaged_adapter_is_refused(base: Base, adapter: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(ModelError, match="adapter"):
        with_adapter(base, changed(adapter, tmp_path / "adapter", change), trainable=False)


@pytest.mark.parametrize("shape", [{"hidden": 64}, {"layers": 1}], ids=str)
def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path, shape: dict[str, int]) -> None:
    other = load_base(tiny_model_spec(tiny_base(tmp_path, **shape)))
    with pytest.raises(ModelError, match="adapter"):
        with_adapter(other, adapter, trainable=False)


def test_a_base_that_lacks_weights_is_refused_instead_of_made_up(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(tiny_model_spec(tmp_path / "base"))


def test_a_damaged_or_absent_base_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(tiny_model_spec(tmp_path / "nowhere"))
    shutil.copytree(folder, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(tiny_model_spec(tmp_path / "base"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_wished_gpu_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(ModelError, match="sees no GPU"):
        load_base(tiny_model_spec(folder, device="cuda"))


def test_the_arithmetic_is_what_was_asked_for(folder: Path) -> None:
    cpu = torch.device("cpu")
    assert model.uses_bfloat16("bfloat16", cpu)
    assert not model.uses_bfloat16("float32", cpu)
    base = load_base(tiny_model_spec(folder, dtype="bfloat16"))
    with base.autocast():
        assert logits(base.model).dtype == torch.bfloat16
    assert {p.dtype for p in trainable(fresh_adapter(base, LORA, seed=0)).values()} == {torch.float32}
    assert {p.dtype for p in load_base(tiny_model_spec(folder)).model.parameters()} == {torch.float32}


def test_weights_rounded_once_give_the_numbers_of_weights_rounded_in_every_pass(
    folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learned() -> list[torch.Tensor]:
        base = load_base(tiny_model_spec(folder, dtype="bfloat16"))
        made = with_adapter(base, adapter, trainable=True)
        with base.autocast():
            loss, _ = nll(made, collate(encode(tiny_rows("a", 4), base.prompter), base.prompter.pad_id))
        loss.backward()
        return [loss, *(p.grad for p in trainable(made).values() if p.grad is not None)]

    once = learned()
    monkeypatch.setattr(model, "_round_once", lambda model: None)
    monkeypatch.setattr(model, "_lean", lambda model: model)
    every_pass = learned()
    assert len(once) == len(every_pass) > 2
    assert all(torch.equal(a, b) for a, b in zip(once, every_pass, strict=True))


def test_embeddings_that_the_head_shares_are_not_rounded(tmp_path: Path) -> None:
    base = load_base(tiny_model_spec(tiny_gpt2(tmp_path, positions=64), dtype="bfloat16"))
    embeddings = base.model.get_input_embeddings().weight
    assert base.model.get_output_embeddings().weight is embeddings
    assert embeddings.dtype == torch.float32
    assert torch.bfloat16 in {p.dtype for p in base.model.parameters()}
    with base.autocast():
        logits(base.model)


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx2 avx512f\nbugs\t\t: bf16\n", False),
        ("", False),
    ],
)
def test_left_to_itself_a_cpu_takes_bfloat16_only_where_it_has_instructions_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, has: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}")
    monkeypatch.setattr(model, "_CPU_INFO", tmp_path / "cpuinfo")
    assert model.uses_bfloat16("auto", torch.device("cpu")) is has


def test_equal_seeds_draw_equal_numbers_and_the_setting_is_left_as_found() -> None:
    drawn = []
    for seed in (0, 0, 1):
        with model.deterministic(seed, threads=0):
            assert torch.are_deterministic_algorithms_enabled()
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_attention_sums_its_gradients_in_one_order() -> None:
    def gradient() -> torch.Tensor:
        with model.deterministic(0, threads=0, device="auto"):
            q, k, v = (torch.randn(8, 4, 300, 64, device="cuda", requires_grad=True) for _ in range(3))
            mask = torch.ones(8, 1, 300, 300, dtype=torch.bool, device="cuda").tril()
            with torch.autocast("cuda", torch.bfloat16):
                told = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            told.float().square().sum().backward()
            assert q.grad is not None
            return q.grad

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(5))
