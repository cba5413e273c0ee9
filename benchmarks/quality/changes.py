"""What became of answers that were changed on the way: learned, stale, or spoiled beside them. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.streams import Stream
from strategies.scoring import exact_match


def renamed_answers(stream: Stream, answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the last model's answers: how many changed questions get the newest answer, how many still the
    stale one, and how many of the other questions are right. Empty when nothing was changed."""
    last = len(stream.experiences)
    examined = {row.hash: row for task in stream.tasks for row in stream.suite(task, last)}
    changed, stale, rest = [], [], []
    for answer in answers:
        row = examined[answer["row_hash"]]
        old = stream.replaced.get((row.task, row.answer))
        if old is None:
            rest.append(answer["exact_match"])
        else:
            changed.append(answer["exact_match"])
            stale.append(exact_match(answer["prediction"], old))
    if not changed:
        return {}
    return {
        "changed_accuracy": sum(changed) / len(changed),
        "stale_share": sum(stale) / len(stale),
        "unchanged_accuracy": sum(rest) / len(rest) if rest else 0.0,
    }
