"""Configuration: everything wrong is said in one line each, with the key, the value and the fix."""

from pathlib import Path

import pytest

from daemon import config, settings
from storage.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(write(folder, text))
    return str(caught.value)


def test_the_shipped_config_is_rendered_from_the_settings_and_loads() -> None:
    assert (ROOT / "config.toml").read_text() == config.render()
    settings = config.load(ROOT / "config.toml")
    assert settings.gate.max_drop == 0.03
    assert settings.strategy.methods == ("replay", "ewc")


def test_every_key_is_described() -> None:
    for name, field in settings.Settings.model_fields.items():
        if name == "tasks":
            continue
        for key, entry in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert entry.description or hasattr(entry.annotation, "model_fields"), f"{name}.{key}"


def test_thresholds_are_not_set_unless_somebody_sets_them(tmp_path: Path) -> None:
    settings = config.load(write(tmp_path, ""))
    assert settings.gate.max_drop is None
    assert settings.gate.min_gain is None


def test_paths_are_relative_to_the_file_not_to_the_shell(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    settings = config.load(write(tmp_path, '[bot]\nstate_dir = "here"\n[source]\npath = "data/qa.duckdb"'))
    assert settings.state_dir == tmp_path / "here"
    assert settings.source.path == tmp_path / "data/qa.duckdb"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[training]\nepoch = 3", ["training.epoch", "unknown key", "did you mean 'epochs'"]),
        ("[trainin]\nepochs = 3", ["trainin", "did you mean 'training'"]),
        ('[training]\nepochs = "x"', ["training.epochs = 'x'", "integer"]),
        ("[training]\nlearning_rate = -1", ["training.learning_rate = -1", "greater than 0"]),
        ('[schedule]\ntimezone = "Europe/Madri"', ["schedule.timezone", "did you mean 'Europe/Madrid'"]),
        ('[strategy]\nname = "replay+ewk"', ["unknown method 'ewk'", "replay, ewc"]),
        ("[splits]\nvalidation = 0.5\nsuite = 0.5", ["splits", "leave at least 0.1"]),
        ('[tasks.x]\nkind = "poem"', ["tasks.x.kind = 'poem'", "'free'"]),
        ('[bot]\nname = "../x"', ["bot.name = '../x'"]),
        ("not toml", ["not valid TOML"]),
        ("[gate]\nmax_drop = true", ["gate.max_drop = True", "number"]),
        ('[gate]\naccept_inconclusive = "yes"', ["gate.accept_inconclusive = 'yes'", "boolean"]),
        ('[training]\nepochs = "3"', ["training.epochs = '3'", "integer"]),
        ("[source]\noverlap_hours = inf", ["source.overlap_hours = inf", "finite"]),
        ('[source]\npath = "/nowhere/qa.duckdb"', ["source.path", "no folder /nowhere"]),
        ('[source]\npath = "/"', ["source.path", "is a directory"]),
        ('[source]\npath = "~nosuch/qa.duckdb"', ["source.path", "no such account"]),
        ('[model]\nbase = "~nosuch/base"', ["model.base", "no such account"]),
        ('[mlflow]\ntracking_uri = "./mlruns"', ["mlflow.tracking_uri = './mlruns'", "sqlite:///"]),
        ('[mlflow]\ntracking_uri = "htp://nope"', ["mlflow.tracking_uri = 'htp://nope'"]),
        ('[schedule]\ncron = "0 0 31 2 *"', ["schedule.cron", "never happens"]),
        ('[model]\nbase = "./nowhere"', ["model.base", "no such file or folder"]),
    ],
)
def test_a_mistake_is_named_with_its_value_and_a_fix(tmp_path: Path, text: str, words: list[str]) -> None:
    told = complaint(tmp_path, text)
    for word in words:
        assert word in told


def test_several_mistakes_are_all_told_one_line_each(tmp_path: Path) -> None:
    told = complaint(tmp_path, "[training]\nepochs = 0\nbatch_size = 0\n[lora]\nrank = 0")
    assert len(told.splitlines()) == 4


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="daemon init"):
        config.load(tmp_path / "config.toml")


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_TRAINING__EPOCHS", "7")
    settings = config.load(write(tmp_path, "[training]\nepochs = 3\nbatch_size = 5"))
    assert (settings.training.epochs, settings.training.batch_size) == (7, 5)


def test_the_environment_is_text_and_the_file_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_GATE__MAX_DROP", "0.5")
    monkeypatch.setenv("HOLDFAST_GATE__ACCEPT_INCONCLUSIVE", "true")
    monkeypatch.setenv("HOLDFAST_BOT__NAME", "7")
    monkeypatch.setenv("HOLDFAST_TASKS__X__LABELS", '["a", "b"]')
    monkeypatch.setenv("HOLDFAST_SOURCE__COLUMNS__ID", "key")
    settings = config.load(write(tmp_path, "[gate]\nmin_gain = 0\n[tasks.x]\nkind = 'labels'"))
    assert (settings.gate.max_drop, settings.gate.min_gain) == (0.5, 0)
    assert settings.gate.accept_inconclusive is True
    assert settings.bot.name == "7"
    assert settings.source.columns.id == "key"
    assert (settings.tasks["x"].kind, settings.tasks["x"].labels) == ("labels", ("a", "b"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HOLDFAST_STRATEGY", "naive"), ("HOLDFAST_TASKS__X__LABELS", "a,b"), ("HOLDFAST_SOURCE__COLUMNS", "x")],
)
def test_a_variable_that_cannot_be_read_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match="environment"):
        config.load(write(tmp_path, ""))


def test_an_empty_source_path_is_no_source(tmp_path: Path) -> None:
    assert config.load(write(tmp_path, '[source]\npath = ""')).source.path is None


def test_a_relative_mlflow_database_lies_beside_the_file(tmp_path: Path) -> None:
    settings = config.load(write(tmp_path, '[mlflow]\ntracking_uri = "sqlite:///mlflow.db"'))
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_misspelt_environment_variable_is_not_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_TRAINING__EPOCH", "7")
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        config.load(write(tmp_path, ""))
