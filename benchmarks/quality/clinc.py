"""CLINC150's domains one after the other, and the same with intents that are renamed on the way.

Rows: Larson et al. 2019 (CC BY 3.0); a task is a domain, the answer an intent. Which rows are taken is
`benchmarks.clinc_rows`'s to say.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.clinc_rows import Sizes, load_stream
from benchmarks.quality.streams import Experience, Stream, by_split
from benchmarks.sampling import shuffled
from storage.rows import Row, Split

ORDERS = ("given", "shuffled")

# In `changing`, the intent of each domain that gets another name, as an owner of a bot might choose it.
NEW_NAMES = {
    "travel": ("book flight", "reserve plane seat"),
    "banking": ("freeze account", "lock my money"),
    "utility": ("find phone", "device locator"),
    "small_talk": ("tell joke", "make me laugh"),
    "work": ("pto request", "ask for holiday"),
    "credit_cards": ("new card", "card application"),
    "meta": ("whisper mode", "speak quietly"),
    "home": ("play music", "start a tune"),
    "auto_and_commute": ("uber", "order a ride"),
    "kitchen_and_dining": ("recipe", "cooking instructions"),
}


def clinc(folder: Path, sizes: Sizes, *, order: str, seed: int) -> Stream:
    """One domain an experience. `given` is the order of the publishers' file; `shuffled` takes the same
    domains by the SHA-256 of their names, which is one fixed order."""
    return of_domains("clinc", ordered(load_stream(folder, sizes, seed=seed), order), order)


def changing(folder: Path, sizes: Sizes, *, order: str, seed: int) -> Stream:
    """As `clinc`, but each experience after the first also renames one intent of the domain before it.

    All training questions of that intent come again, word for word, with the new answer; from then on
    its suite questions expect the new answer too.
    """
    return renaming(of_domains("changing", ordered(load_stream(folder, sizes, seed=seed), order), order))


def ordered(domains: Sequence[list[Row]], order: str) -> list[list[Row]]:
    if order == "given":
        return list(domains)
    return sorted(domains, key=lambda rows: shuffled("order", rows[0].task))


def of_domains(name: str, domains: Sequence[list[Row]], order: str) -> Stream:
    experiences = tuple(
        Experience(
            name=rows[0].task,
            train=tuple(by_split(rows, Split.TRAIN)),
            validation=tuple(by_split(rows, Split.VALIDATION)),
            suites={rows[0].task: tuple(by_split(rows, Split.SUITE))},
        )
        for rows in domains
    )
    return Stream(name=name, order=order, experiences=experiences, labels=True).tidy()


def renaming(stream: Stream) -> Stream:
    """The stream, with one intent of every domain renamed in the experience after it."""
    first, *others = stream.experiences
    experiences, replaced = [first], {}
    for before, experience in zip(stream.experiences, others, strict=False):
        old, new = new_name(before)
        replaced[before.name, new] = old
        experiences.append(
            replace(
                experience,
                train=(*experience.train, *_relabelled(before.train, old, new, only=True)),
                validation=(*experience.validation, *_relabelled(before.validation, old, new, only=True)),
                suites={
                    **experience.suites,
                    before.name: _relabelled(before.suites[before.name], old, new),
                },
            )
        )
    return replace(stream, experiences=tuple(experiences), replaced=replaced)


def new_name(experience: Experience) -> tuple[str, str]:
    """Old and new answer. Domains without an entry in the table rename their first answer."""
    told = NEW_NAMES.get(experience.name)
    if told and any(row.answer == told[0] for row in experience.train):
        return told
    old = min(row.answer for row in experience.train)
    return old, f"what was {old}"


def _relabelled(rows: Sequence[Row], old: str, new: str, *, only: bool = False) -> tuple[Row, ...]:
    """The rows with `new` where they said `old`; `only` those."""
    return tuple(
        replace(row, id=f"{row.id}-renamed", answer=new) if row.answer == old else row
        for row in rows
        if row.answer == old or not only
    )
