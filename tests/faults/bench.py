"""The tiny bot of a trial: put back before each, watched while it runs, checked when it is over."""

import json
import random
import re
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
from safetensors import safe_open

from daemon import cli, config
from daemon.settings import Settings
from storage.errors import DaemonNotRunning, HoldfastError
from storage.records import Cycle, State
from storage.store import Store
from strategies.contract import result_files
from tests.bots import FLAVOURS, collect, fresh_mlflow, lesson, write_config
from tests.daemons import SECONDS, command, environment
from tests.faults import places, power
from tests.faults.places import Armed
from tests.faults.warm import WarmDaemon, WarmProcess
from tests.toys import tiny_base

PATIENCE = 60.0  # seconds in which nothing changes; a trial takes a few
# How the daemon may end before its cycle has, once, by what is done to it.
ENDS = {"kill": -9, "term": 0, "power": -9}
# Kinds in which the worker tells of errors that are the machine's, with a traceback beside the words.
WORKER_MAY_TRACE = {"out of memory", "disk full", "disk fails"}
DISK, INODES = 48, 4096  # MiB, and files, of the file system that a trial may fill

# In the middle of what the champion of `taught` has learned.
ERASED = ("colours-3",)
ERASURE = {"why": "a trial", "where": [], "contains": "which one is colours 3", "dry_run": False}


class Broken(AssertionError):
    """What must hold did not."""


@dataclass(kw_only=True)
class Outcome:
    """How a trial ended."""

    went_off: bool
    how: str  # "recovered" by itself, or "refused" with an error first
    told: str = ""


