"""A machine of its own for tests: the systemd of this one, booted in namespaces on an overlay of its root.

No container engine and no image: `tests/boot.sh` has the mounts. Outside there is one cgroup more while it
runs. All else is gone with the first process inside, and that one with ours, however ours ends.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.daemons import SECONDS, children, environment

BOOT = Path(__file__).resolve().parent / "boot.sh"
SYSTEMD = Path("/lib/systemd/systemd")
NAMESPACES = ["--pid", "--mount", "--uts", "--ipc", "--cgroup", "--net"]
TOOLS = (
    "unshare", "nsenter", "setpriv", "mount", "pivot_root", "systemctl", "journalctl", "useradd", "ip",
    "pkill",
)  # fmt: skip
OVERLAY = (
    "mount -t tmpfs tmpfs {0} && mkdir {0}/upper {0}/work {0}/root && "
    "mount -t overlay -o lowerdir=/,upperdir={0}/upper,workdir={0}/work overlay {0}/root && "
    "mount -t proc proc {0}/root/proc && mount -t sysfs -o ro sysfs {0}/root/sys && "
    "mount -t cgroup2 cgroup2 {0}/root/sys/fs/cgroup"
)


def impossible(scratch: Path) -> str | None:
    """Why no systemd can be booted here, or None. Each reason is tried out, in a directory for the mounts."""
    scratch.mkdir(exist_ok=True)
    if os.geteuid() != 0:
        return "mounting needs root"
    if not os.access(SYSTEMD, os.X_OK):
        return f"there is no {SYSTEMD}"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not on this machine: {', '.join(missing)}"
    cgroups = cgroup2()
    if cgroups is None:
        return "no cgroup2 file system is mounted"
    try:
        probe = cgroups / f"holdfast-probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"no cgroup can be made: {error}"
    tried = subprocess.run(
        ["unshare", "--fork", *NAMESPACES, "sh", "-c", OVERLAY.format(scratch)],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces or no overlay: {tried.stderr.strip()}" if tried.returncode else None


def cgroup2() -> Path | None:
    """Where the unified hierarchy is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


def eventually(met: Callable[[], bool]) -> bool:
    """Whether it comes true before a patient person would call it a failure."""
    deadline = time.monotonic() + SECONDS
    while not met():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Machine:
    """Entering boots it, leaving takes its power. `shared` directories are seen inside, wherever they lie."""

    def __init__(self, scratch: Path, shared: Iterable[Path]) -> None:
        hierarchy = cgroup2()
        assert hierarchy is not None, "impossible() says so before"
        self._cgroup = hierarchy / f"holdfast-test-{os.getpid()}"
        self._log = scratch.with_suffix(".log")
        self._cgroup.mkdir()
        scratch.mkdir(exist_ok=True)
        into_cgroup = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(self._cgroup)]
        with self._log.open("w") as log:
            self._outer = subprocess.Popen(
                [
                    *into_cgroup,
                    *["setpriv", "--pdeathsig", "KILL"],
                    *["unshare", "--fork", "--kill-child", *NAMESPACES],
                    *[str(BOOT), str(scratch), *map(str, shared)],
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        try:
            self._wait_until_up()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command as root inside, to its end."""
        ran = subprocess.run(
            ["nsenter", "--target", str(self._first), "--all", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=environment(),
            check=False,
        )
        assert not check or ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
        return ran

    def path(self, inside: str) -> Path:
        """The same file as seen from outside."""
        return Path(f"/proc/{self._first}/root") / inside.lstrip("/")

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """What systemd knows about a unit."""
        told = self.run("systemctl", "show", unit, f"--property={','.join(properties)}").stdout
        return dict(line.split("=", 1) for line in told.splitlines())

    def journal(self, unit: str) -> str:
        """What the unit said, and what systemd said about it."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}").stdout

    def _wait_until_up(self) -> None:
        deadline, seen = time.monotonic() + SECONDS, ""
        while time.monotonic() < deadline and self._outer.poll() is None:
            first = children(self._outer.pid)
            # Before, it is `boot.sh`, and whoever entered its namespaces would still be on the root outside.
            if first and psutil.Process(first[0]).name() == "systemd":
                self._first = first[0]
                seen = self.run("systemctl", "is-system-running", check=False).stdout.strip()
                if seen in ("running", "degraded"):
                    return
            time.sleep(0.05)
        raise AssertionError(f"systemd did not come up ({seen}): {self._log.read_text()}")

    def _end(self) -> None:
        self._outer.kill()  # takes the first process along, and that one all others
        self._outer.wait()
        deadline = time.monotonic() + SECONDS
        while self._cgroup.exists():
            for folder, _, _ in os.walk(self._cgroup, topdown=False):
                try:
                    os.rmdir(folder)
                except OSError:  # somebody is still about to die in there
                    assert time.monotonic() < deadline, f"{folder} cannot be removed"
                    time.sleep(0.05)
