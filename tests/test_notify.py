"""What systemd hears, on a real datagram socket, and what journald is given."""

import io
import logging
import os
import socket
import sys
from pathlib import Path

import pytest

from daemon.journal import JournalFormatter, TerminalFormatter, under_journal
from daemon.notify import Notifier


@pytest.fixture
def ear(tmp_path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(os.path.relpath(tmp_path / "notify"))
    listening.settimeout(5)
    return listening


def heard(ear: socket.socket) -> list[str]:
    return ear.recv(4096).decode().split("\n")


def notifier(ear: socket.socket) -> Notifier:
    return Notifier.from_environment({"NOTIFY_SOCKET": ear.getsockname()})


def test_ready_status_reload_and_stop_are_told(ear: socket.socket) -> None:
    with ear:
        line = notifier(ear)
        line.ready("idle")
        assert heard(ear) == ["READY=1", "STATUS=idle"]
        line.status("cycle 3:\ntraining")
        assert heard(ear) == ["STATUS=cycle 3: training"]
        line.reloading()
        reloading = heard(ear)
        assert reloading[0] == "RELOADING=1"
        assert reloading[1].startswith("MONOTONIC_USEC=")
        line.stopping("bye")
        assert heard(ear) == ["STOPPING=1", "STATUS=bye"]
        line.alive()
        assert heard(ear) == ["WATCHDOG=1"]


def test_an_abstract_socket_is_spelt_with_an_at_sign() -> None:
    name = f"holdfast-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.settimeout(5)
        Notifier(f"@{name}").ready("idle")
        assert heard(listening)[0] == "READY=1"


def test_without_systemd_nothing_happens_and_nothing_breaks(tmp_path: Path) -> None:
    Notifier.from_environment({}).ready("idle")
    Notifier(str(tmp_path / "nobody")).alive()


def test_the_watchdog_is_fed_twice_as_often_as_asked_and_only_by_the_process_meant() -> None:
    assert Notifier.from_environment({"WATCHDOG_USEC": "60000000"}).ping_seconds == 30
    assert (
        Notifier.from_environment(
            {"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}
        ).ping_seconds
        == 30
    )
    assert Notifier.from_environment({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}).ping_seconds is None
    assert Notifier.from_environment({"WATCHDOG_USEC": "soon"}).ping_seconds is None


def test_children_do_not_inherit_the_line_to_systemd() -> None:
    environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/"}
    Notifier.from_environment(environment)
    assert environment == {"HOME": "/"}


def record(message: str, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("daemon.x", level, __file__, 1, message, None, None)
    made.__dict__.update(fields)
    return made


def test_a_journal_line_has_its_priority_and_names_action_cycle_and_snapshot() -> None:
    told = JournalFormatter().format(record("pulled", action="pulled", cycle=3, snapshot="abc"))
    assert told == "<6>pulled [action=pulled cycle=3 snapshot=abc]"
    assert JournalFormatter().format(record("bad", logging.ERROR)) == "<3>bad"


def test_one_event_is_one_line_and_a_traceback_keeps_its_priority_on_every_line() -> None:
    assert JournalFormatter().format(record("two\nlines")) == "<6>two | lines"
    try:
        raise ValueError("x")
    except ValueError:
        broken = record("broken", logging.CRITICAL)
        broken.exc_info = sys.exc_info()
    assert all(line.startswith("<2>") for line in JournalFormatter().format(broken).splitlines())


def test_in_a_terminal_a_line_starts_with_the_time() -> None:
    told = TerminalFormatter().format(record("pulled", cycle=3))
    assert told.endswith("info     pulled [cycle=3]")


def test_journald_is_recognised_by_its_stream(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        seen = os.fstat(stream.fileno())
        assert under_journal(stream, {"JOURNAL_STREAM": f"{seen.st_dev}:{seen.st_ino}"})
        assert not under_journal(stream, {"JOURNAL_STREAM": "1:2"})
        assert not under_journal(stream, {})
    assert not under_journal(io.StringIO(), {"JOURNAL_STREAM": "1:2"})
