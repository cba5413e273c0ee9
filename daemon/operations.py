"""What each command does, on the store and the registry: the daemon and the CLI call the same functions.

Takes what it works on, remembers nothing, prints nothing. Results are plain JSON values, because they
cross the control socket; times in them are UTC, ending in Z.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from daemon import report
from daemon.settings import Settings
from storage.errors import UNREADABLE, ConfigError, ControlError, RegistryError, SourceError, StoreError
from storage.reach import redact
from storage.records import Promotion
from storage.registry import Registry
from storage.rows import Split
from storage.sources import source_name
from storage.store import ALL, Store
from strategies.contract import PreparedBase

PAUSED = "paused"  # the key in the store's meta: who paused, and when
NAME = "name"  # another: bot.name as MLflow has it


def open_registry(settings: Settings, store: Store) -> Registry:
    """The registry of the bot; nothing is connected to yet. Raises `ConfigError` for another bot's name."""
    check_name(settings, store)
    return Registry(
        settings.tracking_uri,
        settings.bot.name,
        settings.state_dir / "artifacts",
        Path(__file__).resolve().parent / "served_model.py",
        store_id=store.id,
    )


def check_name(settings: Settings, store: Store) -> None:
    """A bot that has made a version keeps its name. Raises `ConfigError`."""
    known = store.get_meta(NAME)
    if known and known != settings.bot.name and store.models():
        raise ConfigError(
            f'bot.name = "{settings.bot.name}", but the versions of {settings.state_dir} are in MLflow as '
            f'"{known}"; set it back, or give another bot another bot.state_dir'
        )


def keep_name(settings: Settings, store: Store) -> None:
    """Notes under which name the bot is in MLflow."""
    if store.get_meta(NAME) != settings.bot.name:
        with suppress(StoreError):  # a full disk: the next start notes it
            store.set_meta(NAME, settings.bot.name)


def software_version() -> str:
    try:
        return version("holdfast")
    except PackageNotFoundError:  # run from a clone that was never installed
        return "unknown"


# Looking.


def status(settings: Settings, store: Store | None) -> dict[str, Any]:
    """Everything about the bot that does not depend on a running daemon. No store: nothing was done yet."""
    return {
        "bot": settings.bot.name,
        "version": software_version(),
        "state_dir": str(settings.state_dir),
        "schedule": {"cron": settings.schedule.cron, "timezone": settings.schedule.timezone},
        "gate": {"max_drop": settings.gate.max_drop, "min_gain": settings.gate.min_gain},
        "tracking_uri": redact(settings.tracking_uri, settings.tracking_uri),
        "source": _source(settings, store),
        **(_known(store) if store else _NOTHING_KNOWN),
    }


def history(store: Store, limit: int) -> dict[str, Any]:
    """The newest cycles, lines in the history of the champion, and when answers changed; newest first."""
    with store.reading("its events"):
        superseded = [
            {"at": moment(event.at), "rows": int(event.detail["rows"]), "source": str(event.detail["source"])}
            for event in store.events(limit, kind="superseded")
        ]
    return {
        "cycles": [plain(cycle) for cycle in store.cycles(limit)],
        "promotions": [promotion(line) for line in reversed(store.promotions())][:limit],
        "superseded": superseded,
    }


def show(store: Store, cycle_id: int) -> dict[str, Any]:
    """One cycle: its scores, matrix and verdict, and all of it in sentences (`words`)."""
    return report.cycle_report(store, cycle_id)


def quarantine(store: Store, limit: int, reason: str | None = None) -> dict[str, Any]:
    """Rows that were not accepted, newest first, and how many there are by reason."""
    counts = store.quarantine_counts()
    if reason is not None and reason not in counts:
        known = ", ".join(sorted(counts)) or "none, the quarantine is empty"
        raise ControlError(f"no quarantined row has the reason {reason!r}; reasons: {known}")
    return {"counts": counts, "rows": [plain(row) for row in store.quarantined(limit, reason)]}


def serving(settings: Settings, store: Store, wanted: int | None = None) -> dict[str, Any]:
    """Where the champion (or version `wanted`) lies, for a process that wants to answer with it.

    `version` and `adapter` are None when the bare base answers: there is no champion yet.
    """
    chosen, champion = wanted, store.champion()
    if chosen is None:
        chosen = champion.version if champion else None
    found = store.model(chosen) if chosen is not None else None
    from daemon.promote import check_has_files

    if chosen is not None and found is None:
        known = ", ".join(str(model.version) for model in store.models()) or "none yet"
        raise ControlError(f"there is no version {chosen}; versions: {known}")
    if found is not None:
        check_has_files(store, found.version)
    cycle = store.cycle(found.cycle_id) if found else None
    return {
        "version": chosen,
        "adapter": str(settings.state_dir / found.result / "adapter") if found else None,
        "snapshot": cycle.snapshot if cycle and f"snapshots/{cycle.snapshot}" not in store.pruned() else None,
        "base": found.base if found else None,
        "rolled_back": champion is not None and chosen is None,
        "tasks": [plain(task) for task in store.tasks()],
    }


