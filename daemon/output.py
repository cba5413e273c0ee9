"""What the command prints without the help of `rich`, whose import takes longer: JSON, and complaints."""

import json
import os
import sys
from typing import Any

from daemon.journal import printable
from storage.errors import HoldfastError


def print_json(value: Any) -> None:
    """Readable in every language; what a terminal would obey is escaped, which JSON reads as the same."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def complain(error: HoldfastError) -> None:
    """`error: …`, red in a terminal."""
    colour, plain = (
        ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    )
    print(f"{colour}error: {printable(error)}{plain}", file=sys.stderr)
