"""How hard the property-based tests look: a little and always the same in CI, long and at random by hand.

`FUZZ=50` (`make test-fuzz`) tries fifty times the examples, others in every run; what fails is
shown small, and kept in `.hypothesis/` to be tried first the next time.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get("FUZZ", "1"))


def examples(few: int, *, times: int = FACTOR) -> Any:
    """A bound for a test whose examples cost something; `times`: what is enough of them in a long run."""
    return settings(max_examples=few * min(FACTOR, times))


# What JSON and a database can hand over, nested and not.
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


def damaged(data: bytes, draw: Callable[[Any], Any]) -> bytes:
    """The bytes as a failing disk, a full one or a curious hand may leave them."""
    start = draw(st.integers(0, max(0, len(data) - 1)))
    end = draw(st.integers(start, min(len(data), start + 64)))
    return bytes(
        draw(
            st.sampled_from(
                [
                    data[:start],
                    data[:start] + data[end:],
                    data[:start] + bytes(b ^ 0x5A for b in data[start:end]) + data[end:],
                    data[:start] + draw(st.binary(max_size=64)) + data[end:],
                    b"\0" * len(data),
                    b"",
                ]
            )
        )
    )


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
