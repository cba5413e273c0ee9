"""Audit of MLflow against the store: the aliases, every version and every number that it shows.

One function an invariant; each yields what contradicts it. Reads, and changes nothing.
"""

from collections.abc import Iterator, Mapping
from datetime import timedelta

from daemon import report
from daemon.erasure import is_due
from daemon.evidence import BACKUP, Evidence, Wrong, same
from daemon.flight import HOUSEKEEPING_SECONDS
from daemon.promote import CHALLENGER, CHAMPION
from storage.artifacts import sha256_file
from storage.records import State
from storage.registry import Listed
from storage.removals import MLFLOW as MLFLOW_FILES
from storage.runs import key

# The alias is repaired at every start, and whenever MLflow is back or the configuration is read again.
REPAIR = "systemctl reload holdfast   (or start it: `daemon run`)"
MLFLOW = BACKUP.format(path="mlflow.db and artifacts/") + ", or set mlflow.tracking_uri back"
CATCHES_UP = timedelta(seconds=HOUSEKEEPING_SECONDS)


def mlflow_can_be_asked(evidence: Evidence) -> Iterator[Wrong]:
    if evidence.listing is None:
        yield Wrong(message=evidence.mlflow_problem, next="daemon doctor")


def the_alias_champion_is_the_stores_champion(evidence: Evidence) -> Iterator[Wrong]:
    """Or what the line before said, for as long as the alias may lag behind the store."""
    if evidence.listing is None:
        return
    alias = evidence.listing.aliases.get(CHAMPION)
    line = evidence.store.champion()  # asked now: it may have moved since the audit began
    earlier = evidence.promotions[-1] if evidence.promotions else None
    wanted = line.version if line else None
    catching_up = line is not None and evidence.store.clock() - line.at < CATCHES_UP
    excused = catching_up and line is not None and alias in (line.previous, earlier and earlier.version)
    if alias != wanted and not excused:
        names = [f"version {version}" if version else "the base" for version in (alias, wanted)]
        yield Wrong(
            message=f"MLflow's alias {CHAMPION} is at {names[0]}, the champion is {names[1]}", next=REPAIR
        )


def the_alias_challenger_is_the_newest_candidate(evidence: Evidence) -> Iterator[Wrong]:
    """It is at the newest version, and gone when that one has become champion, or learned what was erased. A
    cycle that is about to end may be moving it."""
    newest = max(evidence.models, default=None)
    cycle = evidence.cycles.get(evidence.models[newest].cycle_id) if newest is not None else None
    moving = any(c.state is State.DECIDED for c in evidence.cycles.values())
    settled = cycle is None or cycle.state in (State.PROMOTED, State.REJECTED)
    if evidence.listing is None or moving or not settled:
        return
    alias = evidence.listing.aliases.get(CHALLENGER)
    served = newest in {line.version for line in evidence.promotions}
    allowed = {newest, None} if served else {newest}
    champion = evidence.promotions[-1] if evidence.promotions else None
    if champion and champion.version == newest and evidence.now - champion.at > CATCHES_UP:
        allowed = {None}
    if newest in evidence.store.tainted():
        allowed = {newest, None} if is_due(evidence.store) else {None}
    if alias not in allowed:
        at = f"version {alias}" if alias else "no version"
        told = f"MLflow's alias {CHALLENGER} is at {at}, the newest candidate is version {newest}"
        yield Wrong(message=told, next="daemon retrain-now   (the next candidate takes it)")


def each_version_is_in_mlflow_as_it_was_trained(evidence: Evidence) -> Iterator[Wrong]:
    if evidence.listing is None:
        return
    listed = {one.version: one for one in evidence.listing.versions}
    for version, model in evidence.models.items():
        if version in evidence.misfits:
            continue
        pruned = f"{MLFLOW_FILES}{version}/model" in evidence.pruned
        told = _different(listed.get(version), model.cycle_id, model.adapter_hash, pruned=pruned)
        if told:
            yield Wrong(message=f"MLflow has version {version} {told}", next=MLFLOW)


def _different(listed: Listed | None, cycle_id: int, adapter_hash: str, *, pruned: bool) -> str | None:
    if listed is None:
        return "not at all"
    if (listed.cycle_id, listed.adapter_hash) != (cycle_id, adapter_hash):
        told = f"of cycle {listed.cycle_id} with the adapter {listed.adapter_hash[:12]}"
        return f"{told}; here it is of cycle {cycle_id}, {adapter_hash[:12]}"
    if listed.weights is None or pruned:
        return None
    if not listed.weights.is_file():
        return f"without its adapter: {listed.weights} is missing"
    if sha256_file(listed.weights) != adapter_hash:
        return f"with another adapter: {listed.weights} was changed"
    return None


def no_version_in_mlflow_is_unknown_here(evidence: Evidence) -> Iterator[Wrong]:
    """But for those that a cycle has just published, or had when it was stopped."""
    for listed in evidence.listing.versions if evidence.listing else ():
        cycle = evidence.store.cycle(listed.cycle_id)
        halfway = cycle is not None and cycle.state in (State.DECIDED, State.FAILED, State.CANCELLED)
        if evidence.store.model(listed.version) is None and not halfway:
            told = f"MLflow has version {listed.version} of cycle {listed.cycle_id}, which the store does not"
            yield Wrong(message=f"{told} know; was the store put back from a backup?", next="daemon ui")


def each_number_in_mlflow_comes_from_the_predictions(evidence: Evidence) -> Iterator[Wrong]:
    """Scores and what the accuracy matrix tells. How the training went is told nowhere else."""
    for listed in evidence.listing.versions if evidence.listing else ():
        if listed.version not in evidence.models or not evidence.is_sound(listed.version):
            continue
        evidence.tick()
        if listed.metrics is None:
            yield Wrong(message=f"MLflow has no run of version {listed.version} any more", next=MLFLOW)
            continue
        for name, value in _numbers(evidence, listed.cycle_id).items():
            shown = listed.metrics.get(key(name))
            if not same(shown, value):
                told = f"MLflow shows {name} = {shown} for version {listed.version}"
                yield Wrong(message=f"{told}, the predictions say {value:g}", next=MLFLOW)


def _numbers(evidence: Evidence, cycle_id: int) -> Mapping[str, float]:
    """As `daemon.publish` has told them. Nothing where answers are missing: they are told of elsewhere."""
    cells = [score for score in evidence.scores if score.cycle_id == cycle_id]
    if not all(evidence.is_whole(cell) for cell in cells):
        return {}
    found = dict(report.matrix(evidence.store, cycle_id=cycle_id).metrics())
    for cell in cells:
        answers = evidence.store.predictions(cell.model, cell.exam).values()
        found[f"suite/{cell.task}/{cell.label}"] = sum(a.score for a in answers) / len(answers)
        if cell.label == "candidate":
            found[f"suite/{cell.task}/exact_match"] = sum(a.exact_match for a in answers) / len(answers)
            found[f"suite/{cell.task}/token_f1"] = sum(a.token_f1 for a in answers) / len(answers)
    return found
