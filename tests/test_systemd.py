"""The unit that `daemon install-service` writes, under a real systemd: started, watched, killed, stopped.

The hardening is the unit's own. A drop-in shortens WatchdogSec and RestartSec, so that a test need not wait,
and says where Python finds the clone and compiled libraries. Skipped where no systemd can be booted, with the
reason.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from daemon.control import Client
from tests.bots import COLOURS, collect, lesson, write_config
from tests.daemons import ROOT, SECONDS, command, read_json, training_step
from tests.systemd import Machine, eventually, impossible

pytestmark = pytest.mark.acceptance

CONFIG = Path("/etc/holdfast/config.toml")
STATE = "/var/lib/holdfast"
DATA = "/srv/holdfast"
# ptrace stops one thread: of a process's threads, the main one has the process's number.
HOLD_MAIN_THREAD = """
import ctypes, os, sys
libc, pid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
SEIZE, INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000
for request in (SEIZE, INTERRUPT):
    if libc.ptrace(request, pid, None, None):
        sys.exit(os.strerror(ctypes.get_errno()))
while os.WIFSTOPPED(os.waitpid(pid, WALL)[1]):
    pass
"""
DROP_IN = f"[Service]\nWatchdogSec=10\nRestartSec=0\nEnvironment=PYTHONPATH={ROOT}\n"
if sys.dont_write_bytecode:  # then nobody has compiled the libraries: once is enough
    DROP_IN += "Environment=PYTHONPYCACHEPREFIX=%C/holdfast/python\n"


class Holdfast:
    """A tiny bot on its machine, installed as an operator does it."""

    def __init__(self, machine: Machine, base: Path, rows: Path) -> None:
        self.machine = machine
        self._rows = rows  # of the collector; handed over as a closed file
        machine.run("rm", "-rf", str(CONFIG.parent), STATE, DATA)  # of an installation that this machine has
        for folder in (str(CONFIG.parent), DATA):
            machine.path(folder).mkdir()
        write_config(
            machine.path(str(CONFIG.parent)),
            Path(DATA, "base"),
            bot__state_dir=STATE,
            source__path=f"{DATA}/qa.duckdb",
            training__epochs=40,  # long enough to be met in the middle
            training__checkpoint_steps=1_000_000,  # who finds a checkpoint knows that a stop wrote it
        )
        self.weights = machine.path(f"{DATA}/base/model.safetensors")
        shutil.copytree(base, self.weights.parent)
        self.weights.parent.chmod(0o755)
        self.collect("colours")
        self.cli("install-service")
        drop_in = machine.path("/etc/systemd/system/holdfast.service.d/test.conf")
        drop_in.parent.mkdir()
        drop_in.write_text(DROP_IN)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "enable", "--now", "holdfast")

    def cli(self, *args: str, expect: int = 0) -> str:
        """What a command says that root types; its exit code is the one expected."""
        ran = self.machine.run(*command(CONFIG, *args), check=False)
        assert ran.returncode == expect, f"{args}: {ran.stdout}{ran.stderr}"
        return ran.stdout + ran.stderr

    def status(self) -> Any:
        return read_json(self.machine.run(*command(CONFIG, "status", "--json")))

    def call(self, name: str, **args: Any) -> dict[str, Any]:
        """The socket as seen from outside: quicker than starting a command."""
        return Client(self.machine.path(f"{STATE}/control.sock"), timeout=SECONDS).call(name, **args)

    def collect(self, task: str, train: int = 16) -> None:
        collect(self._rows, lesson(task, COLOURS, train=train))
        arriving = self.machine.path(f"{DATA}/arriving")
        shutil.copy(self._rows, arriving)
        arriving.replace(arriving.with_name("qa.duckdb"))

    def show(self, *properties: str) -> tuple[str, ...]:
        told = self.machine.show("holdfast", *properties)
        return tuple(told[name] for name in properties)

    @property
    def pid(self) -> str:
        return self.show("MainPID")[0]

    def is_started_again_after(self, *command: str) -> None:
        """The command, with the main process as its last word; systemd starts another one that answers."""
        before, restarts = self.pid, int(self.show("NRestarts")[0])
        self.machine.run(*command, before)
        assert eventually(lambda: self.show("NRestarts", "ActiveState") == (str(restarts + 1), "active"))
        assert str(self.status()["daemon"]["pid"]) == self.pid != before

    def processes(self) -> list[str]:
        """In the service's cgroup; as long as it is there."""
        cgroup = self.machine.path("/sys/fs/cgroup/system.slice/holdfast.service/cgroup.procs")
        with suppress(OSError):
            return cgroup.read_text().split()
        return []

    def edit_config(self, old: str, new: str) -> None:
        path = self.machine.path(str(CONFIG))
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Holdfast]:
    home = tmp_path_factory.mktemp("systemd")
    scratch = home / "machine"
    if reason := impossible(scratch):
        pytest.skip(f"no systemd can be booted: {reason}")
    shared = [ROOT, Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve()]
    with Machine(scratch, shared) as machine:
        yield Holdfast(machine, base, home / "qa.duckdb")


