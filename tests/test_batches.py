"""Batches of ids: what is learned is the answer alone, and padding changes nothing."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import log_softmax
from transformers import GPT2Config, GPT2LMHeadModel

from storage.errors import TrainingError
from strategies import batches
from strategies.batches import (
    IGNORED,
    Example,
    answer_logits,
    collate,
    encode,
    forward_arguments,
    nll,
    plan,
    token_losses,
)
from strategies.contract import LoraSpec
from strategies.model import Base, fresh_adapter, load_base, trainable
from tests import trainings
from tests.toys import tiny_base, tiny_model_spec, tiny_rows

LENGTHS = st.lists(st.integers(1, 300), max_size=400)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(tiny_model_spec(tiny_base(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def examples(base: Base) -> list[Example]:
    return encode(tiny_rows("a", 6), base.prompter)


def example(prompt: list[int], answer: list[int], **changes: bool) -> Example:
    return Example(row_hash="h", task="t", prompt_ids=tuple(prompt), answer_ids=tuple(answer), **changes)


class WithoutExtras(Module):
    """A model whose forward pass knows neither position_ids nor logits_to_keep."""

    def __init__(self, model: Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )


def test_examples_keep_the_rows_order_and_what_they_are(base: Base) -> None:
    rows = tiny_rows("a", 3)
    made = encode(rows, base.prompter, replayed=True)
    assert [e.row_hash for e in made] == [row.hash for row in rows]
    assert {e.task for e in made} == {"a"}
    assert all(e.replayed for e in made)
    assert made[0].length == len(base.prompter.prompt_ids(rows[0].question)) + len(
        base.prompter.answer_ids(rows[0].answer)
    )


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_a_plan_takes_every_row_once_in_batches_no_larger_than_asked(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    batches = plan(lengths, size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in batches)
    assert batches == plan(lengths, size, seed, epoch)


def test_plans_differ_by_epoch_and_by_seed() -> None:
    lengths = [n % 7 for n in range(100)]
    plans = [plan(lengths, 4, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({str(one) for one in plans}) == 3


def test_rows_of_one_length_meet_other_rows_in_every_epoch() -> None:
    first, second = ({frozenset(batch) for batch in plan([7] * 100, 4, 0, epoch)} for epoch in (0, 1))
    assert len(first & second) < 3


def test_a_plan_puts_rows_of_like_length_together_and_does_not_go_by_length() -> None:
    lengths = [(n * 37) % 101 for n in range(256)]
    batches = plan(lengths, 8, seed=0, epoch=0)
    padding = sum(len(b) * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches)
    assert padding < 0.1 * sum(lengths)
    widths = [max(lengths[i] for i in batch) for batch in batches]
    assert widths not in (sorted(widths), sorted(widths, reverse=True))


def test_a_batch_is_padded_on_the_left_and_counts_positions_from_the_text() -> None:
    batch = collate([example([5, 6, 7], [8]), example([5], [9, 4], replayed=True)], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [0, 5, 9, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert batch.targets.tolist() == [[IGNORED, 8], [9, 4]]
    assert batch.answer_tokens == 3
    assert Counter(vars(batch.to(torch.device("cpu"))).keys()) == Counter(vars(batch).keys())


def test_a_row_that_fits_no_more_loses_its_questions_beginning_and_never_its_answer(base: Base) -> None:
    row = trainings.lesson("a", 1)[0]
    (whole,) = encode([row], base.prompter)
    tight = replace(base.prompter, max_tokens=whole.length - 3)
    (cut,) = encode([row], tight)
    before = len(base.prompter.pieces.before)
    assert cut.length == whole.length - 3
    assert cut.answer_ids == whole.answer_ids
    assert cut.prompt_ids == (*whole.prompt_ids[:before], *whole.prompt_ids[before + 3 :])
    none = replace(base.prompter, max_tokens=len(whole.answer_ids) + base.prompter.template_tokens - 2)
    with pytest.raises(TrainingError, match=r"no room in model\.max_tokens = \d+ any more"):
        encode([row], none)


def test_a_pad_id_inside_the_text_is_still_text() -> None:
    batch = collate([example([0, 0], [0]), example([0], [0])], pad_id=0)
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch.answer_tokens == 2


def test_the_loss_is_the_cross_entropy_of_the_answer_and_of_nothing_else(
    base: Base, examples: list[Example]
) -> None:
    with torch.no_grad():
        for one in examples:
            ids = [*one.prompt_ids, *one.answer_ids]
            chances = log_softmax(base.model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
            by_hand = -sum(chances[n - 1, ids[n]].item() for n in range(len(one.prompt_ids), len(ids)))
            loss, tokens = nll(base.model, collate([one], base.prompter.pad_id))
            assert tokens == len(one.answer_ids)
            assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_padding_changes_neither_losses_nor_logits(base: Base, examples: list[Example]) -> None:
    assert len({one.length for one in examples}) > 2
    with torch.no_grad():
        batch = collate(examples, base.prompter.pad_id)
        together, logits = token_losses(base.model, batch), answer_logits(base.model, batch)
        for row, one in enumerate(examples):
            single = collate([one], base.prompter.pad_id)
            width = len(one.answer_ids)
            torch.testing.assert_close(
                logits[row, -width:], answer_logits(base.model, single)[0], atol=1e-5, rtol=1e-4
            )
            torch.testing.assert_close(
                together[row, -width:], token_losses(base.model, single)[0], atol=1e-5, rtol=1e-4
            )
            assert together[row, :-width].count_nonzero() == 0


def test_padding_changes_nothing_where_positions_are_learned() -> None:
    """Relative ones, as Llama's, would not notice that the text begins later."""
    torch.manual_seed(0)
    size = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**size, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    short, long = example([5], [9, 4]), example([5, 6, 7, 8, 10, 11], [8])
    with torch.no_grad():
        alone, padded = (token_losses(model, collate(rows, pad_id=0)) for rows in ([short], [short, long]))
    torch.testing.assert_close(padded[0], alone[0])


