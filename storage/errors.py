"""Every error a user can meet descends from one base; the docstring is the default message.

A message says what is wrong, the offending value, and the next command to type.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class HoldfastError(Exception):
    """Something went wrong that Holdfast has no better words for."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())


# What Python raises while it reads a file that is not what was written: each loader says it in its own words.
UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip


@contextmanager
def reading(store: str, what: str) -> Iterator[None]:
    """For whoever takes apart what is in a store: what cannot be is an `IntegrityError`, in words."""
    try:
        yield
    except UNREADABLE as error:
        raise IntegrityError(
            f"{store} is damaged, {what} cannot be read ({type(error).__name__}: {error}); "
            "stop the daemon and put your newest backup in its place. `daemon audit` names what is wrong"
        ) from error


def first_line(error: BaseException) -> str:
    """What a library said, without its context; the kind of error where it said nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ConfigError(HoldfastError):
    """The configuration is not usable; run `daemon doctor` for the list of problems."""


class SourceError(HoldfastError):
    """The source of labeled rows cannot be read."""


class SourceBusy(SourceError):
    """The collector holds the source file; the pull will be tried again."""


class SourceMissing(SourceError):
    """The source file is not there; the pull will be tried again."""


class StoreError(HoldfastError):
    """The daemon's own store cannot be used; run `daemon doctor`."""


class StoreBusy(StoreError):
    """Another process holds the store; is a daemon already running? Try `daemon status`."""


class IntegrityError(HoldfastError):
    """Something that must never change has changed; the cycle was stopped before it could do harm."""


class RegistryError(HoldfastError):
    """MLflow did not do what was asked."""


class RegistryUnavailable(RegistryError):
    """MLflow cannot be reached; the cycle keeps its verdict and will be published when it is back."""


class TrainingError(HoldfastError):
    """The training stopped without a usable adapter."""


class NonFiniteLoss(TrainingError):
    """The loss became infinite or NaN; the update was not applied. Try a lower training.learning_rate."""


class ModelError(HoldfastError):
    """The base model cannot be loaded; check model.base."""


class ModelMissing(HoldfastError):
    """The base model is not there; the cycle waits for it."""


class WorkerError(HoldfastError):
    """The training process ended without a result."""


class StageError(HoldfastError):
    """A stage of the cycle failed and would fail again."""


class Interrupted(HoldfastError):
    """Work was asked to stop; everything done so far is kept and continues at the next start."""


class Cancelled(HoldfastError):
    """The cycle was cancelled by hand."""


class ControlError(HoldfastError):
    """The daemon could not do what was asked."""


class DaemonNotRunning(ControlError):
    """The daemon is not running; start it with `systemctl start holdfast` or `daemon run`."""


class DaemonSilent(ControlError):
    """The daemon was asked and did not answer to the end; see `daemon status`."""
