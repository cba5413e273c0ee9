"""Every key's meaning, unit and default: validated, frozen settings.

Those of learning are in `daemon.learning_settings`. `daemon init` and the project's own config.toml are
rendered from these fields by `daemon.config`, which also reads them from the file.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo, available_timezones

from pydantic import (
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from daemon.learning_settings import Lora, Model, StrategySettings, Training, long_form
from daemon.section import YEARS, Minutes, Natural, Positive, Section, Share
from storage.reach import known_scheme
from storage.records import OnConflict
from storage.rows import normalise

ENV_PREFIX = "HOLDFAST_"

File = Annotated[Path, Field(strict=False)]  # TOML has no paths, only text
# Schemes without a host or a file, and SQLite in memory, which would lose the versions with the process.
_NOWHERE = re.compile(r"sqlite(?!:///.)|sqlite:///:memory:|.*:///?$")


class Bot(Section):
    """The bot that is trained."""

    name: str = Field(
        "qa-bot",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$",
        description="Experiment and model name in MLflow.",
    )
    state_dir: File = Field(
        Path("state"),
        description="Where everything the daemon keeps lives. Relative paths are relative to this file.",
    )


class Columns(Section):
    """Your column names; "" for optional ones you lack. Files to ingest may use these keys as names, too."""

    id: str = Field("id", min_length=1, description="Unique id of a row, any type.")
    question: str = Field("question", min_length=1, description="Text.")
    answer: str = Field("answer", min_length=1, description="Text.")
    task: str = Field("task", description='Name of the skill; "": every row belongs to source.default_task.')
    context: str = Field("", description="Text that the question is about. Optional.")
    created_at: str = Field(
        "",
        description="Timestamp; with it a pull reads only what is new. Optional: else all rows are compared.",
    )
    split: str = Field(
        "", description="train, validation or suite. Optional: without it the content decides."
    )


class Source(Section):
    """Your collector's DuckDB. It is only read."""

    path: File | None = Field(None, description="DuckDB file. Unset: rows come by `daemon ingest` only.")
    table: str = Field("qa", min_length=1, description="Table or view, with its schema if any.")
    default_task: str = Field("general", min_length=1, description="Task of rows without one.")
    on_conflict: OnConflict = Field(
        "newest",
        description="A question gets another answer, here or by `daemon ingest`: the newest label counts, "
        "or the later row goes into quarantine, or both are learned.",
    )
    overlap_hours: float = Field(
        48,
        ge=0,
        le=YEARS * 366 * 24,
        description="Hours before the newest row seen that are read again, for late rows.",
    )
    full_scan_days: float = Field(
        7, ge=0, le=YEARS * 366, description="Days after which everything is compared once more."
    )
    batch_rows: Positive = Field(20_000, description="Rows read under one short lock.")
    busy_timeout: float = Field(
        60, ge=0, le=86_400, description="Seconds to wait for a collector that holds the file."
    )
    columns: Columns = Field(default_factory=Columns)

    @field_validator("path", mode="before")
    @classmethod
    def _unset(cls, value: object) -> object:
        return None if value == "" else value


class Splits(Section):
    """Shares of rows that are held out, chosen by content, for rows that name no split."""

    validation: Share = Field(0.1, description="Share watched during training (early stopping).")
    suite: Share = Field(0.15, description="Share frozen into the examination suites; never trained on.")

    @model_validator(mode="after")
    def _sum(self) -> "Splits":
        if self.validation + self.suite >= 0.9:
            raise ValueError(
                f"validation + suite is {self.validation + self.suite:g}; leave at least 0.1 to train on"
            )
        return self


class Evaluation(Section):
    """How suites are examined."""

    batch_size: Positive = Field(32, description="Questions answered at once.")
    max_new_tokens: Positive = Field(64, description="Longest free answer, in tokens.")
    suite_rows: Positive = Field(200, description="Rows in one suite at most; chosen by content.")
    suite_growth: float = Field(
        0.5, gt=0, description="A new suite version is frozen when held-out rows grew by this share."
    )


class Gate(Section):
    """What a candidate must show to replace the champion. Without max_drop and min_gain: no promotion."""

    max_drop: float | None = Field(
        None, ge=0, le=1, description="Largest drop of any suite against the champion (0.03 is 3 points)."
    )
    min_gain: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Smallest mean gain on the tasks of the new rows, against the champion.",
    )
    min_suite_rows: Positive = Field(8, description="Suites with fewer rows have no say, and are named.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Level of the paired bootstrap intervals.")
    bootstrap: int = Field(2000, ge=100, le=100_000, description="Resamples.")
    accept_inconclusive: bool = Field(
        False, description="true: a drop beyond max_drop passes when it cannot be told from noise."
    )


class Rescue(Section):
    """What is tried when a candidate learned but forgot, before it is rejected."""

    attempts: int = Field(
        3,
        ge=0,
        le=10,
        description="Further candidates at most: blends with the champion, then more protection. 0: none.",
    )
    minutes: Minutes = Field(120, description="Minutes that all attempts of a cycle may take together.")
    probe_rows: Positive = Field(
        64, description="Validation rows of each task, at most, by which a blend is chosen."
    )


