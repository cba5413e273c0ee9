"""A config of any content is settings, or a ConfigError that names the file or the key."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from daemon import config
from daemon.settings import ENV_PREFIX, Settings
from storage.errors import ConfigError
from tests.fuzzing import JSON, damaged, examples


def keys() -> list[tuple[str, str]]:
    """Every section and key, those of tables in sections too."""
    found: list[tuple[str, str]] = []

    def walk(name: str, section: type[BaseModel]) -> None:
        for key, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(f"{name}.{key}" if name else key, field.annotation)
            elif name:
                found.append((name, key))

    walk("", Settings)
    return found


VALUES = (
    st.text() | st.integers() | st.floats() | st.booleans() | st.lists(st.text() | st.integers(), max_size=3)
)
VARIABLES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def toml(value: Any) -> str:
    return {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}.get(text := json.dumps(value), text)


def loads_or_complains(path: Path) -> None:
    try:
        config.load(path)
    except ConfigError as error:
        said = str(error)
        assert said
        assert "Traceback" not in said


@examples(300)
@given(at=st.sampled_from(keys()), value=VALUES)
def test_any_value_of_any_key_is_taken_or_refused_in_words(
    tmp_path: Path, at: tuple[str, str], value: Any
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f"[{at[0]}]\n{at[1]} = {toml(value)}\n", encoding="utf-8")
    loads_or_complains(path)


@examples(150)
@given(data=st.data())
def test_any_bytes_are_taken_or_refused_in_words(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "config.toml"
    whole = data.draw(st.sampled_from([config.render().encode(), data.draw(st.binary(max_size=200))]))
    path.write_bytes(damaged(whole, data.draw))
    loads_or_complains(path)


@examples(150)
@given(at=st.sampled_from(keys()), value=VARIABLES | JSON.map(json.dumps))
def test_any_text_in_the_environment_is_taken_or_refused_in_words(
    tmp_path: Path, at: tuple[str, str], value: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_text("")
    variable = ENV_PREFIX + f"{at[0]}.{at[1]}".replace(".", "__").upper()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, value)
        loads_or_complains(path)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "{a=" * 50_000, "x." * 2_000 + "y = 1"])
def test_toml_nested_without_end_is_refused_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError):
        config.load(tmp_path / "config.toml")
