"""`daemon doctor`: is everything in place, and if not, what to type.

Every check looks and changes nothing; each says one thing. Torch is only ever tried in a child
process, because its import is slow and may fail hard.
"""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from daemon import access, config, schedule, statedir, unit
from daemon.access import may_exist
from daemon.control import Client, account
from daemon.journal import printable
from daemon.settings import Settings
from storage.errors import DaemonNotRunning, HoldfastError, SourceBusy
from storage.reach import obstacle, redact, sqlite_path
from storage.records import utcnow
from storage.rows import normalise

GIB = 1 << 30
LITTLE_SPACE = 5 * GIB  # a cycle with its checkpoints takes some hundred MB; a converted base as much
NO_SPACE = GIB // 2
NO_FILES = 200  # inodes
TORCH_SECONDS = 120
SOURCE_SECONDS = 3.0  # to wait for a collector that holds its file
# torchvision holds compiled code for one version of torch; a mismatch only shows on import.
_TORCH_PROBE = """
import json, torch
told = {"torch": torch.__version__, "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0}
try:
    import torchvision
    torchvision.ops.nms
    told["torchvision"] = torchvision.__version__
except Exception as error:
    told["problem"] = (str(error).splitlines() or [repr(error)])[0]
print(json.dumps(told))
"""


