"""A closed set of labels as a prefix trie, and decoding that cannot leave it.

At each step only the tokens that continue some label are allowed, so a task with 150 labels costs the
same forward passes as one with three. Every label ends in the end-of-turn token, which makes a label
that is the beginning of another one a branch like any other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

Node = dict[int, "Node"]


class Trie:
    """Labels by their token ids."""

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self._root: Node = {}
        for ids in labels:
            node = self._root
            for token in ids:
                node = node.setdefault(token, {})

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """Tokens that may follow the prefix; none after the end of a label."""
        node = self._root
        for token in prefix:
            node = node.get(token, {})
        return sorted(node)


class OnlyLabels(LogitsProcessor):
    """Masks every token that does not continue a label. Rows that have finished may only pad.

    `start` is the length of the left-padded prompts.
    """

    def __init__(self, trie: Trie, start: int, pad_id: int) -> None:
        self._trie = trie
        self._start = start
        self._pad_id = pad_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of the next token, minus infinity where it is not allowed."""
        masked = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids[:, self._start :].tolist()):
            allowed = self._trie.allowed(ids)
            if allowed:
                masked[row, allowed] = scores[row, allowed]
            else:
                masked[row, self._pad_id] = 0.0
        return masked
