"""Audit of rows, suites and snapshots: each row where it belongs, and nothing examined was ever learned.

One function an invariant; each yields what contradicts it. Reads, and changes nothing.
"""

from collections.abc import Iterator

from daemon.evidence import BACKUP, Evidence, Wrong, identity
from storage import snapshots
from storage.intake import is_as_it_came
from storage.parquet import read_rows
from storage.records import Cycle
from storage.snapshots import Snapshot
from storage.store import ALL
from strategies.contract import TrainReport, result_files

STORE = BACKUP.format(path="store.duckdb")
TAINTED = "daemon rollback --why …   (to a version from before; its scores on that suite are worth nothing)"


def each_row_is_what_its_hash_says(evidence: Evidence) -> Iterator[Wrong]:
    """Rows of frozen suites are compared to the letter, by `each_frozen_suite_is_what_was_frozen`."""
    for row in evidence.altered_rows:
        yield Wrong(
            message=f"row {row.hash} ({row.task}, {row.split}) was changed: its text has the hash "
            f"{identity(row)[0]}",
            next=STORE,
        )


def each_question_is_in_one_split(evidence: Evidence) -> Iterator[Wrong]:
    for _, splits, row in evidence.store.survey().divided_questions():
        yield Wrong(message=f"the question of row {row} is in more than one split: {splits}", next=STORE)


def each_row_in_quarantine_is_as_it_came(evidence: Evidence) -> Iterator[Wrong]:
    """That its content is in the store by now is right: `source.on_conflict` or a limit may have changed."""
    for refused in evidence.store.quarantined(ALL):
        if not is_as_it_came(refused):
            yield Wrong(message=f"the quarantined row {refused.hash} was changed", next=STORE)


def each_question_has_an_answer_that_counts(evidence: Evidence) -> Iterator[Wrong]:
    for _, row in evidence.store.survey().unanswered():
        yield Wrong(message=f"all answers to the question of row {row} are superseded", next=STORE)


def each_answer_was_superseded_by_another_of_its_question(evidence: Evidence) -> Iterator[Wrong]:
    for row, by in evidence.store.survey().stray_supersessions():
        told = f"by {by}, which does not answer its question" if by else "and is not in the store"
        yield Wrong(message=f"row {row} is on record as superseded {told}", next=STORE)


def no_row_was_used_against_its_split(evidence: Evidence) -> Iterator[Wrong]:
    """Above all: no suite row was trained on."""
    for used in evidence.store.survey().misplaced():
        yield Wrong(
            message=f"cycle {used.cycle_id} has the {used.split} row {used.row_hash} as a {used.role} row",
            next=TAINTED if used.split == "suite" else STORE,
        )


def each_row_of_a_cycle_is_in_the_store(evidence: Evidence) -> Iterator[Wrong]:
    for used in evidence.store.survey().lost_rows():
        told = f"cycle {used.cycle_id} has the {used.role} row {used.row_hash}, which is not in the store"
        yield Wrong(message=told, next=STORE)


def no_row_is_learned_twice_in_a_lineage(evidence: Evidence) -> Iterator[Wrong]:
    """So a lineage has learned what its cycles were taught, and the rest of the training rows is pending."""
    lineages = [
        {model.cycle_id for model in evidence.ancestry(version)}
        for version in evidence.models
        if evidence.is_sound(version)
    ]
    for shared in evidence.store.survey().learned_by_several():
        twice = next(
            (set(shared.cycles) & line for line in lineages if len(line & {*shared.cycles}) > 1), None
        )
        if twice:
            cycles = " and ".join(str(cycle) for cycle in sorted(twice))
            told = f"{shared.count} rows, first {shared.row_hash}, were new to cycles {cycles} of one lineage"
            yield Wrong(message=told, next=STORE)


