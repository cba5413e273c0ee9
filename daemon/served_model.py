"""How a registered version answers questions: MLflow runs this file wherever the model is loaded.

    mlflow.pyfunc.load_model("models:/qa-bot@champion").predict(["Which plan has roaming?"])

Takes a question, a list of questions, or a table with the column `question` and optionally `context`
and `task`; returns one answer each. The model holds an adapter; its base stays a folder on disk and
is recognised by its fingerprint. Keys of the model config, all of which `load_model(uri,
model_config={...})` may override: `base_path`, `fingerprint`, `system_prompt`, `max_tokens`, `dtype`,
`device`, `max_new_tokens`, `tasks` (a list of Task records as dicts). An empty `fingerprint` is not
checked.

Imports nothing of the model at module level: saving a version runs this file in the daemon, where
torch must not be loaded.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

_SPEC = ("fingerprint", "system_prompt", "max_tokens", "dtype", "device")
_COLUMNS = ("question", "context", "task")


class ServedModel(PythonModel):
    """A base and its adapter behind MLflow's `predict`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads base and adapter; MLflow calls it once and insists on the parameter's name."""
        try:
            from strategies.answer import Answerer
            from strategies.contract import ModelSpec, Task
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"this model answers with Holdfast's own code: {error}; install its repository here "
                "(docs/operations.md, Serving the champion)"
            ) from error
        config = context.model_config
        path = Path(config["base_path"])
        _check_base(path, config.get("fingerprint", ""))
        spec = ModelSpec(path=str(path), **{name: config[name] for name in _SPEC if name in config})
        tasks = tuple(Task.from_dict(task) for task in config.get("tasks", ()))
        self._tasks = frozenset(task.name for task in tasks)
        adapter = Path(context.artifacts["adapter"])
        self._answerer = Answerer(spec, adapter, tasks, int(config.get("max_new_tokens", 64)))

    # The hint keeps MLflow from forcing inputs into one column; lists come through as they are.
    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        questions = [self._question(row) for row in _rows(model_input)]
        return list(self._answerer.answer(questions)) if questions else []

    def _question(self, row: dict[str, Any]) -> tuple[str, str, str | None]:
        question, context, task = (_text(row.get(column)) for column in _COLUMNS)
        if not question:
            raise ValueError(f"a row without a question: {row!r}; give text in the column 'question'")
        if task and task not in self._tasks:
            raise ValueError(
                f"unknown task {task!r}; this model knows {sorted(self._tasks)}, or leave it empty"
            )
        return question, context, task or None


def _check_base(path: Path, fingerprint: str) -> None:
    """An adapter on another base would answer nonsense without any error."""
    from storage.errors import ModelError

    advice = "load with model_config={'base_path': '/folder/of/the/base'}"
    if not path.is_dir():
        raise ModelError(f"the base model is not at {path}; {advice}. Its fingerprint is {fingerprint}")
    if fingerprint and (found := _measure(path)) != fingerprint:
        raise ModelError(
            f"the model at {path} is {found}, but this adapter belongs to the base {fingerprint}; {advice}"
        )


def _measure(path: Path) -> str:
    """As `strategies.base` takes it of a base, with the tokenizer saved anew."""
    from transformers import AutoTokenizer

    from strategies import base

    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        AutoTokenizer.from_pretrained(path, trust_remote_code=False).save_pretrained(folder)
        return base.fingerprint(path, Path(folder) / "tokenizer.json")


def _rows(given: Any) -> list[dict[str, Any]]:
    """Any of the accepted inputs as rows."""
    if isinstance(given, str):
        return [{"question": given}]
    if isinstance(given, dict):
        given = pandas.DataFrame(given if all(_is_column(v) for v in given.values()) else [given])
    if isinstance(given, pandas.DataFrame):
        if "question" not in given and len(given.columns) == 1:
            given = given.set_axis(["question"], axis="columns")
        if "question" not in given:
            raise ValueError(
                f"the columns are {list(map(str, given.columns))}; one of them must be 'question'"
            )
        return [
            dict(zip(given.columns, row, strict=True)) for row in given.itertuples(index=False, name=None)
        ]
    if isinstance(given, Iterable):
        return [dict(row) if isinstance(row, dict) else {"question": row} for row in _flat(given)]
    raise ValueError(f"cannot read questions from {type(given).__name__}; give a list of texts")


def _is_column(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _flat(given: Iterable[Any]) -> list[Any]:
    """Lists, series and arrays (a server hands arrays, of any number of dimensions) as a list."""
    return list(given if getattr(given, "ndim", 1) == 1 else given.ravel())  # type: ignore[attr-defined]


def _text(value: Any) -> str:
    """Tables say "nothing" with None or NaN."""
    return "" if value is None or value != value else str(value)


set_model(ServedModel())
