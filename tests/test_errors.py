"""What a library's exception becomes in our messages."""

import pytest

from storage.errors import first_line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("what\nwhere"), "what"),
        (ValueError("\n what "), "what"),
        (ValueError(), "ValueError"),
        (OSError("\n"), "OSError"),
    ],
)
def test_the_first_line_of_an_error_is_never_nothing(error: Exception, told: str) -> None:
    assert first_line(error) == told
