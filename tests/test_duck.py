"""DuckDB as it is opened here says nothing by itself."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_no_progress_bar_comes_between_the_lines_that_a_program_reads() -> None:
    asked = "c.execute(\"SELECT current_setting('enable_progress_bar')\").fetchone()"
    for opened, shown in (("import duckdb; c = duckdb", True), ("from storage import duck; c = duck", False)):
        command = [sys.executable, "-c", f"{opened}.connect(':memory:'); print({asked})"]
        told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert told == f"({shown},)\n"


def test_whatever_opens_a_duckdb_file_opens_it_so() -> None:
    packages = [path for name in ("daemon", "storage", "strategies") for path in (ROOT / name).glob("*.py")]
    opening = [path.name for path in packages if "duckdb.connect(" in path.read_text()]
    assert opening == ["duck.py"]
