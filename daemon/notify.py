"""Tells systemd how the service is doing: the sd_notify protocol, one datagram a message.

Knows the environment variables that systemd sets and nothing else. Without them (in a terminal)
everything here does nothing.
"""

import os
import socket
import time
from collections.abc import MutableMapping

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """The service's line to systemd. Never raises: a lost notification must not end a training."""

    def __init__(self, address: str | None = None, *, watchdog_seconds: float | None = None) -> None:
        self.address = address
        self.watchdog_seconds = watchdog_seconds  # the unit's WatchdogSec; None: no watchdog

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> "Notifier":
        """Takes the variables out of the environment, so that the worker cannot speak for the service."""
        address, limit, pid = (environment.pop(name, None) for name in _VARIABLES)
        ours = pid in (None, str(os.getpid()))
        seconds = int(limit) / 1e6 if limit and limit.isdigit() and ours else None
        return cls(address, watchdog_seconds=seconds)

    @property
    def ping_seconds(self) -> float | None:
        """How often to ping: twice as often as systemd asks for."""
        return self.watchdog_seconds / 2 if self.watchdog_seconds else None

    def ready(self, status: str) -> None:
        self._send("READY=1", _status(status))

    def status(self, text: str) -> None:
        self._send(_status(text))

    def reloading(self) -> None:
        # MONOTONIC_USEC is what Type=notify-reload (systemd 253) asks for; older ones ignore it.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        self._send("STOPPING=1", _status(status))

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self.address:
            return
        # A leading @ stands for the NUL of Linux's abstract sockets.
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
                line.settimeout(1.0)
                line.connect(address)
                line.sendall("\n".join(lines).encode())
        except OSError:
            pass


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())
