"""Rows from files: JSON Lines, JSON, CSV, TSV and Parquet, in batches.

One bad line never spoils a file: what cannot be taken apart is handed on as text with its problem, for
the quarantine. Text formats are read line by line here, because DuckDB's readers give up the whole file
at a broken line, guess types (the answer "2024-01-01" would come back as a timestamp) and lose the text of
what they skip. Parquet, which has none of that, is read by DuckDB, with pyarrow to help it past text that
is not UTF-8. Stores and judges nothing.
"""

import csv
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from storage import duck
from storage.errors import SourceError, first_line
from storage.sources import REQUIRED, Columns, RawRow, as_written, listed, quote

_LONGEST_LINE = 16 * 1024 * 1024  # bytes (in CSV characters); more than that in one line is no row
# Characters that a CSV record of several lines may have. An open quote is followed no further, so that it
# costs neither the time nor the memory of the whole file. The intake takes a million characters at most,
# and written in quotes they are two million at worst.
_LONGEST_RECORD = 2 * 1024 * 1024
_SHOWN = 4096  # of a line that is handed on as text only because it is broken
_DELIMITERS = {".csv": (",", ";", "\t", "|"), ".tsv": ("\t",)}
_SEPARATOR = re.compile("sep=[,;\t|]\r?\n?", re.IGNORECASE)
_PARQUET_ROWS = 1000  # at a time
# Without these pyarrow ends up with all columns of the file in memory.
_PARQUET_FRUGALLY: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1024 * 1024}


def read_file(path: Path, columns: Columns, *, batch_rows: int = 20_000) -> Iterator[list[RawRow]]:
    """The rows of a file, in batches.

    A field is looked for under its configured name, then under ours, with any case. Raises `SourceError`
    for a file that is missing, of an unknown kind, or without a required column, before handing out
    anything of it.
    """
    check_kind(path)
    try:
        rows = _READERS[path.suffix.lower()](path, columns)
        while batch := list(islice(rows, batch_rows)):
            yield batch
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from None
    except (duckdb.Error, pa.ArrowException) as error:
        raise SourceError(f"{path} cannot be read: {first_line(error)}") from None


def check_kind(path: Path) -> None:
    """Raises `SourceError` for a name by which no file can be read here, whatever is in it."""
    if str(path) != str(path).encode("utf-8", "replace").decode():
        raise SourceError(f"the name of {str(path)!r} is not UTF-8; rename it")
    if path.suffix.lower() not in _READERS:
        raise SourceError(f"{path} is of an unknown kind; known are {', '.join(_READERS)}")


# -- JSON ----------------------------------------------------------------------------------------


def _read_json_lines(path: Path, columns: Columns) -> Iterator[RawRow]:
    return _map_objects(path, columns, _json_lines(path))


