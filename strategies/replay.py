"""Experience replay: every epoch rehearses remembered rows among the new ones.

    loss = mean over the n new rows and ρn remembered ones of an epoch of  −log p(y | x; θ)

Chaudhry et al. 2019, "On tiny episodic memories in continual learning" (arXiv 1902.10486), with memory
rows in proportion to the new rows instead of one for one. Which rows: `strategies.replay_policies`.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from strategies import herding, replay_memory, replay_policies
from strategies.batches import Example, collate, token_losses
from strategies.contract import StrategySpec
from strategies.experience import Draw
from strategies.herding import Features
from strategies.method import Method, in_batches
from strategies.replay_memory import Memory, Room, Seen
from strategies.text import Pieces


class Rehearsal(Method):
    """A method with a memory of rows. State: their hashes. Their texts come with the snapshot."""

    file = replay_memory.FILE
    keeps_all: ClassVar[bool] = False  # whether nothing is ever left out of the memory

    def __init__(self, spec: StrategySpec, seed: int) -> None:
        super().__init__(spec, seed)
        self.memory = Memory(seed=seed)
        self.on_offer: dict[str, Example] = {}
        self.turn = str(seed)  # the draws' seed: another one in every experience
        self.policy = replay_policies.POLICIES[spec.replay_policy]
        self.features: Features | None = None

    def load(self, state: Path) -> None:
        super().load(state)
        loaded = replay_memory.load(state)
        if loaded is not None:  # an empty one knows how many rows it has seen
            self.memory = loaded

    def save(self, state: Path) -> None:
        replay_memory.save(self.memory, state)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.on_offer = {example.row_hash: example for example in strategy.experience.memory}
        remembered = len(self.memory)
        self.memory = self.memory.only(self.on_offer)
        if gone := remembered - len(self.memory):
            self.notes.append(f"{gone} remembered rows are superseded or erased, and were forgotten")
        # Without the memory's age every experience would draw the same rows, and leave out the same words.
        self.turn = f"{self.seed}/{self.memory.seen}"
        if self.policy.ranks and not self.keeps_all:
            self.features = Features(strategy.model)

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        if self.features:
            self.features.note(strategy.examples)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The new rows become past ones."""
        new, ranks = strategy.experience.new, {}
        if self.features:
            self.features.close()
            ranks = herding.ranks(self.features.found, new, self.spec.replay_size)
        rows = [seen(example) for example in new]
        self.memory = replay_policies.after(
            self.memory, rows, room(self.spec), self.spec.replay_policy, ranks
        )
        if self.policy.measures:
            examples = self.on_offer | {example.row_hash: example for example in new}
            losses = row_losses(strategy, [examples[row] for row in self.memory.hashes])
            self.memory = replay_policies.respaced(self.memory.measured(losses), strategy.rehearsed)

    def midway(self) -> dict[str, Tensor]:
        return dict(self.features.found) if self.features else {}

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        if self.features:
            self.features.found = dict(tensors)


class Replay(Rehearsal):
    """Mixes the memory into every epoch."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Extends the loader, as Avalanche's own replay plugin replaces it."""
        super().before_training_exp(strategy, **kwargs)
        count = rehearsals(self.spec, len(strategy.experience.new))
        if len(self.memory) and count:
            strategy.dataloader.also(self._rehearsals(strategy.base.prompter.pieces, count))

    def _rehearsals(self, pieces: Pieces, count: int) -> Draw:
        """Which rows an epoch rehearses, and in which words."""
        memory, offered, share = self.memory, self.on_offer, self.spec.replay_dropout

        robust = {
            row for row in memory.hashes if memory.trace(row).is_shared and not offered[row].has_context
        }

        def draw(epoch: int) -> list[Example]:
            drawn = enumerate(self.policy.draw(memory, count, self.turn, epoch))
            return [
                thinned(offered[row], pieces, share, f"{self.turn}/{epoch}/{n}")
                if row in robust
                else offered[row]
                for n, row in drawn
            ]

        return draw


def thinned(example: Example, pieces: Pieces, share: float, seed: str) -> Example:
    """Without about that share of its question's tokens: what is rehearsed often is not learned by heart.

    Random deletion (Wei & Zou 2019, "EDA", arXiv 1901.11196) as the augmentation of the memory that Buzzega
    et al. 2020 ("Rethinking experience replay", arXiv 2010.05595) found to matter. Only for questions whose
    answer does not hang on each word: `Replay` leaves rows with a context, and rows with an answer of
    their own, as they are.
    """
    start, end = len(pieces.before), len(example.prompt_ids) - len(pieces.between)
    question = example.prompt_ids[start:end]
    rng = random.Random(f"{seed}/{example.row_hash}")
    kept = tuple(token for token in question if rng.random() >= share)
    return replace(
        example, prompt_ids=(*example.prompt_ids[:start], *(kept or question), *example.prompt_ids[end:])
    )


def rehearsals(spec: StrategySpec, new: int) -> int:
    """Remembered rows beside so many new ones: at least one, unless the ratio is 0."""
    return max(1, round(spec.replay_ratio * new)) if spec.replay_ratio else 0


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
