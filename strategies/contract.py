"""The records that cross between the daemon and the worker process.

Free of torch, so that the daemon may import it. All records are frozen and go over the process
boundary as JSON (`to_json`, `from_json`); tensors travel as safetensors files beside them.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from storage.errors import UNREADABLE, IntegrityError


class Record:
    """JSON in and out for the frozen dataclasses below (flat fields, paths, enums, nested records)."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str, sort_keys=True)  # type: ignore[call-overload]

    @property
    def digest(self) -> str:
        """SHA-256 of the whole record. A job's is kept with what was made for it.

        What lies in a job's `home` counts by its place in there, and a base by its fingerprint: the work of
        a home that was moved is found again.
        """
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        home = values.pop("home", "")
        if home and "model" in values:
            del values["model"]["path"]
        text = json.dumps(values, default=str, sort_keys=True)
        if home:
            text = text.replace(json.dumps(f"{home}/")[1:-1], "")
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_dict(json.loads(text))

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a file. Raises `IntegrityError` when it is not what was written."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UNREADABLE as error:
            raise IntegrityError(f"{path} cannot be read ({error}); run `daemon doctor`") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


class TaskKind(StrEnum):
    """How answers of a task are given, hence how they are decoded and scored."""

    FREE = "free"  # any text: greedy generation, exact match and token F1
    LABELS = "labels"  # one of a closed set: decoding constrained to the labels


class Metric(StrEnum):
    """The one number of a suite that the gate compares; per-example values lie in [0, 1]."""

    EXACT_MATCH = "exact_match"
    TOKEN_F1 = "token_f1"
    ACCURACY = "accuracy"


@dataclass(frozen=True, kw_only=True)
class Task(Record):
    """A named skill of the bot. Kind, metric and labels are data: nothing in the loop asks for them."""

    name: str
    kind: TaskKind
    metric: Metric
    labels: tuple[str, ...] = ()  # sorted; empty for free answers

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(
            name=values["name"],
            kind=TaskKind(values["kind"]),
            metric=Metric(values["metric"]),
            labels=tuple(values["labels"]),
        )


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Record):
    """Which base, and how text is put to it. `path` is a local folder made by `strategies.base`."""

    path: str
    fingerprint: str  # SHA-256, see `strategies.base.fingerprint`: adapters belong to one base
    system_prompt: str = ""
    max_tokens: int = 512  # prompt and answer together
    dtype: str = "auto"  # auto | float32 | bfloat16
    device: str = "auto"  # auto | cpu | cuda | cuda:N


