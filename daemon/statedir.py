"""The state directory: private to one account, and written by one process at a time.

The lock is a flock on `daemon.lock`: the kernel drops it when its holder dies, however it dies, so a
crash never leaves it behind. The file's text only says who holds it.
"""

import errno
import fcntl
import os
import pwd
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storage.errors import ConfigError, ControlError, StoreBusy

LOCK = "daemon.lock"
DAEMON = "daemon run"  # what the daemon writes into its lock
_PATIENCE = 10.0  # seconds to wait for another command to finish its work
_POLL = 0.1


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a state directory, in its own words."""

    pid: int
    purpose: str


def prepare(path: Path) -> None:
    """Makes the directory, mode 0700. One that others could write into is refused."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode
        if mode & 0o022:
            raise ConfigError(f"{path} can be written by other accounts; `chmod 700 {path}`")
        if is_open_to_others(path):
            path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"bot.state_dir = {str(path)!r} cannot be used: {error}") from None
    if why := broken(path):
        raise ConfigError(
            f"bot.state_dir = {str(path)!r} cannot be written to: {why}; see `journalctl -k`, then repair "
            "the disk and mount it again, or set bot.state_dir to another place"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"bot.state_dir = {str(path)!r} cannot be written by this account; try with sudo")


def broken(path: Path) -> str | None:
    """Why nobody can write there: the disk is mounted read-only, or the kernel gave it up. None: it is not.

    Only trying tells: of an ext4 that it gave up, Linux 6.13 says so neither in the flags nor to access(2).
    """
    try:
        with tempfile.TemporaryFile(dir=path):
            return None
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno in (errno.EROFS, errno.EIO) else None


def is_open_to_others(path: Path) -> bool:
    """Whether accounts other than the owner's may do anything with it."""
    return bool(path.stat().st_mode & 0o077)


@contextmanager
def held(
    path: Path,
    purpose: str,
    *,
    patience: float = _PATIENCE,
    wait: Callable[[str], None] = lambda reason: time.sleep(_POLL),
) -> Iterator[None]:
    """Holds the directory while the block runs.

    Raises `ControlError` at once when a daemon holds it, and `StoreBusy` after `patience` seconds when
    another command does. `wait` is called between two tries, with what is waited for; it may raise.
    """
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{path / LOCK} cannot be opened: {error.strerror}; was something run as root here? "
            f"`sudo chown -R {_account(path.stat().st_uid)} {path}`"
        ) from None
    try:
        _take(descriptor, path, patience, wait)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {purpose}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(path: Path) -> Holder | None:
    """Who holds the directory now; None when it is free, or not ours to look into."""
    try:
        descriptor = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _read(descriptor)
    finally:
        os.close(descriptor)
    return None


def become_owner(path: Path) -> None:
    """Root acts as the owner of the state directory, and so leaves no files that the daemon cannot open."""
    if os.geteuid() != 0 or not path.exists():
        return
    owner = path.stat()
    if owner.st_uid != 0:
        os.setgroups([owner.st_gid])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)


def refuse_root(path: Path, command: str) -> None:
    """Raises `ConfigError` when root would write into somebody else's state directory: its files would be
    root's, and closed to the account that runs the daemon tomorrow."""
    if os.geteuid() != 0 or not path.exists() or path.stat().st_uid == 0:
        return
    owner = _account(path.stat().st_uid)
    raise ConfigError(
        f"{path} belongs to {owner}: `sudo -u {owner} daemon {command}`, or `systemctl start holdfast`"
    )


def _account(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _take(descriptor: int, path: Path, patience: float, wait: Callable[[str], None]) -> None:
    deadline, before = time.monotonic() + patience, None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            found = _read(descriptor)
            # Seen twice: once it may be the text of a dead daemon, locked by `holder` for a moment.
            if found.purpose == DAEMON and found == before:
                raise ControlError(
                    f"a daemon (process {found.pid}) runs on {path} already; see `daemon status`"
                ) from None
            reason = f"`{found.purpose}` (process {found.pid}) is working in {path}"
            if time.monotonic() > deadline:
                raise StoreBusy(f"{reason}; try again when it is done") from None
            before = found
            wait(reason)
        else:
            return


def _read(descriptor: int) -> Holder:
    pid, _, purpose = os.pread(descriptor, 200, 0).decode(errors="replace").strip().partition(" ")
    return Holder(pid=int(pid) if pid.isdigit() else 0, purpose=purpose or "another command")
