"""A collector that is a server: it owns its DuckDB and hands rows over when asked.

    python -m tests.owner FILE INBOX PORT

POST /rows takes a JSON list of rows, {"id": …, "question": …, "answer": …}, and answers when they are
written. POST /hand-over writes what is new into the inbox. For tests: /rows/late commits only after the next
hand-over, as a slow transaction may, and /hand-over/die ends the process when the file is there.
"""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import duckdb

OVERLAP = "2 minutes"  # longer than any transaction is open


class Owner(ThreadingHTTPServer):
    """One connection to the file, which nobody else can open; a cursor of it for each request."""

    def __init__(self, path: Path, inbox: Path, port: int) -> None:
        self.inbox = inbox
        self.database = duckdb.connect(str(path))
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS qa (id TEXT, question TEXT, answer TEXT, created_at TIMESTAMP)"
        )
        self.database.execute("CREATE TABLE IF NOT EXISTS handed (upto TIMESTAMP)")
        self.turn = threading.Condition()  # guards the two counts
        self.begun = self.done = 0
        super().__init__(("127.0.0.1", port), Request)

    def write(self, rows: list[dict[str, str]], *, late: bool) -> None:
        with self.database.cursor() as cursor:
            cursor.begin()
            values = [(row["id"], row["question"], row["answer"]) for row in rows]
            cursor.executemany("INSERT INTO qa VALUES (?, ?, ?, current_timestamp::TIMESTAMP)", values)
            if late:
                with self.turn:
                    next_one = self.begun + 1
                    self.turn.wait_for(lambda: self.done >= next_one)
            cursor.commit()

    def hand_over(self, *, die: bool) -> int:
        """The number of rows. Dying at any moment hands some over again, and loses none."""
        with self.turn:
            self.begun += 1
        with self.database.cursor() as cursor:
            now = one(cursor, "SELECT current_timestamp::TIMESTAMP")
            count = self._export(cursor, f"part-{now:%Y%m%d-%H%M%S-%f}")
            if die:
                os._exit(1)
            cursor.execute("INSERT INTO handed VALUES (?)", [now])
        with self.turn:
            self.done = self.begun
            self.turn.notify_all()
        return count

    def _export(self, cursor: Any, name: str) -> int:
        aside = self.inbox / f".{name}.tmp"
        since = f"SELECT coalesce(max(upto) - INTERVAL {OVERLAP}, '-infinity'::TIMESTAMP) FROM handed"
        count = one(cursor, f"COPY (FROM qa WHERE created_at > ({since})) TO '{aside}' (FORMAT parquet)")
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.rename(self.inbox / f"{name}.parquet")
        return int(count)


def one(cursor: Any, query: str) -> Any:
    return cursor.execute(query).fetchone()[0]


class Request(BaseHTTPRequestHandler):
    server: Owner

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        what, _, how = self.path.strip("/").partition("/")
        if what == "rows":
            self.server.write(json.loads(body), late=how == "late")
            told: object = "written"
        else:
            told = self.server.hand_over(die=how == "die")
        answer = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Not every request."""


if __name__ == "__main__":
    owner = Owner(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    print(owner.server_port, flush=True)
    owner.serve_forever()
