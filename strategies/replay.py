"""Experience replay: every epoch rehearses remembered rows among the new ones.

Chaudhry et al. 2019, "On tiny episodic memories in continual learning" (arXiv 1902.10486), with memory
rows in proportion to the new rows instead of one for one. Which rows: `strategies.replay_memory`.
"""

from pathlib import Path
from typing import Any

from avalanche.core import SupervisedPlugin

from strategies import replay_memory
from strategies.contract import StrategySpec
from strategies.replay_memory import Memory


class Replay(SupervisedPlugin):
    """State: the hashes of the remembered rows. Their texts come with the snapshot."""

    file = replay_memory.FILE

    def __init__(self, spec: StrategySpec, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.seed = seed
        self.memory = Memory(seed=seed)
        self.notes: list[str] = []

    def load(self, state: Path) -> None:
        self.memory = replay_memory.load(state) or self.memory

    def save(self, state: Path) -> None:
        replay_memory.save(self.memory, state)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Extends the loader, as Avalanche's own replay plugin replaces it."""
        on_offer = {example.row_hash: example for example in strategy.experience.memory}
        remembered = len(self.memory)
        self.memory = self.memory.only(on_offer)
        gone = remembered - len(self.memory)
        if gone:
            self.notes.append(f"{gone} remembered rows are no longer in the store and were forgotten")
        count = round(self.spec.replay_ratio * len(strategy.experience.new))
        if len(self.memory) and count:
            memory = self.memory  # what was remembered before this experience
            strategy.dataloader.also(
                lambda epoch: [on_offer[row] for row in memory.rehearse(count, seed=self.seed, epoch=epoch)]
            )

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The new rows become past ones."""
        rows = [(example.row_hash, example.task) for example in strategy.experience.new]
        self.memory = self.memory.updated(rows, size=self.spec.replay_size, policy=self.spec.replay_policy)
