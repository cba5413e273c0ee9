"""Tables, pictures and conclusions of a size, from its records alone, into a section of a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.contenders import CONTENDERS
from benchmarks.quality import charts, conclusions, records
from benchmarks.quality.plan import ORDERS, PRESETS, Choice, plans
from benchmarks.quality.records import RunRecord
from benchmarks.quality.summary import NAIVE, Board, Entry, Stat, boards
from storage.artifacts import write_file

METRICS = (  # the columns
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "learning_accuracy",
    "forward_transfer",
)
TARGET_SIZES = ("ten", "full")  # all ten domains
GROWTH = "long"  # the stream that measures costs, not quality

ABOUT = {
    "clinc": "CLINC150, a domain an experience (Larson et al. 2019); the answer is the intent",
    "changing": "CLINC150 again, but each experience also renames an intent of the domain before it: its "
    "training questions come again word for word, with another answer",
    "clbench": "Six text classification tasks (SST-2, AG News, QQP, Amazon reviews, COPA, CB), one a time",
    "long": "Many small experiences of invented rows on a tiny base: what grows with their number",
    "toy": "Invented rows on a tiny base, to try the benchmark itself",
}
_EXTRAS = {
    "labels_accuracy": "accuracy among the labels",
    "changed_accuracy": "changed: newest answer",
    "stale_share": "changed: stale answer",
    "unchanged_accuracy": "the others",
}


def update(page: Path, size: str, folder: Path = records.FOLDER) -> None:
    """Rewrites the section `quality-<size>` of the page, and its pictures in `<page's folder>/pictures`."""
    found = _boards(size, folder)
    pictures = {name: data for board in found for name, data in _pictures(size, board).items()}
    (page.parent / "pictures").mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        write_file(page.parent / "pictures" / name, data)
    tables.update_page(page, f"quality-{size}", section(size, found))
    if size in TARGET_SIZES:
        told = [(each, board) for each in TARGET_SIZES for board in _boards(each, folder)]
        tables.update_page(page, "quality-target", verdict(told))


def text(size: str, folder: Path = records.FOLDER) -> str:
    """The section for a terminal: without pictures."""
    lines = section(size, _boards(size, folder)).splitlines()
    return "\n".join(line for line in lines if not line.startswith("![")).rstrip()


def _boards(size: str, folder: Path) -> list[Board]:
    return sorted(boards(records.all_of(size, folder)), key=_place)


def verdict(found: Sequence[tuple[str, Board]]) -> str:
    """What became of the target on the stream and the sizes that it is asked on."""
    lines = [
        f"- Size `{size}`, order {board.order}, seed {', '.join(map(str, board.seeds))}: {told}"
        for size, board in found
        if board.stream == "clinc" and (told := conclusions.standing(board))
    ]
    return "\n".join([f"{conclusions.TARGET}, on all ten domains:", "", *lines]) + "\n"


def section(size: str, found: Sequence[Board]) -> str:
    parts = [f"Size `{size}`: {PRESETS[size].about}. {_cost(found)}", "", *_who(found)]
    for board in found:
        seeds = f"seed{'s' * (len(board.seeds) > 1)} {', '.join(map(str, board.seeds))}"
        title = f"### {board.stream}, order {board.order}, {seeds} (size {size})"
        parts += ["", title, "", *_board(size, board)]
    return "\n".join(parts) + "\n"


def _cost(found: Sequence[Board]) -> str:
    """Of all runs; a run may stand on several boards."""
    runs = {run.plan.name: run for board in found for entry in board.measured for run in entry.runs}
    hours = sum(run.cpu_seconds for run in runs.values()) / 3600
    return f"{len(runs)} runs, {hours:.1f} CPU hours of training; the exams come on top."


def _board(size: str, board: Board) -> list[str]:
    runs = [run for entry in board.measured for run in entry.runs]
    told = [f"{ABOUT.get(board.stream, board.stream)}. {_how(runs)}"] if runs else []
    if board.stream == GROWTH:
        return [*told, "", *_growth(board), "", *conclusions.growths(board), *_shown(size, board)]
    table = [_head(board), *(_line(entry, board) for entry in board.entries)]
    return [*told, "", *table, "", *conclusions.lines(board), *_shown(size, board)]


def _how(runs: Sequence[RunRecord]) -> str:
    """Sizes, settings, hardware, command: what another machine needs to measure the same."""
    plan, sizes = runs[0].plan, runs[0].plan.sizes
    training = runs[0].settings["train"]
    days = sorted({run.date for run in runs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    data = {"clinc": " --clinc DIR", "changing": " --clinc DIR", "clbench": " --clbench DIR"}
    return (
        f"{sizes['domains']} experiences of at most {sizes['rows']} training rows, "
        f"{training['epochs']} epochs, batches of {training['batch_size']}, "
        f"{sizes['suite']} suite rows a task; base `{plan.base}`; "
        f"measured {when} on {_hardware(runs)}, one thread a run.\n\n"
        f"```\npython -m benchmarks.quality --size {plan.size} --streams {plan.stream} --orders {plan.order}"
        f"{data.get(plan.stream, '')}{_asked_for(runs)}\n```"
    )


def _asked_for(runs: Sequence[RunRecord]) -> str:
    """Whom, and which seeds, the command must name because the preset leaves them out."""
    usual = {plan.name for plan in plans(Choice(size=runs[0].plan.size))}
    if all(run.plan.name in usual for run in runs):
        return ""
    names = [name for name in CONTENDERS if any(run.plan.contender == name for run in runs)]
    seeds = sorted({run.plan.seed for run in runs})
    return f" \\\n  --seeds {','.join(map(str, seeds))} --contenders {','.join(names)}"


def _hardware(runs: Sequence[RunRecord]) -> str:
    names = sorted({run.hardware for run in runs})
    return names[0] if len(names) == 1 else f"{', '.join(names)} (each record says which)"


def _who(found: Sequence[Board]) -> list[str]:
    names = list(dict.fromkeys(entry.name for board in found for entry in board.entries))
    return [f"- `{name}`: {CONTENDERS[name].about}." for name in CONTENDERS if name in names]


def _extras(board: Board) -> list[str]:
    return [name for name in _EXTRAS if any(entry.extra(name) for entry in board.measured)]


def _head(board: Board) -> str:
    names = ["contender", *(name.replace("_", " ") for name in METRICS)]
    names += [_EXTRAS[name] for name in _extras(board)]
    names += ["time x naive", "peak memory x naive", "memory rows", "state", "seeds"]
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def _line(entry: Entry, board: Board) -> str:
    if not entry.runs:
        return f"| `{entry.name}` | did not run: {_one_line(entry.failed)} |"
    cells = [_cell(entry.metric(name)) for name in METRICS]
    if any(run.plan.joint for run in entry.runs):  # one experience: nothing to forget or to transfer
        cells = [cells[0], *("" for _ in cells[1:])]
    cells += [_cell(entry.extra(name)) for name in _extras(board)]
    cells += [_time(entry), entry.peak_memory.told(digits=2) if entry.peak_memory else ""]
    cells.append(f"{entry.memory_rows:.0f} ({entry.memory_share:.1%})" if entry.memory_rows else "0")
    cells += [f"{entry.state_bytes / 1e6:.2f} MB", str(len(entry.runs))]
    return f"| `{entry.name}` | {' | '.join(cells)} |"


def _time(entry: Entry) -> str:
    """How many seeds it is of, where not all were timed alike."""
    if entry.time is None:
        return ""
    told = entry.time.told(digits=2)
    return told if entry.time.count == len(entry.runs) else f"{told} (of {entry.time.count})"


def _growth(board: Board) -> list[str]:
    head = ["contender", "cost", "first experiences", "last experiences", "slope an experience"]
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(line for entry in board.measured for line in conclusions.flat(entry)),
    ]


def _pictures(size: str, board: Board) -> Mapping[str, bytes]:
    if not board.measured:
        return {}
    stem = _stem(size, board)
    if board.stream == GROWTH:
        return {f"{stem}-costs.svg": charts.svg(charts.flatness(board.measured))}
    found = {
        f"{stem}-curve.svg": charts.svg(charts.curves(board)),
        f"{stem}-tried.svg": charts.svg(charts.forgetting_against_accuracy(board)),
    }
    if _is_timed(board):
        found[f"{stem}-time.svg"] = charts.svg(charts.time_against_accuracy(board))
    return found


def _shown(size: str, board: Board) -> list[str]:
    stem = f"pictures/{_stem(size, board)}"
    if not board.measured:
        return []
    if board.stream == GROWTH:
        return ["", f"![costs over the experiences]({stem}-costs.svg)"]
    shown = ["", f"![average accuracy so far]({stem}-curve.svg)"]
    shown += ["", f"![forgetting and accuracy]({stem}-tried.svg)"]
    return [*shown, "", f"![time and accuracy]({stem}-time.svg)"] if _is_timed(board) else shown


def _is_timed(board: Board) -> bool:
    """Whether the time of anybody can be set beside naive's."""
    return any(entry.time for entry in board.measured if entry.name != NAIVE)


def _stem(size: str, board: Board) -> str:
    seeds = "".join(map(str, board.seeds))
    return f"quality-{size}-{board.stream}-{board.order}-seed{seeds}"


def _cell(found: Stat | None) -> str:
    return found.told(100) if found else ""


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


def _place(board: Board) -> tuple[int, int, int]:
    """What has most seeds is the main table of its order."""
    return list(ABOUT).index(board.stream), ORDERS[board.stream].index(board.order), -len(board.seeds)
