"""Synaptic intelligence: what brought the loss down while old answers were learned is held.

    loss(θ) + λ/2 Σₜ Ωₜ (θ − θₜ)²,   Ωₜ = ωₜ / (Δₜ² + ξ),   ω = −Σ_steps ∂loss/∂θ · δθ

Zenke et al. 2017 (arXiv 1703.04200), who hold the sum of all Ωₜ at the last θ; here each experience is held
at its own end, as in EWC. The importances fall out of the training itself and cost no pass over the rows:
the cheap alternative to EWC. Scaled as EWC's are, so that λ means the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies import quadratic
from strategies.method import Method
from strategies.model import trainable
from strategies.quadratic import Quadratic, check_fit, relative

DAMPING = 1e-6  # ξ: what has not moved must not seem infinitely important


class Si(Method):
    """State: one quadratic, however many experiences it stands for."""

    file = "si.safetensors"
    past: Quadratic | None = None
    path: dict[str, Tensor]  # what each parameter did for the loss in this experience, ω

    def load(self, state: Path) -> None:
        super().load(state)
        path = state / self.file
        self.past = quadratic.load(path) if path.exists() else None

    def save(self, state: Path) -> None:
        if self.past is not None:
            quadratic.save(self.past, state / self.file)

    def midway(self) -> dict[str, Tensor]:
        return self.path

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        self.path = {name: t.to(self.path[name].device) for name, t in tensors.items()}

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        parameters = trainable(strategy.model)
        self.start = {name: p.detach().clone() for name, p in parameters.items()}
        self.path = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        if self.past is not None:
            check_fit(self.past, parameters, "si")
            self.past = self.past.to(strategy.device)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        if self.past is not None and strategy.last_pass:
            strategy.penalise(self.spec.si_lambda / 2 * self.past.at(trainable(strategy.model)))

    @torch.no_grad()
    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """The gradient of the loss alone: what holds old answers did not learn the new ones."""
        self.before = {name: p.detach().clone() for name, p in trainable(strategy.model).items()}
        self.slope = {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).clone()
            for name, p in trainable(strategy.model).items()
        }
        if self.past is not None:
            for name, curvature in self.past.curvature.items():
                pull = curvature * (self.before[name] - self.past.centre[name])
                self.slope[name] -= self.spec.si_lambda * pull

    @torch.no_grad()
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        for name, p in trainable(strategy.model).items():
            self.path[name] -= self.slope[name] * (p.detach() - self.before[name])

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        end = {name: p.detach().clone() for name, p in trainable(strategy.model).items()}
        moved = {name: (end[name] - self.start[name]).square() for name in end}
        importance = {name: path.clamp(min=0) / (moved[name] + DAMPING) for name, path in self.path.items()}
        weighed = relative(importance, end)
        self.past = (
            Quadratic(curvature=weighed, centre=end) if self.past is None else self.past.plus(weighed, end)
        )
