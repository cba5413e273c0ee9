"""`daemon ask`: loads the champion in the command's own process and answers.

The adapter and the way of asking are those of the version; torch is imported only when it answers.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon import examination, experience
from daemon.base import located
from daemon.commands import prepared
from daemon.settings import Settings
from storage import snapshots
from storage.errors import ControlError
from strategies.contract import Metric, ModelSpec, Task, TaskKind

if TYPE_CHECKING:
    from strategies.answer import Answerer


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready to answer, and what to call it."""

    name: str
    task: str | None
    answerer: "Answerer"

    def answer(self, question: str, context: str) -> str:
        return self.answerer.answer([(question, context, self.task)])[0]


def load(settings: Settings, serving: dict[str, Any], task: str | None) -> Loaded:
    """The model that `operations.serving` named. Raises `ControlError` for a task it does not know."""
    tasks = tuple(_task(values) for values in serving["tasks"])
    if task is not None and task not in {known.name for known in tasks}:
        names = ", ".join(sorted(known.name for known in tasks)) or "none yet"
        raise ControlError(f"there is no task {task!r}; tasks: {names}")
    spec = _spec(settings, serving)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from strategies.answer import Answerer

    adapter = Path(serving["adapter"]) if serving["adapter"] else None
    answerer = Answerer(spec, adapter, tasks, settings.evaluation.max_new_tokens)
    return Loaded(name=_name(settings, serving), task=task, answerer=answerer)


def questions() -> Iterator[str]:
    """Lines of standard input, asked for in a terminal."""
    while True:
        try:
            line = input("? ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip():
            yield line


def _spec(settings: Settings, serving: dict[str, Any]) -> ModelSpec:
    now = experience.model_spec(settings, prepared(settings))
    if not serving["snapshot"]:
        return now
    snapshot = snapshots.load(settings.state_dir / "snapshots" / serving["snapshot"])
    return located(settings, examination.specs(snapshot).model)


def _task(values: dict[str, Any]) -> Task:
    return Task(
        name=values["name"],
        kind=TaskKind(values["kind"]),
        metric=Metric(values["metric"]),
        labels=tuple(values["labels"]),
    )


def _name(settings: Settings, serving: dict[str, Any]) -> str:
    if serving["version"] is None:
        return f"{settings.bot.name}: no champion yet, the base model answers"
    return f"{settings.bot.name} version {serving['version']}"
