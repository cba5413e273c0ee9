"""Elastic weight consolidation: parameters that mattered for past answers are held where they were.

    loss(θ) + λ/2 Σₜ Fₜ (θ − θₜ)²

Kirkpatrick et al. 2017 (arXiv 1612.00796), summed over past experiences t as Huszár 2018
(arXiv 1712.03847) derives it. 'online' is Schwarz et al. 2018 (arXiv 1805.06370): one anchor, the last
parameters, and an importance that fades, F* ← γF* + F. Only parameters that train are read or held.
Each F is scaled (`strategies.quadratic.relative`), so that λ means the same on every model.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from storage.errors import NonFiniteLoss
from strategies.batches import Example, collate, nll
from strategies.contract import Progress
from strategies.held import Held
from strategies.model import trainable
from strategies.quadratic import Quadratic, relative
from strategies.replay_memory import priority


class Ewc(Held):
    """The quadratic's curvature is the Fisher information."""

    file = "ewc.safetensors"

    @property
    def strength(self) -> float:
        return self.spec.ewc_lambda

    @property
    def online(self) -> bool:
        return self.spec.ewc_mode == "online"

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        if self.past is not None and self.online:
            self.past = self.past.faded(self.spec.ewc_decay)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        rows = choose(strategy.experience.new, self.spec.fisher_rows, self.seed)
        anchor = {name: p.detach().clone() for name, p in trainable(strategy.model).items()}
        fisher = relative(fisher_information(strategy, rows), anchor)
        if self.past is not None and self.online:
            total = {name: old + fisher[name] for name, old in self.past.curvature.items()}
            self.past = Quadratic(curvature=total, centre=anchor)
        else:
            self.hold(fisher, anchor)


def fisher_information(strategy: Any, rows: Sequence[Example]) -> dict[str, Tensor]:
    """The diagonal empirical Fisher information: the mean over rows of (∂ log p(answer | question) / ∂θ)².

    One row at a time: the square of a batch's mean gradient would shrink as the batch grows, and λ would
    mean something else on every machine.
    """
    parameters = trainable(strategy.model)
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    strategy.model.eval()
    for n, row in enumerate(rows):
        strategy.check_stop()
        batch = collate([row], strategy.base.prompter.pad_id).to(strategy.device)
        with strategy.base.autocast():
            loss, _ = nll(strategy.model, batch)
        # Text alone leaves the adapter of a multimodal model's vision tower unused: it has no gradient.
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for square, gradient in zip(squares.values(), gradients, strict=True):
            if gradient is not None:
                square += gradient.float().square()
        strategy.tell(Progress(stage="fisher", step=n + 1, steps=len(rows)))
    check_finite(squares.values())
    return {name: square / len(rows) for name, square in squares.items()}


def check_finite(fisher: Iterable[Tensor]) -> None:
    """Raises `NonFiniteLoss`."""
    if not all(part.isfinite().all() for part in fisher):
        raise NonFiniteLoss("the Fisher information is not finite; try a lower training.learning_rate")


def choose(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The rows that stand for an experience; their content and the seed decide."""
    return sorted(rows, key=lambda row: (priority(seed, row.row_hash), row.row_hash))[:count]
