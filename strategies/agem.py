"""A-GEM: no gradient may point to where the loss of remembered rows rises.

    g̃ = g − (g·r / r·r) r   when g·r < 0

with g the step's gradient and r that of some remembered rows (Chaudhry et al. 2019, arXiv 1812.00420,
eq. 11). A second gradient in every step: the price of replay without its rehearsal. That no step raises the
loss, to first order, is true of the paper's SGD; AdamW scales what it is given, and only comes near it.
"""

from typing import Any

import torch
from torch import Tensor

from strategies.batches import Example, collate, nll
from strategies.model import trainable
from strategies.replay import Rehearsal, rehearsals


class AGem(Rehearsal):
    """State: the memory of rows, as replay's."""

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        rows = self._rows(strategy, strategy.course.steps)
        if not rows:
            return
        parameters = {n: p for n, p in trainable(strategy.model).items() if p.grad is not None}
        reference = _gradient(strategy, rows, list(parameters.values()))
        steps = [p.grad for p in parameters.values() if p.grad is not None]
        for step, mine in zip(steps, project(steps, reference), strict=True):
            step.copy_(mine)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        used = {row.row_hash for step in range(strategy.course.steps) for row in self._rows(strategy, step)}
        strategy.rehearsed |= used
        super().after_training_exp(strategy, **kwargs)

    def _rows(self, strategy: Any, step: int) -> list[Example]:
        """A pure function of the step, so that a resumed training meets the same rows."""
        count = rehearsals(self.spec, strategy.spec.batch_size * strategy.spec.accumulation)
        drawn = self.policy.draw(self.memory, count, self.turn, step) if len(self.memory) and count else []
        return [self.on_offer[row] for row in drawn]


def project(gradient: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
    """The nearest gradient that does not point against the reference."""
    along = _dot(gradient, reference)
    if along >= 0:
        return gradient
    share = along / _dot(reference, reference)
    return [g - share * r for g, r in zip(gradient, reference, strict=True)]


def _dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _gradient(strategy: Any, rows: list[Example], parameters: list[Tensor]) -> list[Tensor]:
    """Of the mean loss over the rows' answer tokens, in passes that are no larger than the training's own."""
    size, tokens = strategy.spec.batch_size, sum(len(row.answer_ids) for row in rows)
    total = [torch.zeros_like(p) for p in parameters]
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size], strategy.base.prompter.pad_id).to(strategy.device)
        with strategy.base.autocast():
            loss, _ = nll(strategy.model, batch)
        found = torch.autograd.grad(loss / tokens, parameters, allow_unused=True)
        for whole, part in zip(total, found, strict=True):
            if part is not None:
                whole += part
    return total
