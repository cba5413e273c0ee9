"""MLflow as a person sees it: one finished run and one version a cycle, whatever happens in between."""

import json
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from storage.errors import IntegrityError, RegistryError, RegistryUnavailable
from storage.reach import obstacle, redact
from storage.registry import CycleRecord, Matrix, Registry
from storage.runs import key, write_matrix
from tests.mlflow_server import free_port, mlflow_server

ROOT = Path(__file__).parent.parent
SERVED_MODEL = ROOT / "daemon" / "served_model.py"
MATRIX = Matrix(rows=("base", "cycle 7"), columns=("billing", "new"), values=((0.1, 0.2), (0.9, None)))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return open_registry(tmp_path)


def open_registry(home: Path, store_id: str = "store") -> Registry:
    return Registry(
        f"sqlite:///{home}/mlflow.db", "qa-bot", home / "artifacts", SERVED_MODEL, store_id=store_id
    )


def record(home: Path, cycle_id: int = 7, **changes: Any) -> CycleRecord:
    """A whole cycle; the adapter's bytes do not matter to the registry."""
    for part in ("adapter", "state"):
        (home / "result" / part).mkdir(parents=True, exist_ok=True)
    (home / "result" / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (home / "result" / "adapter" / "adapter_config.json").write_text('{"r": 4}')
    (home / "result" / "state" / "memory.json").write_text("[]")
    values: dict[str, Any] = {
        "cycle_id": cycle_id,
        "started_at": datetime(2026, 3, 1, 2, 30),
        "finished_at": datetime(2026, 3, 1, 3, 0),
        "adapter_dir": home / "result" / "adapter",
        "adapter_hash": f"adapter of cycle {cycle_id}",
        "state_dir": home / "result" / "state",
        "model_config": {"base_path": str(home / "base"), "fingerprint": "f" * 64, "tasks": ()},
        "params": {"training.epochs": "2"},
        "tags": {"holdfast.snapshot": "abc"},
        "version_tags": {"holdfast.verdict": "passed"},
        "description": "passed: billing 10 → 90",
        "curve": [{"step": step, "loss": 1 / step, "penalty": 0.0} for step in range(1, 1500)],
        "validation_losses": (0.5, 0.25),
        "metrics": {"suite/billing/candidate": 0.9},
        "artifacts_json": {"verdict.json": {"passed": True}},
        "texts": {"verdict.md": "# passed"},
        "predictions": [{"task": "billing", "row_hash": "a1", "score": 1 / 3}],
        "matrix": MATRIX,
    }
    return CycleRecord(**{**values, **changes})


def client(home: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{home}/mlflow.db", f"sqlite:///{home}/mlflow.db")


def runs(home: Path, tag: str = "holdfast.cycle") -> list[Any]:
    mlflow = client(home)
    experiment = mlflow.get_experiment_by_name("qa-bot").experiment_id
    return [run for run in mlflow.search_runs([experiment]) if tag in run.data.tags]


def versions(home: Path) -> list[Any]:
    return list(client(home).search_model_versions("name = 'qa-bot'"))


def artifact(home: Path, run: Any, name: str) -> Path:
    return Path(client(home).download_artifacts(run.info.run_id, name))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def python(code: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A fresh interpreter, away from the repository, with the tests' helpers at hand."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd="/",
        capture_output=True,
        text=True,
    )


# --- publishing -----------------------------------------------------------------------------


def test_a_published_cycle_can_be_read_in_mlflow(tmp_path: Path, registry: Registry) -> None:
    assert registry.publish(record(tmp_path)) == 1
    (run,) = runs(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "cycle-7"
    assert run.info.end_time - run.info.start_time == 30 * 60 * 1000
    assert run.data.params == {"training.epochs": "2"}
    assert run.data.tags["holdfast.snapshot"] == "abc"
    assert run.data.metrics["suite/billing/candidate"] == 0.9
    history = client(tmp_path).get_metric_history(run.info.run_id, "train/loss")
    assert {point.step: point.value for point in history} == {n: 1 / n for n in range(1, 1500)}
    losses = client(tmp_path).get_metric_history(run.info.run_id, "validation/loss")
    assert [(point.step, point.value) for point in losses] == [(1, 0.5), (2, 0.25)]
    assert json.loads(artifact(tmp_path, run, "verdict.json").read_text()) == {"passed": True}
    assert artifact(tmp_path, run, "verdict.md").read_text() == "# passed"
    assert json.loads(artifact(tmp_path, run, "accuracy_matrix.json").read_text())["values"][1] == [0.9, None]
    assert artifact(tmp_path, run, "accuracy_matrix.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_keep_every_digit_and_open_as_a_table(tmp_path: Path, registry: Registry) -> None:
    registry.publish(record(tmp_path))
    (run,) = runs(tmp_path)
    table = json.loads(artifact(tmp_path, run, "predictions.json").read_text())
    assert table == {"columns": ["task", "row_hash", "score"], "data": [["billing", "a1", 1 / 3]]}
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"])[0]["path"] == "predictions.json"


def test_publishing_again_changes_nothing(tmp_path: Path, registry: Registry) -> None:
    assert registry.publish(record(tmp_path)) == registry.publish(record(tmp_path)) == 1
    assert open_registry(tmp_path).publish(record(tmp_path)) == 1
    assert registry.publish(record(tmp_path, cycle_id=8)) == 2
    assert len(runs(tmp_path)) == len(versions(tmp_path)) == 2
    assert (registry.version_of(7), registry.version_of(8), registry.version_of(9)) == (1, 2, None)


KILLED = """
import os, signal, sys
from pathlib import Path
from storage import packaging
from storage.registry import Registry
from tests.test_registry import open_registry, record

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(packaging if sys.argv[2] == "save" else Registry, sys.argv[2], die)
open_registry(Path(sys.argv[1])).publish(record(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("moment", ["save", "_ensure_model", "_finish"])
def test_a_kill_at_any_moment_leaves_one_run_and_one_version_in_the_end(tmp_path: Path, moment: str) -> None:
    killed = python(KILLED, tmp_path, moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert runs(tmp_path)[0].info.status == "RUNNING"
    assert len(versions(tmp_path)) == (1 if moment == "_finish" else 0)

    assert open_registry(tmp_path).publish(record(tmp_path)) == 1
    (run,), (version,) = runs(tmp_path), versions(tmp_path)
    assert run.info.status == "FINISHED"
    assert version.run_id == run.info.run_id
    kept = [folder.name for folder in (tmp_path / "artifacts" / "qa-bot").iterdir()]
    assert kept == [run.info.run_id]
    assert not (tmp_path / "artifacts" / ".staging").exists()


def test_the_registered_adapter_is_the_one_given_byte_for_byte(tmp_path: Path, registry: Registry) -> None:
    given = record(tmp_path)
    registry.publish(given)
    (version,) = versions(tmp_path)
    model = artifact(tmp_path, runs(tmp_path)[0], "model")
    assert version.source.endswith("/model")
    assert files(model / "artifacts" / "adapter") == files(given.adapter_dir)
    assert (model / "artifacts" / "state" / "memory.json").read_text() == "[]"
    assert "torch==" in (model / "requirements.txt").read_text()


def test_a_rejected_version_says_why(tmp_path: Path, registry: Registry) -> None:
    why = "billing@v1 fell by 12 points"
    tags = {"holdfast.verdict": "rejected", "holdfast.reason": why}
    version = registry.publish(record(tmp_path, version_tags=tags))
    registry.tag_version(version, {"holdfast.promoted": "never"})
    found = versions(tmp_path)[0].tags
    own = {"holdfast.store": "store", "holdfast.cycle": "7", "holdfast.adapter": "adapter of cycle 7"}
    assert found == {**tags, **own, "holdfast.promoted": "never"}


def test_a_missing_adapter_is_named_and_nothing_is_written(tmp_path: Path, registry: Registry) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(IntegrityError, match=str(gone)):
        registry.publish(record(tmp_path, adapter_dir=gone))
    assert runs(tmp_path) == versions(tmp_path) == []


def test_task_names_are_only_ever_text(tmp_path: Path, registry: Registry) -> None:
    metrics = {f"suite/{task}/candidate": 0.5 for task in ("..", "a?b", "a!b", "é$", "a//b", "x" * 400)}
    registry.publish(record(tmp_path, metrics={**metrics, "bad": float("inf"), "none": None}))
    logged = runs(tmp_path)[0].data.metrics
    assert len([name for name in logged if name.startswith("suite/")]) == len(metrics)
    assert not {"bad", "none"} & set(logged)
    with pytest.raises(RegistryError, match="leaves the run"):
        registry.publish(record(tmp_path, cycle_id=8, texts={"../../out.md": "x"}))
    assert not list(tmp_path.rglob("out.md"))


def test_no_two_names_become_one_in_mlflow() -> None:
    """Names of tasks come from rows: somebody may look for two that do."""
    assert key("suite/仝七/candidate") != key("suite/兠七/candidate")  # six digits of their hashes agree
    assert key("suite/general/candidate") == "suite/general/candidate"
    for name in ("suite/é", "suite/a?b/candidate", "x" * 400):
        digested = key(name)
        assert len(digested) <= 250
        assert key(digested) != digested, "a task may be called like this"


# --- failures, stream, aliases --------------------------------------------------------------


def test_a_failed_cycle_has_one_failed_run_with_its_reason(tmp_path: Path, registry: Registry) -> None:
    for _ in range(2):
        registry.log_failure(3, {"training.epochs": "2"}, "the loss became NaN")
    (run,) = runs(tmp_path)
    assert run.info.status == "FAILED"
    assert run.data.tags["holdfast.reason"] == "the loss became NaN"
    assert run.data.params == {"training.epochs": "2"}


def test_a_failure_after_publication_leaves_the_published_run(tmp_path: Path, registry: Registry) -> None:
    registry.publish(record(tmp_path))
    registry.log_failure(7, {}, "the disk is full")
    assert [run.info.status for run in runs(tmp_path)] == ["FINISHED"]


def test_the_stream_has_each_step_once(tmp_path: Path, registry: Registry) -> None:
    registry.log_stream(1, {"average_accuracy": 0.5})
    registry.log_stream(2, {"average_accuracy": 0.6, "forgetting": None})
    registry.log_stream(2, {"average_accuracy": 0.6, "forgetting": 0.1}, MATRIX)
    open_registry(tmp_path).log_stream(2, {"average_accuracy": 0.7}, MATRIX)
    (run,) = runs(tmp_path, tag="holdfast.stream")
    history = client(tmp_path).get_metric_history(run.info.run_id, "average_accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.6)]
    assert run.data.metrics["forgetting"] == 0.1
    assert artifact(tmp_path, run, "accuracy_matrix.png").stat().st_size > 0


def test_an_alias_moves_between_versions_and_never_to_a_missing_one(
    tmp_path: Path, registry: Registry
) -> None:
    assert registry.alias("champion") is None
    registry.delete_alias("champion")
    for cycle in (1, 2):
        registry.publish(record(tmp_path, cycle_id=cycle))
    registry.set_alias("champion", 1, "adapter of cycle 1")
    registry.set_alias("champion", 2, "adapter of cycle 2")
    with pytest.raises(RegistryError, match="does not have version 9"):
        registry.set_alias("champion", 9, "adapter of cycle 9")
    with pytest.raises(RegistryError, match="as this bot trained it"):
        registry.set_alias("champion", 1, "adapter of cycle 2")
    assert (registry.alias("champion"), registry.alias("challenger")) == (2, None)
    registry.delete_alias("champion")
    registry.delete_alias("champion")
    assert registry.alias("champion") is None


def test_a_cycle_of_the_same_number_in_another_store_is_another_cycle(
    tmp_path: Path, registry: Registry
) -> None:
    registry.publish(record(tmp_path, adapter_hash="first"))
    other = open_registry(tmp_path, store_id="a new state directory")
    assert other.version_of(7) is None
    assert other.publish(record(tmp_path, adapter_hash="second")) == 2
    assert len(runs(tmp_path)) == 2
    with pytest.raises(RegistryError, match="as this bot trained it"):
        other.set_alias("champion", 1, "second")


def test_a_store_put_back_from_a_backup_neither_finds_nor_removes_what_came_after_it(
    tmp_path: Path, registry: Registry
) -> None:
    registry.publish(record(tmp_path, adapter_hash="before the restore"))
    assert registry.publish(record(tmp_path, adapter_hash="after the restore")) == 2
    assert [run.info.status for run in runs(tmp_path)] == ["FINISHED", "FINISHED"]
    registry.check_has(1, "before the restore")
    registry.check_has(2, "after the restore")


# --- what cannot be reached -----------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_an_unreachable_server_is_told_quickly_and_without_its_password(tmp_path: Path, scheme: str) -> None:
    uri = f"{scheme}://ana:s3cr%40t@127.0.0.1:{free_port()}"
    registry = Registry(uri, "qa-bot", tmp_path, SERVED_MODEL, store_id="store")
    with pytest.raises(RegistryUnavailable, match="nothing answers") as caught:
        registry.publish(record(tmp_path))
    assert "s3cr" not in str(caught.value)
    assert f"{scheme}://ana:***@127.0.0.1" in str(caught.value)
    with pytest.raises(RegistryUnavailable, match="daemon doctor"):
        registry.check()


@pytest.mark.timeout(60)
def test_a_broken_database_file_is_told_quickly(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database, whatever its name says")
    with pytest.raises(RegistryUnavailable, match="is not an SQLite database"):
        open_registry(tmp_path).check()


def test_a_deleted_experiment_says_how_to_bring_it_back(tmp_path: Path) -> None:
    open_registry(tmp_path).check()
    mlflow = client(tmp_path)
    mlflow.delete_experiment(mlflow.get_experiment_by_name("qa-bot").experiment_id)
    with pytest.raises(RegistryUnavailable, match="mlflow experiments restore --experiment-id"):
        open_registry(tmp_path).check()


def test_a_password_never_stays_in_a_message() -> None:
    uri = "postgresql://ana:s3cr%40t@db/mlflow"
    said = f"cannot connect to {uri}: password 's3cr@t' refused; also http://x:y@z"
    assert redact(said, uri) == (
        "cannot connect to postgresql://ana:***@db/mlflow: password '***' refused; also http://x:***@z"
    )
    assert redact("sqlite:////var/a:b@c.db") == "sqlite:////var/a:b@c.db"
    uri = "postgresql://db/mlflow?user=ana&password=s3cr%40t&sslmode=require"
    assert redact(f"{uri}: password 's3cr@t' refused", uri) == (
        "postgresql://db/mlflow?user=ana&password=***&sslmode=require: password '***' refused"
    )


# As SQLAlchemy, requests and people take them, with everything that is no secret.
SECRETIVE = {
    "postgresql://ana:s3cr/etPW@db.example.org/mlflow": "postgresql://ana:***@db.example.org/mlflow",
    "postgresql+psycopg2://ana:s3cr@etPW@db/mlflow": "postgresql+psycopg2://ana:***@db/mlflow",
    "postgresql://ana:s3cr etPW@db/mlflow": "postgresql://ana:***@db/mlflow",
    "https://ana:s3cr#etPW@db": "https://ana:***@db",
    "https://ana:s3cr?etPW@db": "https://ana:***@db",
    "https://ana:12/s3cretPW@db": "https://ana:***@db",
    "https://s3cretPW@db": "https://***@db",
    "https://s3cr/etPW@db": "https://***@db",
    "https://s3cretPW:@db": "https://***@db",
    "http://[::1:s3cretPW@db": "http://[:***@db",
    "http://ana:s3cr\u2100etPW@db": "http://ana:***@db",
    "mssql+pyodbc:///?odbc_connect=UID%3Dana%3BPWD%3Ds3cretPW": "mssql+pyodbc:///?odbc_connect=***",
}


@pytest.mark.parametrize("uri", SECRETIVE)
def test_no_part_of_a_password_is_told_however_it_is_written(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("socket.create_connection", refuse)
    assert redact(uri, uri) == SECRETIVE[uri]
    assert not {part for part in ("s3cr", "etPW", "ana:12") if part in str(obstacle(uri))}
    said = f"cannot open {uri}: no host {uri.partition('//')[2]!r}"
    assert not {part for part in ("s3cr", "etPW") if part in redact(said, uri)}


def test_a_part_of_a_password_that_a_driver_takes_for_a_host_is_not_told() -> None:
    uri = "mysql://ana:s3cr@etPW@db/mlflow"
    assert redact("no host 'etPW@db', nor s3cr", uri) == "no host '***@db', nor ***"


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///path/with@sign.db",
        "sqlite:////var/a:b@c.db",
        "file:///srv/with@sign",
        "postgresql://ana@db.example.org/mlflow",
        "postgresql:///mlflow?user=ana@corp",
        "postgresql://db.example.org/mlflow?user=ana@corp&sslmode=require",
        "http://127.0.0.1:5000/team",
    ],
)
def test_a_uri_without_a_secret_stays_readable(uri: str) -> None:
    assert redact(f"at {uri}: gone", uri) == f"at {uri}: gone"


def test_a_users_name_is_hidden_in_its_place_only() -> None:
    uri = "https://mlflow@mlflow.example.org"
    assert redact(f"{uri}: gone", uri) == "https://***@mlflow.example.org: gone"
    assert redact("a host a@b is away", "https://ann:a@host") == "a host a@b is away", (
        "too short to be sought"
    )


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["http://", "?key", "http://a:"])
def test_what_a_server_answers_is_redacted_in_time_that_grows_with_it_only(piece: str) -> None:
    assert redact(piece * 100_000) == piece * 100_000


def test_a_password_that_reads_as_a_port_is_told_how_to_write_it() -> None:
    said = obstacle("postgresql://ana:s3cr/et@db/mlflow")
    assert said is not None
    assert "a port is a number" in said
    assert "/ is %2F" in said


def test_a_host_that_cannot_be_is_told_in_words() -> None:
    assert "nothing answers at" in str(obstacle(f"http://{'x' * 70}.example.org"))


@pytest.mark.acceptance
def test_a_server_that_goes_away_gets_the_cycle_when_it_is_back(tmp_path: Path) -> None:
    port = free_port()
    registry = Registry(
        f"http://127.0.0.1:{port}", "qa-bot", tmp_path / "artifacts", SERVED_MODEL, store_id="store"
    )
    with mlflow_server(tmp_path, port):
        assert registry.publish(record(tmp_path)) == 1
    with pytest.raises(RegistryUnavailable, match=f"127.0.0.1:{port}"):
        registry.publish(record(tmp_path, cycle_id=8))
    with mlflow_server(tmp_path, port):
        assert registry.publish(record(tmp_path, cycle_id=8)) == 2
        assert registry.publish(record(tmp_path)) == 1
        registry.set_alias("champion", 2, "adapter of cycle 8")
        assert registry.alias("champion") == 2
    assert (tmp_path / "served").is_dir()


# --- the process that publishes -------------------------------------------------------------

PUBLISH = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
from tests.test_registry import open_registry, record
assert "mlflow" not in sys.modules
home = Path(sys.argv[1])
registry = open_registry(home)
registry.set_alias("champion", registry.publish(record(home)), "adapter of cycle 7")
registry.log_stream(7, {"average_accuracy": 0.5}, record(home).matrix)
assert "torch" not in sys.modules, "publishing loaded torch"
logging.getLogger("storage").info("still heard")
"""


def test_publishing_loads_no_torch_and_keeps_the_log_readable(tmp_path: Path) -> None:
    done = python(PUBLISH, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "storage: still heard\n")


# --- the model, where somebody else loads it ------------------------------------------------

SERVE = """
import json, sys
import mlflow, numpy, pandas
uri, elsewhere = sys.argv[1:]
model = mlflow.pyfunc.load_model(uri)
questions = ["How are you?", "Bill?"]
table = pandas.DataFrame({"question": questions, "context": ["", None], "task": [None, "mood"]})
said = {
    "list": model.predict(questions),
    "text": model.predict("How are you?"),
    "array": model.predict(numpy.array("How are you?")),
    "table": model.predict(table),
    "shuffled": model.predict(table[["task", "question"]].iloc[::-1]),
    "dicts": model.predict([{"question": "Bill?", "task": "mood"}]),
    "empty": model.predict([]),
}
wrong_inputs = {"unknown": [{"question": "?", "task": "nope"}], "column": table[["context", "task"]]}
for name, wrong in wrong_inputs.items():
    try:
        model.predict(wrong)
    except Exception as error:
        said[name] = str(error)
for name, config in {"gone": {"base_path": "/nowhere"}, "other": {"base_path": elsewhere}}.items():
    try:
        mlflow.pyfunc.load_model(uri, model_config=config)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


@pytest.mark.acceptance
def test_anybody_can_load_the_champion_and_ask_it(tmp_path: Path, registry: Registry) -> None:
    from strategies.base import prepare
    from strategies.contract import LoraSpec, PrepareJob
    from strategies.model import fresh_adapter, load_base, save_adapter
    from tests.toys import tiny_base, tiny_model_spec

    base = prepare(PrepareJob(base=str(tiny_base(tmp_path / "tiny")), out=str(tmp_path / "prepared")))
    adapter = fresh_adapter(load_base(tiny_model_spec(Path(base.path))), LoraSpec(rank=2), seed=0)
    save_adapter(adapter, tmp_path / "adapter")
    config = {
        "base_path": base.path,
        "fingerprint": base.fingerprint,
        "dtype": "float32",
        "device": "cpu",
        "max_tokens": 256,
        "max_new_tokens": 4,
        "tasks": [{"name": "mood", "kind": "labels", "metric": "accuracy", "labels": ["fine", "poor"]}],
    }
    given = record(tmp_path, adapter_dir=tmp_path / "adapter", model_config=config)
    registry.set_alias("champion", registry.publish(given), given.adapter_hash)

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    elsewhere = tiny_base(tmp_path / "other", seed=1)
    done = python(SERVE, "models:/qa-bot@champion", elsewhere, MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    how, bill = said["list"]
    assert said["text"] == said["array"] == [how]
    assert said["table"][0] == how
    assert said["table"][1] in {"fine", "poor"}
    assert said["shuffled"] == said["table"][::-1]
    assert said["dicts"] == said["table"][1:]
    assert said["empty"] == []
    assert isinstance(bill, str)
    assert "knows ['mood']" in said["unknown"]
    assert "must be 'question'" in said["column"]
    assert said["gone"].startswith("ModelError: the base model is not at /nowhere")
    assert said["other"].startswith("ModelError")
    assert base.fingerprint in said["other"]


def test_the_picture_of_the_matrix_stops_growing_and_its_numbers_do_not(tmp_path: Path) -> None:
    sizes = {}
    for cycles in (40, 400):
        rows = ("base", *(f"cycle {n}" for n in range(1, cycles + 1)))
        values = tuple((n % 7 / 7,) for n in range(len(rows)))
        write_matrix(tmp_path, Matrix(rows=rows, columns=("billing",), values=values))
        assert json.loads((tmp_path / "accuracy_matrix.json").read_text())["rows"] == list(rows)
        sizes[cycles] = (tmp_path / "accuracy_matrix.png").stat().st_size
    assert sizes[400] < 1.2 * sizes[40]