class Outcome(StrEnum):
    OK = "ok"
    WARN = "warn"  # works, but not as one would want
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check found. `next` is what to type, where something is to be done."""

    name: str
    outcome: Outcome
    message: str
    next: str | None = None


def examine(config_path: Path) -> Iterator[Check]:
    """All checks, as they are made. Those that need the settings are left out when there are none."""
    yield packages()
    told = _ask_torch()
    yield torch(told)
    try:
        settings = config.load(config_path)
    except HoldfastError as error:
        yield fail("config", str(error), None if may_exist(config_path) else config.init_command(config_path))
        return
    yield ok("config", str(config_path))
    checks: dict[str, Callable[[Settings], Check]] = {
        "device": partial(device, told),
        **_CHECKS,
        "systemd": partial(service, config_path),
    }
    for name, check in checks.items():
        try:
            yield check(settings)
        except HoldfastError as error:
            yield fail(name, str(error))
        except Exception as error:  # one check that breaks must not hide the others
            yield fail(name, f"{type(error).__name__}: {error}")


def packages() -> Check:
    """Everything that this version of Holdfast declares is installed."""
    missing = [name for name in _declared() if not _installed(name)]
    if missing:
        return fail("packages", f"not installed: {', '.join(missing)}", f"uv pip install {' '.join(missing)}")
    return ok("packages", f"Python {sys.version.split()[0]}, all packages installed")


def _ask_torch() -> dict[str, Any]:
    command = [sys.executable, "-c", _TORCH_PROBE]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"broken": f"importing torch took more than {TORCH_SECONDS} s"}
    if ran.returncode != 0:
        last = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
        return {"broken": f"torch cannot be imported: {last}"}
    return dict(json.loads(ran.stdout))


def torch(told: dict[str, Any]) -> Check:
    reinstall = "uv pip install --reinstall torch torchvision"
    if "broken" in told:
        return fail("torch", told["broken"], reinstall)
    if "problem" in told:
        message = f"torch {told['torch']} and the installed torchvision do not fit: {told['problem']}"
        return fail("torch", message, f"{reinstall}   (both from one index)")
    return ok("torch", f"torch {told['torch']} with torchvision {told['torchvision']}")


def device(told: dict[str, Any], settings: Settings) -> Check:
    """Where a cycle would train."""
    wanted, gpus = settings.model.device, told.get("gpus", 0)
    number = int(wanted.partition(":")[2] or 0)
    if wanted.startswith("cuda") and number >= gpus:
        seen = f"torch sees {gpus or 'no'} GPU{'s' * (gpus > 1)}"
        return fail("device", f'model.device = "{wanted}", but {seen}', 'model.device = "auto"')
    on_gpu = gpus and wanted != "cpu"
    return ok("device", f"{wanted}: {f'GPU {number}' if on_gpu else 'the CPU'}")


def state_dir(settings: Settings) -> Check:
    path = settings.state_dir
    if not path.exists():
        return warn("state", f"{path} does not exist yet; `daemon run` makes it", "daemon run")
    found = path.stat()
    owner = account(found.st_uid)
    if statedir.is_open_to_others(path):
        return fail("state", f"{path} is open to other accounts", f"chmod 700 {path}")
    if os.geteuid() not in (0, found.st_uid):
        return fail("state", f"{path} belongs to {owner}, not to you", f"sudo -u {owner} daemon doctor")
    if why := statedir.broken(path):
        return fail("state", f"{path} cannot be written to: {why}", "journalctl -k")
    return ok("state", f"{path}, private to {owner}")


def disk(settings: Settings) -> Check:
    place = settings.state_dir
    while not place.exists():
        place = place.parent
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    told = f"{free / GIB:.1f} GiB free for {settings.state_dir}"
    if found.f_files and found.f_favail < NO_FILES:  # some file systems count none
        told = f"{found.f_favail} more files fit beside {settings.state_dir}: a cycle needs more"
        return fail("disk", told, f"df -i {place}")
    if free < NO_SPACE:
        return fail("disk", f"{told}: a cycle needs more", f"du -sh {settings.state_dir}/*")
    return (
        warn("disk", f"{told}: that is little", f"du -sh {settings.state_dir}/*")
        if free < LITTLE_SPACE
        else ok("disk", told)
    )


def store(settings: Settings) -> Check:
    """Asked of the daemon when one runs: it has the store for itself."""
    told = access.status(settings)["rows"]
    if not settings.store_path.exists():
        return ok("store", "none yet; the first `daemon run` or `daemon ingest` makes it")
    known = {normalise(task) for task in told["tasks"]}
    strange = [name for name in settings.tasks if known and normalise(name) not in known]
    if strange:
        tasks = ", ".join(map(printable, told["tasks"]))
        message = f"config.toml has [tasks.{strange[0]}], but no row is of that task; tasks: {tasks}"
        return warn("store", message, "edit config.toml, [tasks]")
    return ok("store", f"{settings.store_path}, {told['total']:,} rows")


def source(settings: Settings) -> Check:
    """Reads one row, as a pull would read many."""
    from daemon.pull import source_spec
    from storage.sources import DuckDBSource

    if settings.source.path is None:
        return warn(
            "source", "source.path is not set: rows come by `daemon ingest` only", "daemon ingest FILE"
        )
    spec = replace(source_spec(settings), batch_rows=1, busy_timeout=SOURCE_SECONDS)
    try:
        first = next(DuckDBSource(spec).batches(None), [])
    except SourceBusy as error:
        return warn("source", f"{error} (pulls keep trying)")
    told = "can be read" if first else "has no rows yet"
    return ok("source", f"{settings.source.path}, table {settings.source.table}, {told}")


def base(settings: Settings) -> Check:
    from daemon.base import check_champions_base, prepared_base
    from strategies.base import local_source

    name = settings.model.base
    ready = prepared_base(settings)
    serving = access.serving(settings, None)
    if ready is not None:
        check_champions_base(settings, ready, serving["version"], serving["base"])
        return ok("base", f"{name}, {ready.parameters / 1e6:.0f} million parameters, ready")
    is_here = local_source(name) is not None  # raises for what cannot be a base
    if serving["version"] is not None:
        champion = f"champion version {serving['version']}"
        return warn("base", f"{name} is new; cycles fail unless it is the very base of {champion}")
    if is_here:
        return ok("base", f"{name}, made ready once, by the first cycle or ingest")
    return warn(
        "base", f"{name} will be fetched from the hub by the first cycle", "daemon retrain-now --wait"
    )


def mlflow(settings: Settings) -> Check:
    uri = settings.tracking_uri
    shown = redact(uri, uri)
    problem = obstacle(uri)
    if problem:
        return fail("mlflow", f"{shown}: {redact(problem, uri)}")
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        return ok("mlflow", f"{shown}, made at the first start")
    return ok("mlflow", shown)


def thresholds(settings: Settings) -> Check:
    unset = [f"gate.{key}" for key in ("max_drop", "min_gain") if getattr(settings.gate, key) is None]
    if unset:
        return warn(
            "gate",
            f"{' and '.join(unset)} not set: nothing will ever be promoted",
            "edit config.toml, [gate]",
        )
    return ok("gate", f"drops up to {settings.gate.max_drop:g}, gains from {settings.gate.min_gain:g}")


def planned(settings: Settings) -> Check:
    plan = settings.schedule
    due = schedule.next_run(plan.cron, plan.timezone, after=utcnow())
    if due is None:
        return warn("schedule", 'schedule.cron is "": cycles start by hand only', "daemon retrain-now")
    return ok("schedule", f"{plan.cron}, next {due:%Y-%m-%d %H:%M %Z}")


def running(settings: Settings) -> Check:
    try:
        told = Client(settings.socket_path).call("status")["daemon"]
    except DaemonNotRunning:
        holder = statedir.holder(settings.state_dir)
        if holder is not None and holder.purpose == statedir.DAEMON:
            return fail(
                "daemon", f"process {holder.pid} runs but does not answer", "journalctl -u holdfast -n 50"
            )
        return warn("daemon", "not running", "systemctl start holdfast   (or: daemon run)")
    return ok("daemon", f"process {told['pid']}, up since {told['started_at']}")


def service(config_path: Path, settings: Settings) -> Check:
    if not unit.UNIT.parent.is_dir():
        return ok("systemd", "not on this machine")
    install = f"sudo {unit.SCRIPT} -c {config_path} install-service"
    if not unit.UNIT.exists():
        return warn("systemd", "the service is not installed", install)
    text = unit.UNIT.read_text()
    if str(settings.state_dir) not in text and not settings.state_dir.is_relative_to("/var/lib/holdfast"):
        return warn("systemd", f"{unit.UNIT} does not know bot.state_dir = {settings.state_dir}", install)
    return ok("systemd", str(unit.UNIT))


def ok(name: str, message: str) -> Check:
    return Check(name=name, outcome=Outcome.OK, message=message)


def warn(name: str, message: str, command: str | None = None) -> Check:
    return Check(name=name, outcome=Outcome.WARN, message=message, next=command)


def fail(name: str, message: str, command: str | None = None) -> Check:
    return Check(name=name, outcome=Outcome.FAIL, message=message, next=command)


_CHECKS: dict[str, Callable[[Settings], Check]] = {
    "state": state_dir,
    "disk": disk,
    "store": store,
    "source": source,
    "base": base,
    "mlflow": mlflow,
    "gate": thresholds,
    "schedule": planned,
    "daemon": running,
}


def _declared() -> list[str]:
    """Names of the distributions that Holdfast needs, without its extras."""
    try:
        lines = requires("holdfast") or []
    except PackageNotFoundError:  # run from a clone that was never installed
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    names = (line for line in lines if "extra ==" not in line)
    return [name.split(";")[0].split("[")[0].rstrip("<>=!~., 0123456789*") for name in names]


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
