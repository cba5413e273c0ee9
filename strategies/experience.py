"""What one cycle learns from, as Avalanche sees it: an experience, and a loader of optimiser steps.

The loader is a pure function of examples, seed and epoch, so that a resumed training meets the same
steps. Knows no method; methods mix further rows in through `Loader.also`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avalanche.benchmarks import DatasetExperience
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute

from storage.errors import TrainingError
from storage.parquet import read_rows
from strategies.batches import Example, encode, plan
from strategies.text import Prompter

Draw = Callable[[int], Sequence[Example]]  # epoch → rows to mix in


@dataclass(frozen=True, kw_only=True)
class Step:
    """The rows of one optimiser step, cut into the passes that memory allows."""

    passes: tuple[tuple[Example, ...], ...]

    @property
    def rows(self) -> list[Example]:
        return [example for one in self.passes for example in one]

    @property
    def answer_tokens(self) -> int:
        return sum(len(example.answer_ids) for example in self.rows)

    @property
    def replayed(self) -> float:
        """Share of rows from the memory."""
        return sum(example.replayed for example in self.rows) / len(self.rows)


class LanguageExperience(DatasetExperience[Any]):
    """The new rows of a cycle, the rows watched while learning, and the remembered rows on offer."""

    def __init__(
        self, *, new: Sequence[Example], validation: Sequence[Example] = (), memory: Sequence[Example] = ()
    ) -> None:
        numbers = {task: n for n, task in enumerate(sorted({example.task for example in new}))}
        labels = DataAttribute([numbers[example.task] for example in new], "targets_task_labels")
        data = AvalancheDataset([list(new)], data_attributes=[labels], collate_fn=list)
        super().__init__(dataset=data, current_experience=0)
        self.validation = list(validation)
        self.memory = list(memory)

    @property
    def new(self) -> list[Example]:
        return list(self.dataset)


def read_experience(snapshot: Path, prompter: Prompter) -> LanguageExperience:
    """The rows of a snapshot, as ids."""
    parts = {part: read_rows(snapshot / f"{part}.parquet") for part in ("train", "validation", "memory")}
    if not parts["train"]:
        raise TrainingError(
            f"the snapshot {snapshot} has no training rows; `daemon status` shows what is pending"
        )
    return LanguageExperience(
        new=encode(parts["train"], prompter),
        validation=encode(parts["validation"], prompter),
        memory=encode(parts["memory"], prompter, replayed=True),
    )


class Loader:
    """Optimiser steps of `accumulation` passes of `batch_size` rows. Rows of like length go together."""

    def __init__(self, examples: Sequence[Example], *, batch_size: int, accumulation: int, seed: int) -> None:
        self.examples = list(examples)
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self._draws: list[Draw] = []

    def also(self, draw: Draw) -> None:
        """Mixes what `draw` gives into every epoch."""
        self._draws.append(draw)

    def rows(self, epoch: int) -> list[Example]:
        return self.examples + [example for draw in self._draws for example in draw(epoch)]

    def steps(self, epoch: int) -> list[Step]:
        # Planned in whole steps and then cut, so that accumulating changes memory and nothing else.
        rows = self.rows(epoch)
        planned = plan(
            [example.length for example in rows], self.batch_size * self.accumulation, self.seed, epoch
        )
        return [self._cut([rows[index] for index in indices]) for indices in planned]

    def _cut(self, rows: list[Example]) -> Step:
        starts = range(0, len(rows), self.batch_size)
        return Step(passes=tuple(tuple(rows[start : start + self.batch_size]) for start in starts))

    def __iter__(self) -> Iterator[Step]:
        """Avalanche's contract; the loop itself asks for the steps of an epoch."""
        return iter(self.steps(0))
