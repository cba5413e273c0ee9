"""The methods by name. To add one: write its file as an Avalanche plugin, and name it here.

A method hooks into `strategies.loop.Learner` through Avalanche's callbacks; the loop knows none of them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from strategies.contract import StrategySpec
from strategies.ewc import Ewc
from strategies.replay import Replay


class Method(Protocol):
    """What the loop asks of a method, besides being a plugin."""

    file: str  # its part of the continual state
    notes: list[str]  # what people should know, for the report

    def load(self, state: Path) -> None:
        """Takes up `file` from a parent's state directory; without it, starts fresh."""

    def save(self, state: Path) -> None: ...


# Each is made from the strategy's settings and the seed.
METHODS: dict[str, Callable[[StrategySpec, int], Method]] = {"replay": Replay, "ewc": Ewc}


def build(spec: StrategySpec, seed: int) -> list[Method]:
    return [METHODS[name](spec, seed) for name in spec.methods]
