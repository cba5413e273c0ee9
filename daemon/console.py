"""What people see: tables, the accuracy matrix, live progress. Takes the operations' plain values.

Prints and nothing else. Texts from rows and models are shown, never interpreted: no markup, no codes of
emojis, no terminal control codes.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from daemon.doctor import Check, Outcome
from daemon.journal import printable

UNLIMITED = 1000  # columns
LINE_SECONDS = 10.0  # between two lines of progress outside a terminal, if there is no new stage
STATE_STYLES = {
    "promoted": "green",
    "rejected": "yellow",
    "failed": "red",
    "cancelled": "magenta",
    "nothing-to-do": "dim",
}
# What a cycle is about to reach, in words; its state names what is done.
_DOING = {
    "requested": "pulling new rows",
    "pulled": "freezing suites and the snapshot",
    "snapshotted": "training",
    "trained": "examining",
    "evaluated": "judging",
    "decided": "publishing to MLflow",
}
_OUTCOMES = {
    Outcome.OK: ("ok", "green"),
    Outcome.WARN: ("warn", "yellow"),
    Outcome.FAIL: ("FAIL", "bold red"),
}


def out() -> Console:
    width = None if sys.stdout.isatty() else UNLIMITED  # a pipe gets whole lines
    return Console(markup=False, emoji=False, highlight=False, width=width)


def err() -> Console:
    return Console(markup=False, emoji=False, highlight=False, stderr=True)


def harmless(told: Any) -> Any:
    """The operations' plain values, every text in them printable: names of tasks come from rows."""
    if isinstance(told, dict):
        return {printable(key): harmless(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [harmless(value) for value in told]
    return printable(told) if isinstance(told, str) else told


def line(text: object, width: int = 80) -> str:
    """Text on one line, at most `width` long."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def when(moment: str | None) -> str:
    """`2026-03-01 02:30 UTC` for the operations' ISO text."""
    if not moment:
        return "never"
    at = datetime.fromisoformat(moment)
    return f"{at:%Y-%m-%d %H:%M} {at.tzname() or 'UTC'}".replace("UTC+00:00", "UTC")


def duration(seconds: float) -> str:
    """`40 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def status(told: dict[str, Any]) -> None:
    console = out()
    console.print(Text.assemble((told["bot"], "bold"), (f" in {told['state_dir']}", "dim")), soft_wrap=True)
    for name, value in _status_lines(told):
        console.print(Text.assemble((f"{name:<12}", "dim"), value), soft_wrap=True)
    if told["rows"]["tasks"]:
        console.print(_tasks(told["rows"]["tasks"]))


def _status_lines(told: dict[str, Any]) -> Iterable[tuple[str, Text]]:
    daemon = told.get("daemon")
    yield "daemon", _daemon_line(daemon)
    if told["paused"]:
        by, at = told["paused"]["by"], told["paused"]["at"]
        since = f" since {when(at)}" if at else ""
        yield "paused", Text(f"by {by}{since}; `daemon resume` ends it", style="yellow")
    if daemon and daemon["config_problem"]:
        yield "config", Text(f"not reloaded, the old one counts: {daemon['config_problem']}", style="red")
    yield "champion", _champion_line(told["champion"])
    yield from _cycle_lines(told)
    yield "next", Text(_next_line(told))
    yield "rows", Text(_rows_line(told["rows"]))
    if told["quarantine"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(told["quarantine"].items()))
        yield "quarantine", Text(f"{reasons}; see `daemon quarantine`", style="yellow")
    source = told["source"]
    if source:
        yield "source", Text(f"{source['path']}, table {source['table']}, pulled {when(source['pulled_at'])}")
    if told["metrics"]:
        yield "scores", Text(metrics_line(told["metrics"]))
    missing = [f"gate.{key}" for key, value in told["gate"].items() if value is None]
    if missing:
        yield "gate", Text(f"{' and '.join(missing)} not set: nothing will be promoted", style="yellow")


def _rows_line(rows: dict[str, Any]) -> str:
    told = f"{rows['total']:,}, of which {rows['pending']:,} wait to be learned"
    return f"{told}; {rows['superseded']:,} more superseded by other answers" if rows["superseded"] else told


def _daemon_line(daemon: dict[str, Any] | None) -> Text:
    if daemon is None:
        return Text("not running; `systemctl start holdfast` or `daemon run`", style="yellow")
    return Text(f"running since {when(daemon['started_at'])}, process {daemon['pid']}", style="green")


def _champion_line(champion: dict[str, Any] | None) -> Text:
    if champion is None:
        return Text("none yet: the base model answers")
    name = f"version {champion['version']}" if champion["version"] is not None else "the base model"
    return Text(f"{name}, by {_mover(champion)} at {when(champion['at'])}: {champion['why']}")


def _cycle_lines(told: dict[str, Any]) -> Iterable[tuple[str, Text]]:
    activity = (told.get("daemon") or {}).get("activity") or {}
    for cycle in told["unfinished"]:
        if cycle["id"] == activity.get("cycle"):
            yield "running", Text(f"cycle {cycle['id']}: {activity_line(activity, cycle['state'])}")
        else:
            yield (
                "queued",
                Text(f"cycle {cycle['id']}, {cycle['state']}, asked for by {cycle['requested_by']}"),
            )
    last = told["last"]
    if last:
        yield (
            "last",
            Text.assemble(f"cycle {last['id']} ", _state(last["state"]), f": {last['reason'] or ''}"),
        )


def _next_line(told: dict[str, Any]) -> str:
    plan = told["schedule"]
    if not plan["cron"]:
        return "only by hand: `daemon retrain-now`"
    planned = f'"{plan["cron"]}" {plan["timezone"]}'
    daemon = told.get("daemon")
    return f"{when(daemon['next_run'])} ({planned})" if daemon else f"{planned}, once the daemon runs"


def _tasks(tasks: dict[str, Any]) -> Table:
    table = _table("task", "train", "validation", "suite", "frozen", "answers", "metric")
    for name, counts in tasks.items():
        frozen = f"v{counts['suite_version']}" if counts["suite_version"] else "not yet"
        splits = (f"{counts[k]:,}" for k in ("train", "validation", "suite"))
        table.add_row(line(name, 40), *splits, frozen, counts["kind"] or "", counts["metric"] or "")
    return table


def activity_line(activity: dict[str, Any], state: str) -> str:
    """What a cycle in this state does at this moment."""
    if activity.get("waiting"):
        waiting = activity["waiting"]
        return f"{waiting['reason']} (try {waiting['tries']}, next at {when(waiting['until'])})"
    if activity.get("progress"):
        return progress_line(activity["progress"])
    return _DOING.get(state, state)


def progress_line(step: dict[str, Any]) -> str:
    """`train 12/40, loss 0.3121, 43 rows/s, 2 min 10 s left`."""
    parts = [step["stage"] + (f" {step['step']}/{step['steps']}" if step["steps"] else "")]
    if step["loss"] is not None:
        parts.append(f"loss {step['loss']:.4f}")
    if step["rows_per_second"]:
        parts.append(f"{step['rows_per_second']:.1f} rows/s")
    if step["left"] is not None:
        parts.append(f"{duration(step['left'])} left")
    if step["detail"]:
        parts.append(line(step["detail"]))
    return ", ".join(parts)


def metrics_line(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value * 100:.1f}" for name, value in metrics.items())


def history(told: dict[str, Any]) -> None:
    if told["cycles"]:
        _cycles(told)
    else:
        out().print("no cycles yet; `daemon retrain-now` asks for one")
    changes = _table("rows superseded", "by answers from", "when", right=("rows superseded",))
    for change in told["superseded"]:
        changes.add_row(f"{change['rows']:,}", line(change["source"], 100), when(change["at"]))
    if told["superseded"]:
        out().print(changes)


def _cycles(told: dict[str, Any]) -> None:
    table = _table(
        "cycle", "state", "asked for by", "finished", "version", "outcome", right=("cycle", "version")
    )
    for cycle in told["cycles"]:
        table.add_row(
            str(cycle["id"]),
            _state(cycle["state"]),
            line(cycle["requested_by"], 24),
            when(cycle["finished_at"]) if cycle["finished_at"] else "",
            str(cycle["version"] or ""),
            Text(line(cycle["reason"] or "", 200)),
        )
    out().print(table)
    promotions = _table("champion", "before", "by", "when", "why", right=("champion", "before"))
    for move in told["promotions"]:
        champion, before = (str(move[key] or "base") for key in ("version", "previous"))
        promotions.add_row(champion, before, _mover(move), when(move["at"]), Text(line(move["why"], 200)))
    if told["promotions"]:
        out().print(promotions)


def _mover(move: dict[str, Any]) -> str:
    """What moved the champion: the gate, or somebody."""
    return str(move["kind"]) if move["kind"] == "gate" else f"{move['kind']}, {move['who']}"


def show(told: dict[str, Any]) -> None:
    console = out()
    for sentence in told["words"]:
        console.print(printable(sentence))
    for attempt in told["attempts"]:
        if attempt["curve"]:
            console.print(trade_off(attempt))
    if told["matrix"]:
        console.print(matrix(told["matrix"]))


def matrix(table: dict[str, Any]) -> Table:
    """The accuracy matrix, redder where less is known."""
    shown = _table("score on", *(line(task, 24) for task in table["tasks"]), right=table["tasks"])
    for name, values in zip(table["rows"], table["values"], strict=True):
        shown.add_row(f"after {name}" if name != "base" else "base", *map(_cell, values))
    return shown


def trade_off(attempt: dict[str, Any]) -> Table:
    """What each blend knew of the new tasks and lost of the others, on validation rows."""
    share = f"attempt {attempt['number']}, share"
    shown = _table(share, "new tasks", "worst change", "on", "", right=(share, "new tasks", "worst change"))
    ends = {1.0: f"attempt {attempt['source']}", 0.0: "the champion"}
    for point in attempt["curve"]:
        new = "–" if point["new"] is None else f"{point['new'] * 100:.1f}"
        mark = "examined" if point["chosen"] else ends.get(point["share"], "")
        change = f"{point['worst_change'] * 100:+.1f}"
        task = Text(line(point["worst_task"], 24))
        shown.add_row(f"{point['share']:.1f}", new, change, task, Text(mark))
    return shown


def erasure_plan(told: dict[str, Any]) -> None:
    """What an erasure will do, before anybody says yes."""
    console = out()
    for each in told["rows"]:
        console.print(f"{each['rows']:,} {each['split']} rows of {line(each['task'], 60)} will be erased")
    if told["quarantined"]:
        console.print(f"{told['quarantined']:,} quarantined rows will be erased")
    if told["suites"]:
        console.print(f"suites that lose a row: {', '.join(line(suite, 60) for suite in told['suites'])}")
    if told["versions"]:
        console.print(f"versions that learned one and go: {', '.join(map(str, told['versions']))}")
    champion = f"version {told['champion']}" if told["champion"] is not None else "the bare base model"
    if told["moves"]:
        console.print(f"the champion will be {champion}, until what else was learned since is learned again")
    console.print("a cycle that has read its rows is cancelled; they stay pending")


def erased(told: dict[str, Any]) -> None:
    number = told["erasure"]["id"]
    if told["done"]:
        out().print(f"erasure {number} is done; rows in the collector's own file are yours to remove there")
    else:
        rest = "nothing that learned a row serves any more, the daemon does the rest"
        out().print(f"erasure {number} is begun: {rest}")


def removals(told: dict[str, Any], *, planned: bool = False) -> None:
    """What went, or would go when that is only planned, or will when a daemon that runs was asked."""
    if not told["removals"]:
        out().print(f"nothing to remove; removed so far: {told['pruned']:,}")
        return
    asked = "the daemon removes between two cycles" if told.get("later") else "removed"
    table = _table("would be removed" if planned else asked, "of")
    for one in told["removals"]:
        table.add_row(one["path"], one["why"])
    out().print(table)


def quarantine(told: dict[str, Any]) -> None:
    if not told["counts"]:
        out().print("the quarantine is empty")
        return
    table = _table("reason", "task", "id", "detail", "row", "source")
    for row in told["rows"]:
        cells = (row["reason"], row["task"] or "", row["id"] or "", row["detail"], row["raw"], row["source"])
        table.add_row(*(Text(line(cell, 60)) for cell in cells))
    out().print(table)
    total = sum(told["counts"].values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(told["counts"].items()))
    out().print(f"{len(told['rows'])} of {total} shown: {reasons}")


def intake(told: dict[str, Any]) -> None:
    print(
        f"{told['read']:,} rows read: {told['accepted']:,} new, {told['known']:,} known, "
        f"{told['rejected']:,} not accepted"
    )
    if told["superseded"]:
        print(f"superseded by other answers: {told['superseded']:,}; see `daemon history`")
    if told["quarantined"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(told["quarantined"].items()))
        print(f"new in quarantine: {reasons}; see `daemon quarantine`")


def check(found: Check) -> None:
    """One line of `daemon doctor`, and what to type."""
    word, style = _OUTCOMES[found.outcome]
    console, indent = out(), " " * 16
    told = printable(found.message).replace("\n", f"\n{indent}")
    console.print(Text.assemble((f"{word:<6}", style), (f"{found.name:<10}", "bold"), told), soft_wrap=True)
    if found.next:
        console.print(Text(f"{indent}→ {found.next}", style="cyan"), soft_wrap=True)


def audit(told: dict[str, Any]) -> None:
    """One line a finding of `daemon audit`: the broken invariant, what breaks it, and what to type."""
    console = out()
    for found in told["findings"]:
        name = found["check"].replace("_", " ")
        console.print(
            Text.assemble(
                ("WRONG ", "bold red"), (f"{name}: ", "bold"), _flat(found["message"]),
                (f" → {_flat(found['next'])}", "cyan"),
            ),
            soft_wrap=True,
        )  # fmt: skip
    if not told["findings"]:
        looked_at = f"{told['cycles']:,} cycles, {told['versions']:,} versions and {told['rows']:,} rows"
        console.print(f"nothing is wrong: {len(told['checks'])} checks of {looked_at}")


def _flat(text: str) -> str:
    return line(text, 2000)


class Follower:
    """Live progress on standard error: a moving line in a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._console = err()
        self._live: Progress | None = None
        self._bar: Any = None
        self._seen: set[str] = set()  # stages and other news that were printed
        self._last, self._printed = "", 0.0

    def __enter__(self) -> "Follower":
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[told]}", markup=False),
            )
            self._live = Progress(*columns, console=self._console, transient=True)
            self._bar = self._live.add_task("", total=None, told="")
            self._live.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, told: dict[str, Any]) -> None:
        """One event of the control socket."""
        told = harmless(told)
        step = told.get("progress")
        if self._live is not None:
            total, done = (step["steps"] or None, step["step"]) if step else (None, 0)
            self._live.tasks[0].total = total  # `update` takes None for: as it was
            self._live.update(self._bar, description=_head(told), told=_news(told), completed=done)
        else:
            key = step["stage"] if step else "taken" if "taken" in told else _news(told)
            self._print(key, f"{_head(told)}: {_news(told)}")

    def _print(self, key: str, text: str) -> None:
        due = key not in self._seen or time.monotonic() - self._printed > LINE_SECONDS
        if due and text != self._last:
            self._seen.add(key)
            self._last, self._printed = text, time.monotonic()
            self._console.print(text)


def _head(told: dict[str, Any]) -> str:
    if "taken" in told:
        return "so far"
    return f"cycle {told['cycle']}" if "state" in told else "base model"


def _news(told: dict[str, Any]) -> str:
    if "taken" in told:
        return str(told["taken"])
    if told.get("behind"):
        return f"queued behind cycle {told['behind']}"
    if "joined" in told:
        return "joined the cycle that is queued already" if told["joined"] else "asked for"
    return activity_line(told, told.get("state", ""))


def _state(state: str) -> Text:
    return Text(state, style=STATE_STYLES.get(state, "cyan"))


def _cell(value: float | None) -> Text:
    if value is None:
        return Text("–", style="dim")
    red, green = round(200 * (1 - value)), round(160 * value)
    return Text(f"{value * 100:.1f}", style=f"white on rgb({red},{green},60)" if sys.stdout.isatty() else "")


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        numeric = name in right or name in ("train", "validation", "suite")
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    return table
