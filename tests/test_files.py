"""Rows from files: every format, and bad lines that do not spoil the good ones."""

import json
import os
import time
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import SourceError
from storage.files import match, read_file
from storage.intake import validate
from storage.records import Rejected, utcnow
from storage.sources import Columns, RawRow, SourceSpec

DEFAULT = Columns()
ROWS = [
    {"id": "1", "question": 'he said "hi", twice\nand left', "answer": "2024-01-01", "task": "t"},
    {"id": "2", "question": "ß é 日本 🙂", "answer": "true", "task": "t"},
]


def rows(path: Path, columns: Columns = DEFAULT) -> list[RawRow]:
    return [row for batch in read_file(path, columns) for row in batch]


def put(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_jsonl() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


def as_csv(delimiter: str = ",") -> str:
    lines = [["id", "question", "answer", "task"], *([row[k] for k in row] for row in ROWS)]
    return "".join(delimiter.join('"' + v.replace('"', '""') + '"' for v in line) + "\r\n" for line in lines)


def as_parquet(folder: Path, name: str = "rows.parquet") -> Path:
    source = put(folder, "for-parquet.jsonl", as_jsonl())
    path = folder / name
    columns = "{id: 'VARCHAR', question: 'VARCHAR', answer: 'VARCHAR', task: 'VARCHAR'}"
    with duckdb.connect() as connection:
        connection.execute(f"COPY (FROM read_json('{source}', columns={columns})) TO '{folder}/x.parquet'")
    (folder / "x.parquet").rename(path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", as_jsonl()),
        ("rows.ndjson", as_jsonl()),
        ("rows.json", as_jsonl()),
        ("rows.json", "\n " + json.dumps(ROWS, indent=2)),
        ("rows.csv", as_csv()),
        ("rows.CSV", as_csv(";")),
        ("rows.tsv", as_csv("\t")),
        ("bom.csv", "\ufeff" + as_csv()),
        ("bom.jsonl", "\ufeff" + as_jsonl()),
        ("no-newline-at-the-end.jsonl", as_jsonl().rstrip()),
    ],
)
def test_every_text_format_brings_the_texts_as_they_were_written(
    tmp_path: Path, name: str, content: str
) -> None:
    assert [row.values for row in rows(put(tmp_path, name, content))] == ROWS


def test_parquet_brings_the_texts_as_they_were_written(tmp_path: Path) -> None:
    assert [row.values for row in rows(as_parquet(tmp_path))] == ROWS


@pytest.mark.parametrize("name", ["a[1].parquet", "b*.parquet", "c?.parquet", "it's; --.parquet"])
def test_patterns_in_a_file_name_mean_themselves(tmp_path: Path, name: str) -> None:
    as_parquet(tmp_path, "bystander.parquet")
    assert len(rows(as_parquet(tmp_path, name))) == 2


def test_a_malformed_line_is_handed_on_as_text_with_its_place(tmp_path: Path) -> None:
    good = '{"id": 1, "question": "q", "answer": "a"}'
    path = put(tmp_path, "x.jsonl", f'{good}\n{{"id": 2, \n\n[1, 2]\n"text"\n{good}\n')
    found = rows(path)
    assert [bool(row.problem) for row in found] == [False, True, True, True, False]
    assert found[1].values == {"text": '{"id": 2,'}
    assert found[1].location == "x.jsonl line 2"
    assert "not valid JSON" in found[1].problem
    assert found[2].problem == "not a JSON object"


def test_one_json_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    (only,) = rows(put(tmp_path, "x.json", "\ufeff\n" + json.dumps(ROWS[0], indent=2)))
    assert (only.values, only.location) == (ROWS[0], "x.json element 1")


