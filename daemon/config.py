"""config.toml and the environment, made into settings; and config.toml made from the settings.

Environment variables win over the file: `HOLDFAST_TRAINING__EPOCHS=3` sets `training.epochs`. What is
wrong is said in one line a problem: the key, the value and the fix.
"""

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

from daemon.learning_settings import long_form
from daemon.settings import ENV_PREFIX, Settings, TaskOverride, suggest
from storage.errors import ConfigError
from storage.reach import absolute, redact


def init_command(path: Path) -> str:
    """What makes a config at `path`. State does not belong below /etc."""
    apart = " --state-dir /var/lib/holdfast" if path.is_relative_to("/etc") else ""
    return f"daemon init {path.parent}{apart}"


def load(path: Path) -> Settings:
    """The settings in `path` and the environment.

    Raises `ConfigError` with one line for each problem: the key, the value and the fix.
    """
    try:
        _check_is_file(path)
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no config file at {path}; "
            + (f"make one with `{init_command(path)}`" if path.name == "config.toml" else "correct --config")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        both = "strategy" in str(error) and "twice" in str(error)
        hint = "; write strategy = [...] or the table [strategy], not both" if both else ""
        raise ConfigError(f"{path} is not valid TOML: {error}{hint}") from None
    except ValueError:  # Python reads no longer ones
        raise ConfigError(f"{path} is not valid TOML: it has a number of more than 4300 digits") from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid TOML: it is nested too deeply") from None
    _check_environment()
    try:
        settings = Settings(**long_form(values))
    except SettingsError as error:
        raise ConfigError(
            f"the environment ({ENV_PREFIX}…): {error}; a list is written as JSON, a key as SECTION__KEY"
        ) from None
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(
            f"{path}: {len(lines)} problem(s)\n" + "\n".join(f"  {line}" for line in lines)
        ) from None
    from daemon import schedule  # brings APScheduler

    schedule.parse(settings.schedule.cron, settings.schedule.timezone)
    return _absolute(settings, path.resolve().parent)


def _check_is_file(path: Path) -> None:
    """A pipe that nobody writes to would be waited for without end. What a shell passes on is read."""
    mode = path.stat().st_mode
    passed_on = path.is_relative_to("/dev") or path.is_relative_to("/proc")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or passed_on):
        raise ConfigError(
            f"the config file {path} is no regular file but a pipe, socket or device; correct --config"
        )


def render(state_dir: Path | None = None) -> str:
    """config.toml with every key, its meaning and its default, or that state directory."""
    values = STARTING_VALUES if state_dir is None else {**STARTING_VALUES, "bot.state_dir": state_dir}
    lines = [
        "# Holdfast configuration. Every key is shown with its default; a # before a key means: not set.",
        "# The two thresholds of [gate] have none; these are to start with. Without, nothing is promoted.",
        "# The environment wins over this file: HOLDFAST_TRAINING__EPOCHS=3 sets training.epochs.",
    ]
    for name, field in Settings.model_fields.items():
        if name != "tasks":
            assert isinstance(field.annotation, type)
            lines += _render_section(name, field.annotation, values)
    return "\n".join([*lines, *_TASKS_EXAMPLE]) + "\n"


# The one place where a fresh config says more than the code's defaults: without thresholds nothing
# is promoted, and a person should see which thresholds they start with.
STARTING_VALUES: dict[str, Any] = {"gate.max_drop": 0.03, "gate.min_gain": 0.02}

_TASKS_EXAMPLE = [
    "",
    "# Optional, one table a task; what is unset is inferred from the rows.",
    "# [tasks.billing]",
    '# kind = "free"            # free text, or "labels": one of a closed set',
    '# labels = ["yes", "no"]   # the closed set, nothing else is taken; unset: the answers seen so far',
    '# metric = "token_f1"      # exact_match, token_f1 or accuracy: what the gate compares',
    "# The first two drop punctuation and articles, as SQuAD does: to them C++ is C#, and -5 is 5.",
]


def _render_section(name: str, section: type[BaseModel], values: dict[str, Any]) -> list[str]:
    lines = ["", f"# {section.__doc__}", f"[{name}]"]
    tables: list[str] = []
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            tables += _render_section(f"{name}.{key}", field.annotation, values)
            continue
        value = values.get(f"{name}.{key}", field.get_default(call_default_factory=True))
        shown = f"{key} = {_toml(value)}" if value is not None else f'# {key} = "..."'
        lines += [f"# {field.description}", shown]
    return lines + tables


