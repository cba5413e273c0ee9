"""Rows and files of any content: each line is taken, or in quarantine with its reason; nothing vanishes."""

import csv
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import SourceError
from storage.files import read_file
from storage.intake import take, validate
from storage.records import Rejected, utcnow
from storage.rows import Row
from storage.sources import Columns, RawRow, SourceSpec
from storage.store import Store
from tests.fuzzing import JSON, damaged, examples

SPEC = SourceSpec()
MANY = int(os.environ.get("FUZZ_ROWS", "20000"))  # 1000000 for the long run
FIELDS = ("id", "task", "question", "answer", "context", "created_at", "split")
VALUES = JSON | st.binary() | st.dates() | st.datetimes() | st.decimals() | st.uuids()
# Text with lone surrogates, NUL, control characters: what files of mixed encodings turn into.
ANY_TEXT = st.text(st.characters())


@given(values=st.dictionaries(st.sampled_from(FIELDS), VALUES | ANY_TEXT), problem=st.just("") | st.text())
def test_any_values_make_a_row_or_a_rejection_that_every_database_takes(
    values: dict[str, Any], problem: str
) -> None:
    raw = RawRow(values=values, location="x line 1", problem=problem)
    judged = validate(raw, SPEC, source="x", now=utcnow())
    if isinstance(judged, Row):
        texts = [judged.id, judged.task, judged.question, judged.answer, judged.context]
        assert all(len(text) == 32 for text in (judged.hash, judged.key, judged.question_key))
    else:
        texts = [judged.raw, judged.reason, judged.detail, judged.id or "", judged.task or ""]
        assert judged.reason
    assert all("\0" not in text for text in (texts if isinstance(judged, Row) else []))
    for text in texts:
        text.encode()  # no lone surrogate


@examples(60)
@given(data=st.data())
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_file_of_any_bytes_is_read_or_refused_in_words(
    tmp_path: Path, suffix: str, data: st.DataObject
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(damaged(good(suffix, tmp_path), data.draw) if data.draw(st.booleans()) else data.draw(
        st.binary(max_size=400)
    ))  # fmt: skip
    read, refused = [], ""
    try:
        read = [row for batch in read_file(path, Columns()) for row in batch]
    except SourceError as error:
        refused = str(error)
    assert str(path) in refused or not refused
    for row in read:
        assert isinstance(validate(row, SPEC, source="x", now=utcnow()), Row | Rejected)


def good(suffix: str, folder: Path) -> bytes:
    rows = [{"id": str(n), "question": f"q {n} é", "answer": "a", "task": "t"} for n in range(20)]
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / "good")
        return (folder / "good").read_bytes()
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


# `$` becomes the row's number, so that each is bad in its own way only.
BAD_JSON = {
    b'{"id": "$", "question": "q"': "unreadable",  # cut off
    b'{"id": "$", "question": "\xff\xfe", "answer": "a"}': "invalid-utf8",  # another encoding
    b'{"id": "$", "question": "nul \\u0000", "answer": "a"}': "invalid-text",
    b'{"id": "$", "question": ["q"], "answer": "a"}': "wrong-type",
    b'{"question": "q $", "answer": "a"}': "missing-id",
    b"id;question;answer;$": "unreadable",
}
BAD_CSV = {
    b"$,q,a": "unreadable",
    b"$,q,a,t,more": "unreadable",
    b'$,"q" x,a,t': "unreadable",
    b"$,q \xff,a,t": "invalid-utf8",
    b"$,nul \0,a,t": "invalid-text",
    b",q $,a,t": "missing-id",
    b"$,,a,t": "empty-question",
}
GOOD_JSON = b'{"id": "%d", "question": "q %d", "answer": "a", "task": "t"}'


@pytest.mark.parametrize(
    ("name", "head", "good", "bad"),
    [
        ("x.jsonl", b"", GOOD_JSON, BAD_JSON),
        ("x.csv", b"id,question,answer,task\n", b"%d,q %d,a,t", BAD_CSV),
    ],
)
def test_one_bad_row_in_a_hundred_costs_itself_and_every_row_is_accounted_for(
    tmp_path: Path, name: str, head: bytes, good: bytes, bad: dict[bytes, str]
) -> None:
    path, damage, count = tmp_path / name, itertools.cycle(bad), 0
    with path.open("wb") as file:
        file.write(head)
        for n in range(MANY):
            is_bad = n % 100 == 7
            count += is_bad
            file.write(next(damage).replace(b"$", b"%d" % n) if is_bad else good % (n, n))
            file.write(b"\n")
    with Store.open(tmp_path / "store.duckdb") as store:
        taken = take(read_file(path, Columns()), store, SPEC, shares=(0.1, 0.1), source_name="x")
        again = take(read_file(path, Columns()), store, SPEC, shares=(0.1, 0.1), source_name="x")
        kept = sum(n for splits in store.row_counts().values() for n in splits.values())
    assert (taken.read, taken.accepted, taken.rejected) == (MANY, MANY - count, count)
    assert kept == MANY - count
    assert taken.known == 0
    assert set(taken.quarantined) == set(bad.values())
    assert (again.accepted, again.rejected, again.quarantined) == (0, count, {})


def test_a_csv_with_another_delimiter_than_any_known_is_refused_with_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id^question^answer\n1^q^a\n")
    with pytest.raises(SourceError, match=r"no column for id and question.*id\^question\^answer"):
        list(read_file(path, Columns()))


def test_a_field_of_many_megabytes_costs_its_row_only(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [
        {"id": str(n), "question": "q" * (8_000_000 if n == 1 else 5), "answer": str(n)} for n in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = [row for batch in read_file(path, Columns()) for row in batch]
    judged = [validate(row, SPEC, source="x", now=utcnow()) for row in read]
    assert [row.reason if isinstance(row, Rejected) else "" for row in judged] == ["", "too-long", ""]
    assert len(str(judged[1])) < 10_000
