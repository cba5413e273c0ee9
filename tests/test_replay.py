"""The memory: who is remembered, who is rehearsed, and that no process boundary shows."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import IntegrityError
from strategies import replay_memory
from strategies.contract import StrategySpec, result_files
from strategies.replay_memory import FILE, POLICIES, Memory, memory_hashes, priority, share_out
from tests.toys import tiny_base
from tests.trainings import SPEC, adapter_bytes, job, lesson, run, snapshot

REPLAY = StrategySpec(methods=("replay",), replay_ratio=0.5, replay_size=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def rows(task: str, count: int) -> list[tuple[str, str]]:
    return [(f"{task}{n:04}", task) for n in range(count)]


def remember(
    *experiences: list[tuple[str, str]], size: int, policy: str = "balanced", seed: int = 0
) -> Memory:
    memory = Memory(seed=seed)
    for experience in experiences:
        memory = memory.updated(experience, size=size, policy=policy)
    return memory


def sizes(memory: Memory) -> dict[str, int]:
    return {task: len(found) for task, found in memory.tasks.items()}


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50)), st.integers(0, 200), st.integers(0, 9))
def test_room_is_shared_fairly(wants: dict[str, int], room: int, turn: int) -> None:
    given = share_out(room, wants, turn)
    assert sum(given.values()) == min(room, sum(wants.values()))
    assert all(0 <= given[name] <= want for name, want in wants.items())
    unsatisfied = [given[name] for name, want in wants.items() if given[name] < want]
    if unsatisfied:  # nobody has much more than one who wanted more
        assert max(given.values()) - min(unsatisfied) <= 1


def test_a_balanced_memory_gives_every_task_equal_room_and_unused_room_to_the_others() -> None:
    memory = remember(rows("a", 100), rows("b", 100), size=60)
    assert sizes(memory) == {"a": 30, "b": 30}
    memory = memory.updated(rows("c", 5), size=60, policy="balanced")
    assert sizes(memory) == {"a": 28, "b": 27, "c": 5}
    assert sizes(remember(rows("a", 3), size=60)) == {"a": 3}


def test_a_reservoir_is_a_uniform_sample_of_all_rows_ever_seen() -> None:
    stream = [row for task in "abcde" for row in rows(task, 400)]
    batches = [stream[start : start + 100] for start in range(0, len(stream), 100)]
    memory = remember(*batches, size=500, policy="reservoir")
    assert len(memory) == 500
    assert all(75 <= size <= 125 for size in sizes(memory).values())  # 100 each, give or take 2.8 sigma
    everything = sorted((row for row, _ in stream), key=lambda row: priority(0, row))
    assert set(memory.hashes) == set(everything[:500])


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_memory_does_not_depend_on_order_or_on_how_rows_were_grouped(policy: str) -> None:
    one = remember(rows("a", 40), rows("b", 50), rows("c", 7), size=30, policy=policy)
    assert remember(rows("c", 7), rows("b", 50), rows("a", 40), size=30, policy=policy) == one
    assert remember(rows("c", 7) + rows("b", 50) + rows("a", 40), size=30, policy=policy) == one
    assert remember(rows("a", 40), rows("b", 50), rows("c", 7), size=30, policy=policy, seed=1) != one


def test_a_row_that_is_seen_again_is_remembered_once() -> None:
    assert sizes(remember(rows("a", 10), rows("a", 10), size=60)) == {"a": 10}


def test_an_epoch_rehearses_all_tasks_equally_and_no_row_twice() -> None:
    memory = remember(rows("a", 40), rows("b", 40), rows("c", 4), size=100)
    drawn = memory.rehearse(30, seed=0, epoch=0)
    assert len(drawn) == len(set(drawn)) == 30
    assert Counter(row[0] for row in drawn) == {"a": 13, "b": 13, "c": 4}
    assert memory.rehearse(30, seed=0, epoch=0) == drawn
    assert memory.rehearse(30, seed=1, epoch=0) != drawn


def test_epochs_go_on_until_the_memory_is_exhausted_and_then_begin_again() -> None:
    memory = remember(rows("a", 20), rows("b", 20), size=40)
    epochs = [memory.rehearse(10, seed=0, epoch=epoch) for epoch in range(8)]
    assert Counter(row for epoch in epochs[:4] for row in epoch) == Counter(memory.hashes)
    assert Counter(row for epoch in epochs[4:] for row in epoch) == Counter(memory.hashes)
    assert epochs[4:] != epochs[:4]


def test_more_draws_than_rows_repeat_nothing_before_everything_came() -> None:
    memory = remember(rows("a", 5), rows("b", 2), size=40)
    times = Counter(memory.rehearse(17, seed=0, epoch=0))
    assert sum(times.values()) == 17
    assert set(times.values()) == {2, 3}


def test_few_draws_reach_every_task_in_turn() -> None:
    memory = remember(*(rows(task, 10) for task in "abcdef"), size=60)
    assert {row[0] for epoch in range(3) for row in memory.rehearse(2, seed=0, epoch=epoch)} == set("abcdef")


def test_a_memory_survives_its_file(tmp_path: Path) -> None:
    memory = remember(rows("a", 10), rows("ж", 10), size=12, seed=3)
    replay_memory.save(memory, tmp_path)
    assert replay_memory.load(tmp_path) == memory
    assert memory_hashes(tmp_path) == memory.hashes
    assert memory_hashes(tmp_path / "nowhere") == []


def test_the_first_seed_stays_the_memorys_seed(base: Path, tmp_path: Path) -> None:
    """Another training seed must not reshuffle who had been drawn before."""
    old, new = lesson("a", 30), lesson("b", 30)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=REPLAY))
    second = snapshot(tmp_path / "2", new, memory=old)
    run(job(base, second, tmp_path / "two", tmp_path / "one", strategy=REPLAY, train=replace(SPEC, seed=9)))
    expected = remember(*([(row.hash, row.task) for row in part] for part in (old, new)), size=12)
    assert replay_memory.load(result_files(tmp_path / "two")["state"]) == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9, "seed": 0, "tasks": {}}', '{"format": 1}'])
def test_a_damaged_memory_is_an_integrity_error(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(IntegrityError, match="daemon doctor"):
        memory_hashes(tmp_path)


def test_the_daemon_can_ask_without_torch() -> None:
    code = "import sys, strategies.replay_memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_second_cycle_rehearses_what_the_first_one_learned(base: Path, tmp_path: Path) -> None:
    old, new = lesson("a", 16), lesson("b", 16)
    first = run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=REPLAY))
    assert (first.replay_rows, first.memory_rows) == (0, 12)
    remembered = memory_hashes(result_files(tmp_path / "one")["state"])
    assert set(remembered) <= {row.hash for row in old}

    offered = snapshot(tmp_path / "2", new, memory=[row for row in old if row.hash in remembered])
    second = run(job(base, offered, tmp_path / "two", tmp_path / "one", strategy=REPLAY))
    assert (second.rows, second.replay_rows, second.memory_rows) == (16, 8, 12)
    assert second.steps == 2 * 24 / SPEC.batch_size
    assert sum(point.replayed for point in second.curve) / second.steps == pytest.approx(8 / 24)
    kept = replay_memory.load(result_files(tmp_path / "two")["state"])
    assert kept is not None
    assert sizes(kept) == {"a": 6, "b": 6}

    naive = run(job(base, offered, tmp_path / "naive", tmp_path / "one"))
    assert naive.replay_rows == 0
    assert adapter_bytes(tmp_path / "naive") != adapter_bytes(tmp_path / "two")


def test_a_memory_at_rest_takes_in_what_is_learned_meanwhile(base: Path, tmp_path: Path) -> None:
    old, new = lesson("a", 16), lesson("b", 16)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=REPLAY))
    second = snapshot(tmp_path / "2", new)
    resting = replace(REPLAY, methods=())
    report = run(job(base, second, tmp_path / "two", tmp_path / "one", strategy=resting))
    expected = remember(*([(row.hash, row.task) for row in part] for part in (old, new)), size=12)
    assert replay_memory.load(result_files(tmp_path / "two")["state"]) == expected
    assert (report.rehearsed, report.memory_rows) == ((), 12)
    run(job(base, second, tmp_path / "naive", strategy=resting))
    assert replay_memory.load(result_files(tmp_path / "naive")["state"]) is None


def test_the_report_names_the_remembered_rows_that_were_rehearsed(base: Path, tmp_path: Path) -> None:
    """Those of the epochs that were run: an early stop leaves rows on offer untouched."""
    old, new = lesson("a", 40), lesson("b", 8)
    watched = lesson("b", 4, split="validation", start=40)
    everything = replace(REPLAY, replay_size=40)
    first = run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=everything))
    assert first.rehearsed == ()
    data = snapshot(tmp_path / "2", new, watched, old)
    for patience, rate in ((0, 0.01), (1, 0.0)):  # nothing gets better at a rate of zero
        spec = replace(SPEC, epochs=5, patience=patience, learning_rate=rate)
        out = tmp_path / f"patience {patience}"
        report = run(job(base, data, out, tmp_path / "one", strategy=everything, train=spec))
        memory = remember([(row.hash, row.task) for row in old], size=40)
        drawn = {row for epoch in range(report.epochs) for row in memory.rehearse(4, seed=0, epoch=epoch)}
        assert report.rehearsed == tuple(sorted(drawn))
        assert len(drawn) == 4 * report.epochs
        assert report.stopped_early == bool(patience)


def test_rows_that_were_erased_are_forgotten_and_that_is_said(base: Path, tmp_path: Path) -> None:
    old = lesson("a", 10)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=REPLAY))
    offered = snapshot(tmp_path / "2", lesson("b", 4), memory=old[:7])
    report = run(job(base, offered, tmp_path / "two", tmp_path / "one", strategy=REPLAY))
    assert "3 remembered rows are no longer in the store and were forgotten" in report.notes
    assert report.memory_rows == 7 + 4