def test_a_row_that_is_only_an_answer_does_not_reach_before_its_beginning(base: Base) -> None:
    with torch.no_grad():
        losses = token_losses(base.model, collate([example([7], [8, 9])], pad_id=0))
    assert losses.shape == (1, 2)
    assert losses.isfinite().all()


def test_logits_of_the_answers_alone_are_those_of_the_full_pass(base: Base, examples: list[Example]) -> None:
    full = WithoutExtras(base.model)
    assert {"logits_to_keep", "position_ids"} <= forward_arguments(base.model)
    assert forward_arguments(full) == {"input_ids", "attention_mask"}
    batch = collate(examples, base.prompter.pad_id)
    with torch.no_grad():
        torch.testing.assert_close(
            answer_logits(base.model, batch), answer_logits(full, batch), atol=1e-6, rtol=1e-5
        )


def test_short_rows_are_learned_with_plain_attention_and_the_same_result(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_base(tmp_path)
    plain = Mock(wraps=batches.sdpa_kernel)
    monkeypatch.setattr(batches, "sdpa_kernel", plain)

    def learned(short: int) -> list[Tensor]:
        monkeypatch.setattr(batches, "_SHORT", short)
        base = load_base(tiny_model_spec(folder, dtype="bfloat16"))
        model = fresh_adapter(base, LoraSpec(rank=4, alpha=8, init="orthogonal"), seed=0)
        with base.autocast():
            loss, _ = nll(model, collate(examples, base.prompter.pad_id))
        loss.backward()
        return [loss, *(p.grad for p in trainable(model).values() if p.grad is not None)]

    longest = max(one.length for one in examples)
    fused = learned(longest - 1)
    plain.assert_not_called()
    short = learned(longest)
    plain.assert_called()
    assert len(fused) == len(short) > 2
    for one, other in zip(short, fused, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()  # bfloat16 has 8 bits


def test_gradients_do_not_depend_on_how_rows_are_batched(tmp_path: Path) -> None:
    base = load_base(tiny_model_spec(tiny_base(tmp_path)))
    model = fresh_adapter(base, LoraSpec(rank=2, alpha=4), seed=0)
    examples = encode(tiny_rows("a", 4), base.prompter)
    parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)

    def gradient(batches: list[list[Example]]) -> torch.Tensor:
        model.zero_grad()
        for batch in batches:
            nll(model, collate(batch, base.prompter.pad_id))[0].backward()
        assert parameter.grad is not None
        return parameter.grad.clone()

    together, apart = gradient([examples]), gradient([[one] for one in examples])
    assert together.abs().max() > 0
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-4)


def test_an_adapter_does_not_hide_what_the_forward_pass_takes(tmp_path: Path) -> None:
    base = load_base(tiny_model_spec(tiny_base(tmp_path)))
    before = forward_arguments(base.model)
    assert forward_arguments(fresh_adapter(base, LoraSpec(rank=2, alpha=4), seed=0)) == before
