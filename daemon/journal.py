"""Log lines for people who read them with `journalctl`: one line an event.

Each line ends with its action and, where there is one, its cycle and snapshot. Under systemd a line
starts with its priority (`<4>`: warning), which journald takes off; in a terminal it starts with the
time. Modules log through `logging` with `extra={"action": …, "cycle": …, "snapshot": …}`. What a user
wrote (a task's name) is text in such a line: without terminal control codes, on the line of its event.
"""

import logging
import os
import sys
import unicodedata
from collections.abc import Mapping
from typing import TextIO

FIELDS = ("action", "cycle", "snapshot")
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def printable(text: object) -> str:
    """Text without terminal control codes; spaces, line breaks, tabs and joiners of letters stay."""
    return "".join(c if _is_harmless(c) else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def _is_harmless(c: str) -> bool:
    return c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs"


class JournalFormatter(logging.Formatter):
    """`<6>pulled: 12 new rows [action=pulled cycle=3]`."""

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 6)
        lines = [_one_line(record)]
        if record.exc_info:
            lines += printable(self.formatException(record.exc_info)).splitlines()
        return "\n".join(f"<{priority}>{line}" for line in lines)


class TerminalFormatter(logging.Formatter):
    """`02:30:00 info    pulled: 12 new rows [action=pulled cycle=3]`."""

    def __init__(self) -> None:
        super().__init__(datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record, self.datefmt)} {record.levelname.lower():<8}"
        text = f"{head} {_one_line(record)}"
        return f"{text}\n{printable(self.formatException(record.exc_info))}" if record.exc_info else text


def setup(stream: TextIO | None = None, *, level: int = logging.INFO) -> None:
    """All of the process's logging, to standard error. Libraries are heard from warnings upwards."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JournalFormatter() if under_journal(stream or sys.stderr) else TerminalFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in ("daemon", "storage", "strategies"):
        logging.getLogger(package).setLevel(level)
    logging.captureWarnings(True)


def under_journal(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the stream goes to journald, as $JOURNAL_STREAM (`device:inode`) says."""
    told = environment.get("JOURNAL_STREAM", "")
    try:
        seen = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return told == f"{seen.st_dev}:{seen.st_ino}"


def _one_line(record: logging.LogRecord) -> str:
    return printable(f"{record.getMessage()}{_fields(record)}".strip()).replace("\n", " | ")


def _fields(record: logging.LogRecord) -> str:
    told = [(name, getattr(record, name, None)) for name in FIELDS]
    shown = " ".join(f"{name}={value}" for name, value in told if value is not None)
    return f" [{shown}]" if shown else ""
