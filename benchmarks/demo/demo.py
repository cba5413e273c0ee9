"""Three days of an invented company, through a real daemon: once as Holdfast learns, once naively.

    python -m benchmarks.demo [--dir demo-state] [--keep] [--readme README.md]        (or: make demo)

A collector writes each day's rows into its own DuckDB, the daemon is asked for a cycle, and what comes
of it is shown as it comes: a candidate that the gate rejects is shown as rejected. The same rows then
go to a second daemon, naive and with its gate opened wide, to have something to compare with. All
numbers at the end are read from the two stores.
"""

import argparse
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import stream
from benchmarks.demo import faq, pictures
from benchmarks.stream import Bot, RunningDaemon, StreamError
from storage.errors import HoldfastError
from storage.rows import Row

MARK = ".holdfast-demo"  # only folders with this file in them are ever deleted

# Small numbers for a small FAQ: 48 rows a day, each seen five times, with as many old ones among them.
SETTINGS: dict[str, Any] = {
    "bot.name": "quillmoor",
    "source.on_conflict": "quarantine",  # each day has a row that is wrong, and newer
    "training.epochs": 5,
    "training.learning_rate": 1e-3,
    "training.patience": 0,
    "strategy.replay_ratio": 1.0,
    "evaluation.max_new_tokens": 24,
    # A suite has 24 questions, so one answer is 4 points: at most two may be lost.
    "gate.max_drop": 0.1,
    # An answer with another department's number in it is wrong, however many words are right.
    **{f"tasks.{task}.metric": "exact_match" for task in ("billing", "shipping", "support")},
}
NAIVE = {"bot.name": "quillmoor-naive", "strategy.methods": "naive", **stream.OPEN_GATE}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console()
    stream.end_on_sigterm()
    try:
        changes = dict(map(stream.parse_change, options.set))
        _run(console, options.dir.resolve(), changes, keep=options.keep, readme=options.readme)
    except HoldfastError as error:
        console.print(f"[red]The demo cannot go on:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped. `make demo` starts afresh.")
        return 130
    return 0


def _run(console: Console, folder: Path, changes: dict[str, Any], *, keep: bool, readme: Path | None) -> None:
    began = time.monotonic()
    start_fresh(folder)
    days = faq.days()
    bot = stream.make_bot(folder, {**SETTINGS, **changes})
    console.print(pictures.introduction(folder, days))
    console.rule("[bold]Holdfast: replay and distillation, behind a gate")
    live_through(console, bot, days)
    rival = stream.make_bot(folder / "naive", {**SETTINGS, **changes, **NAIVE, **stream.share_base(bot)})
    console.rule("[bold]The same days naively: nothing protected, every candidate promoted")
    live_through(console, rival, days)
    console.rule("[bold]After three days")
    ours, theirs = stream.outcome(bot), stream.outcome(rival)
    console.print(pictures.comparison(ours, theirs))
    if readme is not None:
        pictures.update_readme(readme, ours, theirs)
    console.print(pictures.answers(stream.answers(bot), stream.answers(rival), "lead-8"))
    console.print(pictures.verdicts(ours))
    if keep:
        with RunningDaemon(bot) as daemon:
            daemon.leave()
    console.print(pictures.next_steps(bot, running=keep, minutes=(time.monotonic() - began) / 60))


def live_through(console: Console, bot: Bot, days: Sequence[Sequence[Row]]) -> None:
    """A daemon process; each day the collector writes, a cycle runs in the open, and its verdict is told."""
    with RunningDaemon(bot) as daemon:
        for number, rows in enumerate(days, start=1):
            stream.collect(bot.source, rows)
            told = ", ".join(f"{count} {split}" for split, count in Counter(r.split for r in rows).items())
            console.print(
                f"\n[bold]Day {number}, {rows[0].task}[/]: the collector wrote {len(rows)} rows ({told})"
            )
            console.print(f"[dim]$ {pictures.typed(bot)} retrain-now --wait[/]", highlight=False)
            daemon.run("retrain-now", "--wait")
            _tell(console, daemon)


def _tell(console: Console, daemon: RunningDaemon) -> None:
    """What the newest cycle came to; raises when it came to nothing for technical reasons."""
    cycle = daemon.ask("history")["cycles"][0]
    shown = daemon.ask("show", cycle=cycle["id"])
    for line in shown["words"][1:]:  # the first says what the command has just said
        console.print(f"  {line}", highlight=False, markup=False)
    if cycle["state"] not in ("promoted", "rejected"):
        raise StreamError(f"cycle {cycle['id']} is {cycle['state']}; the daemon's log is {daemon.bot.log}")


def start_fresh(folder: Path) -> None:
    """Removes what an earlier demo left, its daemon included, and nothing else."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise StreamError(f"{folder} exists and was not made by the demo; choose another with --dir")
        stream.stop_daemon(Bot(folder=folder))
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("demo-state"), help="made afresh (default: %(default)s)"
    )
    parser.add_argument("--readme", type=Path, help="page whose pictures and numbers of the demo are renewed")
    parser.add_argument("--keep", action="store_true", help="leave the daemon running afterwards")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another setting, as in training.epochs=4",
    )
    return parser
