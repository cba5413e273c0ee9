"""`daemon ask`: loads the champion in the command's own process and answers.

The adapter and the way of asking are those of the version; torch is imported only when it answers.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon import examination, experience
from daemon.base import located
from daemon.commands import prepared
from daemon.settings import Settings
from storage import snapshots
from storage.errors import ControlError
from storage.snapshots import Snapshot
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
        if not question.strip():
            raise ControlError('the question is empty; `daemon ask "…"`')
        return self.answerer.answer([(question, context, self.task)])[0]


def load(settings: Settings, serving: dict[str, Any], task: str | None) -> Loaded:
    """The model that `operations.serving` named. Raises `ControlError` for a task it does not know."""
    snapshot = _snapshot(settings, serving)
    tasks = tuple(map(_task, snapshot.info["tasks"] if snapshot else serving["tasks"]))
    if task is not None and task not in {known.name for known in tasks}:
        names = ", ".join(sorted(known.name for known in tasks)) or "none yet"
        raise ControlError(f"there is no task {task!r}; tasks: {names}")
    spec = _spec(settings, serving, snapshot)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from strategies.answer import Answerer

    adapter = Path(serving["adapter"]) if serving["adapter"] else None
    longest = examination.specs(snapshot).max_new_tokens if snapshot else settings.evaluation.max_new_tokens
    answerer = Answerer(spec, adapter, tasks, longest)
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


def _snapshot(settings: Settings, serving: dict[str, Any]) -> Snapshot | None:
    name = serving["snapshot"]
    return snapshots.load(settings.state_dir / "snapshots" / name) if name else None


def _spec(settings: Settings, serving: dict[str, Any], snapshot: Snapshot | None) -> ModelSpec:
    """How the version was trained to be asked; without its snapshot as one would be now, on its own base."""
    now = experience.model_spec(settings, prepared(settings))
    if snapshot is not None:
        return located(settings, examination.specs(snapshot).model)
    return located(settings, replace(now, fingerprint=serving["base"])) if serving["base"] else now


def _task(values: dict[str, Any]) -> Task:
    return Task(
        name=values["name"],
        kind=TaskKind(values["kind"]),
        metric=Metric(values["metric"]),
        labels=tuple(values["labels"]),
    )


def _name(settings: Settings, serving: dict[str, Any]) -> str:
    if serving["version"] is None:
        why = "rolled back to the base" if serving["rolled_back"] else "no champion yet"
        return f"{settings.bot.name}: {why}, the base model answers"
    return f"{settings.bot.name} version {serving['version']}"
