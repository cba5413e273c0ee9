"""What docs/security.md promises about code, names and secrets."""

import ast
import os
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import duckdb
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from daemon import config, mlflow_ui, operations, publish
from daemon.base import prepare_base
from daemon.control import Request
from daemon.executor import Stop
from storage.errors import ControlError, HoldfastError, SourceError
from storage.records import State
from storage.sources import Columns, DuckDBSource, SourceSpec
from strategies import der, ewc_lora, quadratic, replay_memory
from strategies.base import prepare
from strategies.contract import PrepareJob
from strategies.model import load_base, with_adapter
from tests.bots import Bot, commands, lesson
from tests.mlflow_server import free_port
from tests.toys import tiny_base, tiny_model_spec

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted(path for part in ("daemon", "storage", "strategies") for path in (ROOT / part).glob("*.py"))
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", CODE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_code_of_ours_reads_a_pickle_or_runs_a_models_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not PICKLERS & {name.split(".")[0] for name in names}, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert called(node) not in {"torch.load", "torch.save", "np.load", "numpy.load"}
            assert not [k for k in node.keywords if k.arg == "trust_remote_code" and trusted(k.value)]
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                named = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                assert not (named and trusted(value))


def trusted(value: ast.expr) -> bool:
    return not (isinstance(value, ast.Constant) and value.value is False)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_where_a_loader_looks_is_refused_and_never_run(tmp_path: Path) -> None:
    mark, bomb = tmp_path / "ran", pickle.dumps(Bomb(tmp_path / "ran"))
    base = tiny_base(tmp_path / "base")
    adapter, pickled, state = tmp_path / "adapter", tmp_path / "pickled", tmp_path / "state"
    for folder in (adapter, pickled, state):
        folder.mkdir()
    for name in ("adapter_model.bin", "training_args.bin", "adapter_model.safetensors"):
        (adapter / name).write_bytes(bomb)
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}'
    )
    (pickled / "pytorch_model.bin").write_bytes(bomb)
    (pickled / "config.json").write_bytes((base / "config.json").read_bytes())
    (state / "replay.json").write_bytes(bomb)
    (state / "x.safetensors").write_bytes(bomb)
    loaded = load_base(tiny_model_spec(base))
    for load in (
        lambda: with_adapter(loaded, adapter, trainable=False),
        lambda: prepare(PrepareJob(base=str(pickled), out=str(tmp_path / "out"))),
        lambda: replay_memory.load(state),
        lambda: quadratic.load(state / "x.safetensors"),
        lambda: ewc_lora.load(state / "x.safetensors"),
        lambda: der.load(state / "x.safetensors"),
    ):
        with pytest.raises(HoldfastError):
            load()
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(HoldfastError, match=r"no adapter_model\.safetensors"):
        with_adapter(loaded, adapter, trainable=False)
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the bomb would have left it"


def test_names_of_tables_and_columns_are_names_and_never_sql(tmp_path: Path) -> None:
    path, table, column = tmp_path / "qa.duckdb", 'qa"; DROP TABLE kept; --', "q'\"); DROP TABLE kept; --"
    quoted = '"' + table.replace('"', '""') + '"', '"' + column.replace('"', '""') + '"'
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE kept (x INT)")
        connection.execute(f"CREATE TABLE {quoted[0]} (id TEXT, {quoted[1]} TEXT, answer TEXT)")
        connection.execute(f"INSERT INTO {quoted[0]} VALUES ('1', 'what', 'that')")
    spec = SourceSpec(path=path, table=quoted[0], columns=Columns(question=column, task=""))
    read = [row for batch in DuckDBSource(spec).batches(None) for row in batch]
    assert [row.values["question"] for row in read] == ["what"]
    with pytest.raises(HoldfastError, match="quotes doubled"):
        DuckDBSource(SourceSpec(path=path, table=table))
    with duckdb.connect(str(path), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchall() == [(0,)]


TASKS = ("../../x", "/etc/holdfast-x", "é", "e\u0301", "Billing", "billing", "~root", "a\\b:*?|<>", "x" * 100)


def test_tasks_named_like_paths_stay_text_through_a_whole_cycle(bot: Bot) -> None:
    around = set(bot.home.iterdir())
    bot.collect(row for task in TASKS for row in lesson(task, train=4, suite=2))
    cycle = bot.run()
    assert cycle.state in (State.PROMOTED, State.REJECTED), cycle.reason
    assert set(bot.home.iterdir()) - around <= {bot.home / "qa.duckdb"}
    assert not Path("/etc/holdfast-x").exists()
    names = [part for path in bot.settings.state_dir.rglob("*") for part in path.parts]
    assert not {"..", "~root", "x" * 100} & set(names)
    told = operations.audit(bot.settings, bot.store, bot.registry)
    assert told["findings"] == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\b", "a\0b", "x" * 300, "", ".", ".."])
def test_a_bots_name_that_could_be_a_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.toml").write_text(f"[bot]\nname = {config._toml(name)}\n")
    with pytest.raises(HoldfastError, match=r"bot\.name"):
        config.load(tmp_path / "config.toml")


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "..": (lambda path: None, "no such file"),
    "nothing.csv": (lambda path: None, "no such file"),
    "n" * 300 + ".csv": (lambda path: None, "File name too long"),
    "nul\0.csv": (lambda path: None, "null byte"),
    "lone\ud800.csv": (lambda path: None, "is not UTF-8"),
    "folder.csv": (Path.mkdir, r"is not a file; name the files in it"),
    "pipe.csv": (os.mkfifo, "is not a file but a pipe"),
    "device.csv": (lambda path: path.symlink_to("/dev/zero"), "is not a file but a pipe, socket or device"),
    "loop.csv": (lambda path: path.symlink_to(path), "symbolic links"),
    "under/a.csv": (lambda path: path.parent.write_text(""), "Not a directory"),
    "passwd": (lambda path: path.symlink_to("/etc/passwd"), "is of an unknown kind"),
    "passwd.csv": (lambda path: path.symlink_to("/etc/passwd"), "has no column for id"),
}


