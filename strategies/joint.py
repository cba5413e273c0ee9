"""Everything again, from the base: the upper bound that every method is measured against.

    min over θ, from the base:  Σ over experiences i ≤ t  Σ over rows (x, y) of i  −log p(y | x; θ)

Cumulative training, called joint or multi-task training in the literature, and the usual upper bound
(De Lange et al. 2021, arXiv 1909.08383). It forgets nothing and costs the whole past in every cycle; for a
small bot that can be the right choice.
"""

from typing import Any

from strategies.replay import Rehearsal, seen


class Joint(Rehearsal):
    """State: the hashes of all rows so far. The adapter starts fresh (`strategies.inheritance.adapter`)."""

    keeps_all = True

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        if left := self.memory.seen - len(self.memory):
            self.notes.append(f"joint knows nothing of {left} rows that are not in the memory any more")
        everything = [self.on_offer[row] for row in self.memory.hashes]
        strategy.dataloader.also(lambda epoch: everything)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.memory = self.memory.with_rows(seen(example) for example in strategy.experience.new)