class Bench:
    """One folder in which trials follow one another, each from a copy of the same beginning.

    Beginnings: `new` has a prepared base and no cycle yet, `taught` has a champion. Both have rows to learn.
    What an erasure comes by is counted from `taught`, too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.home = self.folder / "home"
        self.base = self.folder / "base"
        self.counts: dict[str, dict[str, int]] = {}

    @property
    def state(self) -> Path:
        return self.home / "state"

    def prepare(self) -> None:
        """Makes the beginnings by calm cycles, and counts how often each place is come by; once a folder."""
        counted = self.folder / "counts.json"
        if not counted.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            tiny_base(self.base)
            self._make_new()
            for beginning in ("new", "taught"):
                self.put_back(beginning)
                self._count(beginning)
                if beginning == "new":
                    collect(self.home / "qa.duckdb", lesson("flavours", FLAVOURS))
                    self._keep("taught")
            self.put_back("taught")
            self._count("erasing")
            counted.write_text(json.dumps(self.counts))
        self.counts = json.loads(counted.read_text())

    def _make_new(self) -> None:
        self.home.mkdir()
        write_config(self.home, self.base)
        self.state.mkdir(mode=0o700)
        shutil.copy(fresh_mlflow(), self.state / "mlflow.db")
        with duckdb.connect(str(self.home / "qa.duckdb")) as source:
            source.execute("CREATE TABLE qa (id TEXT, task TEXT, question TEXT, answer TEXT, split TEXT)")
        with WarmDaemon(self.home / "config.toml") as daemon:  # a cycle of nothing prepares the base
            daemon.ended(daemon.retrain())
            daemon.stop()
        (self.state / "store.duckdb").unlink()
        collect(self.home / "qa.duckdb", lesson("colours"))
        self._keep("new")

    def _count(self, beginning: str) -> None:
        counting = Armed(home=str(self.home), deed="count").environment()
        with WarmDaemon(self.home / "config.toml", **counting) as daemon:
            if beginning == "erasing":
                daemon.call("erase", **ERASURE)
                ended = daemon.ended(2)
            else:
                ended = daemon.ended(daemon.retrain())
            daemon.stop()
        assert ended["state"] == "promoted", ended
        self.counts[beginning] = counted = Counter((self.home / "calls").read_text().splitlines())
        lacking = [name for name in places.ERASING if not counted[f"daemon {name}"]]
        if lacking := places.unvisited(counted) + (lacking if beginning == "erasing" else []):
            raise Broken(f"calm, from the beginning {beginning!r}, nothing comes by {', '.join(lacking)}")
        for path in ("calls", "daemon.pid", "worker.pid", "daemon.log"):
            (self.home / path).unlink(missing_ok=True)

    def _keep(self, beginning: str) -> None:
        shutil.copytree(self.home, self.folder / beginning)

    def put_back(self, beginning: str) -> None:
        if self.state.is_mount():  # an earlier run was killed
            _tool("umount", "-l", str(self.state))
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.folder / beginning, self.home)

    @contextmanager
    def small_disk(self) -> Iterator[None]:
        """The state on a file system of its own, which can be filled."""
        with self._moved("-t", "tmpfs", "-o", f"size={DISK}m,nr_inodes={INODES}", "tmpfs"):
            yield

    @contextmanager
    def real_disk(self) -> Iterator[None]:
        """The state on an ext4 of its own, which the kernel makes read-only when it finds it damaged."""
        image = self.home / "disk"
        with image.open("wb") as file:
            file.truncate(4 * DISK << 20)
        _tool("mkfs.ext4", "-q", "-F", str(image))
        with self._moved(*_LOOP, str(image)):
            yield

    def repair(self) -> None:
        """What a person does about it; nobody may have a file open there."""
        _tool("umount", str(self.state))
        ran = subprocess.run(["e2fsck", "-f", "-p", str(self.home / "disk")], capture_output=True, text=True)
        if ran.returncode > 1:  # 1: it has repaired something
            raise Broken(f"e2fsck: {ran.stdout} {ran.stderr}")
        _mount(*_LOOP, str(self.home / "disk"), str(self.state))

    @contextmanager
    def _moved(self, *mount: str) -> Iterator[None]:
        before = self.home / "before"
        self.state.rename(before)
        self.state.mkdir()
        with mounted(self.state, *mount):
            self.state.chmod(0o700)
            shutil.copytree(before, self.state, dirs_exist_ok=True)
            _tool("sync", "--file-system", str(self.state))
            yield

    def remount(self, mode: str) -> None:
        _mount("-o", f"remount,{mode}", str(self.state))

    def trial(self, beginning: str, dice: random.Random) -> "Trial":
        self.put_back(beginning)
        return Trial(
            bench=self,
            beginning=beginning,
            dice=dice,
            home=self.home,
            counts=self.counts[beginning],
            settings=config.load(self.home / "config.toml"),
        )


@dataclass(kw_only=True)
class Trial:
    """One bot, one fault."""

    bench: Bench
    beginning: str
    dice: random.Random
    home: Path
    counts: dict[str, int]
    settings: Settings
    fault: Armed | None = None
    erases: bool = False  # a row that the champion has learned, before anything else
    on_death: Callable[[], None] = lambda: None
    on_wait: Callable[[str], None] = lambda reason: None
    heard: list[str] = field(default_factory=list)  # reasons for which the daemon waited
    extra: dict[str, str] = field(default_factory=dict)  # of the daemon's environment

    @property
    def state(self) -> Path:
        return self.settings.state_dir

    @property
    def config(self) -> Path:
        return self.home / "config.toml"

    @property
    def number(self) -> int:
        """Of the cycle that the trial is about."""
        return 1 if self.beginning == "new" else 2

    def put_back(self, beginning: str) -> None:
        """Begins with another one than the dice chose."""
        self.beginning, self.counts = beginning, self.bench.counts[beginning]
        self.bench.put_back(beginning)

    def went_off(self) -> bool:
        return (self.home / "fired").exists()

    def armed(self, **how: Any) -> Armed:
        return Armed(home=str(self.home), **how)

    def draw(self, process: str, among: tuple[str, ...] = ()) -> dict[str, Any]:
        return places.draw(self.dice, self.counts, process, among)

    def run_on(self) -> Cycle:
        """The cycle that was begun, to its end."""
        return self.run(begun=True)

    def run(self, fault: Armed | None = None, *, begun: bool = False) -> Cycle:
        """The cycle, to its end, with as many starts of the daemon as that takes."""
        if fault is not None:
            self.extra = fault.environment()
            if fault.deed == "power":
                power.everything(self.state, self.home / "synced")
        self.fault = fault
        asked = begun
        while True:
            with ExitStack() as stack:
                stack.push(daemon := self.daemon())  # not entered: it may die before it is ready
                if self._ended(daemon, ask=not asked):
                    return self.cycle()
            self.check_end(daemon.process.wait(SECONDS))
            asked = self.was_asked()
            self.on_death()

    def was_asked(self) -> bool:
        """Whether what the trial asks for is on record. No daemon runs."""
        if not self.settings.store_path.exists():
            return False
        with self.store() as store:
            if self.erases:
                return bool(store.erasures())
            return any(cycle.id >= self.number for cycle in store.cycles(1))

    def check_end(self, code: int) -> None:
        """That the daemon ended is the fault's work: each of them once, none but those that are meant to."""
        fault = self.fault
        meant = fault is not None and (fault.process == "daemon" or fault.deed == "power")
        if fault is None or not meant or not self.went_off() or code != ENDS.get(fault.deed):
            raise Broken(f"the daemon ended by itself, with {code}; its log is {self.home / 'daemon.log'}")
        self.fault = None

    def daemon_armed(self, fault: Armed) -> WarmDaemon:
        return WarmDaemon(self.config, **fault.environment())

    def daemon(self) -> WarmDaemon:
        return WarmDaemon(self.config, **self.extra)

    def _ask(self, daemon: WarmDaemon) -> None:
        if self.erases:  # which asks for a cycle in the end
            daemon.call("erase", **ERASURE)
        else:
            daemon.retrain()

    def _ended(self, daemon: WarmDaemon, *, ask: bool = False) -> bool:
        """Whether the cycle ended, and the daemon was stopped after that; false when the daemon did first."""
        last, since, tries = None, time.monotonic(), 0
        while time.monotonic() < since + PATIENCE:
            if daemon.process.poll() is not None:
                return False
            try:
                if ask:
                    self._ask(daemon)
                    ask = False
                activity, ended = self._look(daemon)
            except (HoldfastError, OSError):  # it is ending, or its socket is not there yet
                time.sleep(0.02)
                continue
            if (activity, ended) != last:  # on a busy machine a whole cycle may take longer
                last, since = (activity, ended), time.monotonic()
            waiting = activity.get("waiting")
            if waiting and waiting["tries"] > tries:
                tries = waiting["tries"]
                self.heard.append(waiting["reason"])
                self.on_wait(waiting["reason"])
                daemon.call("resume")
            elif ended and activity.get("cycle") is None:
                return daemon.stop() == 0
            time.sleep(0.03)
        raise Broken(f"nothing happened for {PATIENCE:.0f} s; see {self.home / 'daemon.log'}")

    def _look(self, daemon: WarmDaemon) -> tuple[dict[str, Any], bool]:
        """What it does, and whether the cycle has ended."""
        activity = daemon.status()["daemon"]["activity"] or {}
        newest = daemon.call("history", limit=1)["cycles"]
        return activity, any(c["id"] >= self.number and c["state"] not in _WORKING for c in newest)

    def meets_trouble(self, daemon: WarmDaemon) -> None:
        """Asks for the cycle, and returns when it has ended, or waits, or the daemon says that it cannot."""
        ask, last, since = True, None, time.monotonic()
        while daemon.process.poll() is None:
            if time.monotonic() > since + PATIENCE:
                raise Broken(f"nothing happened for {PATIENCE:.0f} s; see {self.home / 'daemon.log'}")
            try:
                if ask:
                    self._ask(daemon)
                    ask = False
                activity, ended = self._look(daemon)
            except DaemonNotRunning:
                time.sleep(0.02)
                continue
            except HoldfastError as error:
                self.heard.append(str(error))
                return
            if (activity, ended) != last:
                last, since = (activity, ended), time.monotonic()
            if waiting := activity.get("waiting"):
                self.heard.append(waiting["reason"])
                return
            if ended:
                return
            time.sleep(0.03)

    def again(self) -> Cycle:
        """`daemon retrain-now` after what was wrong is put right."""
        with self.daemon() as daemon:
            daemon.retrain()
            if not self._ended(daemon):
                raise Broken("the daemon ended, and nothing was wrong any more")
        return self.cycle()

    def cycle(self) -> Cycle:
        """The newest one."""
        with self.store() as store:
            return store.cycles(1)[0]

    def store(self) -> Store:
        return Store.open(self.settings.store_path, read_only=True)

    def _says(self, *args: str) -> dict[str, Any]:
        """What a command says. In a process of its own: MLflow keeps databases open that are gone."""
        said, log = self.home / "said.json", self.home / "command.log"
        with said.open("w") as out, log.open("w") as err:
            ran = WarmProcess(
                command(self.config, *args, "--json"),
                stdout_to=out.fileno(),
                stderr=err,
                cwd=self.home,
                env=environment(),
            )
            code = ran.wait(SECONDS)
        try:
            return dict(json.loads(said.read_text()))
        except ValueError:
            raise Broken(f"`daemon {args[0]}` ended with {code}: {log.read_text()}") from None

    def findings(self) -> list[str]:
        found = self._says("audit")["findings"]
        return [f"{finding['check']}: {finding['message']}" for finding in found]

    # What must hold.

    def check(self) -> None:
        """After a promotion: the audit is content, nothing is lost or done twice, the champion answers."""
        if found := self.findings():
            raise Broken("the audit finds: " + "; ".join(found))
        self._check_rows()
        with self.store() as store:
            self._check_champion(store)
            self._check_mlflow(store)
            if unfinished := store.unfinished():
                raise Broken(f"cycle {unfinished[0].id} is left in the state {unfinished[0].state}")
        leftovers = [str(p) for name in ("snapshots", "cycles") for p in (self.state / name).glob(".*")]
        leftovers += [str(p) for p in (self.state / "cycles").glob("*/.*")]
        if leftovers:
            raise Broken(f"left over: {leftovers}")

    def check_log(self, *, worker_may_trace: bool) -> None:
        """Nothing happened that the daemon has no words for."""
        log = (self.home / "daemon.log").read_text()
        for said in re.split(r"^(?=\d\d:\d\d:\d\d )", log, flags=re.MULTILINE):
            traced = "Traceback" in said and not (worker_may_trace and "daemon/worker.py" in said)
            if traced or "internal error" in said.lower():
                raise Broken(f"in {self.home / 'daemon.log'}: {said}")

    def _check_rows(self) -> None:
        with duckdb.connect(str(self.home / "qa.duckdb"), read_only=True) as source:
            collected = sorted(source.execute("SELECT id FROM qa").fetchall())
        if self.erases:
            collected.remove(ERASED)
        with duckdb.connect(str(self.settings.store_path), read_only=True) as raw:
            stored = sorted(raw.execute("SELECT id FROM rows").fetchall())
        if collected != stored:
            raise Broken(f"{len(collected)} rows were collected, {len(stored)} are stored")

    def _check_champion(self, store: Store) -> None:
        champion = store.champion()
        model = store.model(champion.version) if champion and champion.version else None
        if model is None:
            raise Broken("there is no champion")
        if left := store.pending(store.lineage(model.version)):
            raise Broken(f"{len(left)} rows were never learned, the first is {left[0].id}")
        adapter = result_files(self.state / model.result)["adapter"]
        with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
            if not all(tensors.get_tensor(name).isfinite().all() for name in tensors.keys()):  # noqa: SIM118
                raise Broken("the champion has a weight that is no number")
        answered = self._says(
            "ask", "which one is colours 1", "--task", "colours"
        )  # loads it as who serves it does
        if answered["version"] != model.version or not isinstance(answered["answer"], str):
            raise Broken(f"asked, the champion, version {model.version}, says {answered}")

    def _check_mlflow(self, store: Store) -> None:
        """One version a cycle, one run that is not deleted, and the run is finished."""
        with sqlite3.connect(self.state / "mlflow.db") as mlflow:
            versions = mlflow.execute(
                "SELECT value, count(*) FROM model_version_tags WHERE key = 'holdfast.cycle' GROUP BY value"
            ).fetchall()
            runs = mlflow.execute(
                "SELECT t.value, count(*), max(r.status) FROM tags t JOIN runs r ON r.run_uuid = t.run_uuid "
                "WHERE t.key = 'holdfast.cycle' AND r.lifecycle_stage = 'active' AND r.status != 'FAILED' "
                "GROUP BY t.value"
            ).fetchall()
        published = sorted(str(model.cycle_id) for model in store.models())
        if sorted(versions) != [(cycle, 1) for cycle in published]:
            raise Broken(f"versions in MLflow by cycle: {versions}, on record: {published}")
        if sorted(runs) != [(cycle, 1, "FINISHED") for cycle in published]:
            raise Broken(f"runs in MLflow by cycle: {runs}, on record: {published}")

    def promoted(self, cycle: Cycle) -> None:
        if cycle.state is not State.PROMOTED:
            raise Broken(f"cycle {cycle.id} is {cycle.state}: {cycle.reason}")

    def refused(self, cycle: Cycle, *words: str) -> str:
        """The cycle failed, and says why in words that a person can act on."""
        reason = cycle.reason or ""
        if cycle.state is not State.FAILED:
            raise Broken(f"cycle {cycle.id} is {cycle.state}, and should have failed")
        if "internal error" in reason or "Traceback" in reason or not all(w in reason for w in words):
            raise Broken(f"cycle {cycle.id} failed, and says only: {reason}")
        if not says_what_to_do(reason):
            raise Broken(f"cycle {cycle.id} does not say what to do: {reason}")
        return reason


