"""Records to Arrow tables and back: how thousands of rows go into a query as one value.

Knows the columns of the tables that are written in bulk; touches no database.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from storage.records import Answer, Cycle, Event, State, StoredRow, TaskRecord
from storage.rows import Split

_TEXT, _TIME, _REAL = pa.string(), pa.timestamp("us"), pa.float64()

ROWS = pa.schema(
    [(name, _TEXT) for name in ("hash", "key", "question_key", "words_key")]
    + [("seq", pa.int64())]
    + [(name, _TEXT) for name in ("id", "task", "question", "answer", "context")]
    + [("created_at", _TIME), ("split", _TEXT), ("source", _TEXT), ("accepted_at", _TIME)]
)
QUARANTINE = pa.schema(
    [(name, _TEXT) for name in ("hash", "id", "task", "raw", "reason", "detail", "source")] + [("at", _TIME)]
)
LABELS = pa.schema(
    [(name, _TEXT) for name in ("row_hash", "source", "id")] + [("created_at", _TIME), ("seq", pa.int64())]
)
SUPERSESSIONS = pa.schema([("seq", pa.int64()), ("row_hash", _TEXT), ("by_hash", _TEXT), ("at", _TIME)])
PREDICTIONS = pa.schema(
    [("row_hash", _TEXT), ("prediction", _TEXT)]
    + [(name, _REAL) for name in ("exact_match", "token_f1", "score")]
)
SCORES = pa.schema(
    {"cycle_id": pa.int64(), "label": _TEXT, "task": _TEXT, "version": pa.int32()}
    | {"model": _TEXT, "exam": _TEXT, "metric": _TEXT, "score": _REAL, "size": pa.int32()}
)


def table(schema: Any, records: Sequence[Any]) -> Any:
    """Records as an Arrow table."""
    return pa.table(
        {name: [getattr(record, name) for record in records] for name in schema.names}, schema=schema
    )


def column(values: Sequence[str]) -> Any:
    """Distinct strings as an Arrow table with the one column `hash`."""
    return pa.table({"hash": pa.array(list(dict.fromkeys(values)), pa.string())})


def words(keys: Mapping[str, str]) -> Any:
    """Words keys by question key, as an Arrow table."""
    return pa.table(
        {"question_key": pa.array(keys, pa.string()), "words_key": pa.array(keys.values(), pa.string())}
    )


def with_roles(rows: Sequence[tuple[str, str]]) -> Any:
    """(hash, role) pairs as an Arrow table; a hash given twice keeps its first role."""
    roles = dict(reversed(rows))
    return pa.table({"hash": pa.array(roles, pa.string()), "role": pa.array(roles.values(), pa.string())})


# Records with a field that is text in the database and something better outside.


def row(*, split: str, **values: Any) -> StoredRow:
    return StoredRow(split=Split(split), **values)


def keyed_answer(*, key: str, **values: Any) -> tuple[str, Answer]:
    return key, Answer(**values)


def task(*, labels: str, **values: Any) -> TaskRecord:
    return TaskRecord(labels=tuple(json.loads(labels)), **values)


def cycle(*, state: str, **values: Any) -> Cycle:
    return Cycle(state=State(state), **values)


def event(*, detail: str, **values: Any) -> Event:
    return Event(detail=json.loads(detail), **values)
