"""Dark experience replay: whose opinions are kept, that they survive a process, and that they hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storage.errors import IntegrityError
from strategies import der
from strategies.contract import StrategySpec, TrainReport, result_files
from strategies.der import Der
from strategies.distill import Opinion, opinion
from strategies.experience import LanguageExperience
from strategies.replay import Replay
from strategies.replay_memory import memory_hashes
from tests import trainings
from tests.trainings import adapter_bytes, job, lesson, run, snapshot

DER = StrategySpec(methods=("replay", "der"), replay_ratio=1.0, replay_size=10)


def told(*answer_tokens: int) -> dict[str, Opinion]:
    """Opinions of some rows."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"row {n}": opinion(torch.randn(k, 100, generator=generator)) for n, k in enumerate(answer_tokens)
    }


def same(one: dict[str, Opinion], other: dict[str, Opinion]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[row].ids, other[row].ids) and torch.equal(one[row].logprobs, other[row].logprobs)
        for row in one
    )


def test_opinions_survive_their_file(tmp_path: Path) -> None:
    opinions = dict(reversed(told(3, 1, 2).items()))
    der.save(opinions, tmp_path / "der.safetensors")
    assert same(der.load(tmp_path / "der.safetensors"), opinions)


@pytest.mark.parametrize("damage", ["truncated", "nonsense", "of another length", "of another kind"])
def test_damaged_opinions_are_an_integrity_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "der.safetensors"
    der.save(told(3, 1), path)
    data = path.read_bytes()
    damaged = {
        "truncated": data[:-9],
        "nonsense": b"opinions",
        "of another length": data.replace(b", 3]", b", 4]"),
        "of another kind": data.replace(b"logprobs", b"logits!!"),
    }[damage]
    assert damaged != data
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="daemon doctor"):
        der.load(path)


def test_opinions_of_another_format_are_refused_and_those_without_a_number_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opinions = tmp_path / "der.safetensors", told(3, 1)
    lengths = [[row, len(each.ids)] for row, each in sorted(opinions.items())]
    tensors = {
        name: torch.cat([getattr(opinions[row], name) for row, _ in lengths]) for name in ("ids", "logprobs")
    }
    der.save_file(tensors, path, metadata={"rows": json.dumps(lengths)})
    assert same(der.load(path), opinions)
    with monkeypatch.context() as later:
        later.setattr(der, "FORMAT", 9)
        der.save(opinions, path)
    with pytest.raises(IntegrityError, match="format 9, known is 1"):
        der.load(path)


def test_opinions_whose_parts_do_not_fit_together_are_an_integrity_error(tmp_path: Path) -> None:
    narrow = {row: replace(each, logprobs=each.logprobs[:, 1:]) for row, each in told(3, 1).items()}
    der.save(narrow, tmp_path / "der.safetensors")
    with pytest.raises(IntegrityError, match="do not fit together"):
        der.load(tmp_path / "der.safetensors")


def test_an_opinion_is_that_of_the_trained_model_right_answers_and_all(base: Path, tmp_path: Path) -> None:
    """Also of a row that is learned once more: what was thought of it before is no opinion to hold on to."""
    method = Der(DER, seed=0)
    learner = trainings.learner(base, tmp_path, [Replay(DER, seed=0), method])
    new = trainings.experience(learner, lesson("a", 4)).new
    nothing = torch.zeros(len(new[0].answer_ids), len(learner.base.prompter.tokenizer))
    method.opinions = {new[0].row_hash: opinion(nothing)}
    learner.train(LanguageExperience(new=new), eval_streams=[])
    learner.model.eval()
    assert method.opinions.keys() == {row.row_hash for row in new}
    for row in new:
        logits = learner.model(input_ids=torch.tensor([[*row.prompt_ids, *row.answer_ids]])).logits[0]
        whole = opinion(logits[len(row.prompt_ids) - 1 : -1].detach())
        torch.testing.assert_close(
            method.opinions[row.row_hash].logprobs, whole.logprobs, atol=1e-4, rtol=1e-4
        )


def opinions(out: Path) -> dict[str, Opinion]:
    return der.load(result_files(out)["state"] / "der.safetensors")


def test_the_opinions_are_those_of_the_remembered_rows(base: Path, tmp_path: Path) -> None:
    """10 of 16, then 5 of these and 5 new ones; what leaves the memory leaves the opinions."""
    old, new = lesson("a", 16), lesson("b", 16)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=DER))
    first = opinions(tmp_path / "one")
    assert len(first) == 10
    assert first.keys() == set(memory_hashes(result_files(tmp_path / "one")["state"]))

    data = snapshot(tmp_path / "2", new, memory=[row for row in old if row.hash in first])
    run(job(base, data, tmp_path / "two", tmp_path / "one", strategy=DER))
    second = opinions(tmp_path / "two")
    assert len(second) == 10
    assert second.keys() == set(memory_hashes(result_files(tmp_path / "two")["state"]))
    stayed = second.keys() & first.keys()
    assert len(stayed) == 5
    assert same({row: first[row] for row in stayed}, {row: second[row] for row in stayed}), "the first stays"


def test_rows_that_were_remembered_before_der_began_are_held_to_nothing(base: Path, tmp_path: Path) -> None:
    old, new = lesson("a", 4), lesson("b", 4)
    replay = replace(DER, methods=("replay",))
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=replay))
    data = snapshot(tmp_path / "2", new, memory=old)
    report = run(job(base, data, tmp_path / "two", tmp_path / "one", strategy=DER))
    assert set(report.rehearsed) == {row.hash for row in old}
    assert not any(point.penalty for point in report.curve)
    assert opinions(tmp_path / "two").keys() == {row.hash for row in new}


def test_rehearsed_rows_are_held_to_what_was_thought_of_them(base: Path, tmp_path: Path) -> None:
    old, new = lesson("a", 8), lesson("b", 8)
    first = run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=DER))
    assert not any(point.penalty for point in first.curve)
    data = snapshot(tmp_path / "2", new, memory=old)

    def second(name: str, weight: float) -> TrainReport:
        strategy = replace(DER, der_weight=weight)
        return run(job(base, data, tmp_path / name, tmp_path / "one", strategy=strategy))

    held, free = second("held", 2.0), second("free", 0.0)
    assert [point.penalty > 0 for point in held.curve[1:]] == [point.replayed > 0 for point in held.curve[1:]]
    assert any(point.penalty > 0 for point in held.curve)
    assert not any(point.penalty for point in free.curve)
    assert adapter_bytes(tmp_path / "held") != adapter_bytes(tmp_path / "free")
    run(job(base, data, tmp_path / "replay", tmp_path / "one", strategy=replace(DER, methods=("replay",))))
    assert adapter_bytes(tmp_path / "replay") == adapter_bytes(tmp_path / "free")
