"""Brings rows in: from the collector's DuckDB at the start of a cycle, from files by hand.

Translates the settings into what `storage.sources` and `storage.intake` want; decides nothing itself.
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from daemon.base import length_counter, token_limit
from daemon.settings import Settings
from storage import files, intake, sources
from storage.errors import HoldfastError
from storage.intake import IntakeReport
from storage.rows import normalise
from storage.store import Store
from strategies.contract import PreparedBase


def pull_source(
    settings: Settings,
    store: Store,
    base: PreparedBase,
    clock: Callable[[], datetime],
    wait: Callable[[float], object],
) -> str:
    """Takes in what is new in the collector's DuckDB; returns what happened, in words.

    `wait` is given the seconds between two tries while the collector holds its file; it may raise to
    end the waiting. Raises `SourceBusy` after source.busy_timeout seconds of that, and `SourceMissing` when
    there is no such file now.
    """
    if settings.source.path is None:
        return "no source configured; rows come by `daemon ingest`"
    source = sources.DuckDBSource(source_spec(settings), clock=clock, sleep=wait)
    return str(intake.pull(source, store, **_rules(settings, base)))


def take_in_files(
    settings: Settings,
    store: Store,
    base: PreparedBase,
    paths: Sequence[Path],
    on_taken: Callable[[IntakeReport], None],
) -> IntakeReport:
    """Takes in JSONL, CSV or Parquet files by hand, under the same rules as the source.

    `on_taken` hears after every batch what was taken so far; it may raise to end the work. An error that
    comes when rows were taken already says which: they stay.
    """
    spec, rules = source_spec(settings), _rules(settings, base)
    taken = IntakeReport()
    try:
        for path in paths:
            for batch in files.read_file(path, spec.columns):
                taken += intake.take([batch], store, spec, source_name=f"file:{path.name}", **rules)
                on_taken(taken)
    except HoldfastError as error:
        if not taken.read:
            raise
        said = f"{error}. What was read before that is kept: {taken}. `daemon ingest` again takes the rest"
        raise type(error)(said) from None
    return taken


def source_spec(settings: Settings) -> sources.SourceSpec:
    given = settings.source
    return sources.SourceSpec(
        path=given.path,
        table=given.table,
        columns=sources.Columns(**given.columns.model_dump()),
        default_task=given.default_task,
        on_conflict=given.on_conflict,
        labels={
            normalise(task): frozenset(label.strip().casefold() for label in wish.labels)
            for task, wish in settings.tasks.items()
            if wish.labels
        },
        overlap=timedelta(hours=given.overlap_hours),
        full_scan_every=timedelta(days=given.full_scan_days),
        batch_rows=given.batch_rows,
        busy_timeout=given.busy_timeout,
    )


def _rules(settings: Settings, base: PreparedBase) -> dict[str, Any]:
    return {
        "shares": (settings.splits.validation, settings.splits.suite),
        "count_tokens": length_counter(settings, base),
        "max_tokens": token_limit(settings, base),
    }
