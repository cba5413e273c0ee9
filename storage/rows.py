"""A labeled row: its fields, its normalised content, its split.

Knows no database and no model. Everything here is a pure function of a row's text, so that the
same row gets the same identity and the same split on every machine and for ever.
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

_SPACES = re.compile(r"\s+")
_INVISIBLE = frozenset({"Cc", "Cf", "Cs"})  # control, format, surrogate
_SEPARATOR = "\x1f"  # white space to Python: cannot survive normalisation, so no field imitates a boundary


class Split(StrEnum):
    """Where a row lives, for ever: learned from, watched while learning, or only ever asked."""

    TRAIN = "train"
    VALIDATION = "validation"
    SUITE = "suite"


# What collectors call the three splits.
SPLIT_NAMES = {
    "train": Split.TRAIN,
    "training": Split.TRAIN,
    "validation": Split.VALIDATION,
    "valid": Split.VALIDATION,
    "val": Split.VALIDATION,
    "dev": Split.VALIDATION,
    "suite": Split.SUITE,
    "test": Split.SUITE,
    "eval": Split.SUITE,
    "heldout": Split.SUITE,
    "held_out": Split.SUITE,
}


def normalise(text: str) -> str:
    """Unicode NFKC, case-folded, runs of white space as one space, invisible characters gone.

    Unassigned characters are kept: a newer Python, to which they are assigned, keeps them too, and the
    same row must not get another hash and split by that.
    """
    if text.isascii() and text.isprintable():  # most text, and twelve times faster; the same result
        return " ".join(text.lower().split())
    text = unicodedata.normalize("NFKC", text).casefold()
    if text.isprintable():  # nothing invisible, and no other white space than " "
        return " ".join(text.split())
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in _INVISIBLE)
    return _SPACES.sub(" ", text).strip()


class _Punctuation(dict[int, str]):
    """A table for `str.translate`, made as characters come: punctuation parts words, an apostrophe joins
    them, and everything else stays. Marks make other letters, and `2 + 3` is not `2 3`."""

    def __missing__(self, code: int) -> str:
        parts = " " if unicodedata.category(chr(code)).startswith("P") else chr(code)
        return self.setdefault(code, "" if chr(code) in "'’‘ʼ`´" else parts)


_PUNCTUATION = _Punctuation()


def words(text: str) -> str:
    """The words of a text, sorted, without punctuation; of a text without words, what is normal of it."""
    text = normalise(text)
    return " ".join(sorted(text.translate(_PUNCTUATION).split())) or text


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One labeled question and its answer, as the collector gave it, plus its split.

    `id` is the collector's own; identity is by content.
    """

    id: str
    task: str
    question: str
    answer: str
    context: str = ""
    created_at: datetime | None = None  # UTC, naive
    split: Split | None = None  # None: derive from content

    @property
    def question_key(self) -> str:
        """What is asked, without the task: 32 hex digits. Has one split, so that the same
        question under two tasks cannot be trained on in one and examined in the other."""
        return _digest(normalise(self.context), normalise(self.question))

    @property
    def words_key(self) -> str:
        """Which words are asked, in any order and with any punctuation: 32 hex digits. Questions with the
        same words are near-duplicates: what was learned of one says what to answer to the other. Decides the
        split of a question that comes without one."""
        return _digest(words(self.context), words(self.question))

    @property
    def key(self) -> str:
        """What is asked of which task: 32 hex digits. Two answers to one key contradict each other."""
        return _digest(normalise(self.task), normalise(self.context), normalise(self.question))

    @property
    def hash(self) -> str:
        """The whole labeled content: 32 hex digits. The row's identity in store, snapshots and memory."""
        return _digest(
            normalise(self.task), normalise(self.context), normalise(self.question), normalise(self.answer)
        )


def derive_split(key: str, *, validation: float, suite: float) -> Split:
    """The split of what has this key, uniform in the hash: `suite` and `validation` are shares in [0, 1)."""
    place = int(key[:16], 16) / 16**16
    if place < suite:
        return Split.SUITE
    return Split.VALIDATION if place < suite + validation else Split.TRAIN


def _digest(*parts: str) -> str:
    return hashlib.sha256(_SEPARATOR.join(parts).encode()).hexdigest()[:32]