@pytest.mark.parametrize("name", ODD, ids=lambda name: repr(name)[:20])
def test_a_path_to_ingest_that_is_no_file_of_rows_is_answered_in_words(bot: Bot, name: str) -> None:
    make, reason = ODD[name]
    folder = bot.home / "inbox"
    folder.mkdir()
    path = folder / ("gone/../../gone" if name == ".." else name)
    make(path)
    prepare_base(bot.settings, bot.executor, lambda progress: None, Stop())
    with pytest.raises((SourceError, ControlError), match=reason):
        ask_to_ingest(bot, str(path))
    assert bot.store.row_counts() == {}


def test_a_path_to_ingest_means_what_it_means_to_the_system(bot: Bot) -> None:
    """Links and `..` are followed; nothing is relative to wherever the daemon was started."""
    prepare_base(bot.settings, bot.executor, lambda progress: None, Stop())
    (bot.home / "inbox").mkdir()
    (bot.home / "rows.csv").write_text("id,question,answer\n1,q,a\n")
    (bot.home / "inbox/link.csv").symlink_to("../rows.csv")
    assert ask_to_ingest(bot, f"{bot.home}/inbox/../rows.csv")["accepted"] == 1
    assert ask_to_ingest(bot, f"{bot.home}/inbox/link.csv")["known"] == 1
    for relative in ("rows.csv", "./rows.csv", "~/rows.csv", ""):
        with pytest.raises(ControlError, match="absolute paths"):
            ask_to_ingest(bot, relative)


def ask_to_ingest(bot: Bot, path: str) -> dict[str, Any]:
    """As by the socket, whoever is at its other end."""
    request = Request(command="ingest", args={"paths": [path]}, who="ann", emit=lambda event: None)
    return commands(bot)(request)


def test_a_password_is_in_nothing_that_is_shown_or_published(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        '[mlflow]\ntracking_uri = "postgresql://ann:s3cr%40t@db.example.org/mlflow"\n'
    )
    settings = config.load(tmp_path / "config.toml")
    used: dict[str, Any] = {part: {} for part in ("model", "lora", "train", "strategy", "limits", "gate")}
    shown = [repr(operations.status(settings, None)), repr(publish.parameters(settings, used))]
    for text in shown:
        assert "s3cr" not in text


def test_the_pages_of_mlflow_get_the_password_where_nobody_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody on the machine sees the arguments of a process, its own account alone the environment."""
    (tmp_path / "config.toml").write_text(
        '[mlflow]\ntracking_uri = "postgresql://ann:s3cr@db.example.org/mlflow"\n'
    )
    became: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: became.extend(given))
    mlflow_ui.serve(config.load(tmp_path / "config.toml"), free_port())
    _, arguments, environment = became
    assert "s3cr" not in " ".join(arguments)
    ask = "from mlflow.cli import server; print(*(o.envvar for o in server.params if 'backend' in o.name))"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ask], capture_output=True, text=True, check=True
    )
    assert environment[ran.stdout.split()[0]] == "postgresql://ann:s3cr@db.example.org/mlflow"


def test_every_package_that_comes_with_the_project_is_pinned() -> None:
    pinned = {
        canonicalize_name(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    seen: set[str] = set()
    while wanted:
        asked = Requirement(wanted.pop())
        name = canonicalize_name(asked.name)
        if name in seen or (asked.marker and not asked.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            wanted += requires(name) or []
        except PackageNotFoundError:  # of another platform
            seen.discard(name)
    assert len(seen) > 50
    assert sorted(seen - pinned) == []


def test_what_is_installed_is_what_is_pinned() -> None:
    """So that an audit of constraints.txt is one of what runs."""
    pinned = [
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    ]
    there = {name: wanted for name, wanted in pinned if _installed(name)}
    assert len(there) > 100
    assert {name: Version(_installed(name)).public for name in there} == there


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # of another platform
        return ""


def test_the_security_page_states_the_units_score() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    unit = (ROOT / "deploy" / "holdfast.service").read_text()
    score = re.search(r"rates it ([\d.]+) of 10", unit)
    assert score
    assert f"**{score[1]} of 10**" in page