def _read_json(path: Path, columns: Columns) -> Iterator[RawRow]:
    """A .json file is one array of objects, one object over several lines, or JSON Lines by another name."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    first = start.partition(b"\n")[0].strip()
    if not start.startswith(b"[") and first != b"{":
        return _read_json_lines(path, columns)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}; nothing was taken from it") from None
    return _map_objects(path, columns, _json_array(path, values if isinstance(values, list) else [values]))


# What a reader of JSON finds: a location, and the object or the text and its problem.
_Found = tuple[str, "dict[str, object] | None", str, str]


def _json_lines(path: Path) -> Iterator[_Found]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            where = f"{path.name} line {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) >= _LONGEST_LINE and not line.endswith(b"\n"):
                _skip_line(file)
                yield where, None, _decode(line[:_SHOWN]), f"the line is longer than {_LONGEST_LINE} bytes"
            elif line.strip():
                yield where, *_parse(_decode(line.strip()))


def _json_array(path: Path, values: list[Any]) -> Iterator[_Found]:
    for number, value in enumerate(values, 1):
        where = f"{path.name} element {number}"
        if isinstance(value, dict):
            yield where, value, "", ""
        else:
            yield where, None, json.dumps(value), "not a JSON object"


def _parse(text: str) -> tuple[dict[str, object] | None, str, str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, text, f"not valid JSON: {error or 'nested too deeply'}"
    return (value, "", "") if isinstance(value, dict) else (None, text, "not a JSON object")


def _decode(line: bytes) -> str:
    """Bytes that are not UTF-8 become lone surrogates, which the intake recognises and refuses."""
    return line.decode("utf-8", "surrogateescape")


def _skip_line(file: Any) -> None:
    while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
        pass


def _map_objects(path: Path, columns: Columns, found: Iterator[_Found]) -> Iterator[RawRow]:
    """Objects need not have the same keys. When the first thousand together lack a required one, the
    file is not what its reader thinks it is."""
    head = list(islice(found, 1000))
    objects = [item for _, item, _, _ in head if item is not None]
    if head and not objects:
        raise SourceError(
            f"{path} has no JSON object in its first lines; nothing was taken from it. Write one object a "
            "line, or, in a .json file, one array of objects"
        )
    if head:
        names = list(dict.fromkeys(key for item in objects for key in item))
        _require(path, match(columns, names), names)
    return _mapped(columns, head, found)


def _mapped(columns: Columns, head: list[_Found], rest: Iterator[_Found]) -> Iterator[RawRow]:
    shapes: dict[tuple[str, ...], dict[str, str]] = {}
    for items in (head, rest):
        for where, item, text, problem in items:
            if item is None:
                yield RawRow(values={"text": text}, location=where, problem=problem)
                continue
            shape = tuple(item)
            if shape not in shapes:
                shapes[shape] = match(columns, shape)
            yield RawRow(values={f: item[name] for f, name in shapes[shape].items()}, location=where)


# -- CSV -----------------------------------------------------------------------------------------


def _read_csv(path: Path, columns: Columns) -> Iterator[RawRow]:
    """A header, then one record a row; the delimiter is the one that makes sense of the header."""
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise SourceError(f"{path} is UTF-16; save it as UTF-8")
    if not start:
        return iter(())
    delimiter, header = _header(path, columns)
    found = match(columns, header)
    _require(path, found, header)
    places = {field: header.index(name) for field, name in found.items()}
    return _csv_rows(path, delimiter, len(header), places)


def _header(path: Path, columns: Columns) -> tuple[str, list[str]]:
    choices: list[tuple[str, list[str]]] = [("", [])]
    problem = ""
    for delimiter in _DELIMITERS[path.suffix.lower()]:
        file, lines = _open_csv(path)
        with file:
            try:
                choices.append((delimiter, next(_csv_reader(lines, delimiter), [])))
            except csv.Error as error:
                problem = problem or _in_words(error)
    delimiter, header = max(choices, key=lambda c: (_required_in(columns, c[1]), len(c[1])))
    if problem and len(header) < 2:  # no other delimiter made sense of it
        raise SourceError(f"{path} has no readable header: {problem}")
    return delimiter, header


def _open_csv(path: Path) -> tuple[TextIO, "_CsvLines"]:
    """The file, and its lines after Excel's `sep=;`: what the delimiter is, the header tells as well."""
    file = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    lines = _CsvLines(file)
    if _SEPARATOR.fullmatch(file.readline(10)):
        lines.start += 1
    else:
        file.seek(0)
    return file, lines


def _csv_reader(lines: "_CsvLines", delimiter: str) -> Iterator[list[str]]:
    """Strict: a quote in the middle of a quoted text mostly means that an earlier one was not closed,
    and reading over it would make one row of many."""
    csv.field_size_limit(_LONGEST_LINE)
    return csv.reader(lines, delimiter=delimiter, strict=True)


class _CsvLines:
    """The physical lines of a CSV file, for `csv.reader`, which asks for a record's second line only
    while a quote is open.

    When no end is found to the quote, its first line alone is given up and the others are read again. That
    at most doubles the work: a look-ahead ends at the next line that could start another, because what
    opens a quote outside of quotes is an error or an end inside.
    """

    def __init__(self, file: TextIO) -> None:
        self.start = 1  # number of the record's first line
        self._file = file
        self._record: list[str] = []
        self._length = 0
        self._again: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._length > _LONGEST_RECORD:
            raise csv.Error(f"a quote opened in this line is not closed within {_LONGEST_RECORD} characters")
        line = self._again.popleft() if self._again else self._read()
        if not line and self._record:
            raise csv.Error("a quote opened in this line is never closed")
        if not line:
            raise StopIteration
        self._record.append(line)
        self._length += len(line)
        if len(line) >= _LONGEST_LINE and not _ends(line):
            raise csv.Error(f"the line is longer than {_LONGEST_LINE} characters")
        return line

    def next_record(self) -> None:
        self.start += len(self._record)
        self._record = []
        self._length = 0

    def give_up(self) -> str:
        """The record's first line, as text; the others will be read as records of their own."""
        first, *others = self._record
        self._record = [first]
        self._again.extendleft(reversed(others))
        return first[:_SHOWN].rstrip("\r\n")

    def _read(self) -> str:
        line = rest = self._file.readline(_LONGEST_LINE)
        while len(rest) >= _LONGEST_LINE and not _ends(rest):
            rest = self._file.readline(_LONGEST_LINE)
        return line


def _ends(line: str) -> bool:
    return line.endswith(("\n", "\r"))


def _in_words(error: csv.Error) -> str:
    said = str(error)
    return f"the quotes do not match: {said}" if "expected after" in said else said


