"""What MLflow's client is asked in several steps: pages, batches, and files that must go.

Part of `storage.registry`, which alone calls it and says in words what goes wrong.
"""

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from storage import runs
from storage.runs import Point

logger = logging.getLogger(__name__)

_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100  # MLflow's own limits of one batch
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"  # read by MLflow at each request


@contextmanager
def asked_once() -> Iterator[None]:
    """For what must not be made twice: MLflow's client repeats a request whose answer was lost, though the
    server may have done it. Here it fails instead, and who tries again looks first what is there."""
    before = os.environ.get(_RETRIES)
    os.environ[_RETRIES] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_RETRIES]
        else:
            os.environ[_RETRIES] = before


def all_versions(client: Any, wanted: str) -> Iterator[Any]:
    return _pages(lambda token: client.search_model_versions(wanted, page_token=token))


def all_runs(client: Any, experiment: str, wanted: str, *, deleted: bool = False) -> Iterator[Any]:
    """The oldest first; if asked for, also those that somebody deleted, whose files are there until `mlflow
    gc`."""
    from mlflow.entities import ViewType

    view, order = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY, ["start_time ASC"]
    return _pages(
        lambda token: client.search_runs([experiment], wanted, view, order_by=order, page_token=token)
    )


def _pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Everything that a search finds."""
    token = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def has_step(client: Any, run_id: str, name: str, step: int) -> bool:
    return any(point.step == step for point in client.get_metric_history(run_id, name))


def log_metrics(client: Any, run_id: str, points: Sequence[Point], at: int | None) -> None:
    from mlflow.entities import Metric

    metrics = (
        Metric(name, float(value), at, step)
        for name, value, step in points
        if value is not None and math.isfinite(value)  # MLflow would store inf as 1.8e308
    )
    while batch := list(islice(metrics, _METRICS_AT_ONCE)):
        client.log_batch(run_id, metrics=batch)


def log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    rest = (Param(runs.key(name), str(value)) for name, value in params.items())
    while batch := list(islice(rest, _PARAMS_AT_ONCE)):
        client.log_batch(run_id, params=batch)


def remove_files(client: Any, uri: str, run_id: str, files: Sequence[str]) -> None:
    """Files or folders of a run, where they are; what the place of artifacts cannot remove is left there."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    place = get_artifact_repository(client.get_run(run_id).info.artifact_uri, uri, uri)
    for name in files:
        try:
            place.delete_artifacts(name)
        except NotImplementedError:
            logger.warning("MLflow's artifacts cannot be removed", extra={"action": "registry.prune"})


def remove_lines(client: Any, uri: str, run_id: str, rows: Collection[str], folder: Path) -> None:
    """Rows out of a run's table of predictions, by way of the folder.

    A table that cannot be read is removed. Counts by classes name no row: they go with one.
    """
    if runs.PREDICTIONS not in {file.path for file in client.list_artifacts(run_id)}:
        return
    path = Path(client.download_artifacts(run_id, runs.PREDICTIONS, str(folder)))
    try:
        left = runs.without(path.read_text(encoding="utf-8"), rows)
    except (ValueError, KeyError):
        remove_files(client, uri, run_id, (runs.PREDICTIONS, runs.CLASSES))
        return
    if left is not None:
        path.write_text(left, encoding="utf-8")
        remove_files(client, uri, run_id, (runs.CLASSES,))
        client.log_artifact(run_id, str(path))