class Retention(Section):
    """How much stays on disk. Rows, scores, verdicts, history and the champion's files stay in any case."""

    champions: Positive = Field(
        30, description="Past champions, the newest, whose files are kept: what can be rolled back to."
    )
    rejected: Natural = Field(3, description="Rejected versions, the newest, whose adapters are kept.")
    predictions: Natural = Field(
        30,
        description="Rejected versions, the newest, whose answers are kept. The numbers of others stay, but "
        "cannot be computed again.",
    )
    snapshots: Natural = Field(
        10, description="Snapshots, the newest, that are kept beside those of kept versions."
    )
    checkpoints: Natural = Field(
        0, description="Failed and cancelled cycles, the newest, whose unfinished work is kept."
    )


class Schedule(Section):
    """When cycles start by themselves."""

    cron: str = Field(
        "30 2 * * *",
        description="Five cron fields: minute, hour, day, month, weekday (names, or 0-7, Sunday is 0 and 7). "
        '"": only by hand.',
    )
    timezone: str = Field("UTC", description="IANA name, for instance Europe/Madrid.")

    @field_validator("timezone")
    @classmethod
    def _zone(cls, value: str) -> str:
        zones = available_timezones()
        if value not in zones:
            raise ValueError(f"no such time zone{suggest(value, zones)}")
        ZoneInfo(value)
        return value


class Mlflow(Section):
    """Where metrics and model versions go."""

    tracking_uri: str = Field(
        "", description='MLflow tracking URI. "": an SQLite database and a folder in the state directory.'
    )

    @field_validator("tracking_uri")
    @classmethod
    def _usable(cls, value: str) -> str:
        if value and (not known_scheme(value) or _NOWHERE.match(value)):
            raise ValueError(
                "must be sqlite:///FILE, http://HOST, https://HOST or a postgresql://, mysql:// or mssql:// "
                "database; folders of files are no longer a store of MLflow"
            )
        return value


class TaskOverride(Section):
    """Optional, one table a task: [tasks.NAME]. What is unset is inferred from the rows."""

    kind: Literal["free", "labels"] | None = Field(
        None, description="free text, or one of a closed set of labels."
    )
    metric: Literal["exact_match", "token_f1", "accuracy"] | None = Field(
        None, description="What the gate compares."
    )
    labels: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="The closed set, nothing else is taken; empty: the answers seen so far.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> "TaskOverride":
        if self.kind == "free" and self.labels:
            raise ValueError(f'kind = "free" has no labels = {list(self.labels)}; remove one of them')
        return self

    @property
    def wanted_kind(self) -> Literal["free", "labels"] | None:
        """Who lists labels means a closed set."""
        return self.kind or ("labels" if self.labels else None)


class Settings(BaseSettings):
    """All settings of one bot."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", validate_default=True
    )

    bot: Bot = Field(default_factory=Bot)
    model: Model = Field(default_factory=Model)
    lora: Lora = Field(default_factory=Lora)
    training: Training = Field(default_factory=Training)
    strategy: StrategySettings = Field(default_factory=StrategySettings)
    source: Source = Field(default_factory=Source)
    splits: Splits = Field(default_factory=Splits)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    gate: Gate = Field(default_factory=Gate)
    rescue: Rescue = Field(default_factory=Rescue)
    retention: Retention = Field(default_factory=Retention)
    schedule: Schedule = Field(default_factory=Schedule)
    mlflow: Mlflow = Field(default_factory=Mlflow)
    tasks: dict[str, TaskOverride] = Field(default_factory=dict)

    def wish(self, task: str) -> TaskOverride | None:
        """What is wished for a task, in whatever spelling."""
        return next((wish for name, wish in self.tasks.items() if normalise(name) == normalise(task)), None)

    @model_validator(mode="after")
    def _some_suite_can_speak(self) -> "Settings":
        size, least = self.evaluation.suite_rows, self.gate.min_suite_rows
        if size < least:
            raise ValueError(
                f"evaluation.suite_rows = {size} is less than gate.min_suite_rows = {least}: no suite would "
                "have a say, and nothing be promoted; raise the one or lower the other"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return _Environment(settings_cls), init_settings

    @property
    def state_dir(self) -> Path:
        return self.bot.state_dir

    @property
    def socket_path(self) -> Path:
        return self.state_dir / "control.sock"

    @property
    def store_path(self) -> Path:
        return self.state_dir / "store.duckdb"

    @property
    def tracking_uri(self) -> str:
        return self.mlflow.tracking_uri or f"sqlite:///{self.state_dir / 'mlflow.db'}"


class _Environment(EnvSettingsSource):
    """Variables are text: here, and only here, text becomes what its setting wants."""

    def __call__(self) -> dict[str, Any]:
        return _typed(long_form(super().__call__()), Settings)


def _typed(values: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """What cannot be read as its setting stays text, for the validation to complain about."""
    found = {}
    for key, value in values.items():
        field = section.model_fields.get(key)
        if field is None or not isinstance(value, str | dict):
            found[key] = value
        elif isinstance(value, dict):
            found[key] = _typed_table(value, field.annotation)
        else:
            try:
                wanted: TypeAdapter[Any] = TypeAdapter(field.annotation or str)
                read = wanted.validate_strings(value, strict=False)
                found[key] = value if isinstance(read, Path) else read  # "" is no path, and not "."
            except ValidationError:
                found[key] = value
    return found


def _typed_table(values: dict[str, Any], annotation: Any) -> dict[str, Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _typed(values, annotation)
    named = (value for value in get_args(annotation) if value is TaskOverride)  # dict[str, TaskOverride]
    section = next(named, None)
    return {name: _typed(value, section) if section else value for name, value in values.items()}


def suggest(word: str, choices: Iterable[str]) -> str:
    """The end of a complaint about an unknown word."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; remove it, or see `daemon init` for all keys"
