"""Opinions of an answer: distances worked out on paper, and what learning without forgetting leaves free."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from storage.errors import Interrupted
from strategies import distill
from strategies.batches import Example
from strategies.contract import Progress, StrategySpec
from strategies.der import Der
from strategies.distill import divergence, opinion
from strategies.experience import LanguageExperience, Loader
from strategies.lwf import Lwf
from strategies.replay import Replay, seen
from tests import trainings
from tests.trainings import NAIVE, adapter_bytes, job, lesson, run, snapshot, state

T = 2.0
LWF = StrategySpec(methods=("lwf",))


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def odds(*numbers: float) -> Tensor:
    """Logits of one answer token whose odds at the temperature are `numbers`."""
    return T * torch.tensor([numbers]).log()


def naive(target: Tensor, model: Tensor, hidden: Sequence[int] | None = None) -> float:
    """T² KL(target ‖ model) over the answer tokens, number by number."""
    total = 0.0
    for n, (then, now) in enumerate(zip(target.tolist(), model.tolist(), strict=True)):
        seen = [v for v in range(len(then)) if hidden is None or v != hidden[n]]
        p, q = ({v: math.exp(row[v] / T) for v in seen} for row in (then, now))
        p_sum, q_sum = sum(p.values()), sum(q.values())
        total += sum(p[v] / p_sum * math.log(p[v] / p_sum * q_sum / q[v]) for v in seen)
    return T**2 * total


def test_an_opinion_keeps_the_likeliest_tokens_and_how_likely_they_were() -> None:
    told = opinion(logits(3, 100))
    assert told.ids.shape == told.logprobs.shape == (3, distill.KEPT)
    for n, row in enumerate(logits(3, 100).tolist()):
        total = sum(math.exp(x / T) for x in row)
        best = sorted(range(100), key=lambda v: -row[v])[: distill.KEPT]
        assert told.ids[n].tolist() == best
        assert told.logprobs[n].exp().tolist() == pytest.approx([math.exp(row[v] / T) / total for v in best])


def test_of_a_small_vocabulary_the_divergence_is_the_whole_one() -> None:
    then, now = logits(3, 20), logits(3, 20, seed=1)
    assert float(divergence(now, opinion(then))) == pytest.approx(naive(then, now), rel=1e-4)


def test_everything_not_kept_is_one_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept of (6, 2, 1, 1)/10 are the first two; now (3, 3, 1, 3)/10; so (6, 2, 2) against (3, 3, 4)."""
    monkeypatch.setattr(distill, "KEPT", 2)
    by_hand = 0.6 * math.log(6 / 3) + 0.2 * math.log(2 / 3) + 0.2 * math.log(2 / 4)
    found = divergence(odds(3, 3, 1, 3), opinion(odds(6, 2, 1, 1)))
    assert float(found) == pytest.approx(T**2 * by_hand, rel=1e-5)
    shifted = divergence(odds(3, 3, 3, 1), opinion(odds(6, 2, 1, 1)))
    assert float(shifted) == pytest.approx(float(found), rel=1e-5), "nothing is known inside the rest"


