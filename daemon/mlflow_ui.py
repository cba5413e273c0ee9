"""`daemon ui`: MLflow's own pages, as a process of their own beside the daemon.

Turns into `mlflow server` (one worker, no job runners: a third of the memory) on this machine's
loopback address only: the pages have no password. That of the database goes through the environment:
the arguments of a process are for everybody to see.
"""

import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from daemon.settings import Settings
from storage.errors import ControlError
from storage.reach import absolute, is_server, redact

HOST = "127.0.0.1"
_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def serve(settings: Settings, port: int) -> None:
    """Prints where the pages are. Serves them itself (and does not return) when no server does already."""
    uri = settings.tracking_uri
    if is_server(uri):
        print(f"MLflow runs at {redact(uri, uri)}")
        return
    if not _is_free(port):
        raise ControlError(f"port {port} is in use; choose another one with --port")
    print(
        f"MLflow on http://{HOST}:{port} for the experiment and model {settings.bot.name!r}; Ctrl-C ends it",
        flush=True,
    )
    _become_server(absolute(uri), settings, port)


def _become_server(uri: str, settings: Settings, port: int) -> NoReturn:
    binaries = Path(sys.executable).parent  # mlflow looks for uvicorn on PATH
    environment = {
        **os.environ,
        **_ENVIRONMENT,
        "MLFLOW_BACKEND_STORE_URI": uri,
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--artifacts-destination", str(settings.state_dir / "artifacts")]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
