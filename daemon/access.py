"""How a command reaches the bot: through the daemon, or, when none runs, through the store itself.

The daemon has its store for itself, so exactly one of the two ways works at any time. Imports the
store only when it is needed: it costs more than asking the daemon.
"""

import os
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon import config, statedir
from daemon.control import Client, account
from daemon.settings import Settings
from storage.errors import ConfigError, ControlError, DaemonNotRunning, DaemonSilent, HoldfastError

if TYPE_CHECKING:
    from storage.store import Store

HERE = Path("config.toml")
SYSTEM = Path("/etc/holdfast/config.toml")
SILENCE_SECONDS = 600.0  # an ingest, a slow MLflow or one check of an audit may say nothing for this long
SLOW = ("audit", "erase", "ingest", "promote", "rollback")
QUICK_SECONDS = 30.0  # for all else: a healthy daemon answers at once, or has a heartbeat
_PAUSE = 0.2  # seconds between two tries
RETURN_SECONDS = 60.0  # for a daemon that is restarted under a client that follows a cycle


def config_path(given: Path | None, *, must_exist: bool = True) -> Path:
    """The config that counts: the one given, the environment's, this directory's, the system's."""
    told = os.environ.get("HOLDFAST_CONFIG")
    said = given or (Path(told) if told else None)
    if said is not None:
        return said.absolute()
    for path in (HERE, SYSTEM):
        if may_exist(path):
            return path.absolute()
    if must_exist:
        raise ConfigError(
            f"no config file: neither ./{HERE} nor {SYSTEM} exists; make one with `daemon init DIR`, or "
            "name yours with --config"
        )
    return HERE.absolute()