def _csv_rows(path: Path, delimiter: str, width: int, places: dict[str, int]) -> Iterator[RawRow]:
    file, lines = _open_csv(path)
    with file:
        reader = _csv_reader(lines, delimiter)
        next(reader)
        while True:
            lines.next_record()
            where = f"{path.name} line {lines.start}"
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(values={"text": lines.give_up()}, location=where, problem=_in_words(error))
                continue
            if not any(value.strip() for value in record):
                continue  # blank lines, and the empty rows that spreadsheets leave at the end
            if len(record) != width:
                problem = f"{len(record)} columns where the header has {width}"
                yield RawRow(values={"text": delimiter.join(record)}, location=where, problem=problem)
                continue
            yield RawRow(values={f: record[place] for f, place in places.items()}, location=where)


def _required_in(columns: Columns, header: list[str]) -> int:
    return len(match(columns, header).keys() & set(REQUIRED))


# -- Parquet -------------------------------------------------------------------------------------


def _read_parquet(path: Path, columns: Columns) -> Iterator[RawRow]:
    # In a path DuckDB reads *, ? and [ as patterns; in brackets they mean themselves.
    literal = "".join(f"[{c}]" if c in "*?[" else c for c in str(path.absolute()))
    with duck.connect(":memory:") as connection:
        described = connection.execute("DESCRIBE SELECT * FROM read_parquet(?)", [literal]).fetchall()
        kinds = {line[0]: line[1] for line in described}
        found = match(columns, kinds)
        _require(path, found, list(kinds))
        rows = _parquet_rows(connection, path, literal, found, kinds)
        for number, values in enumerate(rows, 1):
            yield RawRow(values=dict(zip(found, values, strict=True)), location=f"{path.name} row {number}")


def _parquet_rows(
    connection: Any, path: Path, literal: str, found: dict[str, str], kinds: dict[str, Any]
) -> Iterator[tuple[Any, ...]]:
    """By DuckDB, until it refuses the file for one text that is not UTF-8; from there on by pyarrow."""
    done = 0
    try:
        selected = [_expression(field, name, kinds[name]) for field, name in found.items()]
        connection.execute(f"SELECT {', '.join(selected)} FROM read_parquet(?)", [literal])
        while rows := connection.fetchmany(_PARQUET_ROWS):
            yield from rows
            done += len(rows)
        return
    except duckdb.InvalidInputException:  # of a damaged file too, which pyarrow then refuses in its turn
        with pq.ParquetFile(path, coerce_int96_timestamp_unit="us", **_PARQUET_FRUGALLY) as file:
            if not {*found.values()} <= {*file.schema_arrow.names}:  # DuckDB tells columns of one name apart
                raise
            yield from islice(_unchecked_rows(connection, file, found), done, None)


def _expression(field: str, name: str, kind: Any) -> str:
    return quote(name) if field == "created_at" else as_written(name, str(kind))


def _unchecked_rows(connection: Any, file: Any, found: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    """What DuckDB makes of the columns, except that text may be bytes, which the intake judges."""
    names = list(found.values())
    for batch in file.iter_batches(_PARQUET_ROWS, columns=names):
        columns = [_spelt_out(batch.column(batch.schema.names.index(name))) for name in names]
        text = [_is_text(column.type) for column in columns]
        plain = [column.cast(_bytes_for_text(column.type)) for column in columns]
        rows = connection.from_arrow(pa.table(plain, names=list(found)))
        selected = [_expression(field, field, kind) for field, kind in zip(found, rows.types, strict=True)]
        for values in rows.project(", ".join(selected)).fetchall():
            yield tuple(_as_text(v) if t else v for v, t in zip(values, text, strict=True))


def _spelt_out(column: Any) -> Any:
    """Text that is kept as places in a list of texts, which may be broken like any other."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _bytes_for_text(kind: Any) -> Any:
    """A type with bytes in the place of text, however deep. What is not flat is no text to the intake."""
    if _is_text(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return _bytes_for_text(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _bytes_for_text(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_bytes_for_text(kind.key_type), _bytes_for_text(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_bytes_for_text(kind.value_type))
    return kind


def _is_text(kind: Any) -> bool:
    kind = getattr(kind, "storage_type", kind)  # JSON is text of a special type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _as_text(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


# -- columns -------------------------------------------------------------------------------------


def match(columns: Columns, found: Iterable[str]) -> dict[str, str]:
    """Field to the name it has among `found`: as configured, else ours; exactly, else in any case."""
    names = list(found)
    folded = {name.strip().casefold(): name for name in reversed(names)}
    matched: dict[str, str] = {}
    for field in Columns.__dataclass_fields__:
        for wanted in dict.fromkeys((getattr(columns, field), field)):
            name = wanted if wanted in names else folded.get(wanted.casefold()) if wanted else None
            if name is not None and wanted:
                matched[field] = name
                break
    return matched


def _require(path: Path, found: dict[str, str], header: list[str]) -> None:
    missing = [field for field in REQUIRED if field not in found]
    if missing:
        raise SourceError(
            f"{path} has no column for {' and '.join(missing)}; its columns are {listed(header)}. "
            f"Rename them, or set source.columns.{missing[0]}"
        )


_READERS: dict[str, Callable[[Path, Columns], Iterator[RawRow]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
