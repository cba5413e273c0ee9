"""From raw rows to accepted ones: what is wrong is quarantined with its reason, the rest is stored once.

Judges rows and hands them to the store in batches; opens nothing itself. Reading the same rows again, in
any order and after any crash, changes nothing: a row that says what it said last is no news. What a user
wrote is only ever text here.
"""

import json
import math
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal

from storage.records import Rejected, rejection_hash
from storage.rows import SPLIT_NAMES, Row, Split, normalise
from storage.sources import DuckDBSource, RawRow, SourceSpec
from storage.store import Store

CountTokens = Callable[[str, str], int]  # (context and question, answer) -> tokens of both

_MOST_CHARACTERS = 1_000_000  # no prompt is as long; spares the tokenizer
_LONGEST_TASK = 100  # characters: a task's name becomes part of metric names
_LABELS_TOLD = 20
SHOWN = 4_000  # characters of a field that the quarantine keeps
_SHORTENED = re.compile(r"… \((\d+) characters\)$")


@dataclass(frozen=True, kw_only=True)
class IntakeReport:
    """What became of the rows that were read: `read` is the sum of the next three.

    `quarantined` counts by reason only what was not in quarantine already; `rejected` counts all.
    `superseded` are rows that lost their place to another answer: older ones, or late arrivals.
    """

    read: int = 0
    accepted: int = 0
    known: int = 0
    rejected: int = 0
    superseded: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "IntakeReport") -> "IntakeReport":
        reasons = sorted({*self.quarantined, *other.quarantined})
        return IntakeReport(
            read=self.read + other.read,
            accepted=self.accepted + other.accepted,
            known=self.known + other.known,
            rejected=self.rejected + other.rejected,
            superseded=self.superseded + other.superseded,
            quarantined={r: self.quarantined.get(r, 0) + other.quarantined.get(r, 0) for r in reasons},
        )

    def __str__(self) -> str:
        told = f"{self.read} read, {self.accepted} new, {self.known} known"
        if self.superseded:
            told += f", {self.superseded} superseded"
        if self.rejected:
            told += f", {self.rejected} not accepted"
        if self.quarantined:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.quarantined.items())
            told += f" (new in quarantine: {reasons})"
        return told


