"""The base model as the daemon sees it: prepared once by the worker, then only a folder and a tokenizer.

Never imports torch: rows are measured with the tokenizers library alone.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from daemon.executor import Executor, OnProgress, Stop
from daemon.settings import Settings
from storage.errors import ConfigError, ModelError, ModelMissing
from strategies.base import is_away, prepared
from strategies.contract import ModelSpec, PreparedBase, PrepareJob
from strategies.tokens import count_tokens_factory


def base_folder(settings: Settings) -> Path:
    """Where the prepared base lives: one folder for every value that model.base ever had."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(settings.model.base).name).strip("-")[:40]
    key = hashlib.sha256(settings.model.base.encode()).hexdigest()[:8]
    return settings.state_dir / "models" / f"{name}-{key}"


def prepared_base(settings: Settings) -> PreparedBase | None:
    """What an earlier preparation left, or None when the base is to be prepared (again: it was edited)."""
    return prepared(base_folder(settings))


def prepare_base(settings: Settings, executor: Executor, on_progress: OnProgress, stop: Stop) -> PreparedBase:
    """Makes the base ready (a GGUF file is de-quantised) unless that was done before.

    Raises `ModelError` when model.base cannot be loaded, `ModelMissing` when it is not there now.
    """
    job = PrepareJob(base=settings.model.base, out=str(base_folder(settings)))
    return prepared_base(settings) or executor.prepare(job, on_progress, stop)


def check_champions_base(
    settings: Settings, base: PreparedBase, version: int | None, fingerprint: str | None
) -> None:
    """Raises `ConfigError` when the champion, which has that version and base, is not for this one."""
    if version is not None and fingerprint != base.fingerprint:
        raise ConfigError(
            f"model.base = {settings.model.base!r} is not the base of champion version {version}; set it "
            "back, or start a new bot with another bot.state_dir and bot.name"
        )


def located(settings: Settings, spec: ModelSpec) -> ModelSpec:
    """The spec with the place where its base is now: the state directory may have moved.

    Raises `ModelMissing` when it is not there now, and `ModelError` when there is none that is still what
    it was: adapters belong to one base.
    """
    for folder in (settings.state_dir / "models").glob("*"):
        base = prepared(folder)
        if base is not None and base.fingerprint == spec.fingerprint:
            return replace(spec, path=base.path)
    if is_away(Path(spec.path)):
        raise ModelMissing(
            f"the base model is not at {spec.path} now; is it mounted? Else put its files back"
        )
    raise ModelError(
        f"the base model at {spec.path} is not what it was (fingerprint {spec.fingerprint[:12]}); put its "
        "files back, or start a new bot with another bot.state_dir and bot.name"
    )


def length_counter(settings: Settings, base: PreparedBase) -> Callable[[str, str], int]:
    """(prompt text, answer) → tokens, everything that the prompt puts around them included."""
    count = count_tokens_factory(base)
    system = count(settings.model.system_prompt, "") - base.template_tokens
    return lambda prompt, answer: count(prompt, answer) + system


def token_limit(settings: Settings, base: PreparedBase) -> int:
    return min(settings.model.max_tokens, base.context_tokens)