def audit(
    settings: Settings,
    store: Store | None,
    registry: Registry | None,
    on_check: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Everything that contradicts what must never change, and how much was looked at."""
    from daemon import audit as auditor

    names: list[str] = []

    def hear(name: str) -> None:
        names.append(name)
        on_check(name)

    found = auditor.examine(settings, store, registry, hear, lambda: on_check(names[-1]))
    return {
        "findings": [plain(finding) for finding in found],
        "checks": names,
        "cycles": len(store.cycles(ALL)) if store else 0,
        "versions": len(store.models()) if store else 0,
        "rows": sum(n for splits in store.row_counts().values() for n in splits.values()) if store else 0,
    }


def prunable(settings: Settings, store: Store) -> dict[str, Any]:
    """What `[retention]` would remove next, and what it has removed."""
    from daemon import retention

    return {
        "removals": [plain(one) for one in retention.plan(settings, store)],
        "pruned": len(store.pruned()),
        "left": sum(not one.done for one in store.pruned().values()),  # in MLflow
    }


# Changing.


def paused(store: Store) -> dict[str, Any] | None:
    """Who paused the daemon and when, or None."""
    value = store.get_meta(PAUSED)
    if not value:
        return None
    try:
        told = json.loads(value)
        datetime.fromisoformat(told["at"])
        return {"by": str(told["by"]), "at": told["at"]}
    except UNREADABLE:  # it was paused, whoever it was
        return {"by": "somebody (the record is damaged)", "at": None}


def check_not_paused(store: Store) -> None:
    found = paused(store)
    if found:
        since = f" since {found['at']}" if found["at"] else ""
        raise ControlError(f"paused by {found['by']}{since}; `daemon resume` ends that")


def pause(store: Store, who: str) -> dict[str, Any]:
    """No cycle starts until `resume`, at restarts neither; one that runs is not disturbed."""
    already = paused(store)
    if not already:
        store.set_meta(PAUSED, json.dumps({"by": who, "at": moment(store.clock())}))
        store.event("paused", by=who)
    return {"paused": paused(store), "already": bool(already)}


def resume(store: Store, who: str) -> dict[str, Any]:
    before = paused(store)
    if before:
        store.set_meta(PAUSED, "")
        store.event("resumed", by=who)
    return {"paused": None, "already": not before}


def promote(store: Store, registry: Registry, wanted: int, who: str, why: str) -> dict[str, Any]:
    """A person overrides the gate; their name and reason stay on record."""
    from daemon import promote as champion

    check_why(why)
    return _moved(store, lambda: champion.manual(store, registry, wanted, who, why))


def rollback(store: Store, registry: Registry, who: str, why: str) -> dict[str, Any]:
    """Back to the champion before; what was learned since is pending again."""
    from daemon import promote as champion

    check_why(why)
    return _moved(store, lambda: champion.rollback(store, registry, who, why))


def prune(settings: Settings, store: Store, registry: Registry) -> dict[str, Any]:
    """Removes what `[retention]` lets go. No cycle may run meanwhile."""
    from daemon import retention

    return {
        "removals": [plain(one) for one in retention.prune(settings, store, registry)],
        "pruned": len(store.pruned()),
    }


def erase_plan(settings: Settings, store: Store, **which: Any) -> dict[str, Any]:
    """What `erase` would do, in numbers and names; never a row's text."""
    from daemon import erasure

    found = erasure.plan(settings, store, erasure.choice(**which))
    counts = Counter((row.task, row.split.value) for row in found.rows)
    return {
        "rows": [{"task": task, "split": split, "rows": n} for (task, split), n in sorted(counts.items())],
        "quarantined": len(found.quarantined),
        "versions": sorted({*found.versions} - store.tainted()),
        "suites": found.suites,
        "champion": found.champion,
        "moves": found.moves,
    }


def erase(settings: Settings, store: Store, who: str, why: str, **which: Any) -> dict[str, Any]:
    """Begins an erasure; `erasure.finish` does the rest, between two cycles."""
    from daemon import erasure

    check_why(why)
    return dict(plain(erasure.begin(settings, store, erasure.choice(**which), who, why)))


def ingest(
    settings: Settings,
    store: Store,
    paths: Sequence[Path],
    prepare: Callable[[], PreparedBase],
    on_taken: Callable[[str], None] = lambda so_far: None,
) -> dict[str, Any]:
    """Rows of JSONL, CSV or Parquet files into the store; bad ones into quarantine, with the reason.

    `on_taken` hears after every batch, in words, what was taken so far. Raises `SourceError` for a file
    that cannot be read.
    """
    from daemon.pull import take_in_files
    from storage import files

    for path in paths:  # all of them first: a misspelt last path stops the first too
        check_readable(path)
        files.check_kind(path)
    taken = take_in_files(settings, store, prepare(), paths, lambda so_far: on_taken(str(so_far)))
    return dict(plain(taken))


def check_readable(path: Path) -> None:
    """Raises `SourceError` in words that tell apart what is missing from what is only hidden.

    Opens nothing: a pipe that nobody writes to would never answer.
    """
    try:
        kind = path.stat().st_mode
    except PermissionError:  # a folder above it is closed
        raise SourceError(
            f"{path} is in a folder that is closed to {_me()}; copy it to where it can be read"
        ) from None
    except (OSError, ValueError) as error:  # a name that is too long, a link to itself, a NUL
        why = "" if isinstance(error, FileNotFoundError) else f" ({getattr(error, 'strerror', error)})"
        raise SourceError(f"{path}: no such file, as far as {_me()} can see{why}") from None
    if stat.S_ISDIR(kind):
        raise SourceError(f"{path} is not a file; name the files in it, for instance {path}/*.csv")
    if not stat.S_ISREG(kind):
        raise SourceError(f"{path} is not a file but a pipe, socket or device; write its rows to a file")
    if not os.access(path, os.R_OK):
        raise SourceError(
            f"{path} cannot be read by {_me()}; `chmod a+r {path}`, or copy it to where it can be"
        )


# Plain values.

NOTHING_SERVES: dict[str, Any] = {
    "version": None,
    "adapter": None,
    "snapshot": None,
    "base": None,
    "rolled_back": False,
    "tasks": [],
}
_NOTHING_KNOWN: dict[str, Any] = {
    "champion": None,
    "metrics": {},
    "unfinished": [],
    "last": None,
    "paused": None,
    "rows": {"total": 0, "pending": 0, "superseded": 0, "tasks": {}},
    "quarantine": {},
}


def plain(value: Any) -> Any:
    """JSON types only: records as dicts, times as ISO text with Z, tuples as lists."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    return json.loads(json.dumps(value, default=_plain_leaf))


def moment(at: datetime) -> str:
    return at.isoformat(timespec="seconds") + ("Z" if at.tzinfo is None else "")


def promotion(line: Promotion | None) -> dict[str, Any] | None:
    return dict(plain(line)) if line else None


def _plain_leaf(value: Any) -> str:
    return moment(value) if isinstance(value, datetime) else str(value)


def _known(store: Store) -> dict[str, Any]:
    last = store.last_ended()
    return {
        "champion": promotion(store.champion()),
        "metrics": report.matrix(store).metrics() if store.scores() else {},
        "unfinished": [plain(cycle) for cycle in store.unfinished()],
        "last": plain(last) if last else None,
        "paused": paused(store),
        "rows": _rows(store),
        "quarantine": store.quarantine_counts(),
    }


def _rows(store: Store) -> dict[str, Any]:
    """Rows by task and split, how many wait to be learned, and how many another answer superseded."""
    counts = store.row_counts()
    suites = store.latest_suites()
    kinds = {task.name: task for task in store.tasks()}
    totals: Counter[str] = Counter()
    for splits in counts.values():
        totals.update({split.value: count for split, count in splits.items()})
    champion = store.champion()
    lineage = store.lineage(champion.version if champion else None)
    return {
        "total": sum(totals.values()),
        "pending": store.pending_count(lineage),
        "superseded": store.superseded_count(),
        "tasks": {
            task: {
                "kind": kinds[task].kind if task in kinds else None,
                "metric": kinds[task].metric if task in kinds else None,
                **{split.value: splits.get(split, 0) for split in Split},
                "suite_version": suites[task].version if task in suites else None,
            }
            for task, splits in sorted(counts.items())
        },
    }


def _source(settings: Settings, store: Store | None) -> dict[str, Any] | None:
    source = settings.source
    if source.path is None:
        return None
    cursor = store.cursor(source_name(source.path, source.table)) if store else None
    return {
        "path": str(source.path),
        "table": source.table,
        "pulled_at": moment(cursor.pulled_at) if cursor and cursor.pulled_at else None,
        "newest_row": moment(cursor.watermark) if cursor and cursor.watermark else None,
    }


def _moved(store: Store, move: Callable[[], Promotion]) -> dict[str, Any]:
    """The champion after a move. MLflow may lag: the store's line is what counts, the alias follows."""
    before = len(store.promotions())
    try:
        return {"champion": promotion(move()), "warning": None}
    except RegistryError as error:
        if len(store.promotions()) == before:
            raise
        late = f"it is on record, but MLflow's alias could not be moved yet: {error}"
        return {"champion": promotion(store.champion()), "warning": late}


def check_why(why: str) -> None:
    if not why.strip():
        raise ControlError('a reason is needed, for whoever reads the history: --why "…"')


def _me() -> str:
    from daemon.control import account

    return f"the account {account(os.geteuid())!r}"
