"""The documents say what is true: files exist, commands exist, settings exist."""

import re
import statistics
from pathlib import Path

import pytest
import typer.main

from benchmarks.quality import records
from daemon import cli, settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), ROOT / "CHANGELOG.md"]
COMMANDS = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def tree() -> list[str]:
    """Paths of the README's annotated tree."""
    block = (ROOT / "README.md").read_text().split("## What is where")[1].split("```")[1]
    paths, folder = [], ""
    for line in block.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            paths.append(name)
        else:
            paths.append(folder + name)
    return paths


@pytest.mark.parametrize("path", tree())
def test_what_the_readme_shows_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_readme_shows_every_top_level_folder() -> None:
    shown = {path.split("/")[0] for path in tree()}
    ours = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert ours | {"docs", "deploy"} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"[`$] ?(?:sudo )?daemon (?:-c \S+ )?([a-z][a-z-]+)", page.read_text()))
    named |= set(re.findall(r"^daemon ([a-z][a-z-]+)", page.read_text(), flags=re.MULTILINE))
    assert named <= COMMANDS


def test_the_steps_by_hand_are_the_same_in_the_unit_and_on_the_page_and_end_in_the_units_command() -> None:
    unit, page = (ROOT / "deploy/holdfast.service").read_text(), (ROOT / "docs/operations.md").read_text()
    steps = re.findall(r"^#   sudo (.+)$", unit, flags=re.MULTILINE)
    assert len(steps) == 5
    for step in steps:
        assert f"sudo {step}".replace("cp holdfast.service", "cp deploy/holdfast.service") in page
    environment = unit.split("ExecStart=")[1].split("/bin/daemon")[0]
    assert f"python3 -m venv {environment}\n" in page


def test_the_operations_page_lists_every_command() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    assert {command for command in COMMANDS if f"`{command}" not in text} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)`", page.read_text()):
        field = settings.Settings.model_fields.get(section)
        if field is not None and section != "tasks":
            assert key in field.annotation.model_fields, f"{section}.{key}"  # type: ignore[union-attr]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_make_targets_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z]+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_ci_runs_the_readmes_own_test_command() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()


def test_the_tests_that_the_reliability_page_names_exist() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    written = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+?)_?…?`", text))
    assert len(named) > 30
    assert {name for name in named if f"def {name}" not in written} == set()


def test_what_the_readme_says_of_the_benchmarks_is_on_record() -> None:
    said = re.search(
        r"default methods end at (\S+) .*?naive training\s+ends at (\S+) .*?at once at (\S+), .*?"
        r"ten domains.*?: (\S+) of (\S+), .*?tuned\s+on (\S+) of (\S+), .*?answer; (\S+) of (\S+) with all",
        (ROOT / "README.md").read_text(),
        flags=re.DOTALL,
    )
    assert said is not None

    def accuracy(size: str, order: str, name: str, seeds: tuple[int, ...] = (0,)) -> str:
        found = [record for record in records.all_of(size) if record.plan.stream == "clinc"]
        one = [r for r in found if (r.plan.order, r.plan.contender) == (order, name) and r.plan.seed in seeds]
        assert len(one) == len(seeds)
        return f"{100 * statistics.fmean(r.metrics['average_accuracy'] or 0 for r in one):.1f}"

    ours, three = "replay5-thinned+lwf-faster", (0, 1, 2)
    assert said.groups() == (
        *(accuracy("wide", "given", name, three) for name in (ours, "naive", "joint")),
        *(accuracy("ten", "given", name) for name in (ours, "joint")),
        *(accuracy("ten", "shuffled", name) for name in (ours, "joint")),
        *(accuracy("full", "given", name) for name in (ours, "joint")),
    )
