"""Synaptic intelligence: what brought the loss down while old answers were learned is held.

    loss(θ) + λ/2 Σₜ Ωₜ (θ − θₜ)²,   Ωₜ = max(ωₜ, 0) / (Δₜ² + ξ),   ω = −Σ_steps ∂loss/∂θ · δθ

Zenke et al. 2017 (arXiv 1703.04200), who hold the sum of all Ωₜ at the last θ; here each experience is held
at its own end, as in EWC. The importances fall out of the training itself and cost no pass over the rows:
the cheap alternative to EWC. Scaled as EWC's are, so that λ means the same.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strategies.checkpoint import joined, under
from strategies.held import Held
from strategies.model import trainable
from strategies.quadratic import relative

DAMPING = 1e-6  # ξ: what has not moved must not seem infinitely important


class Si(Held):
    """The quadratic's curvature is what the training's own steps say."""

    file = "si.safetensors"
    path: dict[str, Tensor]  # what each parameter did for the loss in this experience, ω
    best: Mapping[str, Tensor]  # the same up to the epoch that is the best so far, if one is kept

    @property
    def strength(self) -> float:
        return self.spec.si_lambda

    def midway(self) -> dict[str, Tensor]:
        return joined({"path": self.path, "best": self.best})

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        devices = {name: t.device for name, t in self.path.items()}
        self.path = {name: t.to(devices[name]) for name, t in under("path/", tensors).items()}
        self.best = {name: t.to(devices[name]) for name, t in under("best/", tensors).items()}

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        parameters = trainable(strategy.model)
        self.start = {name: p.detach().clone() for name, p in parameters.items()}
        self.path = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        self.best = {}

    @torch.no_grad()
    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """The gradient without SI's own pull: what holds old answers did not learn the new ones. What other
        methods add to the loss stays in it."""
        self.before = {name: p.detach().clone() for name, p in trainable(strategy.model).items()}
        self.slope = {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).clone()
            for name, p in trainable(strategy.model).items()
        }
        if self.past is not None:
            for name, curvature in self.past.curvature.items():
                pull = curvature * (self.before[name] - self.past.centre[name])
                self.slope[name] -= self.strength * pull

    @torch.no_grad()
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        for name, p in trainable(strategy.model).items():
            self.path[name] -= self.slope[name] * (p.detach() - self.before[name])

    def mark_best(self) -> None:
        self.best = {name: t.clone() for name, t in self.path.items()}

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        end = {name: p.detach().clone() for name, p in trainable(strategy.model).items()}
        moved = {name: (end[name] - self.start[name]).square() for name in end}
        paths = self.best or self.path  # to where the adapter is now
        importance = {name: path.clamp(min=0) / (moved[name] + DAMPING) for name, path in paths.items()}
        self.hold(relative(importance, end), end)
