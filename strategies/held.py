"""What EWC and SI share: a quadratic around past parameters that holds the weights, and is kept and grown."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor

from strategies import quadratic
from strategies.method import Method
from strategies.model import trainable
from strategies.quadratic import Quadratic, check_fit


class Held(Method):
    """State: one quadratic, however many experiences it stands for."""

    past: Quadratic | None = None

    @property
    @abstractmethod
    def strength(self) -> float:
        """λ: taking the adapter back to zero costs half of it, in nats, by each experience."""

    def load(self, state: Path) -> None:
        super().load(state)
        path = state / self.file
        self.past = quadratic.load(path) if path.exists() else None

    def save(self, state: Path) -> None:
        if self.past is not None:
            quadratic.save(self.past, state / self.file)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if self.past is not None:
            check_fit(self.past, trainable(strategy.model), Path(self.file).stem)
            self.past = self.past.to(strategy.device)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Once in an optimiser step, however many passes it has."""
        if self.past is not None and strategy.last_pass:
            strategy.penalise(self.strength / 2 * self.past.at(trainable(strategy.model)))

    def hold(self, curvature: dict[str, Tensor], centre: dict[str, Tensor]) -> None:
        """Adds an experience to the past."""
        new = Quadratic(curvature=curvature, centre=centre)
        self.past = new if self.past is None else self.past.plus(curvature, centre)
