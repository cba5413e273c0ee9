"""The daemon's unix socket: one JSON line asks, JSON lines answer.

    {"command": "retrain", "args": {"wait": true}}
    {"event": {"cycle": 4, "state": "requested"}}        any number of these
    {"result": {...}}   or   {"error": {"type": "ControlError", "message": "..."}}

The server (`ControlServer`) reads requests, knows who asks from the kernel, and hands both to a
handler; nothing that a client sends, or fails to send, ends it. The client (`Client`) is what the CLI
uses. Neither knows what the commands mean.
"""

import json
import logging
import os
import re
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage import errors
from storage.errors import ControlError, DaemonNotRunning, DaemonSilent, HoldfastError

log = logging.getLogger(__name__)

MAX_REQUEST = 1 << 20  # bytes of one request line
REQUEST_SECONDS = 10.0  # a client may take this long to say what it wants
REPLY_SECONDS = 10.0  # and this long to take each line of the answer
MAX_CLIENTS = 64
_ROOM = 100  # bytes of path that surely fit into a socket address (sun_path has 108)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked, by whom (an account name), and the way to say something before the end."""

    command: str
    args: dict[str, Any]
    who: str
    emit: Callable[[dict[str, Any]], None]


Handler = Callable[[Request], dict[str, Any]]


class ClientGone(Exception):
    """The client no longer listens; what it asked for stays asked."""


class ControlServer:
    """Listens on a 0600 socket; every client gets a thread, so that one who follows blocks nobody."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path = path
        self._handler = handler
        self._clients = threading.BoundedSemaphore(MAX_CLIENTS)
        self._closing = False
        self._socket = self._listen()
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self._closing = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._socket.close()
        with suppress(OSError):  # on a disk that failed; the next start knows a socket that nobody answers
            self.path.unlink()

    def _listen(self) -> socket.socket:
        _remove_stale(self.path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)  # the socket is never open to others, not even for a moment
        try:
            with _address(self.path) as address:
                listening.bind(address)
        except OSError as error:
            raise ControlError(
                f"the control socket {self.path} cannot be made: {error}; check bot.state_dir"
            ) from None
        finally:
            os.umask(before)
        listening.listen(128)
        return listening

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._socket.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("control socket: %s", error, extra={"action": "control-error"})
                threading.Event().wait(0.1)  # out of file descriptors: some will be freed
                continue
            self._begin(client)

    def _begin(self, client: socket.socket) -> None:
        """A thread for the client, or the word that there is none."""
        if not self._clients.acquire(blocking=False):
            return _refuse(client, f"{MAX_CLIENTS} clients are connected; try again later")
        try:
            threading.Thread(target=self._serve, args=(client,), name="client", daemon=True).start()
        except RuntimeError as error:  # the system's limit on threads, or on memory: others will end
            self._clients.release()
            log.warning("control socket: %s", error, extra={"action": "control-error"})
            _refuse(client, f"the daemon cannot take another client now ({error}); try again later")

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                client.settimeout(REPLY_SECONDS)
                _send(client, self._answer(client))
        except (OSError, ClientGone):
            pass
        finally:
            self._clients.release()

    def _answer(self, client: socket.socket) -> dict[str, Any]:
        """The last line of the conversation."""
        try:
            request = _read_request(client)
            return {"result": self._handler(request)}
        except HoldfastError as error:
            return _error(error)
        except ClientGone:
            raise
        except OSError as error:
            return _error(ControlError(str(error)))
        except Exception as error:  # a bug must not take the daemon down with it
            log.exception("a command failed", extra={"action": "control-error"})
            return _error(ControlError(f"internal error: {error!r}; the daemon's log has the details"))


class Client:
    """One conversation a call. Raises what the daemon raised, `DaemonNotRunning` or `DaemonSilent`."""

    def __init__(self, path: Path, *, timeout: float = 60.0) -> None:
        self.path = path
        self.timeout = timeout  # seconds of silence

    def call(
        self, command: str, on_event: Callable[[dict[str, Any]], None] = lambda event: None, **args: Any
    ) -> dict[str, Any]:
        """The result; `on_event` hears what comes before it."""
        for message in self._converse(command, args):
            if "event" in message:
                on_event(message["event"])
            elif "error" in message:
                raise _rebuild(message["error"])
            elif "result" in message:
                return dict(message["result"])
        raise DaemonSilent("the daemon ended before it answered; see `daemon status` and its log")

    def _converse(self, command: str, args: dict[str, Any]) -> Iterator[dict[str, Any]]:
        request = {"command": command, "args": args, "for": os.environ.get("SUDO_USER", "")}
        with self._connect() as line:
            try:
                with suppress(BrokenPipeError):  # a daemon that refuses does not listen first, and says why
                    line.sendall(json.dumps(request).encode() + b"\n")
                with line.makefile("rb") as answers:
                    for answer in answers:
                        yield json.loads(answer)
            except TimeoutError:
                raise DaemonSilent(
                    f"the daemon said nothing for {self.timeout:.0f} s; see `systemctl status holdfast` and "
                    "`journalctl -u holdfast`"
                ) from None
            except (OSError, json.JSONDecodeError) as error:
                raise DaemonSilent(
                    f"the conversation with the daemon broke off ({error}); see `daemon status`"
                ) from None

    def _connect(self) -> socket.socket:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        line.settimeout(self.timeout)
        try:
            with _address(self.path) as address:
                line.connect(address)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            line.close()
            raise DaemonNotRunning() from None
        except PermissionError:
            line.close()
            raise ControlError(
                f"the daemon at {self.path} answers only its own account and root; try with sudo"
            ) from None
        except OSError as error:
            line.close()
            raise ControlError(f"the daemon at {self.path} cannot be reached: {error}") from None
        return line


def _remove_stale(path: Path) -> None:
    """A socket that nobody answers at is left over from a crash. Anything else is not ours to remove."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ControlError(f"{path} is in the way and not a socket; move it, then start the daemon again")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, _address(path) as address:
        probe.settimeout(1.0)
        try:
            probe.connect(address)
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ControlError(f"another daemon answers at {path}; see `daemon status`")


