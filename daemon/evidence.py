"""What an audit goes by: the store's records as they were at one moment, and the files and MLflow.

Reads, and changes nothing. What several checks need is found out once; what is broken is left out of it,
so that one fault is told by the one check that is about it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from daemon import examination, rescue
from daemon.examination import Exam
from daemon.settings import Settings
from storage import artifacts, snapshots
from storage.errors import HoldfastError, RegistryError
from storage.records import Candidate, Choice, Cycle, ModelVersion, Promotion, Score, StoredRow, Suite
from storage.registry import Listing, Registry
from storage.removals import ANSWERS
from storage.rows import Row, Split
from storage.snapshots import Snapshot
from storage.store import ALL, Store
from strategies.contract import result_files

BACKUP = "stop the daemon and put back your newest backup of {path}"


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """One disagreement: what is wrong, with the offending value, and what to type or do."""

    message: str
    next: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that is on record of one bot. Rows, roles and answers are asked for where they are needed:
    they are only ever added to."""

    settings: Settings
    store: Store
    registry: Registry
    now: datetime
    cycles: dict[int, Cycle]
    candidates: dict[int, list[Candidate]]  # by cycle
    models: dict[int, ModelVersion]  # by version
    promotions: list[Promotion]
    verdicts: dict[int, tuple[bool, str]]  # by cycle
    suites: list[Suite]
    members: dict[tuple[str, int], set[str]]  # hashes of the rows of each suite version
    scores: list[Score]
    sat: dict[tuple[str, str], int]  # (model, exam) to the number of answers
    lacking: set[tuple[str, int]]  # suite versions of which a row was erased since
    pruned: frozenset[str]  # what was removed on purpose, by its path
    tick: Callable[[], None]  # called again and again, so that who waits knows that work goes on

    def path(self, relative: str) -> Path:
        return self.settings.state_dir / relative

    def is_overtaken(self) -> bool:
        """Whether something was removed on purpose since the records were read, which misses it."""
        return self.store.pruned().keys() != self.pruned

    # Files.

    @cached_property
    def _loaded(self) -> tuple[dict[str, Snapshot], dict[str, str]]:
        whole, broken = {}, {}
        for name in sorted({cycle.snapshot for cycle in self.cycles.values() if cycle.snapshot}):
            if f"snapshots/{name}" in self.pruned:
                continue
            self.tick()
            try:
                whole[name] = snapshots.load(self.path(f"snapshots/{name}"))
            except (HoldfastError, OSError, ValueError, KeyError) as error:
                broken[name] = reason(error)
        return whole, broken

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        """Those that cycles refer to and that are whole, by id."""
        return self._loaded[0]

    @property
    def broken_snapshots(self) -> dict[str, str]:
        """Those that are not, with the reason."""
        return self._loaded[1]

    def snapshot_of(self, cycle: Cycle) -> Snapshot | None:
        return self.snapshots.get(cycle.snapshot or "")

    @cached_property
    def broken_results(self) -> dict[str, str]:
        """Result directories, relative to the state directory, that are not what was made there; with why."""
        broken = {}
        for result, adapter in self._results():
            self.tick()
            try:
                artifacts.verify(self.path(result))
                found = examination.adapter_hash(result_files(self.path(result))["adapter"])
            except (HoldfastError, OSError) as error:
                broken[result] = reason(error)
                continue
            if found != adapter:
                told = f"the adapter has the hash {found[:12]}, on record is {adapter[:12]}"
                broken.setdefault(result, f"{self.path(result)}: {told}")
        return broken

    def _results(self) -> Iterator[tuple[str, str]]:
        """(directory, hash of its adapter) of every candidate that was made, but for pruned ones."""
        made = {(c.result, c.model) for tried in self.candidates.values() for c in tried if c.model}
        yield from sorted((result, model) for result, model in made if result not in self.pruned)

    def has(self, result: str) -> bool:
        """Whether a result directory is there, as it was made."""
        return result not in self.pruned and result not in self.broken_results

    # Rows.

    @cached_property
    def broken_suites(self) -> dict[tuple[str, int], str]:
        """Frozen versions that the store does not have any more as they were frozen; with what is wrong."""
        found = ((suite, self._broken_suite(suite)) for suite in self.suites)
        return {(suite.task, suite.version): why for suite, why in found if why}

    def _broken_suite(self, suite: Suite) -> str | None:
        name = f"the suite {suite.task}@v{suite.version}"
        try:
            rows = self.store.suite_rows(suite.task, suite.version)
        except HoldfastError as error:
            return reason(error)
        stranger = next((r for r in rows if r.split is not Split.SUITE or r.task != suite.task), None)
        if stranger is not None:
            return f"{name} has row {stranger.hash}, which is a {stranger.split} row of {stranger.task!r} now"
        digest = snapshots.suite_hash(rows)
        if digest != suite.hash and (suite.task, suite.version) not in self.lacking:
            return f"{name} is not the one that was frozen (hash {digest[:12]}, frozen as {suite.hash[:12]})"
        return None

    @cached_property
    def altered_rows(self) -> list[StoredRow]:
        """Rows whose text is not what their identity was made from, but for those of broken suites."""
        spoiled = set().union(*(self.members.get(suite, set()) for suite in self.broken_suites))
        return [row for row in self.every_row() if row.hash not in spoiled and identity(row) != _said(row)]

    @cached_property
    def untrue_rows(self) -> set[str]:
        """Hashes of the rows whose text cannot be relied on."""
        spoiled = set().union(*(self.members.get(suite, set()) for suite in self.broken_suites))
        return spoiled | {row.hash for row in self.altered_rows}

    def every_row(self) -> Iterator[StoredRow]:
        """Superseded ones too."""
        for count, row in enumerate(self.store.chosen_rows(Choice())):
            if count % 10_000 == 0:
                self.tick()
            yield row

    # Models and exams.

    def ancestry(self, version: int | None) -> list[ModelVersion]:
        """A version and its ancestors, the newest first, as far as they are on record."""
        line: list[ModelVersion] = []
        while version in self.models and self.models[version] not in line:
            line.append(self.models[version])
            version = line[-1].parent
        return line

    @cached_property
    def misfits(self) -> dict[int, str]:
        """Versions that are not what their cycle made; with why."""
        found = {version: self._misfit(model) for version, model in self.models.items()}
        return {version: why for version, why in found.items() if why}

    def _misfit(self, model: ModelVersion) -> str | None:
        cycle = self.cycles.get(model.cycle_id)
        made = self.concluded(cycle.id) if cycle else None
        if cycle is None or made is None:
            return f"version {model.version} is said to be of cycle {model.cycle_id}, which made nothing"
        snapshot = self.snapshot_of(cycle)
        base = snapshot.info["meta"]["model"]["fingerprint"] if snapshot else model.base
        for what, found, wanted in (
            ("the number", model.version, cycle.version if cycle.state.ended else None),
            ("the result", model.result, made.result),
            ("the adapter", model.adapter_hash, made.model),
            ("the base", model.base, base),
        ):
            if wanted is not None and found != wanted:
                return f"version {model.version} has {what} {found}, its cycle {cycle.id} made {wanted}"
        return None

    @cached_property
    def torn(self) -> dict[int, str]:
        """Versions with a gap or a loop in their ancestry; with why."""
        found = {version: self._torn(model) for version, model in self.models.items()}
        return {version: why for version, why in found.items() if why}

    def _torn(self, model: ModelVersion) -> str | None:
        cycle = self.cycles.get(model.cycle_id)
        if cycle is not None and cycle.parent != model.parent:
            return f"version {model.version} continues from {model.parent}, its cycle from {cycle.parent}"
        if model.parent is None:
            return None
        parent, told = self.models.get(model.parent), f"version {model.version} continues from {model.parent}"
        if parent is None:
            return f"{told}, which is not on record"
        if parent.cycle_id >= model.cycle_id:
            return f"{told}, which is not older"
        return None if parent.base == model.base else f"{told}, which has the base {parent.base[:12]}"

    def is_sound(self, version: int | None) -> bool:
        """Whether a version and all its ancestors are what they are said to be."""
        faults = self.torn.keys() | self.misfits.keys()
        return not any(model.version in faults for model in self.ancestry(version))

    def concluded(self, cycle_id: int) -> Candidate | None:
        """The candidate that became the cycle's version, or will."""
        candidates = self.candidates[cycle_id]
        return rescue.concluded(candidates) if candidates else None

    @cached_property
    def exams(self) -> dict[str, Exam]:
        """Every exam that a whole snapshot asks for, on suites and on validation rows, by its key."""
        return {
            exam.key: exam
            for snapshot in self.snapshots.values()
            for exam in (*examination.exams(snapshot), *examination.probe_exams(snapshot))
        }

    def is_pruned(self, score: Score) -> bool:
        """Whether answers behind a score were removed on purpose: it stays, and proves itself no more."""
        if (score.task, score.version) in self.lacking:
            return True
        return f"{ANSWERS}{score.model}" in self.pruned and (score.model, score.exam) not in self.sat

    def is_whole(self, score: Score) -> bool:
        """Whether there is an answer to every row of the score's suite, and to no other."""
        answered = self.store.predictions(score.model, score.exam)
        return answered.keys() == self.members.get((score.task, score.version), set())

    # MLflow.

    @cached_property
    def _listed(self) -> tuple[Listing | None, str]:
        try:
            return self.registry.look(), ""
        except RegistryError as error:
            return None, str(error)

    @property
    def listing(self) -> Listing | None:
        """What MLflow has of this bot. None: it cannot be asked, for `mlflow_problem`."""
        return self._listed[0]

    @property
    def mlflow_problem(self) -> str:
        return self._listed[1]