def each_cycle_was_taught_the_rows_of_its_snapshot(evidence: Evidence) -> Iterator[Wrong]:
    survey = evidence.store.survey()
    told_already = {(used.cycle_id, used.row_hash) for used in (*survey.misplaced(), *survey.lost_rows())}
    for cycle in evidence.cycles.values():
        snapshot = evidence.snapshot_of(cycle)
        if snapshot is None:
            continue
        for role, wanted in _roles(evidence, cycle, snapshot):
            found = set(evidence.store.cycle_rows(cycle.id, role))
            rows = {row for row in found ^ wanted if (cycle.id, row) not in told_already}
            if rows:
                where = "in the store only" if min(rows) in found else "in the files only"
                yield Wrong(
                    message=f"cycle {cycle.id} and its snapshot {snapshot.id} differ in {len(rows)} {role} "
                    f"rows, first {min(rows)}, which is {where}",
                    next=STORE,
                )


def _roles(evidence: Evidence, cycle: Cycle, snapshot: Snapshot) -> Iterator[tuple[str, set[str]]]:
    """Which rows the files say that the cycle was taught, by role."""
    train, validation = ({row.hash for row in snapshot.rows(part)} for part in ("train", "validation"))
    yield "train", train
    yield "validation", validation - train
    chosen = evidence.concluded(cycle.id)
    if cycle.id in evidence.verdicts and chosen and evidence.has(chosen.result):
        report = TrainReport.read(result_files(evidence.path(chosen.result))["report"])
        yield "replay", {*report.rehearsed} - train - validation


def each_frozen_suite_is_what_was_frozen(evidence: Evidence) -> Iterator[Wrong]:
    for why in evidence.broken_suites.values():
        yield Wrong(message=why, next=STORE)


def each_suite_only_grows(evidence: Evidence) -> Iterator[Wrong]:
    """Versions are 1, 2, 3 …, and each has every row of the one before that still counts."""
    superseded = evidence.store.survey().ever_superseded() | evidence.store.erased()
    for suite in evidence.suites:
        if suite.version == 1:
            continue
        before = evidence.members.get((suite.task, suite.version - 1))
        name = f"the suite {suite.task}@v{suite.version}"
        if before is None:
            yield Wrong(message=f"{name} has no version {suite.version - 1} before it", next=STORE)
        elif lost := before - evidence.members.get((suite.task, suite.version), before) - superseded:
            yield Wrong(message=f"{name} lost {len(lost)} rows of the one before, {min(lost)}", next=STORE)


def each_snapshot_of_a_cycle_is_whole(evidence: Evidence) -> Iterator[Wrong]:
    """It is there, its manifest holds, and its name is the hash of its content."""
    for name, why in evidence.broken_snapshots.items():
        cycles = [str(cycle.id) for cycle in evidence.cycles.values() if cycle.snapshot == name]
        yield Wrong(
            message=f"{why} (the snapshot of cycle {', '.join(cycles)})",
            next=BACKUP.format(path=f"snapshots/{name}"),
        )


def each_snapshot_has_the_suites_that_were_frozen(evidence: Evidence) -> Iterator[Wrong]:
    frozen = {(suite.task, suite.version): suite.hash for suite in evidence.suites}
    for snapshot in evidence.snapshots.values():
        for entry in snapshot.info["suites"]:
            name = f"the suite {entry['task']}@v{entry['version']} in {snapshot.path}"
            on_record = frozen.get((entry["task"], entry["version"]), "nothing")
            found = snapshots.suite_hash(read_rows(snapshot.path / entry["file"]))
            if not found == entry["hash"] == on_record:
                told = f"{name} has the hash {found[:12]}, frozen was {on_record[:12]}"
                yield Wrong(message=told, next=BACKUP.format(path=f"snapshots/{snapshot.id}"))


def no_question_of_a_suite_is_learned_from(evidence: Evidence) -> Iterator[Wrong]:
    """Neither under another task nor in another spelling; by the texts that the training has read."""
    examined, innocent = evidence.store.survey().suite_questions(), set()
    for snapshot in evidence.snapshots.values():
        for part in ("train", "validation", "memory"):
            for row in snapshot.rows(part):
                text = (row.context, row.question)
                if text in innocent:
                    continue
                if identity(row)[2] in examined:
                    told = f"row {row.hash} in {snapshot.path / part}.parquet asks what a suite asks"
                    yield Wrong(message=told, next=TAINTED)
                innocent.add(text)
