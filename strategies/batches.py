"""Rows → token batches with an answer mask, bucketed by length; and their loss.

Batches are padded on the left, so that all answers end at the last column: logits are then needed for
the last few positions only, which on a small model with a large vocabulary is most of the work.
"""

import contextlib
import inspect
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from storage.errors import TrainingError
from strategies.text import Prompter

IGNORED = -100
_BUCKET = 32  # batches whose rows are sorted by length together
_SHORT = 128  # columns up to which plain attention beats a CPU's fused kernel in bfloat16


class Question(Protocol):
    """What a row must have to be learned from; snapshot rows do."""

    @property
    def hash(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def context(self) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row as ids. `replayed`: it comes from the memory, not from the new rows."""

    row_hash: str
    task: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    replayed: bool = False
    has_context: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows, L columns; the last K columns hold every answer."""

    input_ids: Tensor  # [B, L], left-padded
    attention_mask: Tensor  # [B, L], 1 where there is text
    position_ids: Tensor  # [B, L], counted from each row's first token
    targets: Tensor  # [B, K], the answer's ids, IGNORED elsewhere

    @property
    def answer_tokens(self) -> int:
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            targets=self.targets.to(device),
        )


def encode(rows: Sequence[Question], prompter: Prompter, *, replayed: bool = False) -> list[Example]:
    """Rows as examples, in the same order.

    Stored rows fit, as intake measured them, but the system prompt may have grown since, or the limit become
    smaller: then a question loses its beginning. Raises `TrainingError` for an answer that leaves it no room.
    """
    return [_example(row, prompter, replayed) for row in rows]


def _example(row: Question, prompter: Prompter, replayed: bool) -> Example:
    answer = prompter.answer_ids(row.answer)
    prompt = prompter.prompt_ids(row.question, row.context, longest=prompter.max_tokens - len(answer))
    if len(prompt) + len(answer) > prompter.max_tokens:
        raise TrainingError(
            f"the answer of row {row.hash[:12]} of task {row.task} has {len(answer)} tokens, which leaves "
            f"its question no room in model.max_tokens = {prompter.max_tokens} any more; raise that, or "
            "shorten model.system_prompt, then `daemon retrain-now`"
        )
    return Example(
        row_hash=row.hash,
        task=row.task,
        prompt_ids=tuple(prompt),
        answer_ids=tuple(answer),
        replayed=replayed,
        has_context=bool(row.context),
    )


def plan(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, as indices: every row once, rows of like length together.

    A pure function, so that a resumed training walks through the same batches. Rows are shuffled,
    sorted by length within buckets of some batches, and the batches shuffled again.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    bucket = batch_size * _BUCKET
    batches = []
    for start in range(0, len(order), bucket):
        chunk = sorted(order[start : start + bucket], key=lambda i: lengths[i])
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Examples side by side, padded on the left."""
    width = max(example.length for example in examples)
    answers = max(len(example.answer_ids) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    targets = torch.full((len(examples), answers), IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        ids = torch.tensor([*example.prompt_ids, *example.answer_ids], dtype=torch.long)
        input_ids[row, width - len(ids) :] = ids
        mask[row, width - len(ids) :] = 1
        targets[row, answers - len(example.answer_ids) :] = ids[len(example.prompt_ids) :]
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        targets=targets,
    )


def answer_logits(model: Module, batch: Batch) -> Tensor:
    """Logits [B, K, V] that predict the last K columns."""
    width = int(batch.targets.shape[1])
    given: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    taken = forward_arguments(model)
    if "position_ids" in taken:
        given["position_ids"] = batch.position_ids
    if "use_cache" in taken:
        given["use_cache"] = False
    if "logits_to_keep" in taken:
        given["logits_to_keep"] = width + 1
    with _attention(batch.input_ids.shape[1]):
        logits: Tensor = model(**given).logits
    return logits[:, -width - 1 : -1]


def _attention(columns: int) -> AbstractContextManager[None]:
    """Forward and backward take 0.4 (32 columns) to 0.7 (128) of the fused kernel's time; see docs/log.md."""
    if columns <= _SHORT and torch.is_autocast_enabled("cpu"):
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def token_losses(model: Module, batch: Batch) -> Tensor:
    """Cross entropy [B, K] in nats of every answer token; zero where there is no answer."""
    logits = answer_logits(model, batch).float()
    losses = cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(batch.targets)


def nll(model: Module, batch: Batch) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of the answers, and how many tokens they have."""
    return token_losses(model, batch).sum(), batch.answer_tokens


def forward_arguments(model: Module) -> frozenset[str]:
    """Names that the forward pass of the model beneath any adapter takes."""
    beneath: Callable[[], Module] | None = getattr(model, "get_base_model", None)
    inner = beneath() if beneath else model
    return frozenset(inspect.signature(inner.forward).parameters)