def _read_request(client: socket.socket) -> Request:
    values = _parse(_read_line(client))
    return Request(
        command=values["command"],
        args=values.get("args", {}),
        who=_who(client, values.get("for", "")),
        emit=lambda event: _tell(client, event),
    )


def _read_line(client: socket.socket) -> bytes:
    deadline = time.monotonic() + REQUEST_SECONDS
    line = bytearray()
    while not line.endswith(b"\n"):
        client.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            chunk = client.recv(min(65536, MAX_REQUEST + 1 - len(line)))
        except TimeoutError:
            raise ControlError(f"no complete request within {REQUEST_SECONDS:.0f} s") from None
        line += chunk
        if len(line) > MAX_REQUEST:
            raise ControlError(f"a request may have {MAX_REQUEST} bytes at most")
        if not chunk:
            raise ControlError("the request ends before its line does")
    client.settimeout(REPLY_SECONDS)
    return bytes(line)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ControlError(f"the request is not a line of JSON: {error}") from None
    well_formed = (
        isinstance(values, dict)
        and isinstance(values.get("command"), str)
        and isinstance(values.get("args", {}), dict)
        and isinstance(values.get("for", ""), str)
    )
    if not well_formed:
        raise ControlError('a request looks like {"command": "status", "args": {}}')
    return dict(values)


def _who(client: socket.socket, on_behalf_of: str) -> str:
    """The account at the other end, as the kernel knows it; root may add whom sudo acts for."""
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid = struct.unpack("3i", credentials)[1]
    return account(uid, on_behalf_of)


def account(uid: int, on_behalf_of: str = "") -> str:
    """`alice`, or `root for alice` under sudo: what audits show."""
    import pwd

    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid {uid}"
    if uid == 0 and re.fullmatch(r"[A-Za-z0-9._-]{1,32}", on_behalf_of):
        return f"{name} for {on_behalf_of}"
    return name


def _tell(client: socket.socket, event: dict[str, Any]) -> None:
    try:
        _send(client, {"event": event})
    except OSError as error:
        raise ClientGone from error


def _refuse(client: socket.socket, why: str) -> None:
    """Waits for nobody: the thread that says it is the one that accepts."""
    with client, suppress(OSError):
        client.setblocking(False)
        _send(client, _error(ControlError(why)))


def _send(client: socket.socket, message: dict[str, Any]) -> None:
    client.sendall(json.dumps(message, default=str).encode() + b"\n")


def _error(error: HoldfastError) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": str(error)}}


def _rebuild(error: dict[str, str]) -> HoldfastError:
    kind = getattr(errors, error.get("type", ""), None)
    if not (isinstance(kind, type) and issubclass(kind, HoldfastError)):
        kind = ControlError
    return kind(error.get("message"))


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """An address for the socket, however long its path: long ones go through the open directory."""
    if len(os.fsencode(path)) <= _ROOM:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
