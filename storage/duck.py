"""How a DuckDB file is opened here, whosever it is."""

from pathlib import Path
from typing import Any

import duckdb

# Extensions are never fetched: what the store needs is built in, and nothing is on behalf of others' files.
_CONFIG = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}


def connect(path: Path | str, *, read_only: bool = False) -> Any:
    """A connection that fetches nothing from anywhere and prints nothing. Raises `duckdb.Error`.

    In a Python without a script (`python -c`, a notebook) DuckDB draws a progress bar on standard output when
    a statement takes two seconds: between the lines that another program reads from there.
    """
    connection = duckdb.connect(str(path), read_only=read_only, config=_CONFIG)
    connection.execute("SET enable_progress_bar = false")
    return connection
