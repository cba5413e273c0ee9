"""A real `mlflow server`, and a proxy before it through which the network goes wrong when a test says so."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from daemon.mlflow_ui import _ENVIRONMENT
from tests.daemons import SECONDS, environment

HOST = "127.0.0.1"
# What becomes of a request: it is refused with an error, or waits for ever, or is done, and then the
# connection is cut or a gateway answers with an error of its own.
Deed = Literal["error", "hang", "cut", "gateway"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """Its address, once it is healthy. Ends with all its processes; what it has stays for the next start."""
    from tests.bots import fresh_mlflow  # brings torch

    if not (folder / "mlflow.db").exists():
        shutil.copy(fresh_mlflow(), folder / "mlflow.db")
    binaries = Path(sys.executable).parent  # mlflow looks for uvicorn on PATH
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
    ]
    command += ["--artifacts-destination", str(folder / "served"), "--workers", "1"]
    with (folder / "server.log").open("a") as log, subprocess.Popen(
        [*command, "--host", HOST, "--port", str(port)],
        env=environment(**_ENVIRONMENT, PATH=f"{binaries}{os.pathsep}{os.environ['PATH']}"),
        cwd=folder, stdout=log, stderr=log, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + SECONDS
            while not _healthy(port):
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.2)
            yield f"http://{HOST}:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class Proxy:
    """Passes requests on to the server at `target`; `port` stays the same while it is down."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.met = threading.Event()  # a fault went off
        self._server: _Server | None = None
        self._fault: tuple[Deed, str] | None = None
        self._left = 0
        self._mended = threading.Event()

    def up(self) -> None:
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Nobody listens: connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def breaks(self, deed: Deed, where: str = "", times: int = 1_000_000) -> None:
        """From now on, so many times, at requests with `where` in their path."""
        self.met.clear()
        self._mended.clear()
        self._fault, self._left = (deed, where), times

    def mend(self) -> None:
        self._fault = None
        self._mended.set()
        if self._server is None:
            self.up()

    def fate(self, path: str) -> Deed | None:
        """What becomes of this request."""
        if self._fault is None or self._fault[1] not in path or self._left <= 0:
            return None
        self._left -= 1
        self.met.set()
        return self._fault[0]

    def hang(self) -> None:
        self._mended.wait(SECONDS)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        super().__init__((HOST, proxy.port), _Request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is no news."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fate = self.server.proxy.fate(self.path)
        if fate == "error":
            return self._answer(500, {}, b"broken on purpose")
        if fate == "hang":
            self.server.proxy.hang()
            return self._cut()
        status, headers, answer = self._ask(body)
        if fate == "cut":
            return self._cut()
        if fate == "gateway":
            return self._answer(502, {}, b"bad gateway")
        return self._answer(status, headers, answer)

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(HOST, self.server.proxy.target, timeout=SECONDS)
        try:
            headers = {**dict(self.headers), "Host": f"{HOST}:{self.server.proxy.target}"}
            connection.request(self.command, self.path, body=body, headers=headers)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _pass

    def log_message(self, format: str, *args: object) -> None:
        """Not every request."""
