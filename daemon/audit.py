"""`daemon audit`: do the store, MLflow and the files agree, and does everything that must never change stand?

`daemon doctor` asks whether the daemon can work; the audit asks whether its work can be believed. The
checks are one function an invariant, here and in `daemon.audit_*`, on what `daemon.evidence` has gathered.
None changes anything, and all may run while a cycle does.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from daemon import audit_cycles, audit_erasures, audit_exams, audit_registry, audit_rows, statedir
from daemon.evidence import BACKUP, Evidence, Wrong, gather
from daemon.settings import Settings
from storage.artifacts import verify
from storage.errors import UNREADABLE, HoldfastError, IntegrityError
from storage.registry import Registry
from storage.store import Store
from strategies.base import fingerprint, prepared

# What pickles are called. Nothing here writes or reads one: loading it would run whatever it says.
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A disagreement, and the invariant that it breaks."""

    check: str
    message: str
    next: str


def examine(
    settings: Settings,
    store: Store | None,
    registry: Registry | None,
    on_check: Callable[[str], None] = lambda name: None,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Finding]:
    """Everything that is wrong, as it is found. Without a store there are only files to look at.

    `on_check` hears the name of each check before it begins; `tick` is called while one goes on: some read
    every file there is.
    """
    for look in FILES if store else (*FILES, what_was_done_is_on_record):
        on_check(look.__name__)
        yield from _told(look, settings)
    if store is None or registry is None:
        return
    try:
        evidence = gather(settings, store, registry, tick)
    except (HoldfastError, ValueError, KeyError) as error:
        yield Finding(check="the_store_can_be_read", message=str(error), next="daemon doctor")
        return
    for check in CHECKS:
        on_check(check.__name__)
        found = list(_told(check, evidence))
        while found and evidence.is_overtaken():
            evidence = gather(settings, store, registry, tick)
            found = list(_told(check, evidence))
        yield from found


def _told(check: Callable[[T], Iterator[Wrong]], subject: T) -> Iterator[Finding]:
    """One check's findings; a check that breaks is one, and does not hide the others."""
    try:
        for wrong in check(subject):
            yield Finding(check=check.__name__, message=wrong.message, next=wrong.next)
    except HoldfastError as error:
        yield Finding(check=check.__name__, message=str(error), next="daemon doctor")
    except Exception as error:
        told = f"could not be checked: {type(error).__name__}: {error}"
        yield Finding(check=check.__name__, message=told, next="daemon doctor")


# Files.


def the_state_is_private(settings: Settings) -> Iterator[Wrong]:
    for path, mode in ((settings.state_dir, "700"), (settings.socket_path, "600")):
        if path.exists() and statedir.is_open_to_others(path):
            found = f"{path.stat().st_mode & 0o777:o}"
            yield Wrong(
                message=f"{path} has the mode {found}: it is open to others", next=f"chmod {mode} {path}"
            )


def no_file_is_a_pickle(settings: Settings) -> Iterator[Wrong]:
    # Not rglob: that breaks when a cycle removes its folder meanwhile.
    found = [Path(folder) / name for folder, _, names in os.walk(settings.state_dir) for name in names]
    for path in sorted(found):
        if path.suffix in PICKLES:
            yield Wrong(
                message=f"{path} is a pickle, by its name", next=f"find out who wrote it, then rm {path}"
            )


def what_was_done_is_on_record(settings: Settings) -> Iterator[Wrong]:
    for name in ("cycles", "snapshots"):
        if any((settings.state_dir / name).glob("*")):
            told = f"{settings.state_dir / name} holds what a store should know of, and there is no store"
            yield Wrong(message=told, next=BACKUP.format(path=settings.store_path))


def each_folder_of_a_cycle_is_on_record(evidence: Evidence) -> Iterator[Wrong]:
    for folder in sorted(evidence.path("cycles").glob("*")):
        known = folder.name.isdigit() and evidence.store.cycle(int(folder.name)) is not None
        if not known:
            newest = max(evidence.cycles, default=0)
            told = f"{folder} is of no cycle on record, the newest is {newest}; is the store an older one?"
            yield Wrong(message=told, next=f"put the newer store.duckdb back, or move {folder} aside")


