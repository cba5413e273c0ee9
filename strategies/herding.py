"""Which rows stand for the others: herding.

Of the rows with one answer, the first is the one whose features are nearest to their mean, and each
further one brings the mean of those chosen nearest to the mean of all (Welling 2009, "Herding dynamical
weights to learn"; equation 4 and algorithm 4 of iCaRL, Rebuffi et al. 2017, arXiv 1611.07725). The first n
of the order are the best n, so that a memory may be cut later.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import normalize

from strategies.batches import Example


class Features:
    """What the model makes of a question: its last hidden state [D] where the answer begins, at length 1.

    Taken from the passes of the training itself, so that they cost nothing: of each row the latest epoch's.
    """

    def __init__(self, model: Any) -> None:
        self.found: dict[str, Tensor] = {}  # by row hash
        self._latest = torch.empty(0)
        head: Module = model.get_base_model().get_output_embeddings()
        self._hook = head.register_forward_pre_hook(self._see)

    def note(self, examples: Sequence[Example]) -> None:
        """Keeps those of the new rows in the pass that the model has just made."""
        for n, row in enumerate(examples):
            if not row.replayed:
                state = self._latest[n, -len(row.answer_ids) - 1]
                self.found[row.row_hash] = normalize(state.float(), dim=0).half().cpu()

    def close(self) -> None:
        self._hook.remove()

    def _see(self, head: Module, given: tuple[Tensor, ...]) -> None:
        self._latest = given[0].detach()


def ranks(features: Mapping[str, Tensor], rows: Sequence[Example], most: int) -> dict[str, int]:
    """The place of each row, by its hash, among the rows of its task with the same answer.

    Beyond the first `most` nobody is ranked, and all have the place `most`.
    """
    classes: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for row in sorted(rows, key=lambda row: row.row_hash):
        classes.setdefault((row.task, row.answer_ids), []).append(row.row_hash)
    places = {row.row_hash: most for row in rows}
    for members in classes.values():
        order = herd(torch.stack([features[row] for row in members]), most)
        places.update({members[index]: place for place, index in enumerate(order)})
    return places


def herd(points: Tensor, most: int) -> list[int]:
    """Indices of the first `most` of [N, D] points of length 1, the most representative first.

    With the mean μ and the sum s of k - 1 points, the next is the x for which ‖μ - (s + x) / k‖ is least;
    for ‖x‖ = 1 that is where x · (kμ - s) is greatest.
    """
    points = points.double()
    mean, total = points.mean(0), torch.zeros_like(points[0])
    is_left = torch.ones(len(points), dtype=torch.bool)
    order: list[int] = []
    for count in range(1, min(most, len(points)) + 1):
        index = int((points @ (count * mean - total)).masked_fill(~is_left, -torch.inf).argmax())
        order.append(index)
        is_left[index] = False
        total = total + points[index]
    return order
