"""What a model thought of an answer, kept small: its likeliest tokens and how likely it found them.

Hinton et al. 2015 (arXiv 1503.02531): soft targets at a temperature, weighed by its square. A vocabulary
of 50,000 logits an answer token cannot be kept for every row; the k largest and the mass of the rest can.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from strategies.batches import Example, answer_logits, collate
from strategies.method import in_batches

KEPT = 32  # tokens of which an opinion is kept
TEMPERATURE = 2.0
_LEAST = 1e-6  # probability of the rest, so that its logarithm is finite


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """Of one row, whose answer has A tokens."""

    ids: Tensor  # [A, k] int32
    logprobs: Tensor  # [A, k] float32, of the distribution at `TEMPERATURE`


def opinion(logits: Tensor, hidden: Tensor | None = None) -> Opinion:
    """The k likeliest tokens of [A, V] logits. `hidden` ids [A] count as impossible."""
    logprobs = log_softmax(_without(logits, hidden) / TEMPERATURE, dim=-1)
    top = logprobs.topk(min(KEPT, logits.shape[-1]), dim=-1)
    return Opinion(ids=top.indices.int(), logprobs=top.values)


def divergence(logits: Tensor, target: Opinion, hidden: Tensor | None = None) -> Tensor:
    """Σ over answer tokens of T² KL(target ‖ model), in nats; everything not kept is one outcome more."""
    logprobs = log_softmax(_without(logits, hidden) / TEMPERATURE, dim=-1)
    mine = logprobs.gather(-1, target.ids.to(logits.device).long())
    theirs = target.logprobs.to(logits.device)
    # What is hidden has probability 0 on both sides and says nothing.
    known = theirs.isfinite()
    mine, theirs = mine.masked_fill(~known, 0.0), theirs.masked_fill(~known, 0.0)
    weight = theirs.exp() * known
    kept = (weight * (theirs - mine)).sum(-1)
    rest = (1 - weight.sum(-1)).clamp(min=_LEAST)
    mine_rest = (1 - (mine.exp() * known).sum(-1)).clamp(min=_LEAST)
    return TEMPERATURE**2 * (kept + rest * (rest.log() - mine_rest.log())).sum()


@torch.no_grad()
def opinions(strategy: Any, rows: Sequence[Example], *, hide_answers: bool) -> dict[str, Opinion]:
    """The present model's opinion of each row's answer, by row hash. `hide_answers`: of wrong tokens only."""
    found: dict[str, Opinion] = {}
    for chosen in in_batches(strategy, rows, "opinions"):
        batch = collate(chosen, strategy.base.prompter.pad_id).to(strategy.device)
        with strategy.base.autocast():
            logits = answer_logits(strategy.model, batch).float()
        for n, row in enumerate(chosen):
            hidden = answer_ids(row, logits.device) if hide_answers else None
            told = opinion(own(logits[n], row), hidden)
            found[row.row_hash] = Opinion(ids=told.ids.cpu(), logprobs=told.logprobs.cpu())
    return found


def own(logits: Tensor, row: Example) -> Tensor:
    """A row's own columns [A, V] of a batch's [K, V]: answers end at the last one."""
    return logits[-len(row.answer_ids) :]


def answer_ids(row: Example, device: torch.device) -> Tensor:
    return torch.tensor(row.answer_ids, device=device)


def _without(logits: Tensor, hidden: Tensor | None) -> Tensor:
    if hidden is None:
        return logits.float()
    return logits.float().scatter(-1, hidden.unsqueeze(-1), -torch.inf)
