"""Learning without forgetting: on every row, what the champion thought of the wrong answers is kept.

    loss + w Σ T² KL(champion ‖ model)

Li & Hoiem 2016 (arXiv 1606.09282) keep the old heads' outputs on the new rows. A language model has one
head, whose old opinion of a new row is that its answer is wrong; so the right token is left out on both
sides, as in the non-target part of Zhao et al. 2022 (arXiv 2203.08679), and the rest is kept.
"""

from typing import Any

from strategies import distill
from strategies.distill import Opinion
from strategies.method import Method


class Lwf(Method):
    """No state: the champion is the adapter that the training starts from."""

    opinions: dict[str, Opinion]

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """One forward pass over the rows that will be learned, before anything changes."""
        self.opinions = {}
        if self.continues:
            epochs = range(strategy.spec.epochs)
            drawn = {row.row_hash for epoch in epochs for row in strategy.dataloader.rows(epoch)}
            # Whole: what is rehearsed may lack some of its words.
            kept = [*strategy.experience.memory, *strategy.experience.new]
            rows = [row for row in kept if row.row_hash in drawn]
            self.opinions = distill.opinions(strategy, rows, hide_answers=True)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        terms = [
            distill.divergence(
                distill.own(strategy.mb_output[n], row),
                self.opinions[row.row_hash],
                distill.answer_ids(row, strategy.device),
            )
            for n, row in enumerate(strategy.examples)
            if row.row_hash in self.opinions
        ]
        if terms:
            strategy.penalise(self.spec.lwf_weight * sum(terms) / strategy.step.answer_tokens)
