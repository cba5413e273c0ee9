"""Passwords and tokens through a whole cycle: afterwards they are in nothing that was written or shown."""

import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from tests.bots import collect, lesson, write_config
from tests.daemons import DaemonProcess, cli
from tests.mlflow_server import free_port, mlflow_server

SECRET = "s3cr"  # every one of them has it
PASSWORD = "s3cr@t/1"
ENVIRONMENT = {
    "MLFLOW_TRACKING_USERNAME": "ann",
    "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    "MLFLOW_TRACKING_TOKEN": "s3cr-token",
    "HF_TOKEN": "hf_s3cr",
    "HUGGING_FACE_HUB_TOKEN": "hf_s3cr",
    "AWS_SECRET_ACCESS_KEY": "s3cr-aws",
}
# As they come, and as they are sent.
FORMS = [SECRET.encode(), *(b64encode(f"ann:{word}".encode()) for word in (PASSWORD, "s3cr%40t%2F1"))]


@contextmanager
def closed_door(port: int) -> Iterator[None]:
    """A server that lets nobody in."""

    class Door(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            self.send_response(401, "go away")
            self.end_headers()
            self.wfile.write(b'{"error_code": "UNAUTHENTICATED", "message": "who are you?"}')

        do_GET = do_POST = refuse

        def log_message(self, *args: object) -> None:
            pass

    door = ThreadingHTTPServer(("127.0.0.1", port), Door)
    threading.Thread(target=door.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        door.shutdown()
        door.server_close()


def written(home: Path) -> Iterator[tuple[str, bytes]]:
    """Everything below a folder: the bytes of files, and what compressed ones say."""
    for path in sorted(home.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        yield str(path), path.read_bytes()
        if path.suffix == ".parquet":
            yield str(path), str(pq.read_table(path).to_pylist()).encode()
        if path.name == "store.duckdb":
            with duckdb.connect(str(path), read_only=True) as store:
                for (name,) in store.execute("SELECT table_name FROM duckdb_tables()").fetchall():
                    yield f"{path} {name}", str(store.table(name).fetchall()).encode()


@pytest.mark.acceptance
def test_no_password_and_no_token_is_in_anything_that_a_cycle_leaves(tmp_path: Path, base: Path) -> None:
    port = free_port()
    uri = f"http://ann:s3cr%40t%2F1@127.0.0.1:{port}"
    extra = {**ENVIRONMENT, "HOLDFAST_MLFLOW__TRACKING_URI": uri}
    home = tmp_path / "bot"
    home.mkdir()
    path = write_config(home, base)
    collect(home / "qa.duckdb", lesson("colours"))
    told: list[str] = []

    def look(*commands: str) -> None:
        for command in commands:
            ran = cli(path, *command.split(), **extra)
            told.append(f"{command}: {ran.stdout}{ran.stderr}")

    with closed_door(port), DaemonProcess(path, **extra) as daemon:
        daemon.retrain()
        waits = daemon.until(lambda status: bool(status["daemon"]["activity"]["waiting"]))
        assert "ann:***@127.0.0.1" in waits["daemon"]["activity"]["waiting"]["reason"]
        look("status", "doctor --json", "audit")
        assert daemon.stop() == 0
    look("history")
    with mlflow_server(tmp_path, port), DaemonProcess(path, **extra) as daemon:
        assert daemon.ended(1)["state"] == "promoted"
        look("status", "show 1 --json", "audit --json", "ui")
        assert daemon.stop() == 0
    assert "ann:***@127.0.0.1" in str(told)
    left = [*written(tmp_path), *((f"command {text[:20]}", text.encode()) for text in told)]
    assert len(left) > 50
    assert [where for where, what in left if any(form in what for form in FORMS)] == []
