"""Results of a benchmark as Markdown: pure functions, and one that rewrites a section of a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = ("average_accuracy", "backward_transfer", "forgetting", "learning_accuracy")


def markdown(found: Mapping[str, Any]) -> str:
    """The comparison, then each strategy's accuracy matrix."""
    lines = _comparison(found["strategies"])
    for name, result in found["strategies"].items():
        lines += [
            "",
            f"Accuracy matrix of `{name}` (rows: after each cycle; columns: suites; in points):",
            "",
        ]
        lines += _matrix(result["matrix"])
    return "\n".join(lines) + "\n"


def _comparison(strategies: Mapping[str, Any]) -> list[str]:
    naive = strategies.get("naive", {}).get("training_seconds")
    head = ["strategy", *(name.replace("_", " ") for name in METRICS), "CPU time of training", "state"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, result in strategies.items():
        told = [_points(result["metrics"].get(key)) for key in METRICS]
        seconds = result["training_seconds"]
        relative = f" ({seconds / naive:.2f} x naive)" if naive else ""
        size = f"{result['state_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {' | '.join([f'`{name}`', *told, f'{seconds:.0f} s{relative}', size])} |")
    return lines


def _matrix(matrix: Mapping[str, Any]) -> list[str]:
    head = ["", *matrix["tasks"]]
    rows = [
        [row, *map(_points, values)] for row, values in zip(matrix["rows"], matrix["values"], strict=True)
    ]
    return [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]]


def _points(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.1f}"


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def update_page(page: Path, name: str, section: str) -> None:
    """Puts the section between the markers of its name; a page without them gets it at the end."""
    begin, end = markers(name)
    text = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    body = f"{begin}\n{section}{end}"
    if begin in text and end in text:
        text = text[: text.index(begin)] + body + text[text.index(end) + len(end) :]
    else:
        text = f"{text.rstrip()}\n\n{body}\n"
    page.write_text(text, encoding="utf-8")
