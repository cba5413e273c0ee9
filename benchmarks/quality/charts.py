"""The pictures of the pages, as SVG: made from records alone, the same bytes for the same numbers.

Knows matplotlib's object interface (no pyplot).
"""

import io
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.quality.conclusions import FORGETS, NEAR_JOINT
from benchmarks.quality.summary import JOINT, NAIVE, Board, Entry, costs

_LINES = 7  # curves that one picture can carry
_CLOSE = 10.0  # points of accuracy below the best: shown larger


def curves(board: Board) -> Figure:
    """Average accuracy over the tasks so far, after every experience; joint training as a level."""
    figure, (axes,) = _figure(1)
    shown = [entry for entry in [board.entry(NAIVE), *board.rivals] if entry is not None][:_LINES]
    for entry in shown:
        points = [100 * value for value in entry.curve]
        axes.plot(range(1, len(points) + 1), points, marker="o", markersize=3, label=entry.name)
    if (joint := board.entry(JOINT)) is not None:
        axes.axhline(100 * joint.accuracy, color="0.4", linestyle="--", label=JOINT)
    axes.set(xlabel="experiences learned", ylabel="average accuracy so far (points)", ylim=(0, 101))
    axes.set_title(f"{board.stream}, order {board.order}")
    axes.legend(fontsize=8)
    return figure


def time_against_accuracy(board: Board) -> Figure:
    """Everybody: what the training cost, and what it left."""
    figure, (axes,) = _figure(1)
    for entry in board.measured:
        if (time := entry.time) is not None:
            axes.plot(time.mean, 100 * entry.accuracy, marker="o", linestyle="")
            axes.annotate(
                entry.name,
                (time.mean, 100 * entry.accuracy),
                fontsize=8,
                textcoords="offset points",
                xytext=(5, 3),
            )
    axes.set(xlabel="CPU time of training (x naive)", ylabel="average accuracy at the end (points)")
    untimed = [entry.name for entry in board.measured if entry.time is None]
    left_out = f"\nnot timed beside naive: {', '.join(untimed)}" if untimed else ""
    axes.set_title(f"{board.stream}, order {board.order}{left_out}", wrap=True)
    axes.margins(0.15)
    return figure


def forgetting_against_accuracy(board: Board) -> Figure:
    """Everybody: what was forgotten and what is left, and the corner that is asked for. Where many crowd
    around it, they have a second panel."""
    joint = board.entry(JOINT)
    points = {
        entry.name: (100 * forgets.mean, 100 * entry.accuracy)
        for entry in board.measured
        if entry.name != JOINT and (forgets := entry.metric("forgetting")) is not None
    }
    best = max((accuracy for _, accuracy in points.values()), default=0.0)
    close = {name: place for name, place in points.items() if best - place[1] <= _CLOSE}
    crowded = len(points) > _LINES and len(close) > 1
    figure, panels = _figure(1 + crowded)
    for axes, shown in zip(panels, [points, close] if crowded else [points], strict=True):
        for name, place in shown.items():
            axes.plot(*place, marker="o", markersize=4, linestyle="")
            if not crowded or shown is close or name not in close:
                axes.annotate(name, place, fontsize=6, rotation=25, textcoords="offset points", xytext=(4, 2))
        if joint is not None:
            level, corner = 100 * joint.accuracy, [0, 100 * FORGETS]
            axes.axhline(level, color="0.4", linestyle="--", label=JOINT)
            axes.fill_between(corner, level - 100 * NEAR_JOINT, 100, alpha=0.15, label="asked for")
            axes.legend(fontsize=8, loc="lower left")
        axes.set(xlabel="forgetting (points)", ylabel="average accuracy at the end (points)")
        axes.set_title(
            f"{board.stream}, order {board.order}: {'the best' if shown is close else 'what was tried'}"
        )
        axes.margins(0.2)
    return figure


def flatness(entries: Sequence[Entry]) -> Figure:
    """Each cost over the experiences, one panel a cost."""
    panels = {name: [costs(entry.runs[0])[name] for entry in entries] for name in costs(entries[0].runs[0])}
    figure, places = _figure(len(panels))
    for axes, (name, lines) in zip(places, panels.items(), strict=True):
        for entry, values in zip(entries, lines, strict=True):
            axes.plot(range(1, len(values) + 1), values, label=entry.name, linewidth=1)
        axes.set(xlabel="experience", title=name)
        axes.set_ylim(0, 1.15 * max(max(values) for values in lines) or 1)
    places[0].legend(fontsize=8)
    return figure


def svg(figure: Figure) -> bytes:
    """Without a date, and with fixed ids: the same picture is the same file."""
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "holdfast"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return b"\n".join(line.rstrip() for line in out.getvalue().splitlines()) + b"\n"


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    rows = (panels + 1) // 2
    figure = Figure(
        figsize=(7, 4.2) if panels == 1 else (10, 4.2) if panels == 2 else (9, 2.7 * rows),
        layout="constrained",
    )
    FigureCanvasSVG(figure)
    columns = 1 if panels == 1 else 2
    places = [figure.add_subplot(rows, columns, n + 1) for n in range(panels)]
    for axes in places:
        axes.grid(alpha=0.25)
    return figure, places
