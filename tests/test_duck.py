"""DuckDB as it is opened here says nothing by itself."""

from pathlib import Path

import duckdb

from storage import duck

ROOT = Path(__file__).resolve().parent.parent


def test_no_progress_bar_comes_between_the_lines_that_a_program_reads() -> None:
    asked = "SELECT current_setting('enable_progress_bar')"
    with duckdb.connect() as usual, duck.connect(":memory:") as ours:
        assert usual.execute(asked).fetchone() == (True,)
        assert ours.execute(asked).fetchone() == (False,)
        assert ours.cursor().execute(asked).fetchone() == (False,)


def test_whatever_opens_a_duckdb_file_opens_it_so() -> None:
    packages = [path for name in ("daemon", "storage", "strategies") for path in (ROOT / name).glob("*.py")]
    opening = [path.name for path in packages if "duckdb.connect(" in path.read_text()]
    assert opening == ["duck.py"]
