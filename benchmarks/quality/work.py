"""Many runs at once, each in a process of its own with one thread: the best use of few cores.

A stop is passed on as SIGTERM; every run then keeps a checkpoint and ends, and the next start goes on.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

from benchmarks.quality import records
from benchmarks.quality.learning import Work
from benchmarks.quality.run import run
from storage.errors import HoldfastError, Interrupted

GRACE = 120.0  # seconds that a run has to keep its checkpoint
_FAILED = 1


def carry_out(works: Sequence[Work], jobs: int) -> list[str]:
    """Makes the records that are missing, `jobs` at a time; returns the names of runs without a result."""
    left = [work for work in works if records.find(work.plan, work.records) is None]
    print(f"{len(works)} runs, {len(works) - len(left)} of them recorded already", flush=True)
    # Threads that spin while they wait would steal the core of the run beside them.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    running: dict[str, BaseProcess] = {}
    failed = []
    try:
        while left or running:
            while left and len(running) < jobs:
                work = left.pop(0)
                running[work.plan.name] = _start(work)
            for name, process in list(running.items()):
                if process.exitcode is not None:
                    del running[name]
                    failed += [name] if process.exitcode else []
            time.sleep(0.2)
    finally:
        _stop(list(running.values()))
    return failed


def _start(work: Work) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(work, os.getpid()))
    process.start()
    return process


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.exitcode is None:
            process.kill()
            process.join()


def _run(work: Work, parent: int) -> None:
    """In the new process. It ends with its parent, too."""
    warnings.simplefilter("ignore")  # of libraries about each other, once a run
    asked = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which asks us
    signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        run(work, lambda: asked.is_set() or os.getppid() != parent, _say)
    except Interrupted:
        raise SystemExit(_FAILED) from None
    except HoldfastError as error:
        _say(f"{work.plan.name}: {error}")
        raise SystemExit(_FAILED) from None
    except Exception:
        _say(f"{work.plan.name}:\n{traceback.format_exc()}")
        raise SystemExit(_FAILED) from None


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