def _toml(value: Any) -> str:
    text = json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # which JSON takes as it is, and TOML does not


def _absolute(settings: Settings, home: Path) -> Settings:
    """Relative paths are relative to the config file, not to wherever the command was typed."""
    bot = settings.bot.model_copy(
        update={"state_dir": _expanded("bot.state_dir", settings.bot.state_dir, home)}
    )
    source = settings.source
    if source.path is not None:
        source = source.model_copy(update={"path": _expanded("source.path", source.path, home)})
    model = settings.model.model_copy(update={"base": _base(settings.model.base, home)})
    mlflow = settings.mlflow.model_copy(update={"tracking_uri": absolute(settings.mlflow.tracking_uri, home)})
    return settings.model_copy(update={"bot": bot, "source": source, "model": model, "mlflow": mlflow})


def _expanded(key: str, path: Path, home: Path) -> Path:
    try:
        return home / path.expanduser()
    except RuntimeError:  # ~nobody
        raise ConfigError(f'{key} = "{path}": there is no such account; write the whole path') from None


def _base(base: str, home: Path) -> str:
    """A local base as an absolute path, be it there now or not; hub and package names as they are."""
    if base.startswith("package:"):
        return base
    local = _expanded("model.base", Path(base), home)
    is_local = base.endswith(".gguf") or base.startswith(("/", "./", "../", "~")) or _may_exist(local)
    return str(local) if is_local else base


def _may_exist(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be entered: who reads it will say so
        return True


def _check_environment() -> None:
    """A misspelt override must not be ignored in silence."""
    for variable in os.environ:
        if not variable.startswith(ENV_PREFIX) or variable in (f"{ENV_PREFIX}CONFIG",):
            continue
        section, _, key = variable.removeprefix(ENV_PREFIX).lower().partition("__")
        field = Settings.model_fields.get(section)
        if field is None:
            raise ConfigError(f"{variable}: no section {section!r}{suggest(section, Settings.model_fields)}")
        known = getattr(field.annotation, "model_fields", None)
        if known is not None and key and key.split("__")[0] not in known:
            raise ConfigError(f"{variable}: no key {key!r} in [{section}]{suggest(key, known)}")


# What to write, where pydantic only names its type.
_FIXES = {
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "string_type": "should be text; write it in quotes",
    "path_type": "should be a path; write the path in quotes",
    "tuple_type": 'should be a list; write it like ["a", "b"]',
}
_UNQUOTED = ("int_type", "float_type", "bool_type")

# Where pydantic only shows the regular expression.
_PATTERNS = {
    "bot.name": "should be letters, digits, - and _, at most 64, and begin with a letter or a digit",
    "model.device": "should be auto, cpu, cuda or cuda:N",
}


def _explain(problem: Any) -> str:
    """One line: key, value, what is wrong, what to do."""
    key = setting = ".".join(str(part) for part in problem["loc"])
    variable = ENV_PREFIX + key.replace(".", "__").upper()
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{suggest(str(problem['loc'][-1]), _siblings(problem['loc']))}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if not key:  # two settings that contradict one another
        return str(message)
    if variable in os.environ:
        key = variable  # text is all right there, so no word about types
    elif problem["type"] == "model_type":
        message = f"should be a table; write its keys under [{key}]"
    else:
        message = _FIXES.get(problem["type"], message)
        if problem["type"] in _UNQUOTED and isinstance(problem["input"], str):
            message += ", without quotes"
    if problem["type"] == "string_pattern_mismatch":
        message = _PATTERNS.get(setting, message)
    if problem["loc"][0] == "mlflow":  # a password is where it should be only if all else is
        return f"{key} = (not shown, it may hold a password): {message}"
    return redact(f"{key} = {problem['input']!r}: {message}")


def _siblings(loc: tuple[str | int, ...]) -> list[str]:
    section: Any = Settings
    for part in loc[:-1]:
        field = section.model_fields.get(part)
        if field is None or not hasattr(field.annotation, "model_fields"):
            return list(TaskOverride.model_fields)
        section = field.annotation
    return list(section.model_fields)
