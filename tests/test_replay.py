"""The memory: who is remembered, who is rehearsed, and that no process boundary shows."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import IntegrityError
from storage.parquet import SnapshotRow
from strategies import replay_memory
from strategies.batches import collate, encode, nll
from strategies.contract import StrategySpec, result_files
from strategies.experience import LanguageExperience, Loader
from strategies.method import Method
from strategies.model import load_base
from strategies.replay import Replay, row_losses, seen, thinned
from strategies.replay_memory import FILE, Memory, Room, Seen, Spacing, Trace, memory_hashes, priority
from strategies.replay_policies import (
    FORGOTTEN,
    LONGEST_INTERVAL,
    POLICIES,
    after,
    draw_due,
    draw_equally,
    draw_hardest,
    draw_uniformly,
    respaced,
    share_out,
)
from tests import trainings
from tests.toys import tiny_model_spec
from tests.trainings import SPEC, adapter_bytes, job, lesson, run, snapshot

REPLAY = StrategySpec(methods=("replay",), replay_ratio=0.5, replay_size=12)


def rows(task: str, count: int, answer: str = "") -> list[Seen]:
    return [Seen(hash=f"{task}{answer}{n:04}", task=task, answer=answer) for n in range(count)]


def remember(
    *experiences: list[Seen], size: int, share: float = 1.0, policy: str = "balanced", seed: int = 0
) -> Memory:
    memory = Memory(seed=seed)
    for experience in experiences:
        memory = after(memory, experience, Room(rows=size, share=share), policy)
    return memory


def taught(base: Path, *lessons: list[SnapshotRow], size: int) -> Memory:
    """The memory of trainings on the tiny base."""
    prompter = load_base(tiny_model_spec(base)).prompter
    return remember(*([seen(example) for example in encode(each, prompter)] for each in lessons), size=size)


def sizes(memory: Memory) -> dict[str, int]:
    return {task: len(found) for task, found in memory.tasks.items()}


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50)), st.integers(0, 200))
def test_room_is_shared_fairly(wants: dict[str, int], room: int) -> None:
    given = share_out(room, wants)
    assert sum(given.values()) == min(room, sum(wants.values()))
    assert all(0 <= given[name] <= want for name, want in wants.items())
    unsatisfied = [given[name] for name, want in wants.items() if given[name] < want]
    if unsatisfied:  # nobody has much more than one who wanted more
        assert max(given.values()) - min(unsatisfied) <= 1


def test_a_balanced_memory_gives_every_task_equal_room_and_unused_room_to_the_others() -> None:
    memory = remember(rows("a", 100), rows("b", 100), size=60)
    assert sizes(memory) == {"a": 30, "b": 30}
    memory = after(memory, rows("c", 5), Room(rows=60), "balanced")
    assert sizes(memory) == {"a": 28, "b": 27, "c": 5}
    assert sizes(remember(rows("a", 3), size=60)) == {"a": 3}


def test_a_reservoir_is_a_uniform_sample_of_all_rows_ever_seen() -> None:
    stream = [row for task in "abcde" for row in rows(task, 400)]
    batches = [stream[start : start + 100] for start in range(0, len(stream), 100)]
    memory = remember(*batches, size=500, policy="reservoir")
    assert len(memory) == 500
    assert all(75 <= size <= 125 for size in sizes(memory).values())  # 100 each, give or take 2.8 sigma
    everything = sorted((row.hash for row in stream), key=lambda row: priority(0, row))
    assert set(memory.hashes) == set(everything[:500])


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_memory_does_not_depend_on_order_or_on_how_rows_were_grouped(policy: str) -> None:
    one = remember(rows("a", 40), rows("b", 50), rows("c", 7), size=30, policy=policy)
    assert remember(rows("c", 7), rows("b", 50), rows("a", 40), size=30, policy=policy) == one
    assert remember(rows("c", 7) + rows("b", 50) + rows("a", 40), size=30, policy=policy) == one
    assert remember(rows("a", 40), rows("b", 50), rows("c", 7), size=30, policy=policy, seed=1) != one


def test_within_a_task_every_answer_has_equal_room() -> None:
    often, seldom = rows("a", 90, "yes"), rows("a", 10, "no")
    memory = remember(often + seldom, size=20)
    assert Counter(trace.answer for trace in memory.tasks["a"].values()) == {"yes": 10, "no": 10}
    memory = remember(often + seldom, size=30)
    assert Counter(trace.answer for trace in memory.tasks["a"].values()) == {"yes": 20, "no": 10}


def test_the_memory_is_at_most_a_share_of_all_rows_seen() -> None:
    memory = remember(rows("a", 100), size=1000, share=0.05)
    assert (len(memory), memory.seen) == (5, 100)
    memory = after(memory, rows("b", 300), Room(rows=1000, share=0.05), "balanced")
    assert (sizes(memory), memory.seen) == ({"a": 5, "b": 15}, 400)  # what was let go does not come back
    assert len(after(memory, rows("c", 300), Room(rows=12, share=0.05), "balanced")) == 12
    assert len(remember(rows("a", 30), size=1000, share=0.05)) == 1, "of one row and a half"


def test_a_reservoir_that_grows_with_a_share_has_some_rows_less_of_the_oldest() -> None:
    """What was let go does not come back: over 40 seeds 20 each would be uniform, give or take 0.6."""
    found: Counter[str] = Counter()
    for seed in range(40):
        memory = remember(
            *(rows(task, 200) for task in "abcd"), size=9999, share=0.1, policy="reservoir", seed=seed
        )
        assert len(memory) == 80
        found.update(sizes(memory))
    assert 16 < found["a"] / 40 < 20 < found["d"] / 40 < 24


def measured(memory: Memory, rise: dict[str, float]) -> Memory:
    """Learned at a loss of 1, and forgotten since by so much, task by task."""
    before = memory.measured(dict.fromkeys(memory.hashes, 1.0))
    return before.measured({row: 1.0 + rise[task] for task, found in memory.tasks.items() for row in found})


def test_hard_rows_are_those_that_were_forgotten_most_and_half_of_the_draw() -> None:
    memory = remember(rows("a", 20), rows("b", 20), size=40)
    memory = memory.measured(dict.fromkeys(memory.hashes, 1.0))
    worst = memory.hashes[3:9]
    memory = memory.measured({row: 2.0 + n for n, row in enumerate(worst)})
    drawn = draw_hardest(memory, 8, 0, 0)
    assert drawn[:4] == worst[:1:-1]
    assert drawn[4:] == draw_equally(memory, 4, 0, 0)
    unmeasured = remember(rows("a", 20), size=20)
    assert draw_hardest(unmeasured, 8, 0, 0) == draw_equally(unmeasured, 8, 0, 0)


def test_a_loss_when_learned_stays_and_the_latest_follows() -> None:
    (row,) = (memory := remember(rows("a", 1), size=9)).hashes
    for loss in (1.0, 0.5, 1.75):
        memory = memory.measured({row: loss})
    assert memory.tasks["a"][row] == Trace(learned=1.0, latest=1.75)
    assert memory.tasks["a"][row].rise == 0.75
    assert memory.measured({}).tasks == memory.tasks


def test_a_task_that_is_retained_rests_twice_as_long_and_a_forgotten_one_is_due() -> None:
    memory = remember(rows("a", 4), rows("b", 4), size=8)
    turns = []
    for _ in range(8):
        memory = respaced(measured(memory, {"a": 0.0, "b": 2 * FORGOTTEN}), memory.hashes)
        turns.append((memory.spacing["a"].interval, memory.spacing["a"].wait, memory.spacing["b"].interval))
    assert turns == [(1, 1, 1), (2, 2, 1), (2, 1, 1), (4, 4, 1), (4, 3, 1), (4, 2, 1), (4, 1, 1), (8, 8, 1)]
    for _ in range(60):
        memory = respaced(measured(memory, {"a": 0.0, "b": 0.0}), memory.hashes)
    assert memory.spacing["a"].interval == LONGEST_INTERVAL
    assert respaced(measured(memory, {"a": 1.0, "b": 0.0}), memory.hashes).spacing["a"] == Spacing()


def test_a_task_is_forgotten_by_the_mean_of_its_rows_and_not_by_one_of_them() -> None:
    memory = respaced(remember(rows("a", 4), size=4), ())
    memory = memory.measured(dict.fromkeys(memory.hashes, 1.0))
    one = memory.measured({memory.hashes[0]: 1.0 + 3 * FORGOTTEN})
    assert respaced(one, one.hashes[:1]).spacing["a"] == Spacing(interval=2, wait=2)


def test_a_task_that_was_due_and_not_drawn_stays_due() -> None:
    memory = respaced(remember(rows("a", 4), rows("b", 4), size=8), ())
    memory = respaced(measured(memory, {"a": 0.0, "b": 0.0}), memory.tasks["b"])
    assert memory.spacing == {"a": Spacing(), "b": Spacing(interval=2, wait=2)}


def test_only_tasks_that_are_due_are_rehearsed_and_cost_time() -> None:
    memory = remember(rows("a", 10), rows("b", 10), rows("c", 10), size=30)
    assert len(draw_due(memory, 12, 0, 0)) == 12
    resting = replace(memory, spacing={"a": Spacing(interval=4, wait=3)})
    assert Counter(row[0] for row in draw_due(resting, 12, 0, 0)) == {"b": 4, "c": 4}
    alone = {"a": Spacing(interval=4, wait=3), "b": Spacing(interval=4, wait=2)}
    assert [len(draw_due(replace(memory, spacing=alone), 1, 0, epoch)) for epoch in range(3)] == [1, 1, 1]
    everyone = dict.fromkeys("abc", Spacing(interval=2, wait=2))
    assert draw_due(replace(memory, spacing=everyone), 12, 0, 0) == []


def test_a_uniform_draw_takes_every_row_before_one_comes_again() -> None:
    memory = remember(rows("a", 30), rows("b", 10), size=40)
    epochs = [draw_uniformly(memory, 10, 0, epoch) for epoch in range(4)]
    assert Counter(row for epoch in epochs for row in epoch) == Counter(memory.hashes)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_other_epochs_and_other_experiences_rehearse_other_rows(policy: str) -> None:
    """A draw that began anew each time would never come to the rest. One row is the hardest every time."""
    memory = respaced(remember(rows("a", 20), rows("b", 20), size=40, policy=policy), ())
    memory = memory.measured(dict.fromkeys(memory.hashes, 1.0)).measured({"a0007": 1.5})
    draw = POLICIES[policy].draw
    epochs = [draw(memory, 10, "0/40", epoch) for epoch in range(4)]
    assert len({row for epoch in epochs for row in epoch}) >= 36
    assert set(draw(memory, 10, "0/80", 0)) != set(epochs[0])


def test_when_there_is_no_room_for_every_answer_the_seed_decides() -> None:
    unique = [Seen(hash=f"r{n}", task="a", answer=f"answer {n}") for n in range(60)]
    kept = [set(remember(unique, size=20, seed=seed).hashes) for seed in (0, 0, 1)]
    assert kept[0] == kept[1]
    assert len(kept[0] & kept[2]) < 15  # 6.7 when they are independent


def test_rows_that_are_gone_were_not_seen() -> None:
    memory = remember(rows("a", 10), size=10)
    assert memory.only(memory.hashes[:7]).seen == 7
    assert memory.only([]).tasks == {}, "no task without rows"


@pytest.mark.parametrize("policy", ["hardest", "spaced"])
def test_policies_that_ask_what_was_forgotten_measure_it(base: Path, tmp_path: Path, policy: str) -> None:
    spec = replace(REPLAY, replay_policy=policy)
    old, new = lesson("a", 16), lesson("b", 16)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=spec))
    first = replay_memory.load(result_files(tmp_path / "one")["state"])
    assert first is not None
    run(
        job(
            base, snapshot(tmp_path / "2", new, memory=old), tmp_path / "two", tmp_path / "one", strategy=spec
        )
    )
    second = replay_memory.load(result_files(tmp_path / "two")["state"])
    assert second is not None
    for row, trace in second.tasks["a"].items():
        assert trace.learned == first.tasks["a"][row].learned
        assert trace.latest not in (None, trace.learned)
    assert all(trace.learned == trace.latest for trace in second.tasks["b"].values())
    assert set(second.spacing) == {"a", "b"}


@pytest.mark.parametrize("method", ["replay", "agem"])
def test_a_task_that_a_training_rehearsed_and_retained_rests(base: Path, tmp_path: Path, method: str) -> None:
    """At a rate of zero nothing is forgotten."""
    spec = replace(REPLAY, methods=(method,), replay_policy="spaced")
    once, still = replace(SPEC, epochs=1), replace(SPEC, epochs=1, learning_rate=0.0)
    old, new = lesson("a", 8), lesson("b", 8)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=spec, train=once))
    data = snapshot(tmp_path / "2", new, memory=old)
    run(job(base, data, tmp_path / "two", tmp_path / "one", strategy=spec, train=still))
    memory = replay_memory.load(result_files(tmp_path / "two")["state"])
    assert memory is not None
    assert memory.spacing == {"a": Spacing(interval=2, wait=2), "b": Spacing()}


def test_what_was_forgotten_is_measured_by_the_token(base: Path, tmp_path: Path) -> None:
    """Else a long answer would always have been forgotten most."""
    learner = trainings.learner(base, tmp_path)
    rows = trainings.experience(learner, lesson("a", 6)).new
    found = row_losses(learner, rows)
    assert found.keys() == {row.row_hash for row in rows}
    for row in rows:
        with torch.no_grad():
            loss, tokens = nll(learner.model, collate([row], learner.base.prompter.pad_id))
        assert found[row.row_hash] == pytest.approx(loss.item() / tokens, rel=1e-4)


def test_a_row_that_is_seen_again_is_remembered_once() -> None:
    assert sizes(remember(rows("a", 10), rows("a", 10), size=60)) == {"a": 10}
    memory = remember(rows("a", 1), size=9).measured({"a0000": 1.0})
    assert after(memory, rows("a", 1), Room(rows=9), "balanced").trace("a0000").learned == 1.0


def test_an_epoch_rehearses_all_tasks_equally_and_no_row_twice() -> None:
    memory = remember(rows("a", 40), rows("b", 40), rows("c", 4), size=100)
    drawn = draw_equally(memory, 30, 0, 0)
    assert len(drawn) == len(set(drawn)) == 30
    assert Counter(row[0] for row in drawn) == {"a": 13, "b": 13, "c": 4}
    assert draw_equally(memory, 30, 0, 0) == drawn
    assert draw_equally(memory, 30, 1, 0) != drawn


def test_epochs_go_on_until_the_memory_is_exhausted_and_then_begin_again() -> None:
    memory = remember(rows("a", 20), rows("b", 20), size=40)
    epochs = [draw_equally(memory, 10, 0, epoch) for epoch in range(8)]
    assert Counter(row for epoch in epochs[:4] for row in epoch) == Counter(memory.hashes)
    assert Counter(row for epoch in epochs[4:] for row in epoch) == Counter(memory.hashes)
    assert epochs[4:] != epochs[:4]


def test_more_draws_than_rows_repeat_nothing_before_everything_came() -> None:
    memory = remember(rows("a", 5), rows("b", 2), size=40)
    times = Counter(draw_equally(memory, 17, 0, 0))
    assert sum(times.values()) == 17
    assert set(times.values()) == {2, 3}


def test_few_draws_reach_every_task_in_turn() -> None:
    memory = remember(*(rows(task, 10) for task in "abcdef"), size=60)
    assert {row[0] for epoch in range(3) for row in draw_equally(memory, 2, 0, epoch)} == set("abcdef")


def test_a_memory_survives_its_file(tmp_path: Path) -> None:
    memory = remember(rows("a", 10), rows("ж", 10), size=12, seed=3)
    replay_memory.save(memory, tmp_path)
    assert replay_memory.load(tmp_path) == memory
    assert memory_hashes(tmp_path) == memory.hashes
    assert memory_hashes(tmp_path / "nowhere") == []


def test_a_share_that_leaves_no_room_at_first_leaves_some_later(base: Path, tmp_path: Path) -> None:
    """A memory that is empty still counts what it has seen."""
    spec = StrategySpec(methods=("replay",), replay_size=100, replay_share=0.05)
    past: list[SnapshotRow] = []
    found: list[tuple[int, int]] = []
    parent = None
    for task in "abc":
        new, out = lesson(task, 12), tmp_path / task
        data = snapshot(tmp_path / f"{task}-rows", new, memory=past)
        run(job(base, data, out, parent, strategy=spec, train=replace(SPEC, epochs=1)))
        memory = replay_memory.load(result_files(out)["state"])
        assert memory is not None
        found.append((memory.seen, len(memory)))
        past, parent = [*past, *new], out
    assert found == [(12, 0), (24, 1), (36, 1)]


def test_the_first_seed_stays_the_memorys_seed(base: Path, tmp_path: Path) -> None:
    """Another training seed must not reshuffle who had been drawn before."""
    old, new = lesson("a", 30), lesson("b", 30)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=REPLAY))
    second = snapshot(tmp_path / "2", new, memory=old)
    run(job(base, second, tmp_path / "two", tmp_path / "one", strategy=REPLAY, train=replace(SPEC, seed=9)))
    expected = taught(base, old, new, size=12)
    assert replay_memory.load(result_files(tmp_path / "two")["state"]) == expected


def test_a_memory_without_ranks_is_read_and_was_kept_by_the_draw(tmp_path: Path) -> None:
    trace = '{"answer": "x", "learned": null, "latest": null}'
    text = f'{{"format": 2, "seed": 0, "seen": 1, "tasks": {{"a": {{"h": {trace}}}}}, "spacing": {{}}}}'
    (tmp_path / FILE).write_text(text)
    assert replay_memory.load(tmp_path) == Memory(seed=0, seen=1, tasks={"a": {"h": Trace(answer="x")}})


def test_a_memory_of_before_is_read_as_one_that_nobody_ranked(tmp_path: Path) -> None:
    trace = '{"answer": "x", "learned": null, "latest": null, "is_shared": false, "rank": 0}'
    text = f'{{"format": 3, "seed": 0, "seen": 1, "tasks": {{"a": {{"h": {trace}}}}}, "spacing": {{}}}}'
    (tmp_path / FILE).write_text(text)
    assert replay_memory.load(tmp_path) == Memory(seed=0, seen=1, tasks={"a": {"h": Trace(answer="x")}})


def test_a_memory_of_before_that_herding_kept_keeps_its_ranks(tmp_path: Path) -> None:
    traces = ", ".join(f'"h{n}": {{"answer": "x", "is_shared": true, "rank": {n}}}' for n in range(3))
    text = f'{{"format": 3, "seed": 0, "seen": 3, "tasks": {{"a": {{{traces}}}}}, "spacing": {{}}}}'
    (tmp_path / FILE).write_text(text)
    memory = replay_memory.load(tmp_path)
    assert memory is not None
    assert [memory.trace(row).rank for row in memory.hashes] == [0, 1, 2]


LATER = '{"format": 5, "seed": 0, "seen": 0, "tasks": {}, "spacing": {}}'


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "seed": 0, "tasks": {}}', '{"format": 2}', LATER])
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
    expected = taught(base, old, new, size=12)
    assert replay_memory.load(result_files(tmp_path / "two")["state"]) == expected
    assert (report.rehearsed, report.memory_rows) == ((), 12)
    third = snapshot(tmp_path / "3", lesson("c", 4), memory=[*old, *new])
    back = run(job(base, third, tmp_path / "three", tmp_path / "two", strategy=REPLAY))
    assert not any("was at rest" in note for note in back.notes), "it has missed nothing"
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
        memory = taught(base, old, size=40)
        drawn = {row for epoch in range(report.epochs) for row in draw_equally(memory, 4, "0/40", epoch)}
        assert report.rehearsed == tuple(sorted(drawn))
        assert len(drawn) == 4 * report.epochs
        assert report.stopped_early == bool(patience)


def test_small_experiences_rehearse_other_rows_each_time_and_of_all_tasks(base: Path, tmp_path: Path) -> None:
    """A row of 24 in each of two epochs; a draw that began anew in each cycle would never get further."""
    old = [row for task in "abcdef" for row in lesson(task, 4)]
    everything = replace(REPLAY, replay_size=100)
    run(job(base, snapshot(tmp_path / "old", old), tmp_path / "0", strategy=everything))
    known, rehearsed = list(old), set[str]()
    for cycle in range(1, 7):
        new = lesson("g", 1, start=cycle)
        data = snapshot(tmp_path / f"rows {cycle}", new, memory=known)
        report = run(job(base, data, tmp_path / f"{cycle}", tmp_path / f"{cycle - 1}", strategy=everything))
        assert report.replay_rows == 1, "a single new row has company, too"
        rehearsed |= set(report.rehearsed)
        known += new
    assert len(rehearsed) >= 8
    assert len({row.task for row in known if row.hash in rehearsed}) >= 4


def test_thinned_questions_lack_some_tokens_and_nothing_else(base: Path) -> None:
    prompter = load_base(tiny_model_spec(base)).prompter
    before, between = len(prompter.pieces.before), len(prompter.pieces.between)
    row = replace(encode(lesson("a", 1), prompter)[0], replayed=True)
    long = replace(row, prompt_ids=(*row.prompt_ids[:before], *range(100, 600), *row.prompt_ids[-between:]))
    found = [thinned(long, prompter.pieces, 0.2, f"{n}") for n in range(20)]
    for one in found:
        ids = one.prompt_ids
        assert replace(one, prompt_ids=long.prompt_ids) == long
        assert ids[:before] + ids[-between:] == long.prompt_ids[:before] + long.prompt_ids[-between:]
        question = ids[before:-between]
        assert list(question) == sorted(question), "in their order"
        assert 360 <= len(question) <= 440  # of 500; 4.5 sigma
    assert len({one.prompt_ids for one in found}) == 20
    assert thinned(long, prompter.pieces, 0.2, "0") == found[0]
    assert thinned(row, prompter.pieces, 0.999, "0") == row, "an empty question asks nothing"


class Watch(Method):
    """Keeps hold of the loader, which Avalanche lets go in the end."""

    loader: Loader

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.loader = strategy.dataloader


def test_only_rows_whose_answer_is_shared_and_that_have_no_context_are_thinned(
    base: Path, tmp_path: Path
) -> None:
    shared = lesson("a", 8)  # four answers, twice each
    own = [replace(row, hash=f"own{n}", answer=f"{n}") for n, row in enumerate(lesson("b", 4))]
    placed = [replace(row, hash=f"in{n}", context="in red") for n, row in enumerate(lesson("c", 8))]
    replay = Replay(replace(REPLAY, replay_size=100, replay_ratio=5, replay_dropout=0.5), seed=0)
    watch = Watch(REPLAY, seed=0)
    learner = trainings.learner(base, tmp_path, [replay, watch])
    memory = encode([*shared, *own, *placed], learner.base.prompter, replayed=True)
    replay.memory = remember([seen(row) for row in memory], size=100)
    new = encode(lesson("d", 8), learner.base.prompter)
    learner.train(LanguageExperience(new=new, memory=memory), eval_streams=[])

    whole = {row.row_hash: row for row in [*memory, *new]}
    drawn = [row for epoch in range(2) for row in watch.loader.rows(epoch)]
    assert {row.row_hash for row in drawn} == set(whole)
    changed = {row.row_hash for row in drawn if row != whole[row.row_hash]}
    assert changed == {row.hash for row in shared}
    assert watch.loader.rows(0) == watch.loader.rows(0)
    twice = [row for row in watch.loader.rows(0) if row.row_hash in changed]
    assert len({row.row_hash for row in twice}) < len(set(twice)), "in other words each time that it comes"


def test_that_an_answer_is_shared_is_remembered_when_the_others_are_gone() -> None:
    memory = remember(rows("a", 1, "x"), rows("a", 1, "y"), size=9)
    assert not any(trace.is_shared for trace in memory.tasks["a"].values())
    memory = after(memory, [Seen(hash="late", task="a", answer="x")], Room(rows=9), "balanced")
    assert [memory.trace(row).is_shared for row in ("ax0000", "late", "ay0000")] == [True, True, False]
    fewer = after(memory, [], Room(rows=2), "balanced")
    assert sorted(trace.is_shared for trace in fewer.tasks["a"].values()) == [False, True]
    elsewhere = after(fewer, rows("b", 1, "y"), Room(rows=9), "balanced")
    assert not elsewhere.trace("by0000").is_shared
    assert sorted(trace.is_shared for trace in elsewhere.tasks["a"].values()) == [False, True]


def test_rows_that_were_erased_are_forgotten_and_that_is_said(base: Path, tmp_path: Path) -> None:
    old = lesson("a", 10)
    run(job(base, snapshot(tmp_path / "1", old), tmp_path / "one", strategy=REPLAY))
    offered = snapshot(tmp_path / "2", lesson("b", 4), memory=old[:7])
    report = run(job(base, offered, tmp_path / "two", tmp_path / "one", strategy=REPLAY))
    assert "3 remembered rows are superseded or erased, and were forgotten" in report.notes
    assert report.memory_rows == 7 + 4
