"""Experience replay: every epoch rehearses remembered rows among the new ones.

Chaudhry et al. 2019, "On tiny episodic memories in continual learning" (arXiv 1902.10486), with memory
rows in proportion to the new rows instead of one for one. Which rows: `strategies.replay_policies`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from strategies import replay_memory, replay_policies
from strategies.batches import Example, collate, token_losses
from strategies.contract import StrategySpec
from strategies.method import Method, in_batches
from strategies.replay_memory import Memory, Room, Seen


class Rehearsal(Method):
    """A method with a memory of rows. State: their hashes. Their texts come with the snapshot."""

    file = replay_memory.FILE

    def __init__(self, spec: StrategySpec, seed: int) -> None:
        super().__init__(spec, seed)
        self.memory = Memory(seed=seed)
        self.on_offer: dict[str, Example] = {}

    def load(self, state: Path) -> None:
        super().load(state)
        self.memory = replay_memory.load(state) or self.memory

    def save(self, state: Path) -> None:
        replay_memory.save(self.memory, state)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.on_offer = {example.row_hash: example for example in strategy.experience.memory}
        remembered = len(self.memory)
        self.memory = self.memory.only(self.on_offer)
        if gone := remembered - len(self.memory):
            self.notes.append(f"{gone} remembered rows are superseded or erased, and were forgotten")

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The new rows become past ones."""
        rows = [seen(example) for example in strategy.experience.new]
        self.memory = replay_policies.after(self.memory, rows, room(self.spec), self.spec.replay_policy)


class Replay(Rehearsal):
    """Mixes the memory into every epoch."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Extends the loader, as Avalanche's own replay plugin replaces it."""
        super().before_training_exp(strategy, **kwargs)
        count = round(self.spec.replay_ratio * len(strategy.experience.new))
        if len(self.memory) and count:
            memory, draw = self.memory, replay_policies.POLICIES[self.spec.replay_policy].draw
            offered = self.on_offer
            strategy.dataloader.also(
                lambda epoch: [offered[row] for row in draw(memory, count, self.seed, epoch)]
            )

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().after_training_exp(strategy, **kwargs)
        if replay_policies.POLICIES[self.spec.replay_policy].measures:
            examples = self.on_offer | {example.row_hash: example for example in strategy.experience.new}
            losses = row_losses(strategy, [examples[row] for row in self.memory.hashes])
            self.memory = replay_policies.respaced(self.memory.measured(losses))


def room(spec: StrategySpec) -> Room:
    return Room(rows=spec.replay_size, share=spec.replay_share)


def seen(example: Example) -> Seen:
    """An example as the memory takes it in."""
    answer = hashlib.sha256(repr(example.answer_ids).encode()).hexdigest()[:8]
    return Seen(hash=example.row_hash, task=example.task, answer=answer)


@torch.no_grad()
def row_losses(strategy: Any, rows: Sequence[Example]) -> dict[str, float]:
    """Mean negative log-likelihood per answer token (nats) of each row, by its hash."""
    found: dict[str, float] = {}
    for chosen in in_batches(strategy, rows, "losses"):
        batch = collate(chosen, strategy.base.prompter.pad_id).to(strategy.device)
        with strategy.base.autocast():
            losses = token_losses(strategy.model, batch).sum(dim=1)
        for row, loss in zip(chosen, losses.tolist(), strict=True):
            found[row.row_hash] = loss / len(row.answer_ids)
    return found
