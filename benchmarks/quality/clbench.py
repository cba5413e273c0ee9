"""Six text classification tasks as questions with a word as the answer, one task after the other.

Tasks and wording as packaged for the benchmark of Razdaibiedina et al. 2023 (arXiv 2301.12314) and Wang et
al. 2023 (O-LoRA, arXiv 2310.14152): SST-2, AG News, QQP, Amazon reviews, COPA, CB. Reads `rows.jsonl` (id,
task, question, answer, split train or test).
"""

import json
from collections import defaultdict
from pathlib import Path

from benchmarks.clinc_rows import Sizes
from benchmarks.quality.streams import Experience, Stream
from benchmarks.sampling import FIRST_DAY, MissingData, balanced
from storage.rows import Row, Split, derive_split

# O-LoRA's fifteen-task orders 4 and 6 (its table of task sequences), of which these six tasks are kept.
ORDERS = {
    "order4": ("cb", "copa", "qqp", "amazon", "sst-2", "agnews"),
    "order6": ("amazon", "cb", "copa", "qqp", "sst-2", "agnews"),
}
VALIDATION = 0.1  # of the questions of the published training split, by their hash


def clbench(folder: Path, sizes: Sizes, *, order: str, seed: int) -> Stream:
    """One task an experience; at most `sizes` rows each, every answer as often as the data allow."""
    path = folder / "rows.jsonl"
    if not path.is_file():
        raise MissingData(f"there is no rows.jsonl in {folder} (id, task, question, answer, split a line)")
    groups: dict[tuple[str, Split], list[Row]] = defaultdict(list)
    for text in path.read_text(encoding="utf-8").splitlines():
        row = _row(json.loads(text))
        assert row.split is not None
        groups[row.task, row.split].append(row)

    def taken(task: str, split: Split) -> tuple[Row, ...]:
        return tuple(balanced(groups[task, split], sizes.of(split), seed))

    experiences = tuple(
        Experience(
            name=task,
            train=taken(task, Split.TRAIN),
            validation=taken(task, Split.VALIDATION),
            suites={task: taken(task, Split.SUITE)},
        )
        for task in ORDERS[order][: sizes.domains]
    )
    return Stream(name="clbench", order=order, experiences=experiences, labels=True).tidy()


def _row(line: dict[str, str]) -> Row:
    row = Row(
        id=line["id"],
        task=line["task"],
        question=line["question"],
        answer=line["answer"],
        created_at=FIRST_DAY,
        split=Split.SUITE,
    )
    if line["split"] == "test":
        return row
    split = derive_split(row.question_key, validation=VALIDATION, suite=0.0)
    return Row(
        id=row.id, task=row.task, question=row.question, answer=row.answer, created_at=FIRST_DAY, split=split
    )
