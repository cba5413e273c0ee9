"""The accuracy matrix, and the trade-off between old and new tasks, as pictures.

Knows matplotlib's object interface (no pyplot: no global state, safe in threads) and nothing of
where pictures go. Names of tasks are only ever text: no mathematics is read into them.
"""

import io
import math
import warnings
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy import array, ma, nan

from storage.runs import TradeOff

_NUMBERED = 400  # cells; beyond, numbers would be unreadable
_LABELS = 50  # ticks on an axis
_LABEL_LENGTH = 28
_DARK = 0.6  # scores below are dark in the colour map: white numbers on them


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], title: str
) -> Figure:
    """Scores in [0, 1], one row a model and one column a suite; None cells (never measured) stay grey."""
    figure = Figure(figsize=_size(len(rows), len(columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _plain(axes.set_title(_label(title, 80)))
    if not rows or not columns:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no scores yet", ha="center", va="center")
        return figure
    grid = ma.masked_invalid(array([[nan if v is None else v for v in row] for row in values], dtype=float))
    image = axes.imshow(
        grid,
        cmap=colormaps["viridis"].with_extremes(bad="0.9"),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    figure.colorbar(image, ax=axes, label="score")
    _ticks(axes, rows, columns)
    if len(rows) * len(columns) <= _NUMBERED:
        _numbers(axes, values)
    return figure


def trade_off(curves: Sequence[TradeOff]) -> Figure:
    """What each blend keeps of the old tasks (across) and knows of the new ones (up); stars were examined."""
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title="From the champion to the candidate", xlabel="old tasks, validation score")
    axes.set_ylabel("new tasks, validation score")
    for curve in curves:
        (line,) = axes.plot(curve.old, curve.new, marker="o", markersize=4, label=_label(curve.name))
        for share, old, new in zip(curve.shares, curve.old, curve.new, strict=True):
            axes.annotate(f"{share:g}", (old, new), xytext=(4, 4), textcoords="offset points", fontsize=8)
            if share == curve.chosen:
                axes.plot([old], [new], marker="*", markersize=16, color=line.get_color())
    axes.legend()
    return figure


def png(figure: Figure) -> bytes:
    """The picture's bytes. Scripts that the font lacks show as boxes, which is no reason to warn."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _size(rows: int, columns: int) -> tuple[float, float]:
    return min(3.5 + 0.75 * columns, 24), min(2.5 + 0.4 * rows, 24)


def _ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        step = math.ceil(len(names) / _LABELS)
        places = range(0, len(names), step)
        axis.set_ticks(list(places), labels=[_label(names[i]) for i in places])
        for label in axis.get_ticklabels():
            _plain(label)
    for label in axes.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")


def _numbers(axes: Axes, values: Sequence[Sequence[float | None]]) -> None:
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            known = value is not None and math.isfinite(value)
            text = f"{value:.2f}" if known else "–"
            colour = "white" if known and value < _DARK else "black"  # type: ignore[operator]
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)


def _label(name: str, length: int = _LABEL_LENGTH) -> str:
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if len(name) <= length else name[: length - 1] + "…"


def _plain(text: Text) -> Text:
    text.set_parse_math(False)
    return text
