"""What one cycle shows in MLflow: the record, its files on disk, names that MLflow takes.

Pure apart from writing files; imports no MLflow (storage/registry.py does). Names of tasks come
from users: whatever they hold, they become one legal name each, and a file never leaves its folder.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.errors import RegistryError

PREDICTIONS = "predictions.json"
CLASSES = "classification.json"
MATRIX = "accuracy_matrix"
_PICTURED = 30  # rows of the heat map beside the base's
_KEY_LENGTH, _TAG_LENGTH = 250, 5000  # what every MLflow backend stores
_ILLEGAL = re.compile(r"[^\w\-. :]", re.ASCII)
_DIGEST = 16  # hex digits: with six, somebody who seeks finds two names of one metric in a second
_DIGESTED = re.compile(rf"-[0-9a-f]{{{_DIGEST}}}\Z")

Point = tuple[str, float | None, int]  # name, value, step


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The accuracy matrix: one row a model (the base first), one column a suite. None: not measured."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    title: str = "Score of each model on each suite"


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """A curve from the trained candidate (share 1) to the champion (share 0): scores on validation rows."""

    name: str
    shares: tuple[float, ...]
    old: tuple[float, ...]  # mean over the old tasks
    new: tuple[float, ...]  # mean over the new tasks
    chosen: float | None  # the share that was examined


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A model version of this bot's store, as MLflow has it."""

    version: int
    cycle_id: int
    adapter_hash: str  # as its tag says
    weights: Path | None  # its adapter's file; None: not on this machine
    metrics: Mapping[str, float] | None  # of its run; None: there is no such run


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All of them, and where the aliases point."""

    aliases: Mapping[str, int] = field(default_factory=dict)
    versions: tuple[Listed, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CycleRecord:
    """Everything that MLflow shows of one cycle. Times are UTC, naive.

    `model_config` is what daemon/served_model.py needs; its docstring lists the keys.
    """

    cycle_id: int
    started_at: datetime
    finished_at: datetime
    adapter_dir: Path
    adapter_hash: str  # SHA-256 of its weights
    model_config: Mapping[str, Any]
    state_dir: Path | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    version_tags: Mapping[str, str] = field(default_factory=dict)
    description: str = ""  # Markdown, shown on the pages of the run and of the version
    curve: Sequence[Mapping[str, float]] = ()  # CurvePoints as dicts: `step` and any numbers
    validation_losses: Sequence[float] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    artifacts_json: Mapping[str, Any] = field(default_factory=dict)  # file name to content
    texts: Mapping[str, str] = field(default_factory=dict)  # file name to content
    predictions: Sequence[Mapping[str, Any]] = ()
    matrix: Matrix | None = None
    trade_off: Sequence[TradeOff] = ()


def points(record: CycleRecord) -> list[Point]:
    """Every metric of a run."""
    found: list[Point] = [
        (f"train/{name}", value, int(point["step"]))
        for point in record.curve
        for name, value in point.items()
        if name != "step"
    ]
    found += [
        ("validation/loss", loss, epoch) for epoch, loss in enumerate(record.validation_losses, start=1)
    ]
    return found + [(key(name), value, 0) for name, value in record.metrics.items()]


def write_files(folder: Path, record: CycleRecord) -> None:
    """The artifacts of a run, all but the model."""
    for name, content in record.artifacts_json.items():
        _write(folder, name, _json(content))
    for name, text in record.texts.items():
        _write(folder, name, text)
    if record.predictions:
        _write(folder, PREDICTIONS, _json(_table(record.predictions)))
    if record.matrix is not None:
        write_matrix(folder, record.matrix)
    if record.trade_off:
        _write_trade_off(folder, record.trade_off)


def write_matrix(folder: Path, matrix: Matrix) -> None:
    """All numbers, and a heat map of the base and the newest rows: one with all would grow every night."""
    from storage.figures import heat_map, png  # matplotlib takes half a second to import

    content = {"rows": matrix.rows, "columns": matrix.columns, "values": matrix.values}
    _write(folder, f"{MATRIX}.json", _json(content))
    hidden = max(0, len(matrix.rows) - 1 - _PICTURED)
    title = f"{matrix.title}; {hidden} after the base are not shown" if hidden else matrix.title
    rows = matrix.rows[:1] + matrix.rows[1 + hidden :]
    values = matrix.values[:1] + matrix.values[1 + hidden :]
    picture = png(heat_map(rows, matrix.columns, values, title))
    (folder / f"{MATRIX}.png").write_bytes(picture)


def _write_trade_off(folder: Path, curves: Sequence[TradeOff]) -> None:
    from storage.figures import png, trade_off

    (folder / "trade_off.png").write_bytes(png(trade_off(curves)))


def key(name: str) -> str:
    """`name` as MLflow takes it for a metric, parameter or tag. Different names stay different.

    So a legal name that looks like one with a digest gets one, too.
    """
    parts = [_ILLEGAL.sub("_", part) or "_" for part in name.split("/")]
    legal = "/".join("_" * len(part) if part in (".", "..") else part for part in parts)
    if legal == name and len(name) <= _KEY_LENGTH and not _DIGESTED.search(name):
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:_DIGEST]
    return f"{legal[: _KEY_LENGTH - _DIGEST - 1]}-{digest}"


def tag(value: object) -> str:
    """`value` as every MLflow backend stores it, cut where it must be."""
    text = str(value)
    return text if len(text) <= _TAG_LENGTH else text[: _TAG_LENGTH - 1] + "…"


def tags(values: Mapping[str, str]) -> dict[str, str]:
    return {key(name): tag(value) for name, value in values.items() if value != ""}


def milliseconds(at: datetime | None) -> int | None:
    """MLflow's time of a naive UTC time."""
    return None if at is None else int(at.replace(tzinfo=UTC).timestamp() * 1000)


def without(text: str, rows: Collection[str]) -> str | None:
    """A table of predictions without the lines of these rows; None: it has none of them."""
    table = json.loads(text)
    place = table["columns"].index("row")
    left = [line for line in table["data"] if line[place] not in rows]
    return None if len(left) == len(table["data"]) else _json({**table, "data": left})


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The format of MLflow's log_table, but with every digit: a score must be recomputable from it."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1, default=str)


def _write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RegistryError(f"the artifact name {name!r} leaves the run; rename it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