@pytest.fixture
def holdfast(installed: Holdfast) -> Iterator[Holdfast]:
    """Running, and with all its starts before it, whatever the test before did."""
    installed.machine.run("systemctl", "reset-failed", "holdfast")
    installed.machine.run("systemctl", "start", "holdfast")
    yield installed
    print(installed.machine.journal("holdfast"))  # pytest shows it with a failure


def test_systemd_hears_that_it_is_ready_and_commands_reach_it(holdfast: Holdfast) -> None:
    assert holdfast.show("Type", "ActiveState", "NRestarts") == ("notify", "active", "0")
    assert eventually(lambda: holdfast.show("StatusText") == ("idle",))
    assert str(holdfast.status()["daemon"]["pid"]) == holdfast.pid
    holdfast.edit_config('cron = ""', 'cron = "15 4 29 2 *"')
    holdfast.machine.run("systemctl", "reload", "holdfast")
    assert eventually(lambda: holdfast.call("status")["schedule"]["cron"] == "15 4 29 2 *")


def test_what_the_unit_forbids_is_forbidden(holdfast: Holdfast) -> None:
    machine, pid = holdfast.machine, holdfast.pid
    told = dict(
        line.split(":\t", 1) for line in machine.run("cat", f"/proc/{pid}/status").stdout.splitlines()
    )
    assert (int(told["CapBnd"], 16), told["NoNewPrivs"], told["Seccomp"]) == (0, "1", "2")
    assert told["Uid"].split() == [machine.run("id", "-u", "holdfast").stdout.strip()] * 4
    for space in ("mnt", "user", "uts"):
        ours, its = (machine.run("readlink", f"/proc/{n}/ns/{space}").stdout for n in ("1", pid))
        assert ours != its

    def inside(*words: str) -> str:
        ran = machine.run("nsenter", "--target", pid, "--mount", *words, check=False)
        return ran.stdout + ran.stderr

    for path in ("/etc/x", "/usr/x", f"{DATA}/x", "/proc/sys/kernel/hostname", "/sys/fs/cgroup/x"):
        assert "Read-only file system" in inside("sh", "-c", f": >{path}"), path
    for path in ("/home/letter", "/tmp/letter"):
        machine.path(path).write_text("not for the service")
        assert "No such file" in inside("cat", path)
    devices = set(inside("ls", "/dev").split())
    assert devices >= {"null", "urandom"}
    assert not [name for name in devices if name.startswith(("rtc", "nvidia", "sd", "vd", "kmsg"))]


def test_of_the_network_it_reaches_this_machine_only(holdfast: Holdfast) -> None:
    """From the service's own cgroup, where systemd put the rule."""
    machine = holdfast.machine
    machine.run("ip", "route", "replace", "local", "192.0.2.0/24", "dev", "lo")  # an address for examples
    send = "import socket, sys; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', (sys.argv[1], 9))"
    join = 'echo $$ >/sys/fs/cgroup/system.slice/holdfast.service/cgroup.procs; exec "$@"'

    def sent(*before: str, to: str) -> str:
        return machine.run(*before, sys.executable, "-Sc", send, to, check=False).stderr

    assert sent(to="192.0.2.1") == "", "anybody else may"
    assert sent("sh", "-c", join, "sh", to="127.0.0.1") == ""
    assert "Operation not permitted" in sent("sh", "-c", join, "sh", to="192.0.2.1")


def test_a_base_that_the_account_may_not_read_is_named(holdfast: Holdfast) -> None:
    """As a copy made with sudo is: safetensors writes its files for their owner alone."""
    holdfast.weights.chmod(0o600)
    told = holdfast.cli("retrain-now", "--wait", expect=4)
    holdfast.weights.chmod(0o644)
    assert f"{DATA}/base/model.safetensors cannot be read by the account of the daemon" in told


def test_a_cycle_is_published_and_nothing_is_wrong(holdfast: Holdfast) -> None:
    holdfast.weights.chmod(0o644)
    assert "promoted" in holdfast.cli("retrain-now", "--wait")
    assert holdfast.status()["champion"]["version"] == 1
    assert "nothing is wrong" in holdfast.cli("audit")
    assert "[action=decided cycle=" in holdfast.machine.journal("holdfast")