@pytest.mark.parametrize(
    ("name", "told"),
    [("x.jsonl", "has no JSON object.*one object a line"), ("x.json", "is not valid JSON")],
)
def test_json_over_several_lines_where_lines_are_rows_is_told(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(SourceError, match=told):
        rows(put(tmp_path, name, "\n".join(json.dumps(row, indent=2) for row in ROWS)))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_excels_line_about_the_delimiter_is_no_header(tmp_path: Path, end: str) -> None:
    for head in ("sep=;", "\ufeffSEP=;"):
        path = put(tmp_path, "x.csv", end.join([head, "id;question;answer", "1;a,b;c", '2;"q"q;a', ""]))
        good, bad = rows(path)
        assert good.values == {"id": "1", "question": "a,b", "answer": "c"}
        assert (good.location, bad.location) == ("x.csv line 3", "x.csv line 4")
    (row,) = rows(put(tmp_path, "x.csv", "id,question,answer,sep=\n1,q,a,;\n"))
    assert row.values["id"] == "1"


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("x.csv", "1,a\0b,c", "invalid-text"),
        ("x.jsonl", '{"id": 1, "question": "a\\u0000b", "answer": "c"}', "invalid-text"),
        ("x.jsonl", '{"id": 1, "question": "a\0b", "answer": "c"}', "unreadable"),  # which JSON forbids
    ],
)
def test_a_nul_costs_its_own_row_only(tmp_path: Path, name: str, row: str, reason: str) -> None:
    good = "2,q,a" if name == "x.csv" else '{"id": 2, "question": "q", "answer": "a"}'
    head = "id,question,answer\n" if name == "x.csv" else ""
    found = rows(put(tmp_path, name, f"{head}{row}\n{good}\n"))
    judged = [validate(each, SourceSpec(), source="x", now=utcnow()) for each in found]
    assert [each.reason if isinstance(each, Rejected) else each.question for each in judged] == [reason, "q"]


def test_json_nested_without_end_is_a_bad_line_and_no_crash(tmp_path: Path) -> None:
    good = b'{"id": 1, "question": "q", "answer": "a"}\n'
    found = rows(put(tmp_path, "x.jsonl", good + b"[" * 200_000 + b"\n" + b'{"id": ' + b"9" * 5000 + b"}\n"))
    assert [bool(row.problem) for row in found] == [False, True, True]


def test_a_line_without_end_is_skipped_and_the_next_is_read(tmp_path: Path) -> None:
    good = b'{"id": 1, "question": "q", "answer": "a"}\n'
    found = rows(put(tmp_path, "x.jsonl", good + b"x" * (40 * 1024 * 1024) + b"\n" + good))
    assert [bool(row.problem) for row in found] == [False, True, False]
    assert len(str(found[1].values["text"])) < 10_000


def test_bytes_that_are_not_utf8_stay_recognisable(tmp_path: Path) -> None:
    jsonl = put(tmp_path, "x.jsonl", b'{"id": 1, "question": "\xff\xfe", "answer": "a"}\n')
    csv = put(tmp_path, "x.csv", b"id,question,answer\n1,\xff\xfe,a\n2,fine,a\n")
    for row in (rows(jsonl)[0], rows(csv)[0]):
        assert row.values["question"] == "\udcff\udcfe"
    assert rows(csv)[1].values["question"] == "fine"


def test_a_csv_line_with_the_wrong_number_of_columns_does_not_stop_the_file(tmp_path: Path) -> None:
    content = 'id,question,answer\n1,q,a\n2,only\n3,q,a,b,c\n\n,,\n4,he said "hi" there,a\r\n5,#5,a\n'
    found = rows(put(tmp_path, "x.csv", content))
    assert [row.values.get("id") for row in found] == ["1", None, None, "4", "5"]
    assert found[1].problem == "2 columns where the header has 3"
    assert found[1].values == {"text": "2,only"}
    assert found[1].location == "x.csv line 3"
    assert found[3].values["question"] == 'he said "hi" there'


