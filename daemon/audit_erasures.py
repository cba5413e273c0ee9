"""Audit of erasures: what had to be forgotten is nowhere, and nobody who learned it answers.

One function an invariant; each yields what contradicts it. Reads, and changes nothing. A text is known again
by its hash, which is all that is left of it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from daemon.erasure import holds, is_due
from daemon.evidence import Evidence, Wrong, identity
from storage.intake import content_hash
from storage.runs import PREDICTIONS
from storage.store import ALL

AGAIN = 'daemon erase --row {row} --why "again"'


def each_erasure_is_finished(evidence: Evidence) -> Iterator[Wrong]:
    for erasure in evidence.store.erasures():
        if erasure.done_at is None:
            told = f"erasure {erasure.id} was begun at {erasure.at:%Y-%m-%d %H:%M} and is not finished"
            yield Wrong(message=told, next="systemctl reload holdfast   (or start it: `daemon run`)")


def no_erased_row_is_left_anywhere(evidence: Evidence) -> Iterator[Wrong]:
    """Neither in the store, nor in a Parquet file, nor in MLflow's tables."""
    erased = evidence.store.erased()
    if not erased or is_due(evidence.store):
        return
    for row in evidence.every_row():
        if not erased.isdisjoint((row.hash, identity(row)[0])):
            yield Wrong(message=f"row {row.hash} was erased and is in the store", next=_again(row.hash))
    default_task = evidence.settings.source.default_task
    for refused in evidence.store.quarantined(ALL):
        if refused.hash in erased or content_hash(refused.raw, default_task) in erased:
            told = f"the quarantined row {refused.hash} was erased and is in the store"
            yield Wrong(message=told, next=_again(refused.hash))
    for model, exam in evidence.sat:
        evidence.tick()
        for row_hash in sorted(erased & evidence.store.predictions(model, exam).keys()):
            yield Wrong(message=f"row {row_hash} was erased, and has an answer", next=_again(row_hash))
    for path in _files(evidence):
        evidence.tick()
        if holds(path, erased) if path.suffix == ".parquet" else _tells(path, erased):
            yield Wrong(message=f"{path} has a row that was erased", next=f"rm {path}")


def nothing_that_learned_an_erased_row_serves(evidence: Evidence) -> Iterator[Wrong]:
    """By what each cycle was taught, not by the marks alone: neither the champion nor an ancestor of it."""
    taught = evidence.store.taught()
    line = evidence.promotions[-1] if evidence.promotions else None
    for model in evidence.ancestry(line.version if line else None):
        if model.cycle_id in taught or model.version in evidence.store.tainted():
            told = f"version {model.version}, of the champion's lineage, learned a row that was erased"
            yield Wrong(message=told, next="daemon rollback --why …   (to a version from before)")


def _files(evidence: Evidence) -> Iterator[Path]:
    # Not rglob: that breaks when a cycle removes its folder meanwhile.
    for folder in ("snapshots", "cycles", "artifacts"):
        for where, _, names in os.walk(evidence.path(folder)):
            wanted = [name for name in names if name.endswith(".parquet") or name == PREDICTIONS]
            yield from (Path(where) / name for name in sorted(wanted))


def _tells(path: Path, erased: set[str]) -> bool:
    text = path.read_text(encoding="utf-8")
    return any(row in text for row in erased)


def _again(row: str) -> str:
    return AGAIN.format(row=row)
