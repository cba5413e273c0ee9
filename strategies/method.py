"""What every method is: an Avalanche plugin with a state that is kept with the model it made.

A method hooks into `strategies.loop.Learner` through Avalanche's callbacks; the loop knows none of them.
`before_training_exp` always meets the parent's adapter, also when a training is resumed.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from avalanche.core import SupervisedPlugin
from torch import Tensor

from strategies.batches import Example
from strategies.contract import Progress, StrategySpec


class Method(SupervisedPlugin):
    """One way to protect old skills. Subclasses say what they persist; without overrides, nothing."""

    file: ClassVar[str] = ""  # its part of the continual state; "": it keeps none

    def __init__(self, spec: StrategySpec, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.seed = seed
        self.continues = False  # whether there is a parent
        self.notes: list[str] = []  # what people should know, for the report

    def load(self, state: Path) -> None:
        """Takes up `file` from a parent's state directory; without it, starts fresh."""
        self.continues = True

    def save(self, state: Path) -> None:
        """Writes `file` into a result's state directory."""

    def midway(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides adapter and optimiser, for `resume`."""
        return {}

    def mark_best(self) -> None:
        """The adapter as it is now is the one that is kept, unless a later epoch ends better."""

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `midway` gave."""


def in_batches(strategy: Any, rows: Sequence[Example], stage: str) -> Iterator[list[Example]]:
    """The rows by length, for a look at them between trainings; dropout is off meanwhile. `stage` is what
    people are told is going on."""
    training, size = strategy.model.training, strategy.spec.batch_size
    ordered = sorted(rows, key=lambda row: (row.length, row.row_hash))
    strategy.model.eval()
    try:
        for start in range(0, len(ordered), size):
            strategy.check_stop()
            yield ordered[start : start + size]
            seen = min(start + size, len(ordered))
            strategy.tell(Progress(stage=stage, step=seen, steps=len(ordered)))
    finally:
        strategy.model.train(training)
