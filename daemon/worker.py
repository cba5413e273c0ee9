"""The child process in which torch lives: `python -m daemon.worker`, started by `daemon.executor`.

Reads one request a line on standard input, {"stage": "prepare|train|blend|evaluate", "job": {...}}, and
writes on standard output any number of {"progress": {...}} lines, then {"done": {...}}, {"error": {"type",
"message"}}, or {"interrupted": true} before it exits with 75. SIGTERM asks for a checkpoint and the end.
The end of input means that the daemon is gone: the process ends at once, whatever it is doing, and what
it had begun is continued from the last checkpoint. Libraries are imported by the stage that needs them.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from storage.errors import HoldfastError, Interrupted
from strategies.contract import BlendJob, EvaluateJob, PrepareJob, Progress, TrainJob

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: try again

# Progress bars, version checks and adverts do not belong in a journal.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
}


class Worker:
    """One request after the other, on the main thread; one thread watches the input, another for SIGTERM.

    A thread waits for the signal because a handler runs on the main thread, between two instructions of
    Python: a signal just before a wait in C, for a request or in a library, is not heard until that ends.
    """

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        self._input = requests
        self._output = answers
        self._requests: SimpleQueue[str | None] = SimpleQueue()
        self._stop = threading.Event()

    def run(self) -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for all threads to come as well
        threading.Thread(target=self._await_sigterm, name="sigterm", daemon=True).start()
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        while (line := self._requests.get()) is not None and not self._stop.is_set():
            try:
                self._send({"done": self._answer(line)})
            except Interrupted:
                break
            except BaseException as error:
                self._send({"error": describe(error)})
            gc.collect()  # a model of the last stage must not stand beside that of the next
        self._send({"interrupted": True})
        return EXIT_INTERRUPTED

    def _answer(self, line: str) -> dict[str, Any]:
        request = json.loads(line)
        return STAGES[request["stage"]](request["job"], self)

    def tell(self, progress: Progress) -> None:
        self._send({"progress": json.loads(progress.to_json())})

    def tell_or_stop(self, progress: Progress) -> None:
        """For stages without checkpoints: they end where they are."""
        self.tell(progress)
        if self.should_stop():
            raise Interrupted()

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def _send(self, message: dict[str, Any]) -> None:
        self._output.write(json.dumps(message) + "\n")
        self._output.flush()

    def _read(self) -> None:
        for line in self._input:
            self._requests.put(line)
        os._exit(0)

    def _await_sigterm(self) -> None:
        signal.sigwait({signal.SIGTERM})
        self._stop.set()
        self._requests.put(None)  # wakes an idle worker


def _prepare(job: dict[str, Any], worker: Worker) -> dict[str, Any]:
    from strategies.base import prepare

    worker.tell_or_stop(Progress(stage="prepare"))
    return dict(json.loads(prepare(PrepareJob.from_dict(job)).to_json()))


def _train(job: dict[str, Any], worker: Worker) -> dict[str, Any]:
    worker.tell(Progress(stage="load", detail="libraries"))
    from strategies.loop import train

    return dict(json.loads(train(TrainJob.from_dict(job), worker.tell, worker.should_stop).to_json()))


def _blend(job: dict[str, Any], worker: Worker) -> dict[str, Any]:
    worker.tell_or_stop(Progress(stage="load", detail="libraries"))
    from strategies.blend import blend

    blend(BlendJob.from_dict(job), worker.tell_or_stop)
    return {}


def _evaluate(job: dict[str, Any], worker: Worker) -> dict[str, Any]:
    worker.tell_or_stop(Progress(stage="load", detail="libraries"))
    from strategies.evaluation import evaluate

    evaluate(EvaluateJob.from_dict(job), worker.tell_or_stop)
    return {}


STAGES: dict[str, Callable[[dict[str, Any], Worker], dict[str, Any]]] = {
    "prepare": _prepare,
    "train": _train,
    "blend": _blend,
    "evaluate": _evaluate,
}


def describe(error: BaseException) -> dict[str, str]:
    """An error in one line for people; what the code did is in the log."""
    if isinstance(error, HoldfastError) and not _is_out_of_memory(error):
        return {"type": type(error).__name__, "message": str(error)}
    traceback.print_exception(error)
    first_line = next(iter(str(error).splitlines()), "")
    if _is_out_of_memory(error):
        message = f"memory ran out ({first_line}); lower training.batch_size and raise training.accumulation"
    elif isinstance(error, OSError):
        message = f"{first_line}; free space or fix the permissions, then `daemon retrain-now`"
    else:
        message = f"{type(error).__name__}: {first_line}"
    return {"type": "StageError", "message": message}


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch's own errors are known by their words, which spares its import."""
    words = ("OutOfMemoryError", "can't allocate memory", "Cannot allocate memory", "can't start new thread")
    return isinstance(error, MemoryError) or any(word in f"{type(error).__name__} {error}" for word in words)


def _go_first_when_memory_runs_out() -> None:
    """A training continues from its checkpoint; the bot that serves people beside it would not.

    1000 is the most a process may ask for, so size does not count any more (`man 5 proc_pid_oom_score_adj`).
    """
    with contextlib.suppress(OSError):  # not Linux, or a container's own /proc
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> int:
    _go_first_when_memory_runs_out()
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    warnings.simplefilter("ignore")  # libraries' warnings, about things we decided
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints from now on, in Python or in C, prints to the log
    sys.stdout = sys.stderr
    return Worker(sys.stdin, answers).run()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # the reading thread holds standard input, which a normal exit would wait for