def may_exist(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # reading it will say so
        return True


def make_bot(directory: Path, state_dir: Path | None) -> tuple[Path, Settings]:
    """A commented config.toml in `directory` and the state directory it names. Overwrites nothing."""
    path = directory / "config.toml"
    text = config.render(state_dir.absolute() if state_dir else None)
    try:
        tomllib.loads(text.encode().decode())
    except ValueError as error:  # a name that is not UTF-8
        raise ConfigError(f"{str(state_dir)!r} cannot be written in TOML: {error}; choose another") from None
    try:
        if path.exists():
            raise ConfigError(f"{path} exists already; edit it, or choose another directory")
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    settings = config.load(path)
    statedir.prepare(settings.state_dir)
    return path, settings


def perform(
    settings: Settings,
    command: str,
    direct: Callable[[], dict[str, Any]],
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    **args: Any,
) -> dict[str, Any]:
    """Asks the daemon, or does the same on the store itself (`direct`) when no daemon runs."""
    try:
        return ask(settings, command, on_event, **args)
    except DaemonNotRunning:
        return direct()


def ask(
    settings: Settings,
    command: str,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    **args: Any,
) -> dict[str, Any]:
    """Asks the daemon. Raises `DaemonNotRunning`, or says that one is there but has no ear (yet)."""
    timeout = SILENCE_SECONDS if command in SLOW else QUICK_SECONDS
    try:
        return Client(settings.socket_path, timeout=timeout).call(command, on_event, **args)
    except DaemonNotRunning:
        holder = statedir.holder(settings.state_dir)
        if holder is None or holder.purpose != statedir.DAEMON:
            raise
        raise ControlError(
            f"the daemon (process {holder.pid}) is starting, stopping or hanging; try again in a "
            "moment, else see `journalctl -u holdfast`"
        ) from None


def retrain(
    settings: Settings,
    on_event: Callable[[dict[str, Any]], None],
    *,
    wait: bool,
    patience: float = RETURN_SECONDS,
) -> dict[str, Any]:
    """Asks for a cycle and, with `wait`, follows that very cycle to its end, over restarts of the daemon.

    Raises `ControlError` when the daemon stays away for `patience` seconds.
    """
    first: dict[str, Any] = {}  # says the cycle's number
    heard = 0.0

    def hear(event: dict[str, Any]) -> None:
        nonlocal heard
        heard = time.monotonic()
        first.update(first or event)
        on_event(event)

    try:
        return ask(settings, "retrain", hear, wait=wait)
    except ControlError:
        if not wait or not first:
            raise
    cycle, heard = first["cycle"], time.monotonic()
    while time.monotonic() - heard < patience:
        time.sleep(_PAUSE)
        with suppress(ControlError):
            return {**ask(settings, "follow", hear, cycle=cycle), "joined": first["joined"]}
    raise ControlError(
        f"no daemon answered within {patience:g} s; cycle {cycle} continues at its next start: "
        f"`systemctl start holdfast`, then `daemon show {cycle}`"
    )


@contextmanager
def reading(settings: Settings) -> Iterator["Store"]:
    """The store, only to look into. Root stays root: nothing is written, and what it still has to import
    may lie where the owner cannot look."""
    from storage.store import Store

    with Store.open(settings.store_path, read_only=True) as store:
        yield store


@contextmanager
def writing(settings: Settings, purpose: str) -> Iterator["Store"]:
    """The store for ourselves, as the daemon would have it; `purpose` is what others are told."""
    from storage.store import Store

    os.umask(0o077)
    statedir.become_owner(settings.state_dir)
    statedir.prepare(settings.state_dir)
    with statedir.held(settings.state_dir, purpose), Store.open(settings.store_path) as store:
        yield store


def reader(settings: Settings, operation: str, *args: Any) -> Callable[[], dict[str, Any]]:
    """Does an operation of the form (store, ...) directly."""

    def direct() -> dict[str, Any]:
        from daemon import operations

        with reading(settings) as store:
            return dict(getattr(operations, operation)(store, *args))

    return direct


def writer(settings: Settings, operation: str) -> Callable[[], dict[str, Any]]:
    """Does an operation of the form (store, who) directly."""

    def direct() -> dict[str, Any]:
        from daemon import operations

        who = me()
        with writing(settings, f"daemon {operation}") as store:
            return dict(getattr(operations, operation)(store, who))

    return direct


def status(settings: Settings) -> dict[str, Any]:
    """What the bot knows; `daemon` is None when none runs."""

    def direct() -> dict[str, Any]:
        from daemon import operations

        if not settings.store_path.exists():
            return {**operations.status(settings, None), "daemon": None}
        with reading(settings) as store:
            return {**operations.status(settings, store), "daemon": None}

    return perform(settings, "status", direct)


def audit(settings: Settings) -> dict[str, Any]:
    """Everything that contradicts what must never change."""

    def direct() -> dict[str, Any]:
        from daemon import operations

        if not settings.store_path.exists():
            return operations.audit(settings, None, None)
        with reading(settings) as store:
            return operations.audit(settings, store, operations.open_registry(settings, store))

    return perform(settings, "audit", direct)


def serving(settings: Settings, version: int | None) -> dict[str, Any]:
    """Who answers: the champion, or the version."""

    def direct() -> dict[str, Any]:
        from daemon import operations

        if not settings.store_path.exists():
            return operations.NOTHING_SERVES
        with reading(settings) as store:
            return operations.serving(settings, store, version)

    return perform(settings, "serving", direct, version=version)


def move(settings: Settings, operation: str, **args: Any) -> dict[str, Any]:
    """Promotes or rolls back."""

    def direct() -> dict[str, Any]:
        from daemon import operations

        who = me()
        with writing(settings, f"daemon {operation}") as store:
            registry = operations.open_registry(settings, store)
            if operation == "promote":
                return operations.promote(store, registry, args["version"], who, args["why"])
            return operations.rollback(store, registry, who, args["why"])

    return perform(settings, operation, direct, **args)


def prune(settings: Settings, *, dry_run: bool) -> dict[str, Any]:
    """Lets go what may go, or lists it."""

    def direct() -> dict[str, Any]:
        from daemon import operations

        if dry_run:
            with reading(settings) as store:
                return operations.prunable(settings, store)
        with writing(settings, "daemon prune") as store:
            return operations.prune(settings, store, operations.open_registry(settings, store))

    return perform(settings, "prune", direct, dry_run=dry_run)


def ingest(
    settings: Settings, paths: Sequence[Path], on_event: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Takes in the rows of files. Where the daemon falls silent on the way, says what it had taken."""
    told = "It had told of no rows yet"

    def hear(event: dict[str, Any]) -> None:
        nonlocal told
        if "taken" in event:
            told = f"So far it had told of {event['taken']}, which stay"
        on_event(event)

    def direct() -> dict[str, Any]:
        from daemon import operations
        from daemon.commands import prepared, progress

        with writing(settings, "daemon ingest") as store:
            return operations.ingest(
                settings,
                store,
                paths,
                lambda: prepared(settings, lambda step: on_event({"progress": progress(step)})),
                lambda so_far: on_event({"taken": so_far}),
            )

    try:
        return perform(settings, "ingest", direct, hear, paths=[str(path) for path in paths])
    except DaemonSilent as error:
        raise DaemonSilent(f"{error}. {told}; the same `daemon ingest` again takes the rest") from None


def erase(settings: Settings, why: str, which: dict[str, Any], *, dry_run: bool) -> dict[str, Any]:
    """Erases the rows that are meant, or says what that would do."""

    def direct() -> dict[str, Any]:
        from daemon import erasure, operations

        if dry_run:
            with reading(settings) as store:
                return operations.erase_plan(settings, store, **which)
        who = me()
        with writing(settings, "daemon erase") as store:
            registry = operations.open_registry(settings, store)  # refuses a bot that it does not know
            begun = operations.erase(settings, store, who, why, **which)
            try:
                erasure.finish(settings, store, registry)
            except (HoldfastError, OSError):  # what serves is settled; the daemon does the rest later
                return {"erasure": begun, "done": False}
        return {"erasure": begun, "done": True}

    return perform(settings, "erase", direct, why=why, dry_run=dry_run, **which)


def me() -> str:
    """The account that types, for the record; ask before `writing` turns root into someone else."""
    return account(os.geteuid(), os.environ.get("SUDO_USER", ""))
