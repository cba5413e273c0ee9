"""A model that answers questions: base, adapter, and the tasks it knows. For `daemon ask` and MLflow."""

from collections.abc import Sequence
from pathlib import Path

from torch.nn import Module

from strategies.contract import ModelSpec, Task
from strategies.evaluation import answer
from strategies.model import load_base, with_adapter

BATCH = 32


class Answerer:
    """Loads once, answers many times. Raises `ModelError` when base or adapter cannot be loaded."""

    def __init__(
        self, spec: ModelSpec, adapter: Path | None, tasks: Sequence[Task] = (), max_new_tokens: int = 64
    ) -> None:
        self._base = load_base(spec)
        self._model: Module = self._base.model
        if adapter is not None:
            self._model = with_adapter(self._base, adapter, trainable=False).eval()
        self._tasks = {task.name: task for task in tasks}
        self._max_new_tokens = max_new_tokens

    def answer(self, questions: Sequence[tuple[str, str, str | None]]) -> list[str]:
        """Answers to (question, context, task) in their order. A task decides how it is answered: a
        closed set of labels is kept to, and without a task the answer is free text."""
        answers = [""] * len(questions)
        for name in dict.fromkeys(task for _, _, task in questions):
            chosen = [i for i, (_, _, task) in enumerate(questions) if task == name]
            told = answer(
                self._model,
                self._base,
                [questions[i][:2] for i in chosen],
                self._tasks.get(name) if name else None,
                batch_size=BATCH,
                max_new_tokens=self._max_new_tokens,
            )
            for index, text in zip(chosen, told, strict=True):
                answers[index] = text
        return answers