@dataclass(frozen=True, kw_only=True)
class LoraSpec(Record):
    """Shape of the adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = "all-linear"  # or module names separated by commas
    init: str = "zero"  # zero | orthogonal: how a fresh adapter comes to change nothing


@dataclass(frozen=True, kw_only=True)
class TrainSpec(Record):
    """How one experience is learned. Steps are optimiser steps; rates are per step."""

    learning_rate: float = 5e-4
    epochs: int = 2
    batch_size: int = 8  # rows in one forward pass
    accumulation: int = 1  # forward passes in one optimiser step
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    patience: int = 2  # epochs without a better validation loss before stopping; 0: never stop early
    checkpoint_steps: int = 25
    seed: int = 0
    threads: int = 0  # CPU threads for torch; 0: torch decides


@dataclass(frozen=True, kw_only=True)
class StrategySpec(Record):
    """Which methods protect old skills. `methods` is empty for naive fine-tuning."""

    methods: tuple[str, ...] = ("replay", "lwf")
    replay_size: int = 1000  # rows kept over all past tasks, at most
    replay_share: float = 1.0  # and at most this share of all rows seen so far
    replay_ratio: float = 0.5  # replayed rows for each new row, in every epoch
    replay_policy: str = "balanced"  # balanced | herding | reservoir | hardest | spaced
    replay_dropout: float = 0.2  # share of a rehearsed question's tokens that are left out, others each time
    der_weight: float = 0.5
    lwf_weight: float = 0.5
    merge_weight: float = 0.7  # 1: the trained adapter, 0: the champion
    olora_lambda: float = 0.5
    si_lambda: float = 1.0  # price of losing all that was learned, in nats times two; EWC's means the same
    ewc_lambda: float = 1.0
    ewc_mode: str = "separate"  # separate | online
    ewc_decay: float = 0.9  # online only: weight of the past when a new Fisher is added
    fisher_rows: int = 32  # rows whose gradients estimate the Fisher information of an experience

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "methods": tuple(values["methods"])})

    @property
    def name(self) -> str:
        return "+".join(self.methods) or "naive"


@dataclass(frozen=True, kw_only=True)
class TrainJob(Record):
    """`train`: a snapshot directory in, a result directory out.

    Result (written complete or not at all, `manifest.json` last): `adapter/` as PEFT saves it,
    `state/` (the continual state: one safetensors or JSON file a method), `report.json` (a TrainReport).
    `work` holds the mid-training checkpoint and survives interruptions. The parent's hash makes the digest
    say what the training grew from, not only where that lay.
    """

    snapshot: str
    out: str
    work: str
    model: ModelSpec
    lora: LoraSpec
    train: TrainSpec
    strategy: StrategySpec
    parent: str | None = None  # result directory of the champion's training; None: a fresh adapter
    parent_adapter: str = ""  # SHA-256 of its weights
    home: str = ""  # the state directory

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(
            **{
                **values,
                "model": ModelSpec.from_dict(values["model"]),
                "lora": LoraSpec.from_dict(values["lora"]),
                "train": TrainSpec.from_dict(values["train"]),
                "strategy": StrategySpec.from_dict(values["strategy"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class BlendJob(Record):
    """`blend`: two training results in, a directory of adapters between them out (`manifest.json` last).

    `shares` say how far each goes from the champion (0) to the candidate (1); the adapter of share 0.3
    is in `0.3/adapter/`. The hashes make the digest say what was blended, not only where it lay.
    """

    out: str
    champion: str  # result directory
    champion_adapter: str  # SHA-256 of its weights
    candidate: str
    candidate_adapter: str
    shares: tuple[float, ...]
    home: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "shares": tuple(values["shares"])})


@dataclass(frozen=True, kw_only=True)
class SuiteJob(Record):
    """Rows to be answered: those in a Parquet file of the snapshot that belong to the task."""

    task: Task
    path: str

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(task=Task.from_dict(values["task"]), path=values["path"])


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(Record):
    """`evaluate`: models and suites in, `predictions.parquet` out (`manifest.json` last).

    `models` maps a label (`base`, `champion`, `candidate`) to an adapter directory, or to null for
    the bare base, and `keys` to what that model is, wherever it lies. `plan` names the (label, task)
    pairs that are to be answered: pairs whose predictions are known already are simply not in it.
    Columns: model, task, row_hash, prediction, exact_match, token_f1, score (the task's metric).
    """

    out: str
    model: ModelSpec
    models: dict[str, str | None]
    suites: tuple[SuiteJob, ...]
    plan: tuple[tuple[str, str], ...]
    keys: dict[str, str] = field(default_factory=dict)
    batch_size: int = 32
    max_new_tokens: int = 64
    threads: int = 0
    home: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(
            **{
                **values,
                "model": ModelSpec.from_dict(values["model"]),
                "suites": tuple(SuiteJob.from_dict(s) for s in values["suites"]),
                "plan": tuple((label, task) for label, task in values["plan"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class PrepareJob(Record):
    """`prepare`: a base by hub name, folder or GGUF file in, a ready local folder out.

    The folder holds the weights as safetensors (or only points to a user's own folder), the
    tokenizer, and `base.json` (a PreparedBase), written last.
    """

    base: str
    out: str
    gguf_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class PreparedBase(Record):
    """What the daemon must know of a base without loading it."""

    path: str  # folder that transformers loads
    fingerprint: str
    tokenizer_file: str  # tokenizer.json, readable without torch
    template_tokens: int  # tokens that the chat template adds around an empty question and answer
    context_tokens: int  # longest sequence that the model takes
    parameters: int
    source: str = ""  # the folder or GGUF file it was made from
    stamp: str = ""  # names, sizes and times of the source's files


@dataclass(frozen=True, kw_only=True)
class CurvePoint(Record):
    """One optimiser step."""

    step: int
    loss: float
    learning_rate: float
    penalty: float = 0.0
    replayed: float = 0.0  # share of replayed rows in the step
    rows_per_second: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainReport(Record):
    """What the training did, for MLflow and for people."""

    strategy: str
    rows: int
    replay_rows: int
    steps: int
    epochs: int
    stopped_early: bool
    seconds: float  # of training, all resumed parts together
    cpu_seconds: float  # of all threads: what a busy neighbour changes least
    final_loss: float
    validation_losses: tuple[float, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    resumed: int = 0  # how often it continued from a checkpoint
    rehearsed: tuple[str, ...] = ()  # hashes of the remembered rows that were drawn, sorted
    memory_rows: int = 0  # rows in the replay memory afterwards
    state_bytes: int = 0
    trainable_parameters: int = 0
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(
            **{
                **values,
                "validation_losses": tuple(values["validation_losses"]),
                "curve": tuple(CurvePoint.from_dict(p) for p in values["curve"]),
                "rehearsed": tuple(values.get("rehearsed", ())),
                "notes": tuple(values["notes"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Progress(Record):
    """A line of live progress from the worker. Rates are per second, `left` is in seconds."""

    stage: str  # prepare | load | opinions | train | validate | losses | fisher | blend | evaluate
    step: int = 0
    steps: int = 0
    loss: float | None = None
    rows_per_second: float | None = None
    left: float | None = None
    detail: str = ""


def blended(out: str | Path, share: float) -> Path:
    """Where a `BlendJob` puts the adapter of a share."""
    return Path(out) / f"{share:g}" / "adapter"


def result_files(directory: str | Path) -> dict[str, Path]:
    """The named parts of a training result."""
    root = Path(directory)
    return {"adapter": root / "adapter", "state": root / "state", "report": root / "report.json"}
