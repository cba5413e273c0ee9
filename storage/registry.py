"""Where metrics, figures and model versions become visible: one MLflow experiment and one model per bot.

With its parts (storage/mlflow_*.py, storage/packaging.py) and daemon/served_model.py it alone imports MLflow.
It records and never decides, and it imports no torch: models are saved as code plus files, without loading
them.

Everything may be repeated after a crash. A cycle counts as published when its model version exists:
that is one transaction, and the version carries the store, the cycle and the adapter that it was made
of. A cycle of the same number is another one where the store is new, or was put back from a backup.
Whatever an interrupted attempt left before that is removed and written again.
"""

import json
import logging
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from storage import artifacts, mlflow_client, packaging, runs
from storage.errors import IntegrityError, RegistryError
from storage.mlflow_connection import Connection
from storage.reach import sqlite_path
from storage.runs import CycleRecord, Listed, Listing, Matrix

__all__ = ["CycleRecord", "Listed", "Listing", "Matrix", "Registry"]

logger = logging.getLogger(__name__)

STORE_TAG = "holdfast.store"
CYCLE_TAG = "holdfast.cycle"
ADAPTER_TAG = "holdfast.adapter"  # SHA-256 of its weights
STREAM_TAG = "holdfast.stream"
REASON_TAG = "holdfast.reason"  # why a cycle failed, or why a version was rejected
MODEL_DIR = "model"  # in the run's artifacts