def gather(settings: Settings, store: Store, registry: Registry, tick: Callable[[], None]) -> Evidence:
    """The records, as they are at this moment: a cycle that runs may change them in the next."""
    with store.transaction():
        cycles = {cycle.id: cycle for cycle in reversed(store.cycles(ALL))}
        verdicts = {number: store.verdict(number) for number in cycles}
        return Evidence(
            settings=settings,
            store=store,
            registry=registry,
            now=store.clock(),
            cycles=cycles,
            candidates={number: store.candidates(number) for number in cycles},
            models={model.version: model for model in store.models()},
            promotions=store.promotions(),
            verdicts={number: verdict for number, verdict in verdicts.items() if verdict},
            suites=store.suites(),
            members=store.survey().suite_members(),
            scores=store.scores(),
            sat=store.survey().sat(),
            lacking=store.suites_lacking(),
            pruned=frozenset(store.pruned()),
            tick=tick,
        )


def reason(error: Exception) -> str:
    """An error's first half: what is wrong. What to do is the audit's to say."""
    return str(error).partition(";")[0]


def same(one: float | None, other: float | None) -> bool:
    """Whether two numbers are one, but for rounding."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)


def identity(row: Any) -> tuple[str, ...]:
    """Hash and keys of a row's text."""
    made = Row(id="", task=row.task, question=row.question, answer=row.answer, context=row.context)
    return made.hash, made.key, made.question_key, made.words_key


def _said(row: StoredRow) -> tuple[str, ...]:
    return row.hash, row.key, row.question_key, row.words_key
