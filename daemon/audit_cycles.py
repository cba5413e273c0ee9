"""Audit of cycles, candidates, versions and promotions: nothing is stuck, and nobody serves without reason.

One function an invariant; each yields what contradicts it. Reads, and changes nothing.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise

from daemon import rescue
from daemon.audit_rows import STORE
from daemon.evidence import BACKUP, Evidence, Wrong
from daemon.promote import champions
from storage.records import TRANSITIONS, Candidate, Cycle, Promotion, State
from storage.store import ALL
from strategies.contract import StrategySpec, result_files
from strategies.replay_memory import memory_hashes

BY_HAND = "daemon history   (then `daemon promote` or `daemon rollback`, with a reason)"
SHOW = "daemon show {cycle}"


# Cycles.


def no_cycle_is_left_that_nobody_will_continue(evidence: Evidence) -> Iterator[Wrong]:
    """The daemon continues cycles that have no end, from what their state says is there."""
    for cycle in evidence.cycles.values():
        told = _stuck(evidence, cycle)
        if told:
            yield Wrong(message=f"cycle {cycle.id} is {cycle.state} and {told}", next=STORE)


def _stuck(evidence: Evidence, cycle: Cycle) -> str | None:
    candidates = evidence.candidates[cycle.id]
    if cycle.state.ended:
        return None if cycle.finished_at else "has no time of its end, so the daemon takes it for unfinished"
    if cycle.finished_at:
        return f"has ended at {cycle.finished_at:%Y-%m-%d %H:%M}, so nobody continues it"
    if cycle.state in (State.REQUESTED, State.PULLED):
        return None
    if cycle.snapshot is None or not candidates:
        return "has no snapshot to train on" if cycle.snapshot is None else "has no candidate to train"
    made = candidates[-1].model or candidates[-1].note
    if cycle.state in (State.TRAINED, State.EVALUATED) and not made:
        return f"has nothing to examine: its attempt {candidates[-1].number} was never made"
    if cycle.state is State.DECIDED and cycle.id not in evidence.verdicts:
        return "has no verdict"
    return None


def each_ended_cycle_says_why(evidence: Evidence) -> Iterator[Wrong]:
    """Not that its times are in order: a clock may be set back while one runs."""
    for cycle in evidence.cycles.values():
        if cycle.state.ended and not cycle.reason:
            yield Wrong(message=f"cycle {cycle.id} is {cycle.state} for no reason", next=STORE)


def each_cycle_took_only_arrows_that_exist(evidence: Evidence) -> Iterator[Wrong]:
    """By its events, which are written together with every step."""
    for cycle in evidence.cycles.values():
        if cycle.state.ended != (cycle.finished_at is not None):
            continue
        events = reversed(evidence.store.events(ALL, cycle.id))
        path = [State(event.kind) for event in events if event.kind in {*State}]
        wrong = [f"{one} → {other}" for one, other in pairwise(path) if other not in TRANSITIONS[one]]
        if wrong or path[:1] != [State.REQUESTED] or cycle.state not in path:
            told = wrong[0] if wrong else f"{' → '.join(path) or 'nothing'}, and is {cycle.state}"
            yield Wrong(message=f"cycle {cycle.id} went {told}", next=SHOW.format(cycle=cycle.id))


def each_cycle_ended_as_its_verdict_says(evidence: Evidence) -> Iterator[Wrong]:
    for cycle in evidence.cycles.values():
        told = _ended_otherwise(evidence, cycle)
        if told:
            yield Wrong(message=f"cycle {cycle.id} is {cycle.state}, but {told}", next=BY_HAND)


def _ended_otherwise(evidence: Evidence, cycle: Cycle) -> str | None:
    if cycle.state is State.PROMOTED:
        moved = [line.seq for line in evidence.promotions if line.version == cycle.version]
        return None if moved else f"version {cycle.version} was never champion"
    if any(line.cycle_id == cycle.id and line.kind == "gate" for line in evidence.promotions):
        return "the gate promoted its version"
    if cycle.state is not State.REJECTED:
        return None
    passed = evidence.verdicts.get(cycle.id)
    if passed is None:
        return "no verdict is on record"
    if passed[0] and not _came_between(evidence, cycle):
        return "its verdict says that it passed, and no person moved the champion meanwhile"
    return None


def _came_between(evidence: Evidence, cycle: Cycle) -> bool:
    """Whether a person moved the champion while the cycle ran: then what it beat does not serve any more.

    By the order of the record: clocks are set.
    """
    mine = [event.seq for event in evidence.store.events(ALL, cycle.id)]
    moves = evidence.store.events(ALL, kind="champion")
    return any(move.detail["how"] != "gate" and min(mine) < move.seq < max(mine) for move in moves)


# Candidates.


def each_candidate_is_one_that_a_rescue_makes(evidence: Evidence) -> Iterator[Wrong]:
    for cycle in evidence.cycles.values():
        candidates, snapshot = evidence.candidates[cycle.id], evidence.snapshot_of(cycle)
        attempts = rescue.Limits.of(snapshot).attempts if snapshot else ALL
        with evidence.store.reading(f"an attempt of cycle {cycle.id}"):
            told = next(_faults(candidates, attempts), None) or _other_verdict(evidence, cycle)
        if told:
            yield Wrong(message=f"cycle {cycle.id}: {told}", next=SHOW.format(cycle=cycle.id))


def _faults(candidates: Sequence[Candidate], attempts: int) -> Iterator[str]:
    if len(candidates) - 1 > attempts:
        yield f"{len(candidates) - 1} attempts to rescue it, rescue.attempts was {attempts}"
    for number, candidate in enumerate(candidates, start=1):
        name, blend = f"attempt {candidate.number}", candidate.kind == rescue.Kind.BLEND
        if candidate.number != number:
            yield f"{name} stands where attempt {number} should"
        if (candidate.kind == rescue.Kind.TRAIN) != (number == 1) or (candidate.source is None) != (
            number == 1
        ):
            yield f"{name} is a {candidate.kind} from {candidate.source}"
        if candidate.source is not None and not 0 < candidate.source < number:
            yield f"{name} starts from attempt {candidate.source}, which came no earlier"
        if blend and candidate.model and not 0 < (candidate.share or 0) < 1:
            yield f"{name} is a blend of the share {candidate.share}"
        if candidate.strategy is not None:
            StrategySpec.from_json(candidate.strategy)  # or it cannot be read
        judged = json.loads(candidate.verdict)["passed"] if candidate.verdict else None
        if judged != candidate.passed or (judged is not None and candidate.model is None):
            yield f"{name} is said to have passed: {candidate.passed}; its verdict says {judged}"
        if number < len(candidates) and (judged or (judged is None and candidate.note is None)):
            yield f"{name} was {'good enough' if judged else 'never judged'}, and another one followed"


def _other_verdict(evidence: Evidence, cycle: Cycle) -> str | None:
    """What ends a cycle is the verdict on the candidate that becomes its version."""
    chosen, verdict = evidence.concluded(cycle.id), evidence.verdicts.get(cycle.id)
    if verdict is None or (chosen and verdict == (chosen.passed, chosen.verdict)):
        return None
    return f"its verdict is not the one on attempt {chosen.number if chosen else 'none'}"


def each_result_is_as_it_was_made(evidence: Evidence) -> Iterator[Wrong]:
    """The directory verifies, and holds the adapter that is on record."""
    for result, why in evidence.broken_results.items():
        yield Wrong(message=why, next=BACKUP.format(path=result))


def nothing_that_is_needed_was_pruned(evidence: Evidence) -> Iterator[Wrong]:
    """The champion, and what an unfinished cycle works on."""
    for version in champions(evidence.promotions)[-1:]:
        if version in evidence.models and evidence.models[version].result in evidence.pruned:
            told = f"version {version}, which serves, was pruned"
            yield Wrong(message=told, next=BACKUP.format(path=evidence.models[version].result))
    for cycle in evidence.cycles.values():
        parent = evidence.models.get(cycle.parent or 0)
        needed = {f"snapshots/{cycle.snapshot}", parent.result if parent else ""} & evidence.pruned
        if needed and not cycle.state.ended:
            told = f"cycle {cycle.id} is {cycle.state} and needs {min(needed)}, which was pruned"
            yield Wrong(message=told, next=f"daemon cancel {cycle.id}")


# Versions.


def each_version_is_what_its_cycle_made(evidence: Evidence) -> Iterator[Wrong]:
    for why in evidence.misfits.values():
        yield Wrong(message=why, next=STORE)
    for cycle in evidence.cycles.values():
        made = cycle.state in (State.PROMOTED, State.REJECTED)
        if made and cycle.version not in evidence.models:
            told = f"cycle {cycle.id} made version {cycle.version}, which is not on record"
            yield Wrong(message=told, next=STORE)


def lineages_have_no_gaps_and_no_loops(evidence: Evidence) -> Iterator[Wrong]:
    for why in evidence.torn.values():
        yield Wrong(message=why, next=STORE)


def each_snapshot_continues_from_its_cycles_parent(evidence: Evidence) -> Iterator[Wrong]:
    for cycle in evidence.cycles.values():
        snapshot = evidence.snapshot_of(cycle)
        if snapshot and snapshot.info["meta"]["parent"] != cycle.parent:
            told = f"from version {cycle.parent}, its snapshot from {snapshot.info['meta']['parent']}"
            yield Wrong(message=f"cycle {cycle.id} continues {told}", next=STORE)


def each_memory_has_only_rows_that_its_lineage_learned(evidence: Evidence) -> Iterator[Wrong]:
    """So it never has a suite row, nor one that the store does not know."""
    learned = {
        m.cycle_id: {*evidence.store.cycle_rows(m.cycle_id, "train")} for m in evidence.models.values()
    }
    for model in evidence.models.values():
        if not evidence.has(model.result) or not evidence.is_sound(model.version):
            continue
        remembered = set(memory_hashes(result_files(evidence.path(model.result))["state"]))
        strange = remembered.difference(*(learned[m.cycle_id] for m in evidence.ancestry(model.version)))
        if strange:
            row = min(strange)
            known = "" if evidence.store.survey().known([row]) else " and the store does not know"
            told = f"version {model.version} remembers {len(strange)} rows that it was never taught{known}"
            yield Wrong(message=f"{told}, first {row}", next=BACKUP.format(path=model.result))


# Promotions.


def each_promotion_has_a_verdict_or_a_person_behind_it(evidence: Evidence) -> Iterator[Wrong]:
    for line in evidence.promotions:
        told = _unfounded(evidence, line)
        if told:
            name = f"version {line.version}" if line.version is not None else "the base"
            yield Wrong(message=f"{name} became champion by {line.kind} at {line.at}, {told}", next=BY_HAND)


def _unfounded(evidence: Evidence, line: Promotion) -> str | None:
    if line.version is not None and line.version not in evidence.models:
        return "which is not on record"
    if line.version is None and line.kind not in ("rollback", "erasure"):
        return "which is no version"
    if line.kind != "gate":
        return None if line.who.strip() and line.why.strip() else f"by {line.who!r}, why: {line.why!r}"
    made_by = evidence.models[line.version].cycle_id if line.version is not None else None
    verdict = evidence.verdicts.get(made_by or 0)
    if made_by != line.cycle_id:
        return f"for the verdict on cycle {line.cycle_id}, but cycle {made_by} made it"
    return None if verdict and verdict[0] else f"and cycle {made_by} has no passing verdict"


def promotions_follow_one_another(evidence: Evidence) -> Iterator[Wrong]:
    """Each line says who served before, and a rollback goes to the champion before that."""
    for n, line in enumerate(evidence.promotions):
        before = evidence.promotions[:n]
        last = before[-1] if before else None
        told = None
        if line.seq != n + 1 or line.previous != (last.version if last else None):
            told = f"follows version {line.previous}; before it served {last.version if last else 'the base'}"
        elif line.kind == "rollback" and not _goes_back(line, champions(before), evidence.store.tainted()):
            told = f"rolls back to {line.version}, which is not the champion before"
        if told:
            yield Wrong(message=f"line {line.seq} of the champion's history {told}", next=BY_HAND)
            return  # what follows would only repeat it


def _goes_back(line: Promotion, stack: list[int], tainted: set[int]) -> bool:
    """To the champion before the present one, passing over those that learned an erased row."""
    if not stack or line.version is None:
        return len(stack) == 1
    *earlier, present = stack
    while earlier and earlier[-1] != line.version and earlier[-1] in tainted | {present}:
        earlier.pop()
    return earlier[-1:] == [line.version]
