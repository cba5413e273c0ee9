"""What holds for all tests, and a whole bot for those that want one."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.fuzzing import FACTOR

if TYPE_CHECKING:
    from tests.bots import Bot

# Machines are shared and noisy: how long an example takes says nothing about the code.
# The same examples in every run, so that a change is judged by what it changed: see `tests.fuzzing`.
settings.register_profile(
    "patient",
    deadline=None,
    derandomize=FACTOR == 1,
    max_examples=100 * FACTOR,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real daemons import everything, more than once a test, and the first pays for its module's bench."""
    for item in items:
        if item.get_closest_marker("acceptance") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every account may enter; pytest's own is closed again by each run that starts."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.toys import tiny_base

    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def bot(tmp_path: Path, base: Path) -> "Iterator[Bot]":
    from tests.bots import make_bot

    made = make_bot(tmp_path, base)
    yield made
    made.store.close()
