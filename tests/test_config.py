"""Configuration: everything wrong is said in one line each, with the key, the value and the fix."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import access, config, settings
from storage.errors import ConfigError, ModelError
from strategies.base import local_source

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
    assert settings.strategy.methods == ("replay", "lwf")


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ('[strategy]\nmethods = ["replay", "lwf"]', ("replay", "lwf")),
        ('strategy = ["replay", "ewc"]\n[bot]\nname = "b"', ("replay", "ewc")),
        ('strategy = "replay+merge"', ("replay", "merge")),
        ('strategy = "naive"', ()),
        ("[strategy]\nmethods = []", ()),
    ],
)
def test_methods_are_a_list_or_one_word(tmp_path: Path, text: str, methods: tuple[str, ...]) -> None:
    assert config.load(write(tmp_path, text)).strategy.methods == methods


@pytest.mark.parametrize(
    ("value", "methods"), [("replay+der", ("replay", "der")), ('["si"]', ("si",)), ("naive", ())]
)
def test_methods_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, methods: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HOLDFAST_STRATEGY__METHODS", value)
    assert config.load(write(tmp_path, 'strategy = ["replay", "ewc"]')).strategy.methods == methods


@pytest.mark.parametrize(
    ("text", "variable", "value", "methods", "size"),
    [
        ('strategy = ["ewc"]', "HOLDFAST_STRATEGY__REPLAY_SIZE", "5", ("ewc",), 5),
        ('strategy = "auto"', "HOLDFAST_STRATEGY__REPLAY_SIZE", "5", ("auto",), 5),
        ("[strategy]\nreplay_size = 7", "HOLDFAST_STRATEGY", '["lwf"]', ("lwf",), 7),
    ],
)
def test_the_short_form_and_the_environment_are_merged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    variable: str,
    value: str,
    methods: tuple[str, ...],
    size: int,
) -> None:
    monkeypatch.setenv(variable, value)
    strategy = config.load(write(tmp_path, text)).strategy
    assert (strategy.methods, strategy.replay_size) == (methods, size)


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
        ('[training]\nepochs = "x"', ["training.epochs = 'x'", "whole number"]),
        ("[training]\nlearning_rate = -1", ["training.learning_rate = -1", "greater than 0"]),
        ('[schedule]\ntimezone = "Europe/Madri"', ["schedule.timezone", "did you mean 'Europe/Madrid'"]),
        ('[strategy]\nmethods = ["replay", "ewk"]', ["unknown method 'ewk'", "replay, der"]),
        ('strategy = ["naive", "replay"]', ["naive stands alone"]),
        ('strategy = ["replay", "auto"]', ["auto stands alone"]),
        ('strategy = ["ewc"]\n[strategy]\nreplay_size = 5', ["not valid TOML", "not both"]),
        ('strategy = ["der"]', ["strategy.methods = ['der']", "add replay"]),
        ('strategy = "ewc+si"', ["strategy.methods", "ewc and si", "choose one"]),
        ('[strategy]\nmethods = ["ewc", "ewc"]', ["strategy.methods", "twice"]),
        ('[strategy]\nmethods = ["joint", "replay"]', ["strategy.methods", "joint", "alone"]),
        ("[strategy]\nmethods = [1]", ["strategy.methods.0 = 1", "in quotes"]),
        ('[lora]\nrank = 3\ninit = "orthogonal"', ["lora", "rank is 3", "make it even"]),
        ("strategy = 3", ["strategy = 3", "[strategy]"]),
        ("[splits]\nvalidation = 0.5\nsuite = 0.5", ["splits", "leave at least 0.1"]),
        ('[tasks.x]\nkind = "poem"', ["tasks.x.kind = 'poem'", "'free'"]),
        ('[bot]\nname = "../x"', ["bot.name = '../x': should be letters, digits, - and _"]),
        ('[tasks.x]\nkind = "free"\nlabels = ["a"]', ["tasks.x", "labels = ['a']", "remove one"]),
        ("[evaluation]\nsuite_rows = 7", ["evaluation.suite_rows = 7", "gate.min_suite_rows = 8"]),
        ("not toml", ["not valid TOML"]),
        ("[gate]\nmax_drop = true", ["gate.max_drop = True", "number"]),
        (
            '[gate]\naccept_inconclusive = "yes"',
            ["gate.accept_inconclusive = 'yes'", "or false, without quotes"],
        ),
        ('[training]\nepochs = "3"', ["training.epochs = '3'", "a whole number, without quotes"]),
        ("[training]\nepochs = 4.5", ["training.epochs = 4.5: should be a whole number"]),
        ('[model]\ndevice = "gpu"', ["model.device = 'gpu': should be auto, cpu, cuda or cuda:N"]),
        ("training = 3", ["training = 3", "[training]"]),
        ("[source]\npath = 3", ["source.path = 3", "path in quotes"]),
        ('[tasks.x]\nlabels = "a"', ["tasks.x.labels = 'a'", '["a", "b"]']),
        ('[model]\nbase = ""', ["model.base = ''"]),
        ("[source]\noverlap_hours = inf", ["source.overlap_hours = inf", "finite"]),
        ('[source]\npath = "~nosuch/qa.duckdb"', ["source.path", "no such account"]),
        ('[model]\nbase = "~nosuch/base"', ["model.base", "no such account"]),
        (
            "[retention]\nsnapshots = 9223372036854775807",
            ["retention.snapshots = 9223", "or equal to 2147483647"],
        ),
        ("[training]\ntime_limit = 52704001", ["training.time_limit = 52704001", "less than or equal to"]),
        (f"[training]\nepochs = 1{'0' * 5000}", ["not valid TOML", "more than 4300 digits"]),
        ('[mlflow]\ntracking_uri = "./mlruns"', ["mlflow.tracking_uri = (not shown", "sqlite:///"]),
        ('[mlflow]\ntracking_uri = "htp://nope"', ["mlflow.tracking_uri"]),
        ('[mlflow]\ntracking_uri = "sqlite://"', ["mlflow.tracking_uri"]),
        ('[mlflow]\ntracking_uri = "sqlite:///:memory:"', ["mlflow.tracking_uri"]),
        ('[mlflow]\ntracking_uri = "http://"', ["mlflow.tracking_uri"]),
        ('[mlflow]\ntracking_uri = "http://["', ["mlflow.tracking_uri", "sqlite:///"]),
        ('[schedule]\ncron = "0 0 31 2 *"', ["schedule.cron", "never happens"]),
    ],
)
def test_a_mistake_is_named_with_its_value_and_a_fix(tmp_path: Path, text: str, words: list[str]) -> None:
    told = complaint(tmp_path, text)
    for word in words:
        assert word in told


SECRETS = [
    'tracking_uri = "ann:s3cr@db.example.org/mlflow"',
    'tracking_uri = "htp://ann:s3cr@nope"',
    'tracking_uri = "http:/ann:s3cr@nope"',
    'tracking_uri = "http://[s3cr"',
    'tracking_uri = "http://[s3cr]"',
    'tracking_uri = "http://ann:s3cr\\u2100@nope"',
    'tracking_uri = {password = "s3cr"}',
    'tracking_uri = ["s3cr"]',
]


@pytest.mark.parametrize("text", [*(f"[mlflow]\n{text}" for text in SECRETS), 'mlflow = "ann:s3cr@db"'])
def test_a_mistake_in_where_mlflow_is_repeats_no_password(tmp_path: Path, text: str) -> None:
    told = complaint(tmp_path, text)
    assert "mlflow" in told
    assert "s3cr" not in told


@pytest.mark.parametrize("variable", ["HOLDFAST_MLFLOW", "HOLDFAST_MLFLOW__TRACKING_URI"])
@pytest.mark.parametrize("value", ["ann:s3cr@db", '"ann:s3cr@db"', '{"tracking_uri": {"password": "s3cr"}}'])
def test_a_mistake_in_the_environment_repeats_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert "s3cr" not in complaint(tmp_path, "")


def whole_numbers() -> list[str]:
    return [
        f"{name}.{key}"
        for name, field in settings.Settings.model_fields.items()
        for key, entry in getattr(field.annotation, "model_fields", {}).items()
        if entry.annotation is int
    ]


@pytest.mark.parametrize("key", whole_numbers())
@pytest.mark.parametrize("number", [2**63 - 1, 10**400], ids=["2^63-1", "10^400"])
def test_every_whole_number_has_an_end(tmp_path: Path, key: str, number: int) -> None:
    """Beyond it the libraries break, in the middle of a cycle."""
    section, name = key.split(".")
    told = complaint(tmp_path, f"[{section}]\n{name} = {number}")
    assert f"{key} = {number}: should be less than or equal to " in told


@pytest.mark.timeout(20)
def test_a_pipe_is_no_config_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.toml")
    with pytest.raises(ConfigError, match=r"config\.toml is no regular file but a pipe.*--config"):
        config.load(tmp_path / "config.toml")


def test_what_a_shell_passes_on_is_a_config() -> None:
    reading, writing = os.pipe()
    os.write(writing, b'[bot]\nname = "piped"\n')
    os.close(writing)
    assert config.load(Path(f"/dev/fd/{reading}")).bot.name == "piped"
    os.close(reading)


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


def test_text_of_the_environment_that_does_not_fit_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_TRAINING__EPOCHS", "many")
    with pytest.raises(ConfigError, match=r"HOLDFAST_TRAINING__EPOCHS = 'many': should be a valid integer$"):
        config.load(write(tmp_path, ""))


def test_an_empty_source_path_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.load(write(tmp_path, '[source]\npath = ""')).source.path is None
    monkeypatch.setenv("HOLDFAST_SOURCE__PATH", "")
    assert config.load(write(tmp_path, '[source]\npath = "qa.duckdb"')).source.path is None


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "https://ann:secret@mlflow.example.org/team",
        "postgresql+psycopg2://ann@db.example.org/mlflow",
        "postgresql:///mlflow",
        "mysql+pymysql://db.example.org/mlflow",
        "mssql+pyodbc://db.example.org/mlflow",
        "sqlite:////srv/mlflow.db",
    ],
)
def test_where_mlflow_can_keep_its_records_is_taken_as_it_is(tmp_path: Path, uri: str) -> None:
    assert config.load(write(tmp_path, f'[mlflow]\ntracking_uri = "{uri}"')).tracking_uri == uri


def test_what_is_not_mounted_makes_no_config_invalid(tmp_path: Path) -> None:
    """`daemon status` works without it, and so does the start of the service; who reads it says so."""
    settings = config.load(write(tmp_path, '[source]\npath = "away/qa.duckdb"\n[model]\nbase = "away.gguf"'))
    assert settings.source.path == tmp_path / "away/qa.duckdb"
    assert settings.model.base == str(tmp_path / "away.gguf")


@pytest.mark.parametrize(
    ("base", "meant"),
    [
        ("./away", "{home}/away"), ("/away", "/away"), ("lab/away", "lab/away"),
        ("lab/here", "{home}/lab/here"),
        ("package:away", "package:away"), ("away.gguf", "{home}/away.gguf"),
    ],
)  # fmt: skip
def test_a_base_is_a_place_by_its_name_or_because_it_is_there(tmp_path: Path, base: str, meant: str) -> None:
    (tmp_path / "lab/here").mkdir(parents=True)
    found = config.load(write(tmp_path, f'[model]\nbase = "{base}"')).model.base
    assert found == meant.format(home=tmp_path)


@pytest.fixture
def nobody(public: Path) -> Iterator[Path]:
    """The test goes on as another account, to whom `closed` in this directory is closed."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    (public / "closed").mkdir(mode=0o700)
    write(public / "closed", "").chmod(0o600)
    write(public, "").chmod(0o666)
    os.seteuid(65534)
    yield public
    os.seteuid(0)


def test_a_base_in_a_folder_that_may_not_be_entered_is_no_hub_name(nobody: Path) -> None:
    settings = config.load(write(nobody, '[model]\nbase = "closed/base"'))
    with pytest.raises(ModelError, match="is in a folder closed to this account"):
        local_source(settings.model.base)


def test_a_config_that_this_account_may_not_see_is_told(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder /etc/holdfast of another account."""
    monkeypatch.setattr(access, "HERE", nobody / "nowhere.toml")
    monkeypatch.setattr(access, "SYSTEM", nobody / "closed" / "config.toml")
    with pytest.raises(ConfigError, match="Permission denied"):
        config.load(access.config_path(None))


def test_a_relative_mlflow_database_lies_beside_the_file(tmp_path: Path) -> None:
    settings = config.load(write(tmp_path, '[mlflow]\ntracking_uri = "sqlite:///mlflow.db"'))
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_misspelt_environment_variable_is_not_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_TRAINING__EPOCH", "7")
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        config.load(write(tmp_path, ""))