def each_base_is_what_it_was(evidence: Evidence) -> Iterator[Wrong]:
    """Before a cycle only sizes and times are looked at; here every byte is read."""
    for folder in sorted(evidence.path("models").glob("[!.]*")):
        base = prepared(folder)
        if base is None:  # not one, or one that will be made anew
            continue
        evidence.tick()
        try:
            verify(folder)
        except IntegrityError as error:
            yield Wrong(message=str(error), next=f"rm -r {folder}: the next cycle makes it anew")
            continue
        evidence.tick()
        if _fingerprint(base.path, folder) != base.fingerprint:
            told = f"the base at {base.path} is not what it was when it was made ready"
            yield Wrong(message=told, next="put its files back as they were")


def _fingerprint(base: str, folder: Path) -> str:
    """Empty for one that can no longer be read."""
    try:
        return fingerprint(Path(base), folder / "tokenizer" / "tokenizer.json")
    except UNREADABLE:
        return ""


FILES: tuple[Callable[[Settings], Iterator[Wrong]], ...] = (the_state_is_private, no_file_is_a_pickle)
CHECKS: tuple[Callable[[Evidence], Iterator[Wrong]], ...] = (
    each_folder_of_a_cycle_is_on_record,
    each_base_is_what_it_was,
    audit_rows.each_row_is_what_its_hash_says,
    audit_rows.each_question_is_in_one_split,
    audit_rows.each_row_in_quarantine_is_as_it_came,
    audit_rows.each_question_has_an_answer_that_counts,
    audit_rows.each_answer_was_superseded_by_another_of_its_question,
    audit_rows.no_row_was_used_against_its_split,
    audit_rows.each_row_of_a_cycle_is_in_the_store,
    audit_rows.no_row_is_learned_twice_in_a_lineage,
    audit_rows.each_frozen_suite_is_what_was_frozen,
    audit_rows.each_suite_only_grows,
    audit_rows.each_snapshot_of_a_cycle_is_whole,
    audit_rows.each_snapshot_has_the_suites_that_were_frozen,
    audit_rows.each_cycle_was_taught_the_rows_of_its_snapshot,
    audit_rows.no_question_of_a_suite_is_learned_from,
    audit_erasures.each_erasure_is_finished,
    audit_erasures.no_erased_row_is_left_anywhere,
    audit_erasures.nothing_that_learned_an_erased_row_serves,
    audit_cycles.no_cycle_is_left_that_nobody_will_continue,
    audit_cycles.each_ended_cycle_says_why,
    audit_cycles.each_cycle_took_only_arrows_that_exist,
    audit_cycles.each_cycle_ended_as_its_verdict_says,
    audit_cycles.each_candidate_is_one_that_a_rescue_makes,
    audit_cycles.each_result_is_as_it_was_made,
    audit_cycles.nothing_that_is_needed_was_pruned,
    audit_cycles.each_version_is_what_its_cycle_made,
    audit_cycles.lineages_have_no_gaps_and_no_loops,
    audit_cycles.each_snapshot_continues_from_its_cycles_parent,
    audit_cycles.each_memory_has_only_rows_that_its_lineage_learned,
    audit_cycles.each_promotion_has_a_verdict_or_a_person_behind_it,
    audit_cycles.promotions_follow_one_another,
    audit_exams.each_prediction_belongs_to_an_exam,
    audit_exams.each_answered_row_is_in_the_store,
    audit_exams.each_prediction_is_worth_what_its_text_says,
    audit_exams.each_score_is_the_mean_of_its_predictions,
    audit_exams.each_score_is_of_its_cycles_own_models_and_exams,
    audit_exams.each_verdict_can_be_reached_again,
    audit_registry.mlflow_can_be_asked,
    audit_registry.the_alias_champion_is_the_stores_champion,
    audit_registry.the_alias_challenger_is_the_newest_candidate,
    audit_registry.each_version_is_in_mlflow_as_it_was_trained,
    audit_registry.no_version_in_mlflow_is_unknown_here,
    audit_registry.each_number_in_mlflow_comes_from_the_predictions,
)
