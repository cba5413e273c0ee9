"""Rows from files: JSON Lines, JSON, CSV, TSV and Parquet, in batches.

One bad line never spoils a file: what cannot be taken apart is handed on as text with its problem, for
the quarantine. Text formats are read line by line here, because DuckDB's readers give up the whole file
at a broken line, guess types (the answer "2024-01-01" would come back as a timestamp) and lose the text of
what they skip. Parquet, which has none of that, is read by DuckDB. Stores and judges nothing.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb

from storage.errors import SourceError
from storage.sources import REQUIRED, Columns, RawRow, listed, quote

_LONGEST_LINE = 16 * 1024 * 1024  # bytes; more than that in one line is no row
_DELIMITERS = {".csv": (",", ";", "\t", "|"), ".tsv": ("\t",)}
_IN_MEMORY = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}


def read_files(
    paths: Sequence[Path], columns: Columns, *, batch_rows: int = 20_000
) -> Iterator[list[RawRow]]:
    """The rows of files, in batches.

    A field is looked for under its configured name, then under ours, with any case. Raises `SourceError`
    for a file that is missing, of an unknown kind, or without a required column, before handing out
    anything of it.
    """
    for path in paths:  # all of them first: a misspelt last path stops the first too
        _check(path)
    for path in paths:
        yield from _batches(path, columns, batch_rows)


def _check(path: Path) -> None:
    if not path.is_file():
        raise SourceError(f"there is no file {path}")
    if path.suffix.lower() not in _READERS:
        raise SourceError(f"{path} is of an unknown kind; known are {', '.join(_READERS)}")


def _batches(path: Path, columns: Columns, batch_rows: int) -> Iterator[list[RawRow]]:
    try:
        rows = _READERS[path.suffix.lower()](path, columns)
        while batch := list(islice(rows, batch_rows)):
            yield batch
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from None
    except duckdb.Error as error:
        raise SourceError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


# -- JSON ----------------------------------------------------------------------------------------


def _read_json_lines(path: Path, columns: Columns) -> Iterator[RawRow]:
    return _map_objects(path, columns, _json_lines(path))


def _read_json(path: Path, columns: Columns) -> Iterator[RawRow]:
    """A .json file is one array of objects, or JSON Lines under another name."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        return _read_json_lines(path, columns)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}; nothing was taken from it") from None
    return _map_objects(path, columns, _json_array(path, values))


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
                yield where, None, _decode(line[:4096]), f"the line is longer than {_LONGEST_LINE} bytes"
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
        raise SourceError(f"{path} has no JSON object in its first lines; nothing was taken from it")
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
    choices = [(delimiter, _header(path, delimiter)) for delimiter in _DELIMITERS[path.suffix.lower()]]
    delimiter, header = max(choices, key=lambda c: (_required_in(columns, c[1]), len(c[1])))
    found = match(columns, header)
    _require(path, found, header)
    places = {field: header.index(name) for field, name in found.items()}
    return _csv_rows(path, delimiter, len(header), places)


def _header(path: Path, delimiter: str) -> list[str]:
    with _open_csv(path) as file:
        try:
            return next(csv.reader(file, delimiter=delimiter), [])
        except csv.Error as error:
            raise SourceError(f"{path} has no readable header: {error}") from None


def _open_csv(path: Path) -> Any:
    csv.field_size_limit(_LONGEST_LINE)
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_rows(path: Path, delimiter: str, width: int, places: dict[str, int]) -> Iterator[RawRow]:
    with _open_csv(path) as file:
        reader = csv.reader(file, delimiter=delimiter)
        next(reader)
        while True:
            start = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(values={}, location=f"{path.name} line {start}", problem=str(error))
                continue
            where = f"{path.name} line {start}"
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
    with duckdb.connect(":memory:", config=_IN_MEMORY) as connection:
        described = connection.execute("DESCRIBE SELECT * FROM read_parquet(?)", [literal]).fetchall()
        header = [line[0] for line in described]
        found = match(columns, header)
        _require(path, found, header)
        selected = ", ".join(quote(name) for name in found.values())
        connection.execute(f"SELECT {selected} FROM read_parquet(?)", [literal])
        number = 0
        while rows := connection.fetchmany(1000):
            for values in rows:
                number += 1
                yield RawRow(
                    values=dict(zip(found, values, strict=True)), location=f"{path.name} row {number}"
                )


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
