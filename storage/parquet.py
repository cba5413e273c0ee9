"""Rows as Parquet files: what snapshots hold and what the training reads.

Knows pyarrow only; free of torch and DuckDB, so that `strategies` may import it. Equal rows give
equal bytes (with one version of pyarrow).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import UNREADABLE, IntegrityError


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotRow:
    """A row in a snapshot: the labeled content, and nothing of when and whence."""

    hash: str
    id: str
    task: str
    question: str
    answer: str
    context: str
    split: str


class RowLike(Protocol):
    """Anything with the fields of a `SnapshotRow`: a `StoredRow`, for instance."""

    @property
    def hash(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def context(self) -> str: ...
    @property
    def split(self) -> str: ...


COLUMNS = ("hash", "id", "task", "question", "answer", "context", "split")
_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in COLUMNS])


def write_rows(path: str | Path, rows: Sequence[RowLike]) -> None:
    """Write the rows in the order given."""
    columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    pq.write_table(pa.table(columns, schema=_SCHEMA), path, compression="zstd")


def read_rows(path: str | Path) -> list[SnapshotRow]:
    """The rows in the order written."""
    try:
        columns = pq.ParquetFile(path).read(columns=list(COLUMNS)).to_pydict()
        rows = zip(*(columns[name] for name in COLUMNS), strict=True)
    except (*UNREADABLE, pa.ArrowException) as error:
        raise IntegrityError(f"{path} cannot be read as rows: {error}; run `daemon doctor`") from None
    return [SnapshotRow(**dict(zip(COLUMNS, row, strict=True))) for row in rows]
