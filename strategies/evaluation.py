"""Models answer suites: greedy, in batches, every prediction written down. Never thresholds.

Free answers are generated up to the end of the turn; answers of a task with closed labels are decoded
inside the trie of its labels. What an answer is worth is `strategies.scoring`'s to say.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import Module
from transformers import LogitsProcessorList

from storage.artifacts import atomic_dir, made_for
from storage.parquet import SnapshotRow, read_rows
from strategies import scoring
from strategies.contract import EvaluateJob, Progress, SuiteJob, Task, TaskKind
from strategies.labels import OnlyLabels, Trie
from strategies.model import Base, deterministic, load_base, with_adapter, without_adapter
from strategies.text import Prompter

OnAnswers = Callable[[int], None]  # gets how many more rows are answered

SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("task", pa.string()),
        ("row_hash", pa.string()),
        ("prediction", pa.string()),
        ("exact_match", pa.float64()),
        ("token_f1", pa.float64()),
        ("score", pa.float64()),
    ]
)


def evaluate(job: EvaluateJob, on_progress: Callable[[Progress], None]) -> None:
    """Answers what the job's plan names and writes `predictions.parquet`; complete or not at all."""
    out = Path(job.out)
    if made_for(out, job.digest):
        return
    suites = {suite.task.name: (suite, _rows(suite)) for suite in job.suites}
    if unknown := [pair for pair in job.plan if pair[0] not in job.models or pair[1] not in suites]:
        raise ValueError(f"the plan names what the job does not hold: {unknown}")
    pace = _Pace(sum(len(suites[task][1]) for _, task in job.plan), on_progress)
    lines: list[dict[str, object]] = []
    with deterministic(0, job.threads):
        on_progress(Progress(stage="load", detail="base model"))
        base = load_base(job.model)
        for label, adapter in job.models.items():
            tasks = [task for model, task in job.plan if model == label]
            if tasks:
                pace.label = label
                lines += _examine(base, label, adapter, [suites[t] for t in tasks], job, pace)
    with atomic_dir(out, {"job": job.digest}) as folder:
        pq.write_table(pa.Table.from_pylist(lines, SCHEMA), folder / "predictions.parquet")


def _rows(suite: SuiteJob) -> list[SnapshotRow]:
    """A suite has a file of its own; validation rows of all tasks share one."""
    return [row for row in read_rows(Path(suite.path)) if row.task == suite.task.name]


def answer(
    model: Module,
    base: Base,
    questions: Sequence[tuple[str, str]],
    task: Task | None,
    *,
    batch_size: int,
    max_new_tokens: int,
    on_answers: OnAnswers = lambda rows: None,
) -> list[str]:
    """Greedy answers to (question, context) pairs, in their order.

    With a task of kind `labels` the answer is one of its labels; otherwise it is free text.
    """
    labels = _label_ids(base.prompter, task)
    # A model with learned positions has nothing beyond its context: the answer needs its room there.
    room = max(map(len, labels)) if labels else min(max_new_tokens, base.context_tokens // 2)
    longest = base.context_tokens - room
    prompts = [base.prompter.prompt_ids(*question, longest=longest) for question in questions]
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        told = _generate(model, base, [prompts[i] for i in chosen], labels, room)
        for index, text in zip(chosen, told, strict=True):
            answers[index] = text
        on_answers(len(chosen))
    return answers


def _examine(
    base: Base,
    label: str,
    adapter: str | None,
    suites: Sequence[tuple[SuiteJob, list[SnapshotRow]]],
    job: EvaluateJob,
    pace: "_Pace",
) -> list[dict[str, object]]:
    """All suites of one model."""
    model: Module = base.model if adapter is None else with_adapter(base, Path(adapter), trainable=False)
    model.eval()
    lines = []
    for suite, rows in suites:
        told = answer(
            model,
            base,
            [(row.question, row.context) for row in rows],
            suite.task,
            batch_size=job.batch_size,
            max_new_tokens=job.max_new_tokens,
            on_answers=pace,
        )
        lines += [_line(label, suite.task, row, text) for row, text in zip(rows, told, strict=True)]
    if adapter is not None:
        without_adapter(model)
    return lines


def _line(label: str, task: Task, row: SnapshotRow, prediction: str) -> dict[str, object]:
    return {
        "model": label,
        "task": task.name,
        "row_hash": row.hash,
        "prediction": prediction,
        "exact_match": scoring.exact_match(prediction, row.answer),
        "token_f1": scoring.token_f1(prediction, row.answer),
        "score": scoring.score(task.metric, prediction, row.answer),
    }


def _label_ids(prompter: Prompter, task: Task | None) -> dict[tuple[int, ...], str] | None:
    """Token ids of each label, and the label they spell; None for free answers."""
    if task is None or task.kind is not TaskKind.LABELS or not task.labels:
        return None
    return {tuple(prompter.answer_ids(label)): label for label in task.labels}


@torch.inference_mode()
def _generate(
    model: Module,
    base: Base,
    prompts: Sequence[Sequence[int]],
    labels: dict[tuple[int, ...], str] | None,
    room: int,
) -> list[str]:
    """Answers of at most `room` tokens to a batch of prompts, padded on the left."""
    prompter = base.prompter
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), prompter.pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if labels is None:
        room = max(min(room, base.context_tokens - width), 1)
    else:
        processors.append(OnlyLabels(Trie(list(labels)), width, prompter.pad_id))
    with base.autocast():
        generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]  # Module's attributes are untyped
        output = generate(
            input_ids=input_ids.to(base.device),
            attention_mask=mask.to(base.device),
            logits_processor=processors,
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            eos_token_id=prompter.stop_ids,
            pad_token_id=prompter.pad_id,
        )
    told = output[:, width:].tolist()
    if labels is None:
        return [prompter.decode(ids) for ids in told]
    return [_label(ids, labels) for ids in told]


def _label(ids: list[int], labels: dict[tuple[int, ...], str]) -> str:
    """The label that the ids spell; padding may follow it."""
    return next(text for spelt, text in labels.items() if tuple(ids[: len(spelt)]) == spelt)


class _Pace:
    """Counts answered rows and tells how it goes."""

    def __init__(self, rows: int, on_progress: Callable[[Progress], None]) -> None:
        self.label = ""
        self._rows = rows
        self._done = 0
        self._began = time.monotonic()
        self._tell = on_progress

    def __call__(self, rows: int) -> None:
        self._done += rows
        rate = self._done / max(time.monotonic() - self._began, 1e-6)
        self._tell(
            Progress(
                stage="evaluate",
                step=self._done,
                steps=self._rows,
                rows_per_second=rate,
                left=(self._rows - self._done) / rate,
                detail=self.label,
            )
        )
