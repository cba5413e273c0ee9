"""The systemd unit with this machine's paths in it: `holdfast.service` is the template and the truth.

Knows systemd's file format and where things lie; `install` is the only function here that changes
anything.
"""

import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from daemon.settings import Settings
from storage.errors import ControlError
from storage.reach import sqlite_path

SCRIPT = Path(sys.executable).parent / "daemon"  # in full: sudo does not look into virtual environments
TEMPLATE = Path(__file__).resolve().parent / "holdfast.service"
UNIT = Path("/etc/systemd/system/holdfast.service")
ACCOUNT = "holdfast"
_STATE = Path("/var/lib/holdfast")  # StateDirectory= in the template
_HIDDEN = tuple(
    map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp"))
)  # by ProtectHome and PrivateTmp
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Account:
    """Who the service runs as."""

    user: str
    group: str


def account_for(settings: Settings, wanted: str | None = None) -> Account:
    """`wanted`, else the owner of an existing state directory unless that is root, else `holdfast`."""
    name = wanted
    if name is None and settings.state_dir.exists() and (uid := settings.state_dir.stat().st_uid):
        name = pwd.getpwuid(uid).pw_name
    name = name or ACCOUNT
    try:
        import grp

        return Account(user=name, group=grp.getgrgid(pwd.getpwnam(name).pw_gid).gr_name)
    except KeyError:
        return Account(user=name, group=name)


def render(settings: Settings, config: Path, account: Account) -> str:
    """The unit's text for this installation."""
    command, directory = _command()
    replaced = {
        "ExecStart": f"{command} run --config {_quoted(config)}",
        "User": account.user,
        "Group": account.group,
    }
    if settings.model.device.startswith("cuda") or Path("/dev/nvidiactl").exists():
        # ProtectClock= names a device, and systemd before version 253 then refuses all that are not named.
        replaced |= {"PrivateDevices": "no", "ProtectClock": "no"}
    added = [f"WorkingDirectory={_quoted(directory)}"] if directory else []
    added += _paths(settings, config, replaced) + _network(settings)
    return _fill_in(TEMPLATE.read_text(), replaced, added)


def install(text: str, settings: Settings, account: Account) -> list[str]:
    """Account, state directory and unit; what was done, line by line. Needs root.

    Raises `ControlError` when a step fails; every step may be repeated.
    """
    if os.geteuid() != 0:
        raise ControlError("installing a service needs root; try with sudo, or look at it first with --print")
    if not UNIT.parent.is_dir():
        raise ControlError(f"there is no {UNIT.parent}: this machine does not run systemd; use `daemon run`")
    done = _ensure_account(account)
    done += _ensure_state_dir(settings.state_dir, account)
    temporary = UNIT.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.chmod(0o644)
    temporary.replace(UNIT)
    _run("systemctl", "daemon-reload")
    return [*done, f"wrote {UNIT}"]


def _command() -> tuple[str, Path | None]:
    """How the daemon is started here, and the directory that it takes (None: any)."""
    if SCRIPT.exists():
        return _quoted(SCRIPT), None
    return f"{_quoted(Path(sys.executable))} -m daemon.cli", Path(__file__).resolve().parent.parent


def _paths(settings: Settings, config: Path, replaced: dict[str, str]) -> list[str]:
    """Lets the service see what it needs where the template hides or locks it."""
    package = Path(__file__).resolve().parent.parent
    read = [Path(sys.prefix), Path(sys.base_prefix), package, config.parent]
    late = []  # what may not be there yet: the daemon waits for it, and does not need it to start
    if settings.source.path is not None:
        late.append(settings.source.path.parent)
    if Path(settings.model.base).is_absolute():
        late.append(Path(settings.model.base))
    database = sqlite_path(settings.tracking_uri)
    write = [settings.state_dir, *([database.parent] if database is not None else [])]
    lines = [
        f"BindReadOnlyPaths={_quoted(path if path in read else Path(f'-{path}'))}"
        for path in _distinct([*read, *late])
        if _is_hidden(path)
    ]
    for path in _distinct(write):
        if _is_hidden(path):
            lines.append(f"BindPaths={_quoted(path)}")
        elif not path.is_relative_to(_STATE):
            lines.append(f"ReadWritePaths={_quoted(path)}")
    if any(line.startswith("Bind") for line in lines):
        replaced["ProtectHome"] = "tmpfs"  # empty but for what is bound into it
    return lines


def _network(settings: Settings) -> list[str]:
    host = urlsplit(settings.tracking_uri).hostname
    base = settings.model.base
    hub = not (base.startswith("package:") or Path(base).is_absolute())
    if hub or (host is not None and host not in _LOCAL):
        return ["# MLflow or the base model is on another machine.", "IPAddressDeny="]
    return []


def _fill_in(template: str, replaced: dict[str, str], added: Sequence[str]) -> str:
    lines = []
    for line in template.splitlines():
        key, equals, _ = line.partition("=")
        lines.append(f"{key}={replaced[key]}" if equals and key in replaced else line)
    if added:
        end = lines.index("[Install]")
        lines[end:end] = ["# Filled in by `daemon install-service`.", *added, ""]
    return "\n".join(lines) + "\n"


def _distinct(paths: Sequence[Path]) -> list[Path]:
    """Without those that lie in another one; in order."""
    kept: list[Path] = []
    for path in sorted(set(paths)):
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


def _is_hidden(path: Path) -> bool:
    return any(path.is_relative_to(root) for root in _HIDDEN)


def _quoted(path: Path) -> str:
    """A path as systemd reads it: % is a specifier, white space separates."""
    text = str(path).replace("\\", "\\\\").replace("%", "%%").replace('"', '\\"')
    return f'"{text}"' if any(c.isspace() for c in text) or '"' in text else text


def _ensure_account(account: Account) -> list[str]:
    try:
        pwd.getpwnam(account.user)
    except KeyError:
        _run("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", account.user)
        return [f"made the account {account.user}"]
    return []


def _ensure_state_dir(path: Path, account: Account) -> list[str]:
    """The directory belongs to the account, with all that root made there before (`sudo daemon run`).

    Whoever has the directory may put another file, or a link, under any name in it, at any moment: every
    file is opened, and what was opened is judged and changed.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner, changed, left = pwd.getpwnam(account.user), False, []
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fchmod(top, 0o700)
        for folder, _, files, number in os.fwalk(".", dir_fd=top):
            for name in (".", *files):
                handed_over = _hand_over(name, number, owner)
                changed = changed or handed_over is True
                if handed_over is None:
                    left.append(path / folder / name)
    finally:
        os.close(top)
    done = [f"{path} belongs to {account.user} now"] if changed else []
    return done + [
        f"left {each} as it is: that file has another name somewhere, `find / -samefile {each}`"
        for each in left
    ]


def _hand_over(name: str, folder: int, owner: pwd.struct_passwd) -> bool | None:
    """Whether the file became the owner's; None when it may be somebody else's."""
    try:
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:  # a link, a socket, or gone by now
        return False
    try:
        found = os.fstat(opened)
        if found.st_uid == owner.pw_uid:
            return False
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            return None
        os.fchown(opened, owner.pw_uid, owner.pw_gid)
        return True
    finally:
        os.close(opened)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ControlError(
            f"`{command[0]}` is not on this machine; do its part by hand, see {TEMPLATE}"
        ) from None
    except subprocess.CalledProcessError as error:
        raise ControlError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from None
