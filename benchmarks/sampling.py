"""Cutting data to size reproducibly: which rows are taken depends on ids, sizes and the seed alone."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime

from storage.errors import HoldfastError
from storage.rows import Row

FIRST_DAY = datetime(2026, 3, 2)


class MissingData(HoldfastError):
    """The rows of a stream are not where the command says, or are too few."""


def balanced(rows: Sequence[Row], size: int, seed: int) -> list[Row]:
    """At most `size` rows, round and round the answers; which ones depends on ids and seed alone."""
    classes: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: shuffled(seed, row.id)):
        classes[row.answer].append(row)
    order = sorted(classes, key=lambda name: shuffled(seed, name))
    rounds = range(max(map(len, classes.values()), default=0))
    return [classes[name][n] for n in rounds for name in order if n < len(classes[name])][:size]


def shuffled(seed: int | str, name: str) -> str:
    """A place in an order that nobody chose."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
