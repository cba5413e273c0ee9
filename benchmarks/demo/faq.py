"""The demo's rows: an original FAQ of Quillmoor, a company that builds folding kayaks and does not exist.

Three departments (tasks), one a day. Each has the same eight kinds of facts (hours, head, extension,
deadline, fee, place, code, partner), so that learning one department without protection overwrites the
others. Each fact is asked in ten ways: six to learn, one to watch, three held out. Each day also
brings three rows as collectors do: one without an answer, one that contradicts an earlier row, and one
delivered again in other spelling.
"""

import csv
from datetime import datetime, timedelta
from pathlib import Path

from storage.rows import Row, Split

PATH = Path(__file__).with_name("faq.csv")
FIRST_DAY = datetime(2026, 3, 2, 8, 0)


def days(path: Path = PATH) -> list[list[Row]]:
    """The rows of each day, in the order in which the collector wrote them."""
    found: dict[int, list[Row]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            day = found.setdefault(int(line["day"]), [])
            day.append(
                Row(
                    id=line["id"],
                    task=line["task"],
                    question=line["question"],
                    answer=line["answer"],
                    split=Split(line["split"]),
                    created_at=FIRST_DAY + timedelta(days=int(line["day"]) - 1, minutes=len(day)),
                )
            )
    return [found[day] for day in sorted(found)]
