"""The import arrows of the architecture, checked on the source itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("daemon", "strategies", "storage")
TORCH = {"torch", "transformers", "peft", "avalanche", "safetensors"}
SHARED_WITH_STRATEGIES = {"storage.rows", "storage.errors", "storage.artifacts", "storage.parquet"}


def imported(path: Path, *, top_level_only: bool) -> set[str]:
    """Dotted names that a module imports; `from a import b` counts as a.b and a."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("**/*.py"))


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", modules("storage"), ids=lambda p: p.name)
def test_storage_knows_neither_models_nor_the_daemon(path: Path) -> None:
    assert not tops(imported(path, top_level_only=False)) & (TORCH | {"strategies", "daemon"})


@pytest.mark.parametrize("path", modules("strategies"), ids=lambda p: p.name)
def test_strategies_know_neither_databases_nor_the_daemon(path: Path) -> None:
    names = imported(path, top_level_only=False)
    assert not tops(names) & {"duckdb", "mlflow", "daemon", "apscheduler"}
    from_storage = {".".join(n.split(".")[:2]) for n in names if n.startswith("storage.")}
    assert from_storage <= SHARED_WITH_STRATEGIES


@pytest.mark.parametrize("path", modules("daemon"), ids=lambda p: p.name)
def test_the_daemon_never_imports_torch_at_module_level(path: Path) -> None:
    assert not tops(imported(path, top_level_only=True)) & TORCH


@pytest.mark.parametrize(
    ("library", "home"),
    [
        (
            "mlflow",
            {
                "storage/registry.py",
                "storage/mlflow_client.py",
                "storage/mlflow_connection.py",
                "storage/packaging.py",
                "daemon/served_model.py",
            },
        ),
        ("apscheduler", {"daemon/schedule.py"}),
        ("duckdb", {"storage/duck.py", "storage/database.py", "storage/sources.py", "storage/files.py"}),
        ("avalanche", {"strategies/loop.py", "strategies/method.py", "strategies/experience.py"}),
        ("peft", {"strategies/model.py"}),
    ],
)
def test_each_big_library_has_one_home(library: str, home: set[str]) -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in modules(package)
        if library in tops(imported(path, top_level_only=False))
    }
    assert users <= home


def test_no_module_reads_pickles_or_trusts_remote_code() -> None:
    for package in PACKAGES:
        for path in modules(package):
            text = path.read_text()
            assert not tops(imported(path, top_level_only=False)) & {
                "pickle",
                "cloudpickle",
                "dill",
                "joblib",
            }, path
            assert "torch.load(" not in text, path
            assert "trust_remote_code=True" not in text, path


def test_importing_what_the_service_imports_does_not_load_torch() -> None:
    code = (
        "import sys, daemon.service, daemon.cycle, daemon.cli, storage.registry\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_module_says_what_it_is_for() -> None:
    for package in PACKAGES:
        for path in modules(package):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_files_stay_short_enough_to_read() -> None:
    long = {p.name: n for k in PACKAGES for p in modules(k) if (n := len(p.read_text().splitlines())) > 500}
    assert not long