def test_a_worker_that_is_killed_costs_the_service_nothing(holdfast: Holdfast) -> None:
    """As the kernel kills one for memory (`test_out_of_memory`). That systemd lets the daemon live then is
    `OOMPolicy`, not shown here: its cgroups lack the memory controller."""
    holdfast.weights.chmod(0o644)
    holdfast.collect("shapes", train=32)
    daemon, restarts = holdfast.pid, holdfast.show("NRestarts")
    cycle = holdfast.call("retrain")["cycle"]["id"]
    assert eventually(lambda: training_step(holdfast.call("status")) > 6)
    holdfast.machine.run("pkill", "-STOP", "--parent", daemon)  # it would be done before we have looked
    worker = holdfast.machine.run("pgrep", "--parent", daemon).stdout.strip()
    assert holdfast.machine.run("cat", f"/proc/{worker}/oom_score_adj").stdout == "1000\n"
    holdfast.machine.run("pkill", "-KILL", "--parent", daemon)
    assert holdfast.call("follow", cycle=cycle)["cycle"]["state"] == "promoted"
    assert holdfast.call("show", cycle=cycle)["cycle"]["attempts"] == 1
    assert (holdfast.pid, holdfast.show("NRestarts")) == (daemon, restarts)


def test_after_kill_9_it_is_started_again(holdfast: Holdfast) -> None:
    holdfast.is_started_again_after("kill", "-KILL")
    assert "nothing is wrong" in holdfast.cli("audit")
    assert "Failed with result 'signal'" in holdfast.machine.journal("holdfast")


def test_after_five_failures_in_ten_minutes_a_person_has_to_look(holdfast: Holdfast) -> None:
    def dies() -> bool:
        """Whether systemd has given up on it."""
        died = holdfast.pid
        holdfast.machine.run("kill", "-KILL", died)
        assert eventually(
            lambda: holdfast.pid not in (died, "0") or holdfast.show("ActiveState") == ("failed",)
        )
        return holdfast.show("ActiveState") == ("failed",)

    assert [dies() for _ in range(6)] == [False] * 5 + [True], "five starts, and no sixth"
    assert "Start request repeated too quickly" in holdfast.machine.journal("holdfast")


@pytest.mark.parametrize("command", [("kill", "-STOP"), (sys.executable, "-c", HOLD_MAIN_THREAD)])
def test_a_main_loop_that_hangs_is_noticed_by_the_watchdog_and_started_again(
    holdfast: Holdfast, command: tuple[str, ...]
) -> None:
    """With all threads, and alone: those that run cycles and answer people do not feed the watchdog."""
    holdfast.is_started_again_after(*command)
    journal = holdfast.machine.journal("holdfast")
    assert "Watchdog timeout (limit 10s)" in journal
    assert "Failed with result 'watchdog'" in journal


def test_a_stop_in_mid_training_leaves_a_checkpoint_and_no_process(holdfast: Holdfast) -> None:
    holdfast.weights.chmod(0o644)
    holdfast.collect("flavours", train=64)
    cycle = holdfast.call("retrain")["cycle"]["id"]
    assert eventually(lambda: training_step(holdfast.call("status")) > 6)
    daemon = holdfast.pid
    holdfast.machine.run("pkill", "-STOP", "--parent", daemon)  # it would be done before systemctl is
    holdfast.machine.run("systemctl", "stop", "--no-block", "holdfast")
    assert eventually(lambda: holdfast.show("StatusText")[0].startswith("stopping"))
    holdfast.machine.run("pkill", "-CONT", "--parent", daemon)
    holdfast.machine.run("systemctl", "stop", "holdfast")
    told = holdfast.show("ActiveState", "Result", "ExecMainCode", "ExecMainStatus")
    assert told == ("inactive", "success", "1", "0"), "it exited, with 0"
    assert holdfast.processes() == []
    assert len(list(holdfast.machine.path(STATE).rglob("checkpoint-*.safetensors"))) == 1

    holdfast.machine.run("systemctl", "start", "holdfast")
    assert holdfast.call("follow", cycle=cycle)["cycle"]["state"] == "promoted"
    assert holdfast.call("show", cycle=cycle)["cycle"]["attempts"] == 0
    assert '"resumed": 1' in holdfast.machine.path(f"{STATE}/cycles/{cycle}/train/report.json").read_text()
    assert "nothing is wrong" in holdfast.cli("audit")


def test_a_config_that_is_not_valid_is_told_and_not_tried_again(holdfast: Holdfast) -> None:
    path = holdfast.machine.path(str(CONFIG))
    good = path.read_text()
    path.write_text(good.replace("[schedule]\ncron = ", '[schedule]\ncron = "0 0 31 2 *" # '))
    assert path.read_text() != good
    started = holdfast.machine.run("systemctl", "restart", "holdfast", check=False)
    told = holdfast.show("ActiveState", "SubState", "Result", "ExecMainStatus", "NRestarts")
    path.write_text(good)
    assert started.returncode == 1
    assert told == ("failed", "failed", "exit-code", "1", "0"), "not on its way to another start"
    assert 'schedule.cron = "0 0 31 2 *": this never happens' in holdfast.machine.journal("holdfast")
