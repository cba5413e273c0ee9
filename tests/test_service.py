"""`daemon run` as a real process: signals, locks, reload, systemd, recovery. Cycles train a tiny model."""

import json
import os
import queue
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import duckdb
import pytest

from daemon import access, config, service, statedir
from daemon.base import prepare_base
from daemon.executor import Stop
from daemon.notify import Notifier
from daemon.service import STOP_SECONDS, WORKER_STOP_SECONDS
from storage.errors import ControlError, StoreBusy, StoreError
from storage.store import Store
from tests.bots import COLOURS, FLAVOURS, collect, lesson, make_bot, write_config
from tests.daemons import (
    SECONDS,
    DaemonProcess,
    children,
    cli,
    command,
    environment,
    read_json,
    training_step,
)
from tests.toys import tiny_base

QUICK = STOP_SECONDS + 5  # a stop without a worker; the rest is room for a loaded machine


@pytest.fixture
def idle(tmp_path: Path, base: Path) -> Iterator[DaemonProcess]:
    """A running daemon without a source."""
    with DaemonProcess(write_config(tmp_path, base)) as daemon:
        yield daemon


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# Starting and stopping.


def test_it_is_private_small_and_ready(idle: DaemonProcess) -> None:
    assert stat.S_IMODE(idle.settings.state_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(idle.settings.socket_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(idle.settings.store_path.stat().st_mode) == 0o600
    told = idle.status()
    assert told["daemon"]["pid"] == idle.process.pid
    assert told["daemon"]["torch_loaded"] is False
    assert "libtorch" not in Path(f"/proc/{idle.process.pid}/maps").read_text()


def test_sigterm_ends_it_within_seconds_and_tells_systemd(idle: DaemonProcess) -> None:
    started = time.monotonic()
    assert idle.stop() == 0
    assert time.monotonic() - started < QUICK
    idle.hear("STOPPING=1")
    assert not idle.settings.socket_path.exists()
    assert "action=stopped" in idle.log.read_text()


def test_its_log_may_be_truncated_while_it_runs(idle: DaemonProcess) -> None:
    """logrotate's `copytruncate`, on a log that is appended to: `daemon run 2>> holdfast.log`."""
    rotated = idle.log.with_suffix(".1")
    shutil.copy(idle.log, rotated)
    os.truncate(idle.log, 0)
    assert idle.stop() == 0
    assert "action=started" in rotated.read_text()
    assert "action=started" not in idle.log.read_text()
    assert "action=stopped" in idle.log.read_text()
    assert "\0" not in idle.log.read_text(), "it does not go on where it was"


def test_ctrl_c_ends_it_too(idle: DaemonProcess) -> None:
    idle.signal(signal.SIGINT)
    assert idle.process.wait(SECONDS) == 0


def test_a_second_daemon_on_the_state_directory_is_turned_away(idle: DaemonProcess) -> None:
    ran = cli(idle.config_path, "run")
    assert ran.returncode == 1
    assert f"a daemon (process {idle.process.pid}) runs on" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert idle.status()["daemon"]["pid"] == idle.process.pid


def test_while_another_command_works_on_the_state_systemd_is_asked_to_try_again(
    tmp_path: Path, base: Path
) -> None:
    path = write_config(tmp_path, base)
    (tmp_path / "state").mkdir(mode=0o700)
    impatient = "from daemon import cli, service; service.START_PATIENCE = 0.1; cli.main()"
    with statedir.held(tmp_path / "state", "daemon ingest"):
        ran = subprocess.run(
            [sys.executable, "-c", impatient, "--config", str(path), "run"],
            env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    assert ran.returncode == 75, ran.stderr
    assert "`daemon ingest` (process" in ran.stderr


@pytest.mark.parametrize("held", ["directory", "store"])
def test_it_waits_for_a_command_that_works_on_the_state_and_can_be_stopped_meanwhile(
    tmp_path: Path, base: Path, held: str
) -> None:
    path, state = write_config(tmp_path, base), tmp_path / "state"
    state.mkdir(mode=0o700)
    with ExitStack() as ingest:
        if held == "directory":
            ingest.enter_context(statedir.held(state, "daemon ingest"))
        else:
            ingest.enter_context(Store.open(state / "store.duckdb"))
        with DaemonProcess(path, until="STATUS=waits") as waiting:
            assert waiting.stop() == 0
        with DaemonProcess(path, until="STATUS=waits") as waiting:
            ingest.close()
            waiting.hear("READY=1")
            assert waiting.stop() == 0


def test_after_kill_9_the_next_one_starts_as_if_nothing_had_been(idle: DaemonProcess) -> None:
    idle.kill()
    assert idle.settings.socket_path.exists()
    with DaemonProcess(idle.config_path) as again:
        assert again.status()["daemon"]["pid"] == again.process.pid


def test_a_config_that_is_not_valid_ends_the_start_with_the_reason(tmp_path: Path, base: Path) -> None:
    path = write_config(tmp_path, base, schedule__cron="0 0 31 2 *")
    ran = cli(path, "run")
    assert ran.returncode == 1
    assert 'schedule.cron = "0 0 31 2 *": this never happens' in ran.stderr


def test_a_state_directory_that_others_may_write_is_refused(tmp_path: Path, base: Path) -> None:
    path = write_config(tmp_path, base)
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    ran = cli(path, "run")
    assert ran.returncode == 1
    assert "chmod 700" in ran.stderr


def test_the_watchdog_is_fed_while_all_is_well(tmp_path: Path, base: Path) -> None:
    with DaemonProcess(write_config(tmp_path, base), WATCHDOG_USEC="1000000") as daemon:
        for _ in range(3):
            daemon.hear("WATCHDOG=1")


# Reloading.


def test_sighup_takes_the_new_config(idle: DaemonProcess) -> None:
    assert idle.status()["daemon"]["next_run"] is None
    edit(idle.config_path, 'cron = ""', 'cron = "15 4 * * sun"')
    idle.signal(signal.SIGHUP)
    idle.hear("RELOADING=1")
    idle.hear("READY=1")
    told = idle.status()
    assert told["schedule"]["cron"] == "15 4 * * sun"
    assert "T04:15:00" in told["daemon"]["next_run"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('cron = ""', 'cron = "0 0 31 2 *"', "never happens"),
        ('cron = ""', "cron = 3", "schedule.cron"),
        ('name = "test-bot"', 'name = "other-bot"', "needs a restart"),
    ],
)
def test_sighup_with_a_bad_config_keeps_the_old_one_and_says_why(
    idle: DaemonProcess, old: str, new: str, reason: str
) -> None:
    edit(idle.config_path, old, new)
    idle.signal(signal.SIGHUP)
    idle.hear("RELOADING=1")
    idle.hear("READY=1")
    told = idle.status()
    assert reason in told["daemon"]["config_problem"]
    assert told["bot"] == "test-bot"
    assert "action=reload-refused" in idle.log.read_text()
    edit(idle.config_path, new, old)
    idle.signal(signal.SIGHUP)
    idle.until(lambda told: told["daemon"]["config_problem"] is None)


def test_sighup_with_another_base_than_the_champions_keeps_the_old_one(tmp_path: Path, base: Path) -> None:
    """Where it is known to be another; what was never made ready is for the next cycle to tell."""
    bot = make_bot(tmp_path, base)
    bot.collect(lesson("colours"))
    bot.run()
    path, other = tmp_path / "config.toml", tiny_base(tmp_path / "other", seed=1)
    made = service.Service(path, bot.settings, bot.store, Notifier.from_environment(), queue.SimpleQueue())
    try:
        edit(path, str(base), str(other))
        prepare_base(config.load(path), bot.executor, lambda progress: None, Stop())
        made._reload()
        assert "is not the base of champion version 1" in (made._config_problem or "")
        assert made._daemon.settings.model.base == str(base)
        edit(path, str(other), str(base))
        made._reload()
        assert made._config_problem is None
    finally:
        made._control.close()


def test_sighup_on_a_full_disk_ends_nothing(idle: DaemonProcess) -> None:
    """The limit on the size of files stands for the disk: nothing can be written, not even the log."""
    edit(idle.config_path, 'cron = ""', 'cron = "15 4 * * sun"')
    pid, (_, hard) = idle.process.pid, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    for _ in range(2):
        idle.signal(signal.SIGHUP)
        idle.hear("RELOADING=1")
        idle.hear("READY=1")
    assert idle.status()["schedule"]["cron"] == "15 4 * * sun"
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    idle.call("pause")
    idle.stop()
    with DaemonProcess(idle.config_path) as again:
        assert again.status()["paused"] is not None


@pytest.mark.parametrize(("mail", "code"), [("stop", 0), ("none", 70)])
def test_work_that_does_not_end_does_not_hide_why_the_daemon_ends(
    tmp_path: Path, base: Path, mail: str, code: int
) -> None:
    """A cycle thread that hangs, with a stop that was asked for or a control thread that died."""
    stubborn = (
        "import queue, sys, threading; from pathlib import Path\n"
        "from daemon import control, flight, service\n"
        "service.STOP_SECONDS = 0.1\n"
        "flight.Flight._loop = lambda self: threading.Event().wait()\n"
        f"service.Service._receive = lambda self, seconds: {mail!r}\n"
        "control.ControlServer.alive = lambda self: False\n"
        "sys.exit(service.run(Path(sys.argv[1])))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", stubborn, str(write_config(tmp_path, base))],
        env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert ran.returncode == code, ran.stderr
    assert "action=cut-off" in ran.stderr


def test_a_store_that_a_reader_has_puts_off_the_tidying_up_and_is_no_bug(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config(tmp_path, base)
    settings = config.load(path)
    with Store.open(settings.store_path) as store:
        made = service.Service(path, settings, store, Notifier.from_environment(), queue.SimpleQueue())
        with monkeypatch.context() as patch:
            busy = StoreBusy("process 7 holds the store")
            patch.setattr(store._db, "_use", lambda: (_ for _ in ()).throw(busy))
            assert not made._housekeeping()
        told = [record.action for record in caplog.records if "process 7 holds" in record.message]  # type: ignore[attr-defined]
        assert told == ["unerased", "alias-unchecked", "unpruned", "unrefreshed"]
        assert made._housekeeping()
        made._control.close()


# The schedule.


def test_a_firing_that_cannot_be_written_down_is_not_lost(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at three in the morning, and at the start that follows, which it must not end."""
    path = write_config(tmp_path, base, schedule__cron="0 3 1 1 *")
    settings = config.load(path)
    with Store.open(settings.store_path) as store:
        told = {"cron": "0 3 1 1 *", "timezone": "UTC", "seen": "2020-06-01T00:00:00Z"}
        store.set_meta("schedule", json.dumps(told))
        made = service.Service(path, settings, store, Notifier.from_environment(), queue.SimpleQueue())
        full = StoreError("no space left on device")
        with monkeypatch.context() as patch:
            patch.setattr(store, "request_cycle", lambda *a, **k: (_ for _ in ()).throw(full))
            made._catch_up()
            made._seen()
        assert store.unfinished() == []
        assert json.loads(store.get_meta("schedule") or "") == told, "another start would make it up"
        monkeypatch.setattr(service.schedule, "LOOK_SECONDS", 0)
        made._schedule.start()
        try:
            made._look_at_the_clock()
            made._look_at_the_clock()
            done = threading.Event()
            made._schedule.soon(done.set)  # after what was asked for before
            assert done.wait(30)
        finally:
            made._schedule.stop()
            made._control.close()
        assert [cycle.requested_by for cycle in store.unfinished()] == ["schedule"]


def test_a_reload_does_not_lose_a_firing_that_was_slept_through(tmp_path: Path, base: Path) -> None:
    """The machine wakes up, and is told to reload before it has looked at the clock."""
    path = write_config(tmp_path, base, schedule__cron="0 3 1 1 *")
    settings = config.load(path)
    with Store.open(settings.store_path) as store:
        made = service.Service(path, settings, store, Notifier.from_environment(), queue.SimpleQueue())
        try:
            made._plan()
            told = {"cron": "0 3 1 1 *", "timezone": "UTC", "seen": "2020-06-01T00:00:00Z"}
            store.set_meta("schedule", json.dumps(told))
            edit(path, 'cron = "0 3 1 1 *"', 'cron = "0 4 1 1 *"')
            made._reload()
            assert [cycle.requested_by for cycle in store.unfinished()] == ["schedule"]
            made._reload()
            assert len(store.cycles()) == 1, "it is made up once"
            assert json.loads(store.get_meta("schedule") or "")["cron"] == "0 4 1 1 *"
        finally:
            made._control.close()


def test_a_reload_waits_for_a_busy_store_and_the_watchdog_does_not(tmp_path: Path, base: Path) -> None:
    path = write_config(tmp_path, base)
    settings, mail = config.load(path), queue.SimpleQueue[str]()
    with Store.open(settings.store_path) as store:
        made = service.Service(path, settings, store, Notifier.from_environment(), mail)
        turns = threading.Semaphore(0)
        made._report = turns.release  # type: ignore[method-assign]
        thread = threading.Thread(target=made.run)
        thread.start()
        assert turns.acquire(timeout=60)
        with store.transaction():  # as an erasure that writes the store anew holds it
            mail.put("reload")
            for _ in range(3):
                assert turns.acquire(timeout=30)
        mail.put("stop")
        thread.join(60)
        assert not thread.is_alive()


def test_a_firing_missed_while_it_was_down_is_made_up_once(tmp_path: Path, base: Path) -> None:
    path = write_config(tmp_path, base, schedule__cron="0 3 1 1 *")
    with DaemonProcess(path) as daemon:
        assert daemon.status()["last"] is None, "nothing was missed before the first start"
        daemon.stop()
    with Store.open(daemon.settings.store_path) as store:
        seen = json.loads(store.get_meta("schedule") or "")
        store.set_meta("schedule", json.dumps({**seen, "seen": "2020-06-01T00:00:00Z"}))
    with DaemonProcess(path) as daemon:
        assert [cycle["trigger"] for cycle in daemon.call("history")["cycles"]] == ["schedule"]
        daemon.kill()
    with DaemonProcess(path) as daemon:
        assert len(daemon.call("history")["cycles"]) == 1


def test_a_paused_daemon_stays_paused_over_a_restart(idle: DaemonProcess) -> None:
    idle.call("pause")
    with pytest.raises(ControlError, match="paused by"):
        idle.retrain()
    idle.stop()
    with DaemonProcess(idle.config_path) as again:
        assert again.status()["paused"] is not None
        again.call("resume")
        assert again.status()["paused"] is None


# Cycles.


@pytest.mark.acceptance
def test_a_day_in_the_life(tmp_path: Path, base: Path) -> None:
    """Two lessons, then nothing new: by the commands a person types."""
    path = write_config(tmp_path, base)
    collect(tmp_path / "qa.duckdb", lesson("colours", COLOURS))
    with DaemonProcess(path) as daemon:
        ran = cli(path, "retrain-now", "--wait")
        assert ran.returncode == 0, ran.stderr + daemon.log.read_text()
        assert "cycle 1 promoted" in ran.stdout
        assert "cycle 1: publishing to MLflow" in ran.stderr
        collect(tmp_path / "qa.duckdb", lesson("flavours", FLAVOURS))
        assert read_json(cli(path, "retrain-now", "--wait", "--json"))["cycle"]["state"] == "promoted"
        ran = cli(path, "retrain-now", "--wait")
        assert ran.returncode == 0
        assert "nothing-to-do" in ran.stdout

        told = read_json(cli(path, "status", "--json"))
        assert told["champion"]["version"] == 2
        assert told["rows"]["pending"] == 0
        assert told["daemon"]["torch_loaded"] is False, "after whole cycles and MLflow still not"
        assert [c["state"] for c in daemon.call("history")["cycles"]] == [
            "nothing-to-do",
            "promoted",
            "promoted",
        ]
        shown = cli(path, "show", "2").stdout
        assert "Cycle 2 is promoted" in shown
        assert "after cycle 2" in shown

        answered = cli(path, "ask", "which one is colours 3", "--task", "colours")
        assert answered.stdout.strip() in COLOURS, answered.stderr
        assert "version 2" in answered.stderr
        assert "--task" not in cli(path, "ask", "x", "--task", "smells").stdout
        assert "tasks: colours, flavours" in cli(path, "ask", "x", "--task", "smells").stderr

        assert "version 1 now" in cli(path, "rollback", "--why", "flavours are wrong").stdout
        assert daemon.status()["rows"]["pending"] == 16, "what version 2 had learned is pending again"
        assert "version 2 now" in cli(path, "promote", "2", "--why", "they were right").stdout
        again = cli(path, "promote", "2", "--why", "really")
        assert again.returncode == 1
        assert "is the champion already" in again.stderr
        assert daemon.stop() == 0
    offline = read_json(cli(path, "status", "--json"))
    assert offline["daemon"] is None
    assert offline["champion"]["why"] == "they were right"
    assert "they were right" in cli(path, "history").stdout


@pytest.mark.acceptance
def test_sigterm_in_mid_training_is_quick_and_the_cycle_goes_on_at_the_next_start(
    tmp_path: Path, base: Path
) -> None:
    path = write_config(tmp_path, base, training__epochs=30, training__checkpoint_steps=5)
    collect(tmp_path / "qa.duckdb", lesson("colours", COLOURS, train=64))
    with DaemonProcess(path) as daemon:
        cycle = daemon.retrain()
        daemon.until(lambda told: training_step(told) > 6)
        worker = children(daemon.process.pid)
        assert worker
        for pid in worker:  # it would be done before a command has started
            os.kill(pid, signal.SIGSTOP)
        assert "cycle 1: " in cli(path, "status").stdout  # it may be in a validation just now
        started = time.monotonic()
        daemon.signal(signal.SIGTERM)
        daemon.hear("STOPPING=1")
        for pid in worker:
            os.kill(pid, signal.SIGCONT)
        assert daemon.process.wait(SECONDS) == 0
        assert time.monotonic() - started < WORKER_STOP_SECONDS
        assert not [pid for pid in worker if Path(f"/proc/{pid}").exists()], (
            "the worker does not outlive the daemon"
        )
    edit(path, "epochs = 30", "epochs = 2")  # counts from the next cycle: this one's snapshot has its own
    with DaemonProcess(path) as daemon:
        ended = daemon.ended(cycle)
        assert ended["state"] == "promoted", daemon.log.read_text()
        assert daemon.call("show", cycle=cycle)["cycle"]["attempts"] == 0, (
            "a shutdown is not a failed attempt"
        )
        report = json.loads((tmp_path / "state/cycles/1/train/report.json").read_text())
        assert report["resumed"] >= 1
        daemon.stop()


@pytest.mark.acceptance
def test_who_waits_for_a_cycle_gets_its_ending_over_a_restart_of_the_daemon(
    tmp_path: Path, base: Path
) -> None:
    path = write_config(tmp_path, base, training__epochs=30, training__checkpoint_steps=5)
    collect(tmp_path / "qa.duckdb", lesson("colours", COLOURS, train=64))
    with DaemonProcess(path) as daemon:
        waiting = subprocess.Popen(
            command(path, "retrain-now", "--wait"), env=environment(), stdout=subprocess.PIPE, text=True
        )
        daemon.until(lambda told: training_step(told) > 6)
        assert daemon.stop() == 0
    with DaemonProcess(path) as daemon:
        told, _ = waiting.communicate(timeout=SECONDS)
        assert (waiting.returncode, told.split(":")[0]) == (0, "cycle 1 promoted")
        daemon.stop()


@pytest.mark.acceptance
def test_who_waits_follows_the_same_cycle_after_a_crash_and_else_is_told_its_number(
    tmp_path: Path, base: Path
) -> None:
    path = write_config(tmp_path, base, source__busy_timeout=0)
    collect(tmp_path / "qa.duckdb", lesson("colours", COLOURS, train=4))
    running = [DaemonProcess(path).__enter__()]
    seen: list[dict[str, object]] = []

    def crash(event: dict[str, object]) -> None:
        """A daemon that dies as soon as it has said the cycle's number, and one in its place."""
        if not seen:
            running.pop().__exit__(None, None, None)
            running.append(DaemonProcess(path).__enter__())
        seen.append(event)

    settings = running[0].settings
    told = access.retrain(settings, crash, wait=True)
    assert (told["cycle"]["id"], told["cycle"]["state"], told["joined"]) == (1, "nothing-to-do", False)
    with (
        duckdb.connect(str(tmp_path / "qa.duckdb")),  # so that it cannot have ended before
        pytest.raises(ControlError, match=r"within 0\.5 s; cycle 2 .*systemctl start.*`daemon show 2`"),
    ):
        access.retrain(settings, lambda event: running[0].kill(), wait=True, patience=0.5)
    running.pop().__exit__(None, None, None)


@pytest.mark.acceptance
def test_the_exit_code_tells_what_became_of_the_cycle(tmp_path: Path, base: Path) -> None:
    path = write_config(tmp_path, base, gate__min_gain=1.0, training__epochs=400)
    collect(tmp_path / "qa.duckdb", lesson("colours", COLOURS, train=64))
    with DaemonProcess(path) as daemon:
        cycle = daemon.retrain()
        daemon.until(lambda told: training_step(told) > 2)
        assert daemon.call("retrain")["joined"] is False
        assert daemon.call("retrain")["joined"] is True
        assert cli(path, "cancel").returncode == 0
        assert daemon.ended(cycle)["state"] == "cancelled"
        assert cli(path, "cancel", "2").returncode == 0
        daemon.until(lambda told: not told["unfinished"])
        edit(path, "epochs = 400", "epochs = 1")
        daemon.signal(signal.SIGHUP)
        daemon.hear("RELOADING=1")
        daemon.hear("READY=1")
        assert cli(path, "retrain-now", "--wait").returncode == 3
        edit(path, "[source]", '[source]\ntable = "nothing_here"')
        daemon.signal(signal.SIGHUP)
        daemon.hear("RELOADING=1")
        daemon.hear("READY=1")
        ran = cli(path, "retrain-now", "--wait")
        assert ran.returncode == 4
        assert "nothing_here" in ran.stdout
        daemon.stop()


@pytest.mark.acceptance
def test_a_locked_source_is_waited_for_and_shown(tmp_path: Path, base: Path) -> None:
    path = write_config(tmp_path, base, source__busy_timeout=0)
    collect(tmp_path / "qa.duckdb", lesson("colours", COLOURS, train=4))
    with DaemonProcess(path) as daemon:
        with duckdb.connect(str(tmp_path / "qa.duckdb")):
            cycle = daemon.retrain()
            told = daemon.until(lambda told: bool(told["daemon"]["activity"]["waiting"]))
            waiting = told["daemon"]["activity"]["waiting"]
            assert f"PID {os.getpid()}" in waiting["reason"]
            assert f"PID {os.getpid()}" in cli(path, "status").stdout
        again = daemon.call("retrain")
        assert again["joined"]
        assert again["cycle"]["id"] == cycle
        assert daemon.ended(cycle)["state"] == "nothing-to-do"
        daemon.stop()


@pytest.mark.acceptance
def test_what_is_mounted_late_is_waited_for_and_then_learned_from(tmp_path: Path, base: Path) -> None:
    """The base and the collector's folder are on a disk that comes after the daemon."""
    disk = tmp_path / "disk"
    disk.mkdir()
    shutil.copytree(base, disk / "base")
    collect(disk / "qa.duckdb", lesson("colours", COLOURS, train=4))
    path = write_config(tmp_path, disk / "base", source__path=str(disk / "qa.duckdb"))
    disk.rename(tmp_path / "unplugged")
    with DaemonProcess(path) as daemon:
        cycle = daemon.retrain()
        waiting = _waits(daemon, "no such file or folder")
        assert waiting["reason"] in " ".join(cli(path, "status").stdout.split())
        assert cli(path, "pause").returncode == cli(path, "resume").returncode == 0
        disk.mkdir()
        (tmp_path / "unplugged/base").rename(disk / "base")
        daemon.signal(signal.SIGHUP)
        _waits(daemon, f"there is no file {disk}/qa.duckdb")
        assert daemon.status()["daemon"]["config_problem"] is None
        (tmp_path / "unplugged/qa.duckdb").rename(disk / "qa.duckdb")
        assert daemon.retrain() == cycle
        assert daemon.ended(cycle)["state"] == "nothing-to-do"
        assert daemon.status()["rows"]["total"] == len(lesson("colours", COLOURS, train=4))
        daemon.stop()


def _waits(daemon: DaemonProcess, reason: str) -> dict[str, Any]:
    def met(told: dict[str, Any]) -> bool:
        return reason in ((told["daemon"]["activity"]["waiting"] or {}).get("reason") or "")

    return dict(daemon.until(met)["daemon"]["activity"]["waiting"])
