"""Ends between the champion and where the training ended: θ ← θ₀ + α (θ − θ₀).

WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903) at one α for all cycles, in the adapter's factors: a
candidate grows out of its champion, and the way between them is short. No cost, no state.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strategies.method import Method
from strategies.model import trainable


class Merge(Method):
    end: dict[str, Tensor]

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.end = {}  # where the training ended, once it has
        self.start = {name: p.detach().clone() for name, p in trainable(strategy.model).items()}

    def midway(self) -> dict[str, Tensor]:
        return self.end

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """A stop after the merge must not merge twice."""
        self.end = dict(tensors)

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if not self.continues:
            return  # a fresh adapter is nobody's champion
        parameters = trainable(strategy.model)
        self.end = self.end or {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.copy_(self.start[name].lerp(self.end[name].to(p.device), self.spec.merge_weight))
