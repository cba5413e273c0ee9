"""One bot's way to MLflow: the client, the experiment, and words for whatever goes wrong on it.

Part of `storage.registry`, which alone uses it.
"""

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.errors import RegistryError, RegistryUnavailable
from storage.reach import absolute, is_server, obstacle, redact

# MLflow reads these when it is imported; the operator's own values win. Seconds instead of minutes
# of retries: a cycle that cannot publish now keeps its verdict and publishes later.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # would copy the working directory's uv.lock into the model
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_QUIET = {
    "mlflow": logging.WARNING,
    "alembic": logging.WARNING,
    "matplotlib": logging.WARNING,
    "mlflow.store.db.utils": logging.CRITICAL,  # logs a traceback of what it raises anyway
    "urllib3.connectionpool": logging.ERROR,  # each retry
}
# Errors that another day may cure, as opposed to requests that MLflow will always refuse.
_PASSING = frozenset(
    {
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
    }
)


class Connection:
    """Connects at the first use, and serves one user at a time."""

    def __init__(self, uri: str, bot: str, artifact_root: Path) -> None:
        self.uri = absolute(uri)
        self._bot = bot
        self._artifact_root = artifact_root
        self._lock = threading.RLock()
        self._connected: tuple[Any, str] | None = None

    @property
    def shown_uri(self) -> str:
        """The tracking URI without its password."""
        return redact(self.uri, self.uri)

    @property
    def is_server(self) -> bool:
        """Whether a server decides on the place of artifacts."""
        return is_server(self.uri)

    @contextmanager
    def use(self, *, make: bool = True) -> Iterator[tuple[Any, str]]:
        """Client and experiment id; whatever MLflow raises inside comes out in our words.

        Without `make` the experiment is not made where it is missing, and its id is not told.
        """
        with self._lock:
            self._knock()
            _prepare()
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError

            errors = (MlflowException, SQLAlchemyError, OSError)  # OSError: files, and all of requests
            try:
                if self._connected is None and make:
                    self._connected = self._connect()
                connected = self._connected or (self.client(), "")
            except errors as error:
                raise self._unavailable(str(error)) from None
            try:
                yield connected
            except errors as error:
                code = getattr(error, "error_code", "INTERNAL_ERROR")
                if code in _PASSING:
                    raise self._unavailable(str(error)) from None
                raise RegistryError(f"MLflow at {self.shown_uri} refused: {self._redact(error)}") from None

    def _knock(self) -> None:
        problem = obstacle(self.uri)
        if problem is not None:
            raise self._unavailable(problem)

    def _unavailable(self, problem: str) -> RegistryUnavailable:
        return RegistryUnavailable(
            f"MLflow at {self.shown_uri} cannot be used: {self._redact(problem)}; check mlflow.tracking_uri "
            "with `daemon doctor`. The cycle keeps its verdict and is published when MLflow is back"
        )

    def _redact(self, problem: object) -> str:
        said, _, _ = str(problem).partition("\n[SQL:")  # the statement helps nobody who runs a daemon
        return redact(said, self.uri).strip()

    def _connect(self) -> tuple[Any, str]:
        from mlflow.exceptions import MlflowException

        client = self.client()
        experiment = client.get_experiment_by_name(self._bot)
        if experiment is None:
            return client, client.create_experiment(self._bot, artifact_location=self._artifact_location())
        if experiment.lifecycle_stage != "active":
            raise MlflowException(
                f"the experiment {self._bot!r} was deleted; bring it back with "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
            )
        return client, experiment.experiment_id

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def _artifact_location(self) -> str | None:
        return None if self.is_server else (self._artifact_root / self._bot).as_uri()


def _prepare() -> None:
    """Before MLflow's first import, and harmless after it. Nothing but MLflow's chatter is silenced."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name, level in _QUIET.items():
        chatty = logging.getLogger(name)
        chatty.setLevel(max(chatty.level, level))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns about its own type hints while it is imported
        import mlflow.pyfunc  # noqa: F401
