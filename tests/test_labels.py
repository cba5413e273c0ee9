"""Decoding inside a closed set of labels: always a label, always the one a patient walk would find."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.contract import Metric, Task, TaskKind
from strategies.evaluation import answer
from strategies.labels import OnlyLabels, Trie
from strategies.model import Base, load_base
from tests.toys import tiny_base, tiny_model_spec

QUESTIONS = [(f"Question {n}" + "?" * (n % 4), "") for n in range(7)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    """Several random models, so that many branches are taken."""
    return [load_base(tiny_model_spec(tiny_base(tmp_path_factory.mktemp("tiny"), seed=n))) for n in range(3)]


def task(*labels: str) -> Task:
    return Task(name="t", kind=TaskKind.LABELS, metric=Metric.ACCURACY, labels=labels)


def decode(base: Base, labels: Sequence[str], batch_size: int = 4) -> list[str]:
    return answer(base.model, base, QUESTIONS, task(*labels), batch_size=batch_size, max_new_tokens=1)


@torch.no_grad()
def walk(base: Base, question: str, labels: Sequence[str]) -> str:
    """Step by step, one row, no padding, no cache: the best token that continues some label."""
    spelt = {tuple(base.prompter.answer_ids(label)): label for label in labels}
    ids, told = base.prompter.prompt_ids(question), []
    while tuple(told) not in spelt:
        logits = base.model(input_ids=torch.tensor([[*ids, *told]])).logits[0, -1]
        here = len(told)
        told.append(
            max({s[here] for s in spelt if list(s[:here]) == told}, key=lambda token: logits[token].item())
        )
    return spelt[tuple(told)]


@contextmanager
def counted_passes(base: Base) -> Iterator[list[int]]:
    passes: list[int] = []
    hook = base.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "labels",
    [
        ("red", "green", "blue"),
        ("no", "not", "nots", "nothing", "n"),  # labels that begin other labels
        ("only",),
        ("", "something"),
        ("<|im_end|>", "<|im_end|><|im_end|>", "<|endoftext|>"),
        ("ja", "já", "日本", "日"),
    ],
    ids=lambda labels: labels[0] or "empty",
)
def test_the_answer_is_the_label_that_a_step_by_step_walk_finds(
    bases: list[Base], labels: tuple[str, ...]
) -> None:
    for base in bases:
        assert decode(base, labels) == [walk(base, question, labels) for question, _ in QUESTIONS]


def test_many_random_labels_are_decoded_as_walked(bases: list[Base]) -> None:
    rng = random.Random(0)
    labels = sorted({"".join(rng.choices("ab", k=rng.randint(1, 7))) for _ in range(60)})
    told = {text for base in bases for text in decode(base, labels)}
    assert told <= set(labels)
    assert len(told) > 1
    assert decode(bases[0], labels) == [walk(bases[0], question, labels) for question, _ in QUESTIONS]


def test_the_answer_does_not_depend_on_the_batch(bases: list[Base]) -> None:
    labels = ("no", "not", "nothing at all")
    assert decode(bases[0], labels, 1) == decode(bases[0], labels, 7)


def test_150_labels_cost_as_many_passes_as_three(bases: list[Base]) -> None:
    passes = []
    for count in (3, 150):
        with counted_passes(bases[0]) as counted:
            decode(bases[0], [f"{n:03}" for n in range(count)], batch_size=len(QUESTIONS))
        passes.append(len(counted))
    assert passes == [4, 4]  # three digits and the end of the turn


def test_labels_longer_than_free_answers_may_be_are_decoded_to_their_end(bases: list[Base]) -> None:
    long = "x" * 80
    assert decode(bases[0], (long,)) == [long] * len(QUESTIONS)


@given(st.sets(st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1))
def test_a_trie_allows_what_continues_some_label_and_nothing_else(labels: set[tuple[int, ...]]) -> None:
    trie = Trie(list(labels))
    for label in labels:
        for length in range(len(label) + 1):
            prefix = label[:length]
            following = {
                other[length] for other in labels if other[:length] == prefix and len(other) > length
            }
            assert trie.allowed(prefix) == sorted(following)
    assert trie.allowed((9,)) == []


def test_rows_that_have_finished_may_only_pad() -> None:
    only = OnlyLabels(Trie([(1, 2), (1, 1, 2)]), start=1, pad_id=3)
    scores = only(torch.tensor([[7, 1, 2], [7, 1, 1], [7, 1, 3]]), torch.full((3, 4), 0.5))
    assert scores.argmax(1).tolist() == [3, 2, 3]
    assert scores.isfinite().sum(1).tolist() == [1, 1, 1]
