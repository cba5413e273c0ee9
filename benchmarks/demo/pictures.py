"""What the demo shows: rich renderables of outcomes, and the README's pictures. Measures nothing."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from benchmarks.stream import Answer, Bot, Outcome, hardware
from benchmarks.tables import update_page
from daemon.report import Matrix
from storage.figures import heat_map, png
from storage.rows import Row

EXPLAINED = {
    "average_accuracy": "of all departments, at the end",
    "backward_transfer": "what later days did to earlier ones",
    "forgetting": "from the best ever down to the end",
    "learning_accuracy": "of each department, after its own day",
}


def introduction(folder: Path, days: Sequence[Sequence[Row]]) -> RenderableType:
    departments = ", ".join(rows[0].task for rows in days)
    return Text(
        "\nQuillmoor builds folding kayaks and does not exist. Its bot learns the FAQ of one department "
        f"a day: {departments}. Of each question, three phrasings are never learned, only asked. "
        f"Everything lies in {near(folder)}/; what the daemon says is in {near(folder)}/daemon.log.\n"
    )


def comparison(ours: Outcome, naive: Outcome) -> RenderableType:
    """Both accuracy matrices side by side, and what follows from them."""
    grid = Table.grid(padding=(0, 4))
    grid.add_row(matrix("Holdfast", ours.matrix), matrix("naive", naive.matrix))
    return Group("", grid, "", _metrics(ours.metrics, naive.metrics), "")


def matrix(title: str, table: Matrix) -> Table:
    """Held-out questions answered exactly right, in percent; a department's own day is underlined."""
    shown = Table(title=f"{title}, % right", title_justify="left", show_edge=False, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for task in table.tasks:
        shown.add_column(task, justify="right", no_wrap=True)
    for number, (name, values) in enumerate(zip(table.rows, table.values, strict=True)):
        cells = [
            _cell(value, learned_now=learned == number)
            for value, learned in zip(values, table.learned_at, strict=True)
        ]
        shown.add_row(name, *cells)
    return shown


def _cell(value: float | None, *, learned_now: bool) -> Text:
    if value is None:
        return Text("·", style="dim")
    colour = "green" if value >= 2 / 3 else "yellow" if value >= 1 / 3 else "red"
    return Text(f"{value * 100:.0f}", style=f"{colour} underline" if learned_now else colour)


def _metrics(ours: Mapping[str, float], naive: Mapping[str, float]) -> Table:
    shown = Table(show_edge=False, pad_edge=False)
    for name in ("", "Holdfast", "naive"):
        shown.add_column(name, justify="right" if name else "left")
    shown.add_column("", style="dim")
    for key, meaning in EXPLAINED.items():
        shown.add_row(key.replace("_", " "), _points(ours.get(key)), _points(naive.get(key)), meaning)
    return shown


def _points(share: float | None) -> str:
    return "·" if share is None else f"{share * 100:.1f}"


def answers(ours: Mapping[str, Answer], naive: Mapping[str, Answer], which: str) -> RenderableType:
    """The same held-out question of each department, as both champions answered it in their last exam."""
    shown = Table(title="Held out, asked after the last day", title_justify="left")
    for name in ("question", "Holdfast", "naive"):
        shown.add_column(name)
    for key in sorted(key for key in ours.keys() & naive.keys() if key.endswith(which)):
        shown.add_row(ours[key].question, _judged(ours[key]), _judged(naive[key]))
    return shown


def _judged(answer: Answer) -> Text:
    return Text(answer.given, style="green" if answer.right else "red")


def verdicts(outcome: Outcome) -> RenderableType:
    lines = ["", "[bold]The gate's verdicts[/]"]
    for told in outcome.cycles:
        cycle = told["cycle"]
        colour = "green" if cycle["state"] == "promoted" else "red"
        lines.append(f"  cycle {cycle['id']} [{colour}]{cycle['state']}[/]: {cycle['reason']}")
    return Text.from_markup("\n".join(lines))


def next_steps(bot: Bot, *, running: bool, minutes: float) -> RenderableType:
    steps = {
        "run &": "start it again; it goes on where it was",
        'ask "Who leads billing?"': "the champion answers",
        "ui": "MLflow: forgetting over time, heat map",
        "show 3": "the last cycle in full",
        "quarantine": "rows that were not accepted, and why",
        "retrain-now --wait": "another cycle, with whatever is new",
    }
    if running:
        steps.pop("run &")
    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_column()
    for words, meaning in steps.items():
        table.add_row(Text(f"{command()} {words}", style="bold"), Text(meaning, style="dim"))
    state = "The daemon keeps running." if running else "The daemon was stopped."
    chosen = Text(f"export HOLDFAST_CONFIG={near(bot.config)}", style="bold")
    return Group(
        "",
        f"That took {minutes:.1f} minutes. {state} What to type next:",
        "",
        Padding(chosen, (0, 2)),
        Padding(table, (0, 2)),
        "",
        f"The rows come from {near(bot.source)}; write more, and they are learned.",
    )


def update_readme(readme: Path, ours: Outcome, naive: Outcome) -> None:
    """The two heat maps beside the page, in docs/pictures, and the numbers under them."""
    folder = readme.parent / "docs" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in (("holdfast", ours), ("naive", naive)):
        table = found.matrix
        figure = heat_map(table.rows, table.tasks, table.values, f"{name}: held-out questions right")
        (folder / f"demo-{name}.png").write_bytes(png(figure))
    numbers = [
        f"| {key.replace('_', ' ')} | {_points(ours.metrics.get(key))} | {_points(naive.metrics.get(key))} |"
        for key in EXPLAINED
    ]
    verdicts = "; ".join(f"cycle {told['cycle']['id']} {told['cycle']['state']}" for told in ours.cycles)
    section = "\n".join(
        [
            '<img src="docs/pictures/demo-holdfast.png" width="46%" alt="accuracy matrix with Holdfast"> '
            '<img src="docs/pictures/demo-naive.png" width="46%" alt="accuracy matrix, trained naively">',
            "",
            "Rows: the model after each day. Columns: the departments' frozen suites, exact match.",
            "Left: what Holdfast promoted. Right: the same rows trained naively.",
            "",
            "| points | Holdfast | naive |",
            "|---|---|---|",
            *numbers,
            "",
            f"The gate's verdicts: {verdicts}.",
            f"One run of `python -m benchmarks.demo --readme README.md`, seed 0, on {hardware()}.",
            "",
        ]
    )
    update_page(readme, "matrix", section)


def typed(bot: Bot) -> str:
    """How a person here would type it."""
    return f"{command()} -c {near(bot.config)}"


def command() -> str:
    return near(Path(sys.executable).with_name("daemon"))


def near(path: Path) -> str:
    """Relative to where the person is, when that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
