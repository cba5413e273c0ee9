"""Moves `champion`, and only on record: the store's promotion line comes first, the alias follows.

The store is the truth; the registry's alias mirrors it and is repaired at every start and after every
cycle, so that a crash or an outage between the two writes cannot leave them apart for long.
"""

import threading
from collections.abc import Sequence

from storage.errors import ControlError, RegistryError, RegistryUnavailable
from storage.records import Cycle, ModelVersion, Promotion
from storage.registry import Registry
from storage.store import Store

CHAMPION = "champion"
CHALLENGER = "challenger"
_repairing = threading.Lock()


def by_gate(store: Store, version: int, cycle: Cycle) -> None:
    """Promotes the version of a cycle whose passing verdict is recorded; the store refuses any other.

    Only the record: the alias is for `repair_alias`, once the record stands.
    """
    store.promote(version, cycle_id=cycle.id, kind="gate", who="gate", why=cycle.reason or "passed")


def manual(store: Store, registry: Registry, version: int, who: str, why: str) -> Promotion:
    """A person overrides the gate; who, when and why stay on record.

    Raises `ControlError` for a version that this bot never made.
    """
    with store.transaction():  # what is pruned meanwhile is pruned before this or after it
        if store.model(version) is None:
            known = ", ".join(str(model.version) for model in store.models()) or "none yet"
            raise ControlError(f"there is no version {version}; versions: {known}. See `daemon history`")
        check_has_files(store, version)
        champion = store.champion()
        if champion is not None and champion.version == version:
            raise ControlError(f"version {version} is the champion already")
        line = store.promote(version, cycle_id=None, kind="manual", who=who, why=why)
    repair_alias(store, registry)
    return line


def rollback(store: Store, registry: Registry, who: str, why: str) -> Promotion:
    """Back to the champion before the present one; rows learned since then are pending again.

    The next cycle continues from that version's adapter, memory and Fisher information. Rolling back
    the first champion leaves the bare base. What learned an erased row is passed over. Raises `ControlError`
    when there is nothing to go back to.
    """
    with store.transaction():
        stack = champions(store.promotions())
        if not stack:
            raise ControlError("there is no champion to roll back; see `daemon history`")
        unfit = store.tainted() | {stack[-1]}
        fit = [version for version in stack if version not in unfit]
        if len(stack) > 1 and not fit:
            raise ControlError(
                "every champion before this one learned a row that was erased; `daemon promote VERSION "
                "--why …` takes another one, see `daemon history`"
            )
        before = fit[-1] if fit else None
        if before is not None:
            check_has_files(store, before)
        line = store.promote(before, cycle_id=None, kind="rollback", who=who, why=why)
    repair_alias(store, registry)
    return line


def check_has_files(store: Store, version: int) -> None:
    """Raises `ControlError` for a version that nobody can answer with, or may: its files were removed on
    purpose, or it learned what was erased."""
    if version in store.tainted():
        raise ControlError(f"version {version} learned a row that was erased; see `daemon history`")
    models, pruned = {model.version: model.result for model in store.models()}, store.pruned()
    gone = pruned.get(models.get(version, ""))
    if gone is not None:
        left = ", ".join(str(one) for one, result in models.items() if result not in pruned) or "none"
        raise ControlError(
            f"version {version} has no files any more, they were pruned at {gone.at:%Y-%m-%d %H:%M} "
            f"([retention]); versions that have: {left}"
        )


def repair_alias(store: Store, registry: Registry) -> None:
    """Makes the registry's `champion` say what the store says; `challenger` is nobody who serves, or has
    learned what was erased.

    One thread at a time, and each reads the store anew: whoever comes last leaves the newest.
    """
    with _repairing:
        wanted = serving(store)
        if wanted is None:
            registry.delete_alias(CHAMPION)
        elif registry.alias(CHAMPION) != wanted.version:
            registry.set_alias(CHAMPION, wanted.version, wanted.adapter_hash)
        unfit = store.tainted() | ({wanted.version} if wanted else set())
        if registry.alias(CHALLENGER) in unfit:
            registry.delete_alias(CHALLENGER)


def check_is_ours(store: Store, registry: Registry) -> None:
    """Raises `RegistryError` unless this MLflow has the champion or, without one, any of our versions: the
    others may have been deleted there by hand."""
    champion = serving(store)
    left = [champion] if champion else store.models()
    while left:
        model = left.pop()
        try:
            registry.check_has(model.version, model.adapter_hash)
            return
        except RegistryUnavailable:
            raise
        except RegistryError:
            if not left:
                raise


def serving(store: Store) -> ModelVersion | None:
    """The champion's version; None while there is none."""
    line = store.champion()
    return store.model(line.version) if line and line.version is not None else None


def champions(lines: Sequence[Promotion]) -> list[int]:
    """Champions that a rollback can return to, the present one last: each rollback undoes one promotion,
    or more where the one before may not serve any more."""
    stack: list[int] = []
    for line in lines:
        if line.kind == "rollback":
            stack.pop()
            while stack and stack[-1] != line.version:
                stack.pop()
        elif line.kind == "erasure":  # what came later may have learned it
            stack = [version for version in stack if line.version is not None and version < line.version]
            stack += [] if line.version is None else [line.version]
        elif line.version is not None:
            stack.append(line.version)
    return stack