def test_a_quote_that_never_closes_costs_its_own_line_and_no_other(tmp_path: Path) -> None:
    content = 'id,question,answer\n1,q1,a\n2,What is two,"Two\n3,What is three,Three\n4,q4,Four\n'
    found = rows(put(tmp_path, "x.csv", content))
    assert [row.values.get("answer") for row in found] == ["a", None, "Three", "Four"]
    assert found[1].values == {"text": '2,What is two,"Two'}
    assert found[1].location == "x.csv line 3"
    assert found[1].problem == "a quote opened in this line is never closed"
    assert [row.location for row in found[2:]] == ["x.csv line 4", "x.csv line 5"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_quote_that_only_a_later_row_closes_costs_its_own_line_and_no_other(
    tmp_path: Path, end: str
) -> None:
    lines = ["id,question,answer", '2,q2,"Two', '3,"q3, again",Three', '4,"four\n""lines""\n\n.",a', "5,q5,a"]
    found = rows(put(tmp_path, "x.csv", end.join(lines)))
    assert [row.values.get("id") for row in found] == [None, "3", "4", "5"]
    assert found[0].values == {"text": '2,q2,"Two'}
    assert found[0].problem == "the quotes do not match: ',' expected after '\"'"
    assert found[1].values["question"] == "q3, again"
    assert found[2].values["question"] == 'four\n"lines"\n\n.'
    assert [row.location for row in found] == [f"x.csv line {n}" for n in (2, 3, 4, 8)]


def test_a_quote_inside_quotes_is_no_guess_about_what_was_meant(tmp_path: Path) -> None:
    content = 'id,question,answer\n1,"he said "hi" there",a\n2,"he said \\"hi\\"",a\n3,q,a\n'
    found = rows(put(tmp_path, "x.csv", content))
    assert [bool(row.problem) for row in found] == [True, True, False]
    assert [row.values.get("text") for row in found[:2]] == content.splitlines()[1:3]


def test_unreadable_csv_records_stay_apart_in_the_quarantine(tmp_path: Path) -> None:
    long = "x" * 20_000
    found = rows(put(tmp_path, "x.csv", f'id,question,answer\n1,"q"1,a\n2,"q"2,a\n3,"q"{long},a\n'))
    judged = [validate(row, SourceSpec(), source="x", now=utcnow()) for row in found]
    assert len({row.hash for row in judged if isinstance(row, Rejected)}) == 3
    assert [len(str(row.values["text"])) for row in found] == [8, 8, 4096]


def test_a_record_may_span_many_lines_but_not_any_number(tmp_path: Path) -> None:
    header, text, endless = "id,question,answer\n", "a line of it\n" * 10_000, "2,q,a\n" * 400_000
    found = rows(put(tmp_path, "x.csv", f'{header}1,"{text}",a\n2,"q,a\n{endless}'))
    assert found[0].values["question"] == text
    assert found[1].values == {"text": '2,"q,a'}
    assert "not closed within" in found[1].problem
    assert len(found) == 400_002
    assert not any(row.problem for row in found[2:])


def test_a_csv_line_without_end_is_skipped_and_the_next_is_read(tmp_path: Path) -> None:
    endless = "x" * (17 * 1024 * 1024)
    content = f'id,question,answer\n1,q,a\n{endless}\n2,q,a\n3,q,"\n{endless}\n4,q,a\n'
    found = rows(put(tmp_path, "x.csv", content))
    assert [row.values.get("id") for row in found] == ["1", None, "2", None, None, "4"]
    assert [row.location for row in found if row.problem] == [f"x.csv line {n}" for n in (3, 5, 6)]
    assert all(len(str(row.values.get("text", ""))) < 10_000 for row in found)


def test_many_open_quotes_are_read_in_time_that_grows_with_the_file_only(tmp_path: Path) -> None:
    def seconds(count: int, question: str) -> float:
        lines = (f"{n},{question if n % 100 == 50 else 'q'},a\n" for n in range(count))
        path = put(tmp_path, "x.csv", "id,question,answer\n" + "".join(lines))
        start = time.process_time()
        assert len(rows(path)) == count
        return time.process_time() - start

    # Twice the time in practice; if every open quote were followed to the end, hundreds of times.
    assert seconds(100_000, '"open') < 10 * seconds(100_000, "plain")


def test_a_header_with_an_open_quote_does_not_swallow_the_rows(tmp_path: Path) -> None:
    path = put(tmp_path, "x.csv", 'id,question,answer,"a note\n1,q,a,n\n2,q,a,n\n')
    with pytest.raises(SourceError, match=r"x\.csv has no readable header: a quote .* is never closed"):
        rows(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_even_when_others_are_in_the_texts(tmp_path: Path, delimiter: str) -> None:
    others = "".join({",", ";", "\t", "|"} - {delimiter})
    lines = [["id", "question", "answer", "a note"], ["1", f"q{others}" * 5, "a", others]]
    path = put(tmp_path, "x.csv", "\n".join(delimiter.join(line) for line in lines))
    assert rows(path)[0].values == {"id": "1", "question": f"q{others}" * 5, "answer": "a"}


def test_columns_are_found_by_configured_name_then_by_ours_in_any_case() -> None:
    columns = Columns(question="utterance", task="", split="")
    found = ["ID", "Question", " answer ", "utterance", "Task"]
    assert match(columns, found) == {
        "id": "ID",
        "question": "utterance",
        "answer": " answer ",
        "task": "Task",
    }
    assert match(columns, ["question"]) == {"question": "question"}


def test_optional_columns_may_be_missing(tmp_path: Path) -> None:
    path = put(tmp_path, "x.csv", "id,question,answer\n1,q,a\n")
    columns = Columns(task="skill", context="passage", created_at="at", split="split")
    assert rows(path, columns=columns)[0].values == {"id": "1", "question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.csv", "id,frage,answer\n1,q,a\n"), ("x.jsonl", '{"id": 1, "frage": "q", "answer": "a"}\n')],
)
def test_a_missing_required_column_is_named_with_those_found(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(
        SourceError, match=r"no column for question; its columns are id, frage, answer.*Rename"
    ):
        rows(put(tmp_path, name, content))


def texts(*values: bytes | None) -> pa.Array:
    """Text as careless writers leave it: nobody checked that it is UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


def test_text_that_is_not_utf8_costs_a_parquet_file_that_row_only(tmp_path: Path) -> None:
    names = [f"q {n} é".encode() for n in range(5000)]
    names[3210] = b"caf\xe9"
    made = datetime(2024, 1, 1, 1, 2, 3, 4)
    table = {
        "id": pa.array(range(5000)),
        "question": texts(*names),
        "answer": pa.array([Decimal("1.50")] * 5000),
        "task": pa.array(["t"] * 5000).dictionary_encode(),
        "context": pa.array([b"c"] * 5000),
        "at": pa.array([made] * 5000, pa.timestamp("ns")),
    }
    pq.write_table(pa.table(table), tmp_path / "x.parquet", row_group_size=2000)
    found = rows(tmp_path / "x.parquet", columns=Columns(context="context", created_at="at"))
    expected = {"answer": "1.50", "task": "t", "context": b"c", "created_at": made}
    assert [row.values for row in found] == [
        {"id": n, "question": b"caf\xe9" if n == 3210 else f"q {n} é", **expected} for n in range(5000)
    ]
    assert [row.location for row in found] == [f"x.parquet row {n}" for n in range(1, 5001)]
    judged = [validate(row, SourceSpec(), source="x", now=utcnow()) for row in found[3209:3212]]
    assert [row.reason if isinstance(row, Rejected) else "" for row in judged] == ["", "invalid-utf8", ""]


@pytest.mark.parametrize("last", [b"fine", b"caf\xe9"])
def test_a_number_of_parquet_is_written_as_its_own_kind_writes_it(tmp_path: Path, last: bytes) -> None:
    """Whoever reads it: what is not UTF-8 makes it pyarrow."""
    text = pa.array([b"fine", last]).cast(pa.string(), safe=False)
    table = {"id": text, "question": text, "answer": pa.array([0.1, 2.5], pa.float32())}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    assert [row.values["answer"] for row in rows(tmp_path / "x.parquet")] == ["0.1", "2.5"]


def test_every_text_type_of_parquet_may_hold_text_that_is_not_utf8(tmp_path: Path) -> None:
    question = pa.array([b"ok", b"\xff", None])
    for text in (question.view(pa.string()), question.cast(pa.large_binary()).view(pa.large_string())):
        table = {"id": text, "question": text, "answer": texts(b"a", b"\xfe", b"c")}
        pq.write_table(pa.table(table), tmp_path / "x.parquet")
        found = [tuple(row.values.values()) for row in rows(tmp_path / "x.parquet")]
        assert found == [("ok", "ok", "a"), (b"\xff", b"\xff", b"\xfe"), (None, None, "c")]


def test_a_parquet_column_kept_as_a_dictionary_may_hold_text_that_is_not_utf8(tmp_path: Path) -> None:
    places, words = pa.array([0, 1, None, 0], pa.int32()), texts(b"ok", b"\xff")
    kept = pa.DictionaryArray.from_arrays(places, words)
    table = {"id": texts(b"1", b"2", b"3", b"4"), "question": kept, "answer": texts(b"a", b"b", b"c", b"d")}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    found = [row.values["question"] for row in rows(tmp_path / "x.parquet")]
    assert found == ["ok", b"\xff", None, "ok"]


BAD = texts(b"x", b"\xff", b"y")
PLACES = pa.array([0, 1, 2, 3], pa.int32())
NESTED = {
    "struct": pa.StructArray.from_arrays([BAD], ["s"]),
    "list": pa.ListArray.from_arrays(PLACES, BAD),
    "large list": pa.LargeListArray.from_arrays(PLACES.cast(pa.int64()), BAD),
    "list of one": pa.FixedSizeListArray.from_arrays(BAD, 1),
    "map": pa.MapArray.from_arrays(PLACES, texts(b"1", b"2", b"3"), BAD),
    "list of structs": pa.ListArray.from_arrays(PLACES, pa.StructArray.from_arrays([BAD], ["s"])),
    "struct of a dictionary": pa.StructArray.from_arrays(
        [pa.DictionaryArray.from_arrays(PLACES[:3], BAD)], ["d"]
    ),
}


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize(
    ("name", "verdicts"),
    [
        ("something else", ["", "", ""]),
        ("created_at", ["", "", ""]),
        ("context", ["wrong-type"] * 3),
        ("question", ["wrong-type"] * 3),
        ("split", ["unknown-split"] * 3),
    ],
)
def test_text_that_is_not_utf8_deep_in_a_parquet_column_costs_no_other_row(
    tmp_path: Path, kind: str, name: str, verdicts: list[str]
) -> None:
    good = dict.fromkeys(("id", "question", "answer"), texts(b"1", b"2", b"3"))
    pq.write_table(pa.table({**good, name: NESTED[kind]}), tmp_path / "x.parquet")
    wide = Columns(context="context", created_at="created_at", split="split")
    judged = [
        validate(row, SourceSpec(), source="x", now=utcnow())
        for row in rows(tmp_path / "x.parquet", columns=wide)
    ]
    assert [row.reason if isinstance(row, Rejected) else "" for row in judged] == verdicts


def test_a_parquet_file_with_such_text_is_not_loaded_as_a_whole(tmp_path: Path) -> None:
    text = texts(b"\xff", *(b"%d" % n * 200 for n in range(40_000)))
    table = pa.table({"id": text, "question": text, "answer": text})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10_000, compression="none")
    size = (tmp_path / "x.parquet").stat().st_size
    del table, text
    before = pa.total_allocated_bytes()
    batches = read_file(tmp_path / "x.parquet", DEFAULT, batch_rows=1000)
    peak = max(pa.total_allocated_bytes() - before for _ in batches)
    assert size > 60_000_000
    assert peak < size / 3


def test_damage_of_a_parquet_file_is_still_an_error_in_words(tmp_path: Path) -> None:
    text = pa.array([f"a text {n}" for n in range(5000)])
    pq.write_table(pa.table({"id": text, "question": text, "answer": text}), tmp_path / "x.parquet")
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[500:3000] = bytes(byte ^ 0x5A for byte in content[500:3000])
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(SourceError, match=r"x\.parquet cannot be read: .*[Ss]nappy"):
        rows(tmp_path / "x.parquet")


def test_parquet_without_a_required_column_says_so(tmp_path: Path) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"COPY (SELECT 1 AS id, 'q' AS question) TO '{tmp_path}/x.parquet'")
    with pytest.raises(SourceError, match="no column for answer; its columns are id, question"):
        rows(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.xlsx", b"PK", "of an unknown kind; known are .jsonl"),
        ("x.parquet", b"not parquet at all", "cannot be read"),
        ("x.json", b'[{"id": 1,', "not valid JSON.*nothing was taken"),
        ("x.jsonl", b"\x00\x01\x02" * 100, "has no JSON object"),
        ("x.csv", "id,question,answer\n1,q,a\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
    ],
)
def test_a_file_of_the_wrong_kind_is_an_error_in_words(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        rows(put(tmp_path, name, content))


def test_a_missing_file_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"b\.csv cannot be read: No such file"):
        rows(tmp_path / "b.csv")


def test_a_name_that_the_store_could_not_note_is_an_error_in_words(tmp_path: Path) -> None:
    path = put(tmp_path, os.fsdecode(b"r\xff.jsonl"), as_jsonl())
    with pytest.raises(SourceError, match=r"r\\udcff\.jsonl' is not UTF-8; rename it"):
        rows(path)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    assert rows(put(tmp_path, name, "")) == []


def test_objects_may_differ_in_their_keys(tmp_path: Path) -> None:
    items: list[dict[str, Any]] = [{"id": 1, "question": "q", "answer": "a", "context": "c"}, {"id": 2}]
    found = rows(put(tmp_path, "x.jsonl", "\n".join(map(json.dumps, items))), columns=Columns())
    assert [row.values for row in found] == items


def test_files_are_read_in_batches(tmp_path: Path) -> None:
    lines = "".join(f'{{"id": {n}, "question": "q{n}", "answer": "a"}}\n' for n in range(2500))
    sizes = [len(b) for b in read_file(put(tmp_path, "x.jsonl", lines), DEFAULT, batch_rows=1000)]
    assert sizes == [1000, 1000, 500]