class Registry:
    """One bot's experiment and registered model, both named after it."""

    def __init__(
        self, tracking_uri: str, bot: str, artifact_root: Path, served_model: Path, *, store_id: str
    ) -> None:
        """Touches nothing yet. `artifact_root` is used where no server decides on the place."""
        self._store_id = store_id
        self._bot = bot
        self._artifact_root = artifact_root.absolute()
        self._served_model = served_model
        self._connection = Connection(tracking_uri, bot, self._artifact_root)

    @property
    def shown_uri(self) -> str:
        """The tracking URI without its password."""
        return self._connection.shown_uri

    def check(self) -> None:
        """Raises RegistryUnavailable when MLflow cannot be used now."""
        with self._connection.use():
            pass

    def publish(self, record: CycleRecord) -> int:
        """The version of the cycle: its run and its model, written once however often this is called."""
        with self._connection.use() as (client, experiment):
            done = self._find_version(client, record.cycle_id, record.adapter_hash)
            if done is None:
                self._remove_runs(client, experiment, record.cycle_id)
                done = self._write(client, experiment, record)
            self._finish(client, done.run_id, "FINISHED", record.finished_at)
            return int(done.version)

    def version_of(self, cycle_id: int) -> int | None:
        """The version that a cycle made, if it was published."""
        with self._connection.use() as (client, _):
            found = self._find_version(client, cycle_id)
            return int(found.version) if found is not None else None

    def log_failure(
        self,
        cycle_id: int,
        params: Mapping[str, str],
        reason: str,
        *,
        tags: Mapping[str, str] | None = None,
        started_at: datetime | None = None,
        finished_at: datetime | None = None,
    ) -> None:
        """A failed run with its reason, once. A cycle that has a version already keeps its one run."""
        with self._connection.use() as (client, experiment):
            if self._find_version(client, cycle_id) is not None:
                return
            if self._runs(client, experiment, {CYCLE_TAG: str(cycle_id)}, "attributes.status = 'FAILED'"):
                return
            self._remove_runs(client, experiment, cycle_id)
            tags = {**(tags or {}), REASON_TAG: reason, "mlflow.note.content": reason}
            run_id = self._cycle_run(client, experiment, cycle_id, tags, started_at).info.run_id
            mlflow_client.log_params(client, run_id, params)
            self._finish(client, run_id, "FAILED", finished_at)

    def log_stream(
        self, step: int, metrics: Mapping[str, float | None], matrix: Matrix | None = None
    ) -> None:
        """The curves over all cycles, in one run that never ends. `step` is the cycle's number.

        A number that a step has already is left alone; the heat map there is always the newest.
        """
        with self._connection.use() as (client, experiment):
            run_id = self._stream_run(client, experiment)
            points = [(runs.key(name), value, step) for name, value in metrics.items()]
            new = [point for point in points if not mlflow_client.has_step(client, run_id, point[0], step)]
            mlflow_client.log_metrics(client, run_id, new, int(time.time() * 1000))
            if matrix is not None:
                with self._staging() as folder:
                    runs.write_matrix(folder, matrix)
                    client.log_artifacts(run_id, str(folder))

    def set_alias(self, alias: str, version: int, adapter_hash: str) -> None:
        """Moves the alias; readers see the old version or the new one.

        Raises `RegistryError` when the version there holds another adapter than ours.
        """
        with self._connection.use() as (client, _):
            self._check_is(client, version, adapter_hash)
            client.set_registered_model_alias(self._bot, alias, str(version))

    def check_has(self, version: int, adapter_hash: str) -> None:
        """Raises `RegistryError` when the version is not there, or holds another adapter than ours."""
        with self._connection.use() as (client, _):
            self._check_is(client, version, adapter_hash)

    def alias(self, alias: str) -> int | None:
        """The version that the alias points to."""
        with self._connection.use() as (client, _):
            found = client.search_registered_models(filter_string=f"name = '{self._bot}'")
            version = found[0].aliases.get(alias) if found else None
            return int(version) if version is not None else None

    def delete_alias(self, alias: str) -> None:
        """No alias afterwards, whether there was one or not."""
        with self._connection.use() as (client, _):
            if client.search_registered_models(filter_string=f"name = '{self._bot}'"):
                client.delete_registered_model_alias(self._bot, alias)

    def tag_version(self, version: int, tags: Mapping[str, str]) -> None:
        with self._connection.use() as (client, _):
            for key, value in runs.tags(tags).items():
                client.set_model_version_tag(self._bot, str(version), key, value)

    def prune(self, version: int, files: Sequence[str], tags: Mapping[str, str]) -> None:
        """Removes files or folders of a version's run, and tags the version with what became of them.

        A version or file that is not there is no error. Where the store of artifacts cannot remove anything,
        the files are left to `mlflow gc`.
        """
        with self._connection.use() as (client, _):
            wanted = f"name = '{self._bot}' and {self._ours({})}"
            found = [one for one in mlflow_client.all_versions(client, wanted) if int(one.version) == version]
            for one in found:
                mlflow_client.remove_files(client, self._connection.uri, one.run_id, files)
                for key, value in runs.tags(tags).items():
                    client.set_model_version_tag(self._bot, str(version), key, value)

    def erase(self, rows: Collection[str], cycles: Collection[int], tags: Mapping[str, str]) -> None:
        """Takes rows out of all that MLflow has: their lines in tables of predictions, and of the cycles that
        learned them all files but numbers and pictures. The tags go to the versions of these cycles."""
        shutil.rmtree(self._artifact_root / ".staging", ignore_errors=True)
        with self._connection.use() as (client, experiment):
            for run in self._runs(client, experiment, {}, "attributes.status = 'RUNNING'"):
                cycle = int(run.data.tags.get(CYCLE_TAG, 0))  # the stream's run has none
                if cycle and self._find_version(client, cycle) is None:  # else it waits to be finished
                    self._remove_runs(client, experiment, cycle)
            for run in list(mlflow_client.all_runs(client, experiment, self._ours({}), deleted=True)):
                name, is_deleted = run.info.run_id, run.info.lifecycle_stage == "deleted"
                if int(run.data.tags.get(CYCLE_TAG, 0)) in cycles or is_deleted:
                    mlflow_client.remove_files(
                        client, self._connection.uri, name, (MODEL_DIR, runs.PREDICTIONS, runs.CLASSES)
                    )
                elif CYCLE_TAG in run.data.tags:
                    with self._staging() as folder:
                        mlflow_client.remove_lines(client, self._connection.uri, name, rows, folder)
            artifacts.sync(self._artifact_root)  # or a power cut would bring back what MLflow removed
            for one in mlflow_client.all_versions(client, f"name = '{self._bot}' and {self._ours({})}"):
                if int(one.tags.get(CYCLE_TAG, 0)) in cycles:
                    for key, value in runs.tags(tags).items():
                        client.set_model_version_tag(self._bot, one.version, key, value)

    def look(self) -> Listing:
        """What MLflow has of this store. Makes nothing: no database, no experiment."""
        database = sqlite_path(self._connection.uri)
        if database is not None and not database.exists():
            return Listing()
        with self._connection.use(make=False) as (client, _):
            models = client.search_registered_models(filter_string=f"name = '{self._bot}'")
            if not models:
                return Listing()
            aliases = {name: int(version) for name, version in models[0].aliases.items()}
            wanted = f"name = '{self._bot}' and {self._ours({})}"
            versions = [
                self._listed(client, version) for version in mlflow_client.all_versions(client, wanted)
            ]
        return Listing(aliases=aliases, versions=tuple(sorted(versions, key=lambda one: one.version)))

    # --- runs and versions ------------------------------------------------------------------

    def _find_version(self, client: Any, cycle_id: int, adapter_hash: str | None = None) -> Any:
        """The oldest version of our cycle, with that adapter if one is named."""
        tags = self._ours({CYCLE_TAG: str(cycle_id)} | ({ADAPTER_TAG: adapter_hash} if adapter_hash else {}))
        found = client.search_model_versions(f"name = '{self._bot}' and {tags}")
        return min(found, key=lambda v: int(v.version), default=None)

    def _check_is(self, client: Any, version: int, adapter_hash: str) -> None:
        found = client.search_model_versions(
            f"name = '{self._bot}' and {self._ours({ADAPTER_TAG: adapter_hash})}"
        )
        if str(version) not in {str(one.version) for one in found}:
            raise RegistryError(
                f"MLflow at {self.shown_uri} does not have version {version} of {self._bot} as this bot "
                "trained it; set mlflow.tracking_uri back to where the bot's versions are, or, if it was "
                "deleted there, `daemon rollback` to one that is left"
            )

    def _listed(self, client: Any, version: Any) -> Listed:
        from mlflow.exceptions import MlflowException

        place = urlsplit(version.source)
        here = place.scheme in ("", "file") and not self._connection.is_server
        weights = Path(unquote(place.path)) / "artifacts" / "adapter" / "adapter_model.safetensors"
        try:
            metrics = dict(client.get_run(version.run_id).data.metrics) if version.run_id else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            metrics = None
        return Listed(
            version=int(version.version),
            cycle_id=int(version.tags.get(CYCLE_TAG, 0)),
            adapter_hash=version.tags.get(ADAPTER_TAG, ""),
            weights=weights if here else None,
            metrics=metrics,
        )

    def _runs(self, client: Any, experiment: str, tags: Mapping[str, str], condition: str = "") -> list[Any]:
        wanted = self._ours(tags) + (f" and {condition}" if condition else "")
        return list(mlflow_client.all_runs(client, experiment, wanted))

    def _ours(self, tags: Mapping[str, str]) -> str:
        """A filter for things of this store with these tags."""
        return " and ".join(f"tags.`{k}` = '{v}'" for k, v in {STORE_TAG: self._store_id, **tags}.items())

    def _remove_runs(self, client: Any, experiment: str, cycle_id: int) -> None:
        """What an interrupted attempt left: the files first, so that a second interruption finds the rest.

        Files on a remote store are left to `mlflow gc`, which knows that deleted runs may go.
        """
        for run in self._runs(
            client, experiment, {CYCLE_TAG: str(cycle_id)}, "attributes.status = 'RUNNING'"
        ):
            place = urlsplit(run.info.artifact_uri)
            folder = Path(unquote(place.path)).parent  # the run's own; the URI ends in /artifacts
            if place.scheme in ("", "file") and folder.parent == self._artifact_root / self._bot:
                shutil.rmtree(folder, ignore_errors=True)
            client.delete_run(run.info.run_id)
            logger.info(
                "removed an unfinished MLflow run", extra={"action": "registry.clean", "cycle": cycle_id}
            )

    def _write(self, client: Any, experiment: str, record: CycleRecord) -> Any:
        if not record.adapter_dir.is_dir():
            raise IntegrityError(f"there is no adapter at {record.adapter_dir}; run a new cycle")
        tags = {**record.tags, "mlflow.note.content": record.description}
        if record.predictions:
            tags["mlflow.loggedArtifacts"] = json.dumps([{"path": runs.PREDICTIONS, "type": "table"}])
        run = self._cycle_run(client, experiment, record.cycle_id, tags, record.started_at)
        run_id = run.info.run_id
        mlflow_client.log_params(client, run_id, record.params)
        mlflow_client.log_metrics(client, run_id, runs.points(record), runs.milliseconds(record.finished_at))
        with self._staging() as folder:
            runs.write_files(folder, record)
            packaging.save(folder / MODEL_DIR, self._served_model, run_id, record)
            client.log_artifacts(run_id, str(folder))
        self._sync(run)
        self._ensure_model(client)
        version_tags = {
            **record.version_tags,
            STORE_TAG: self._store_id,
            CYCLE_TAG: str(record.cycle_id),
            ADAPTER_TAG: record.adapter_hash,
        }
        with mlflow_client.asked_once():
            return client.create_model_version(
                self._bot,
                source=f"{run.info.artifact_uri}/{MODEL_DIR}",
                run_id=run_id,
                tags=runs.tags(version_tags),
                description=runs.tag(record.description) or None,
            )

    def _sync(self, run: Any) -> None:
        """MLflow does not sync what it copies, and a power cut would leave a version without its adapter."""
        place = urlsplit(run.info.artifact_uri)
        folder = Path(unquote(place.path))
        if place.scheme in ("", "file") and self._artifact_root in folder.parents:
            artifacts.sync(folder, names_upto=self._artifact_root.parent)

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """A folder for files on their way to MLflow. One name, so that what a kill left goes next time."""
        folder = self._artifact_root / ".staging"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _cycle_run(
        self,
        client: Any,
        experiment: str,
        cycle_id: int,
        tags: Mapping[str, str],
        started_at: datetime | None,
    ) -> Any:
        own = {**tags, CYCLE_TAG: str(cycle_id)}
        return self._create_run(client, experiment, f"cycle-{cycle_id}", own, started_at)

    def _create_run(
        self, client: Any, experiment: str, name: str, tags: Mapping[str, str], at: datetime | None = None
    ) -> Any:
        own = {STORE_TAG: self._store_id, "mlflow.source.name": "holdfast"}
        start = runs.milliseconds(at)
        with mlflow_client.asked_once():
            return client.create_run(
                experiment, run_name=name, start_time=start, tags=runs.tags({**tags, **own})
            )

    def _finish(self, client: Any, run_id: str, status: str, at: datetime | None) -> None:
        run = client.get_run(run_id)
        if run.info.status != status and run.info.lifecycle_stage == "active":
            client.set_terminated(run_id, status, runs.milliseconds(at))

    def _stream_run(self, client: Any, experiment: str) -> str:
        found = self._runs(client, experiment, {STREAM_TAG: "true"})
        if found:
            return str(found[0].info.run_id)
        run = self._create_run(client, experiment, "stream", {STREAM_TAG: "true"})
        return str(run.info.run_id)

    def _ensure_model(self, client: Any) -> None:
        if not client.search_registered_models(filter_string=f"name = '{self._bot}'"):
            client.create_registered_model(
                self._bot, description=f"Adapters of {self._bot}, one version a cycle."
            )
