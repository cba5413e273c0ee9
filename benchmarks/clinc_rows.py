"""CLINC150 (Larson et al. 2019, CC BY 3.0) as a stream: one domain after the other, sampled reproducibly.

Reads files only; which rows are taken depends on their ids, the sizes and the seed, and on nothing else.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from benchmarks.sampling import FIRST_DAY, MissingData, balanced
from storage.rows import SPLIT_NAMES, Row, Split


@dataclass(frozen=True)
class Sizes:
    """How much of the data is used; rows are counted for each domain."""

    domains: int = 4
    rows: int = 450
    validation: int = 45
    suite: int = 64

    def of(self, split: Split) -> int:
        return {Split.TRAIN: self.rows, Split.VALIDATION: self.validation, Split.SUITE: self.suite}[split]


def load_stream(folder: Path, sizes: Sizes, *, seed: int) -> list[list[Row]]:
    """The first domains in the order of the file, each cut down to `sizes`, every class equally often.

    Reads `rows.jsonl` (id, task, question, answer, split) or, when there is none, the publishers' own
    data_full.json and domains.json; both give the same rows. Raises `MissingData`.
    """
    lines = _read(folder)
    order = list(dict.fromkeys(line["task"] for line in lines))[: sizes.domains]
    days = {domain: FIRST_DAY + timedelta(days=day) for day, domain in enumerate(order)}
    groups: dict[tuple[str, Split], list[Row]] = defaultdict(list)
    for line in lines:
        if line["task"] in days:
            split = SPLIT_NAMES[line["split"]]
            groups[line["task"], split].append(_row(line, split, days[line["task"]]))
    return [
        [
            row
            for split in Split
            for row in balanced(
                _enough(groups[domain, split], sizes.of(split), domain, split), sizes.of(split), seed
            )
        ]
        for domain in order
    ]


def _read(folder: Path) -> list[dict[str, str]]:
    if (folder / "rows.jsonl").is_file():
        return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    if not (folder / "data_full.json").is_file() or not (folder / "domains.json").is_file():
        raise MissingData(
            f"there is neither rows.jsonl nor data_full.json with domains.json in {folder}; "
            "get them with `git clone https://github.com/clinc/oos-eval`, then pass --data oos-eval/data"
        )
    full = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
    return [
        {
            "id": f"clinc-{split}-{n}",
            "task": domain_of[intent],
            "question": text,
            "answer": intent.replace("_", " "),
            "split": split,
        }
        for split in ("train", "val", "test")
        for n, (text, intent) in enumerate(full[split])
    ]


def _enough(rows: Sequence[Row], size: int, domain: str, split: Split) -> Sequence[Row]:
    if len(rows) < size:
        raise MissingData(
            f"{domain} has {len(rows)} {split} rows, {size} are wanted; lower --rows, --validation or --suite"
        )
    return rows


def _row(line: dict[str, str], split: Split, day: datetime) -> Row:
    return Row(
        id=line["id"],
        task=line["task"],
        question=line["question"],
        answer=line["answer"],
        split=split,
        created_at=day,
    )