class _Refused(Exception):
    """This row is not taken: a reason code, and words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def pull(
    source: DuckDBSource,
    store: Store,
    *,
    shares: tuple[float, float],
    count_tokens: CountTokens | None = None,
    max_tokens: int = 0,
) -> IntakeReport:
    """Everything new in the source into the store.

    The cursor moves only when every batch is stored; a crash before that means reading again. It says nothing
    of other columns than those that were read, nor of what was refused by other labels, another limit of
    tokens or another rule for conflicts: then everything is compared.
    """
    place, spec = f"columns of {source.name}", source.spec
    labels = sorted((task, sorted(labels)) for task, labels in spec.labels.items())
    read_by = repr((spec.columns, labels, str(spec.on_conflict), max_tokens))
    cursor = store.cursor(source.name) if store.get_meta(place) == read_by else None
    report = take(
        source.batches(cursor), store, spec, shares=shares, count_tokens=count_tokens,
        max_tokens=max_tokens, source_name=source.name,
    )  # fmt: skip
    with store.transaction():
        store.save_cursor(source.name, source.next_cursor(cursor))
        store.set_meta(place, read_by)
    return report


def take(
    batches: Iterable[Sequence[RawRow]],
    store: Store,
    spec: SourceSpec,
    *,
    shares: tuple[float, float],
    count_tokens: CountTokens | None = None,
    max_tokens: int = 0,
    source_name: str,
) -> IntakeReport:
    """Batches of raw rows into the store, each as a whole. `shares` are (validation, suite)."""
    report = IntakeReport()
    for batch in batches:
        report += _take_batch(batch, store, spec, shares, count_tokens, max_tokens, source_name)
    return report


def _take_batch(
    batch: Sequence[RawRow],
    store: Store,
    spec: SourceSpec,
    shares: tuple[float, float],
    count_tokens: CountTokens | None,
    max_tokens: int,
    source: str,
) -> IntakeReport:
    now = store.clock()
    rows: list[tuple[RawRow, Row]] = []
    refused: list[Rejected] = []
    erased = store.erased()
    for raw in batch:
        judged = validate(raw, spec, source=source, now=now)
        if isinstance(judged, Row):
            rows.append((raw, judged))
        elif not erased or content_hash(judged.raw, spec.default_task) not in erased:
            refused.append(judged)
    fresh: list[Row] = []
    for (raw, row), repeated in zip(rows, store.repeats([row for _, row in rows], source), strict=True):
        if repeated or (erased and not erased.isdisjoint((row.hash, *_once_refused_as(raw)))):
            continue
        try:  # only now: what was taken in stays, and counting tokens costs more than all the rest
            _check_label(row, spec)
            _check_length(row, count_tokens, max_tokens)
            fresh.append(row)
        except _Refused as refusal:
            refused.append(_reject(raw, refusal, source, now))
    before = store.quarantine_counts()
    store.quarantine(refused)
    acceptance = store.accept(fresh, source, shares=shares, on_conflict=spec.on_conflict)
    after = store.quarantine_counts()
    rejected = len(refused) + acceptance.rejected
    return IntakeReport(
        read=len(batch),
        accepted=acceptance.accepted,
        known=len(batch) - acceptance.accepted - rejected,
        rejected=rejected,
        superseded=acceptance.superseded,
        quarantined={r: n - before.get(r, 0) for r, n in after.items() if n > before.get(r, 0)},
    )


def validate(raw: RawRow, spec: SourceSpec, *, source: str, now: datetime) -> Row | Rejected:
    """The row, or why it is none, whatever the settings."""
    try:
        return _row(raw, spec)
    except _Refused as refusal:
        return _reject(raw, refusal, source, now)


def _row(raw: RawRow, spec: SourceSpec) -> Row:
    if raw.problem:
        raise _Refused("unreadable", raw.problem)
    given = raw.values
    question = given.get("question")
    if question is not None and not isinstance(question, str | bytes):
        raise _Refused("wrong-type", f"the question is {_kind(question)}, not text")
    texts = {name: _text(name, given.get(name)) for name in ("id", "task", "question", "answer")}
    context = _text("context", given.get("context"), strip=False)
    if sum(map(len, texts.values())) + len(context) > _MOST_CHARACTERS:
        raise _Refused("too-long", f"more than {_MOST_CHARACTERS} characters")
    task = " ".join((texts["task"] or spec.default_task).split())
    if not texts["id"]:
        raise _Refused("missing-id", "the row has no id")
    for name, text in (("task", task), ("question", texts["question"]), ("answer", texts["answer"])):
        if not _says_something(text):
            raise _Refused(f"empty-{name}", f"the {name} is empty")
    if len(task) > _LONGEST_TASK:
        raise _Refused("too-long", f"the task's name has {len(task)} characters; at most {_LONGEST_TASK}")
    return Row(
        id=texts["id"],
        task=task,
        question=texts["question"],
        answer=texts["answer"],
        context=context,
        created_at=_time(given.get("created_at")),
        split=_split(given.get("split")),
    )


def _text(name: str, value: object, *, strip: bool = True) -> str:
    """A field as text; "" when it is absent. White space around it means nothing."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Refused("invalid-utf8", f"the {name} is not UTF-8: {error}") from None
    elif not isinstance(value, str):
        value = _scalar_text(name, value)
    if not value.isprintable():  # printable text has neither; most text is
        if "\0" in value:
            raise _Refused("invalid-text", f"the {name} contains a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _Refused("invalid-utf8", f"the {name} is not UTF-8: {error.reason}") from None
    return value.strip() if strip else value


def _scalar_text(name: str, value: object) -> str:
    """Typed columns: numbers, truth values and dates have one obvious spelling; structures have none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")  # str says 1E-7
    if isinstance(value, int | Decimal | date | uuid.UUID) or (
        isinstance(value, float) and math.isfinite(value)
    ):
        return str(value)
    raise _Refused("wrong-type", f"the {name} is {_kind(value)}, not text")


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", bool: "a truth value"}.get(
        type(value), f"of type {type(value).__name__}"
    )


def _says_something(text: str) -> bool:
    """Whether anything is left of it once white space and invisible characters are gone."""
    return any(map(str.isalnum, text)) or bool(normalise(text))


def _split(value: object) -> Split | None:
    if value is None or value == "":
        return None
    split = SPLIT_NAMES.get(value.strip().casefold()) if isinstance(value, str) else None
    if split is None and not (isinstance(value, str) and not value.strip()):
        raise _Refused("unknown-split", f"split {str(value)[:100]!r}; known are {', '.join(SPLIT_NAMES)}")
    return split


def _time(value: object) -> datetime | None:
    """UTC, naive. No row is refused for its time, so what is no time is simply none."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return datetime(value.year, value.month, value.day) if isinstance(value, date) else None
    try:
        return value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value
    except OverflowError:
        return None


def _check_label(row: Row, spec: SourceSpec) -> None:
    labels = spec.labels.get(normalise(row.task))
    if labels is not None and row.answer.casefold() not in labels:
        known = ", ".join(sorted(labels)[:_LABELS_TOLD])
        raise _Refused("unknown-label", f"the answer is none of the labels of tasks.{row.task}: {known}")


def _check_length(row: Row, count_tokens: CountTokens | None, max_tokens: int) -> None:
    if count_tokens is None:
        return
    asked = f"{row.context}\n{row.question}" if row.context else row.question
    tokens = count_tokens(asked, row.answer)
    if tokens > max_tokens:
        raise _Refused("too-long", f"{tokens} tokens; model.max_tokens is {max_tokens}")


def _once_refused_as(raw: RawRow) -> list[str]:
    """Its hashes in quarantine, had it been there. Of a shortened row that is all that an erasure can leave;
    it must not come back when `model.max_tokens` is raised or a label added."""
    whole = _whole(_all_plain(raw.values))
    return [rejection_hash(whole, reason) for reason in ("too-long", "unknown-label")]


def _whole(plain: Mapping[str, object]) -> str:
    """What the identity of a refused row is made of, with the reason."""
    return json.dumps(plain, sort_keys=True)


def _reject(raw: RawRow, refusal: _Refused, source: str, now: datetime) -> Rejected:
    """The identity covers everything that was delivered; what is kept to look at may be shortened."""
    plain = _all_plain(raw.values)
    return Rejected(
        hash=rejection_hash(_whole(plain), refusal.reason),
        id=_label(raw.values.get("id")),
        task=_label(raw.values.get("task")),
        raw=json.dumps({name: _shorten(value) for name, value in plain.items()}, ensure_ascii=False),
        reason=refusal.reason,
        detail=_storable(f"{raw.location}: {refusal.detail}"),
        source=source,
        at=now,
    )


def said(raw: str) -> dict[str, str]:
    """The fields of a quarantined row that say something."""
    return {name: str(value) for name, value in json.loads(raw).items() if value is not None}


def content_hash(raw: str, default_task: str) -> str | None:
    """The hash that a quarantined row would have as a row, if it asks anything. Of a shortened one that
    cannot be told: `take` knows it by its hash in quarantine."""
    told = said(raw)
    question, answer, context = (told.get(name, "") for name in ("question", "answer", "context"))
    if not normalise(question) or any(map(shortened, told.values())):
        return None
    task = told.get("task", "").strip() or default_task
    return Row(id="", task=task, question=question, answer=answer, context=context).hash


def is_as_it_came(rejected: Rejected) -> bool:
    """Whether a quarantined row has the content that its identity was made of.

    Of a shortened one that cannot be told any more.
    """
    if rejection_hash(rejected.raw, rejected.reason) == rejected.hash:
        return True  # refused by the store, which keeps the very text
    try:
        values = json.loads(rejected.raw)
        if any(isinstance(value, str) and shortened(value) for value in values.values()):
            return True
        return rejection_hash(_whole(values), rejected.reason) == rejected.hash
    except (ValueError, AttributeError, RecursionError):
        return False


def _all_plain(values: Mapping[str, object]) -> dict[str, str | int | float | bool | None]:
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int | float):
        return value
    return _storable(value)


def _storable(value: object) -> str:
    """Any value as text that every database takes: what is no text is shown as an escape."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value).encode("utf-8", "backslashreplace").decode()


def _shorten(value: str | int | float | bool | None) -> str | int | float | bool | None:
    if isinstance(value, str) and len(value) > SHOWN:
        return f"{value[:SHOWN]}… ({len(value)} characters)"
    return value


def shortened(text: str) -> tuple[str, int] | None:
    """What is left of a text that the quarantine has shortened, and how long it was; None of a whole one."""
    found = _SHORTENED.search(text)
    return (text[:SHOWN], int(found[1])) if found and found.start() == SHOWN else None


def _label(value: object) -> str | None:
    """As the intake would spell it, so that a row is found by its name wherever it is."""
    if isinstance(value, bool):
        value = "true" if value else "false"
    return None if value is None else _storable(value)[:200].strip()
