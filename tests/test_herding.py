"""Herding: the rows that stand for the others, found while training, are the ones that stay."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from strategies import herding, replay_memory
from strategies.batches import Example, answer_logits, collate
from strategies.contract import StrategySpec, result_files
from strategies.herding import Features, herd, ranks
from strategies.replay_memory import Memory, Room, Seen
from strategies.replay_policies import after
from tests import trainings
from tests.trainings import ANSWERS, job, lesson, run, snapshot

HERDING = StrategySpec(methods=("replay",), replay_policy="herding", replay_size=8)


def points(count: int, seed: int) -> Tensor:
    return normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=1)


def example(name: str, answer: int = 1, task: str = "t") -> Example:
    return Example(row_hash=name, task=task, prompt_ids=(5,), answer_ids=(answer,))


@given(st.integers(1, 12), st.integers(0, 1000))
def test_each_next_row_is_the_one_of_icarls_equation_4(count: int, seed: int) -> None:
    given = points(count, seed).double()
    order = herd(given, count)
    assert sorted(order) == list(range(count))
    for k in range(count):
        chosen = given[order[:k]].sum(0)
        far = {n: (given.mean(0) - (chosen + given[n]) / (k + 1)).norm().item() for n in order[k:]}
        assert far[order[k]] <= min(far.values()) + 1e-9


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 1000))
def test_the_first_ones_do_not_depend_on_how_many_are_asked_for(count: int, most: int, seed: int) -> None:
    given = points(count, seed)
    assert herd(given, most) == herd(given, count)[:most]


def test_rows_are_ranked_within_their_task_and_answer() -> None:
    far, near = torch.tensor([1.0, 0.0]), normalize(torch.tensor([1.0, 1.0]), dim=0)
    features = {"a": far, "b": near, "c": torch.tensor([0.0, 1.0]), "d": far, "e": far}
    rows = [example("a"), example("b"), example("c"), example("d", answer=2), example("e", task="u")]
    found = ranks(features, rows, most=2)
    assert found["b"] == 0
    assert (found["d"], found["e"]) == (0, 0)
    assert sorted(found[row] for row in "abc") == [0, 1, 2], "beyond the first two nobody is ranked"
    assert ranks(features, rows[::-1], most=2) == found


def test_features_are_the_last_hidden_states_where_the_answers_begin(base: Path, tmp_path: Path) -> None:
    learner = trainings.learner(base, tmp_path, [])
    new = trainings.experience(learner, lesson("a", 5)).new
    watched = Features(learner.model)
    with torch.no_grad():
        answer_logits(learner.model, collate(new, learner.base.prompter.pad_id))
        watched.note(new)
        watched.close()
        for row in new:
            alone = learner.model(
                input_ids=torch.tensor([[*row.prompt_ids, *row.answer_ids]]), output_hidden_states=True
            )
            expected = normalize(alone.hidden_states[-1][0, len(row.prompt_ids) - 1], dim=0)
            torch.testing.assert_close(watched.found[row.row_hash].float(), expected, atol=1e-3, rtol=1e-2)
    before = dict(watched.found)
    answer_logits(learner.model, collate(new[:1], learner.base.prompter.pad_id))
    assert watched.found == before


def test_a_memory_that_must_shrink_keeps_the_most_typical_rows() -> None:
    rows = [Seen(hash=f"{answer}{n}", task="t", answer=answer) for answer in "xy" for n in range(5)]
    places = {row.hash: 4 - int(row.hash[1]) for row in rows}  # x4 and y4 stand for the others best
    memory = after(Memory(seed=0), rows, Room(rows=4), "herding", places)
    assert set(memory.hashes) == {"x4", "x3", "y4", "y3"}
    assert set(after(memory, [], Room(rows=2), "herding").hashes) == {"x4", "y4"}
    later = after(memory, [Seen(hash="z0", task="u")], Room(rows=3), "herding", {"z0": 0})
    assert set(later.hashes) == {"x4", "y4", "z0"}


@pytest.mark.parametrize("before", ["herding", "balanced"])
@pytest.mark.parametrize("now", ["herding", "balanced"])
def test_experiences_under_two_policies_share_the_room(before: str, now: str) -> None:
    """A rank says how typical a row is; nobody's rank says nothing."""
    memory = Memory(seed=0)
    for policy, name in ((before, "old"), (now, "new")):
        rows = [Seen(hash=f"{name}{n}", task="t", answer="x") for n in range(100)]
        ranks = {row.hash: n for n, row in enumerate(rows)} if policy == "herding" else {}
        memory = after(memory, rows, Room(rows=50), policy, ranks)
    old = sum(row.startswith("old") for row in memory.hashes)
    assert 10 <= old <= 40, "neither pushes the other out"


def test_a_training_keeps_the_typical_rows_of_each_answer(base: Path, tmp_path: Path) -> None:
    seen: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(herding, "ranks", lambda *given: seen.update(ranks(*given)) or seen)
        run(job(base, snapshot(tmp_path / "1", lesson("a", 24)), tmp_path / "one", strategy=HERDING))
    kept = replay_memory.load(result_files(tmp_path / "one")["state"])
    assert kept is not None
    assert len(seen) == 24
    assert set(kept.hashes) == {row for row, place in seen.items() if place < 2}
    assert len(kept.hashes) == 2 * len(ANSWERS)
    assert all(trace.rank == seen[row] for row, trace in kept.tasks["a"].items())