def says_what_to_do(reason: str) -> bool:
    """It names a command, or a setting to change."""
    commands = {one.name or one.callback.__name__ for one in cli.app.registered_commands if one.callback}
    typed = re.findall(r"`(?:daemon ([\w-]+)|(free -m|journalctl|chmod|mount)).*?`", reason)
    settings = {
        f"{section}.{key}"
        for section, model in Settings.model_fields.items()
        for key in getattr(model.annotation, "model_fields", ())
    }
    return any(tool or name in commands for name, tool in typed) or any(
        key in settings for key in re.findall(r"\w+\.\w+", reason)
    )


_WORKING = {s.value for s in State if not s.ended}


_LOOP = ("-o", "loop,errors=remount-ro")


def _mount(*args: str) -> None:
    _tool("mount", *args)


def _tool(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


@contextmanager
def mounted(folder: Path, *how: str) -> Iterator[None]:
    _mount(*how, str(folder))
    try:
        yield
    finally:
        _tool("umount", "-l", str(folder))


def can_mount(folder: Path) -> bool:
    """Whether this account may mount a file system there."""
    try:
        with mounted(folder, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def can_break_a_disk(folder: Path) -> bool:
    """Whether this account may mount an image there, of an ext4 that this kernel gives up on demand."""
    image = folder / "try"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    try:
        _tool("mkfs.ext4", "-q", "-F", str(image))
        with mounted(folder, *_LOOP, str(image)):  # only then is it there, where no other ext4 is
            return any(Path("/sys/fs/ext4").glob("*/trigger_fs_error"))
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        image.unlink()
