"""`daemon run` with a kill -9 in wait: python -m tests.killer STATE before|after ARGUMENTS…

The process kills itself, as suddenly as anybody else could, when a cycle leaves STATE: before or after
that is recorded. All else is the real daemon.
"""

import os
import signal
import sys
from typing import Any

from daemon import cli
from storage.records import Cycle, State
from storage.store import Store


def arm(state: State, moment: str) -> None:
    advance = Store.advance

    def fatal(self: Store, cycle_id: int, to: State, **told: Any) -> Cycle:
        found = self.cycle(cycle_id)
        if found is None or found.state is not state:
            return advance(self, cycle_id, to, **told)
        if moment == "after":
            advance(self, cycle_id, to, **told)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    Store.advance = fatal  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    arm(State(sys.argv[1]), sys.argv[2])
    sys.argv = ["daemon", *sys.argv[3:]]
    cli.main()