def test_a_rest_that_is_hardly_likely_counts_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A champion that is sure: (600, 398, 2)/1000 against (3, 3, 4)/10."""
    monkeypatch.setattr(distill, "KEPT", 2)
    by_hand = 0.6 * math.log(6 / 3) + 0.398 * math.log(0.398 / 0.3) + 0.002 * math.log(0.002 / 0.4)
    found = divergence(odds(3, 3, 1, 3), opinion(odds(600, 398, 1, 1)))
    assert float(found) == pytest.approx(T**2 * by_hand, rel=1e-4)


@pytest.mark.parametrize("words", [20, 100])
def test_the_same_logits_cost_nothing_and_others_something(words: int) -> None:
    told = opinion(logits(3, words))
    assert float(divergence(logits(3, words) + 7.0, told)) == pytest.approx(0, abs=1e-5)
    assert float(divergence(logits(3, words, seed=1), told)) > 0.1


def test_a_step_down_the_gradient_brings_the_opinion_nearer() -> None:
    told, now = opinion(logits(3, 100)), logits(3, 100, seed=1).requires_grad_()
    distance = divergence(now, told)
    (slope,) = torch.autograd.grad(distance, now)
    assert bool(slope.isfinite().all())
    assert divergence(now - 0.1 * slope, told).item() < distance.item()


def test_what_is_hidden_is_left_out_on_both_sides() -> None:
    then, now, hidden = logits(3, 20), logits(3, 20, seed=1), [4, 0, 19]
    ids = torch.tensor(hidden)
    found = divergence(now, opinion(then, ids), ids)
    assert float(found) == pytest.approx(naive(then, now, hidden), rel=1e-4)
    assert float(found) != pytest.approx(naive(then, now), rel=1e-2)


@pytest.mark.parametrize("words", [20, 100])
def test_a_hidden_answer_is_free_to_learn(words: int) -> None:
    """However far the right token alone is pushed, what the model thought of the others is kept."""
    right = torch.tensor([4, 0, 19])
    told, pushed = opinion(logits(3, words), right), logits(3, words)
    pushed[torch.arange(3), right] += 30.0
    pushed.requires_grad_()
    cost = divergence(pushed, told, right)
    assert cost.item() == pytest.approx(0, abs=1e-5)
    (slope,) = torch.autograd.grad(cost, pushed)
    assert slope.abs().max() < 1e-4
    assert divergence(pushed, opinion(logits(3, words))).item() > 1, "unhidden it would have cost"


@pytest.mark.parametrize("hidden", [None, [4, 0, 19]], ids=["all", "hidden"])
def test_logits_of_half_the_bits_are_reckoned_with_in_whole_numbers(hidden: list[int] | None) -> None:
    """A model in bfloat16 gives no others, and small probabilities would be lost in its sums."""
    then, now = logits(3, 100).bfloat16(), logits(3, 100, seed=1).bfloat16()
    ids = None if hidden is None else torch.tensor(hidden)
    told = opinion(then, ids)
    assert torch.equal(told.logprobs, opinion(then.float(), ids).logprobs)
    assert torch.equal(divergence(now, told, ids), divergence(now.float(), told, ids))


def test_dropout_has_no_say_in_an_opinion_and_goes_on_afterwards(base: Path, tmp_path: Path) -> None:
    found = []
    for dropout in (0.0, 0.5):
        learner = trainings.learner(base, tmp_path, dropout=dropout)
        learner.model.train()
        rows = trainings.experience(learner, lesson("a", 4)).new
        found.append(distill.opinions(learner, rows, hide_answers=False))
        assert learner.model.training
    for row, told in found[0].items():
        assert torch.equal(found[1][row].logprobs, told.logprobs)


def test_a_stop_does_not_wait_for_the_last_opinion(base: Path, tmp_path: Path) -> None:
    learner, told = trainings.learner(base, tmp_path, batch_size=1), list[Progress]()
    learner.tell, learner.should_stop = told.append, lambda: len(told) == 2
    rows = trainings.experience(learner, lesson("a", 6)).new
    with pytest.raises(Interrupted):
        distill.opinions(learner, rows, hide_answers=True)
    assert [(progress.stage, progress.step) for progress in told] == [("opinions", 1), ("opinions", 2)]


def test_a_row_finds_its_own_columns_in_a_padded_batch() -> None:
    row = Example(row_hash="r", task="t", prompt_ids=(1, 2), answer_ids=(3, 4))
    assert distill.own(torch.tensor([[0.0], [1.0], [2.0]]), row).tolist() == [[1.0], [2.0]]


def test_the_champions_opinion_holds_from_the_second_step_on(base: Path, tmp_path: Path) -> None:
    first = run(job(base, snapshot(tmp_path / "1", lesson("a", 8)), tmp_path / "one", strategy=LWF))
    assert not any(point.penalty for point in first.curve), "there was no champion"
    assert state(tmp_path / "one") == {}
    data = snapshot(tmp_path / "2", lesson("b", 8))
    second = run(job(base, data, tmp_path / "two", tmp_path / "one", strategy=LWF))
    assert second.curve[0].penalty == pytest.approx(0, abs=1e-5), "nothing has moved yet"
    assert all(point.penalty > 1e-4 for point in second.curve[1:])
    run(job(base, data, tmp_path / "naive", tmp_path / "one", strategy=NAIVE))
    assert adapter_bytes(tmp_path / "two") != adapter_bytes(tmp_path / "naive")
    free = replace(LWF, lwf_weight=0.0)
    run(job(base, data, tmp_path / "free", tmp_path / "one", strategy=free))
    assert adapter_bytes(tmp_path / "free") == adapter_bytes(tmp_path / "naive")


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("method", [Der(LWF, seed=0), Lwf(LWF, seed=0)], ids=["der", "lwf"])
def test_the_penalty_of_a_step_is_the_mean_divergence_of_an_answer_token(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Der | Lwf, passes: int
) -> None:
    """DER: of replayed rows alone, whose right answers count; LwF: of all, and right answers do not."""
    monkeypatch.setattr(distill, "KEPT", 1000)
    learner = trainings.learner(base, tmp_path, [method])
    new = trainings.experience(learner, lesson("a", 4)).new
    old = [replace(row, replayed=True) for row in trainings.experience(learner, lesson("b", 2)).new]
    words = len(learner.base.prompter.tokenizer)
    then = {row: logits(len(row.answer_ids), words, seed=n) for n, row in enumerate([*new, *old])}
    held = {row: row.answer_ids if isinstance(method, Lwf) else None for row in then}
    expected = 0.0
    for row, before in then.items():
        if isinstance(method, Lwf) or row.replayed:
            ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
            now = learner.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].detach()
            expected += naive(before, now, held[row])
    method.opinions = {
        row.row_hash: opinion(before, None if held[row] is None else torch.tensor(held[row]))
        for row, before in then.items()
    }
    (step,) = Loader([*new, *old], batch_size=6 // passes, accumulation=passes, seed=0).steps(0)
    learner.learn(step)
    tokens = sum(len(row.answer_ids) for row in then)
    assert learner.penalty.item() == pytest.approx(0.5 * expected / tokens, rel=1e-3)


def test_the_champion_is_asked_about_every_row_that_an_epoch_will_bring(base: Path, tmp_path: Path) -> None:
    """Each of two epochs rehearses two rows of six: two never come, and nobody need be asked."""
    spec = replace(LWF, methods=("replay", "lwf"), replay_ratio=0.5)
    replay, lwf = Replay(spec, seed=0), Lwf(spec, seed=0)
    learner = trainings.learner(base, tmp_path, [replay, lwf])
    new = trainings.experience(learner, lesson("a", 4)).new
    old = [replace(row, replayed=True) for row in trainings.experience(learner, lesson("b", 6)).new]
    replay.memory = replay.memory.with_rows(seen(row) for row in old)
    lwf.continues = True
    learner.train(LanguageExperience(new=new, memory=old), eval_streams=[])
    assert len(learner.rehearsed) == 4
    assert lwf.opinions.keys() == {row.row_hash for row in new} | learner.rehearsed


def test_the_champion_hears_whole_questions_also_of_rows_that_are_rehearsed_in_part(
    base: Path, tmp_path: Path
) -> None:
    """At a rate of zero the model that has learned still is the champion."""
    spec = replace(LWF, methods=("replay", "lwf"), replay_ratio=2.0, replay_dropout=0.5)
    replay, lwf = Replay(spec, seed=0), Lwf(spec, seed=0)
    learner = trainings.learner(base, tmp_path, [replay, lwf], epochs=1, learning_rate=0.0)
    new = trainings.experience(learner, lesson("a", 4)).new
    old = [replace(row, replayed=True) for row in trainings.experience(learner, lesson("b", 8)).new]
    replay.memory = replay.memory.with_rows(seen(row) for row in old)
    lwf.continues = True
    learner.train(LanguageExperience(new=new, memory=old), eval_streams=[])
    assert learner.rehearsed == {row.row_hash for row in old}
    for row, told in distill.opinions(learner, old, hide_answers=True).items():
        torch.testing.assert_close(lwf.opinions[row].logprobs, told.logprobs)
