"""What a training takes over from its parent: the adapter, the continual state, and what people should know.

A parent is the result directory of an earlier training; without one everything starts fresh. Methods
that are not active now have their state carried along, so that they can be taken up again.
"""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch.nn import Module

from strategies import combinations, replay_memory, replay_policies
from strategies.batches import Example
from strategies.contract import LoraSpec, TrainJob, TrainReport, result_files
from strategies.der import Der
from strategies.model import (
    Base,
    adapter_config,
    follows_targets,
    fresh_adapter,
    grown_adapter,
    with_adapter,
)
from strategies.replay import Replay, room, seen

_ABOUT_ROWS = {Replay.file, Der.file}  # the rest is about parameters


def adapter(base: Base, job: TrainJob) -> Module:
    """The parent's adapter, or a fresh one that changes nothing yet; trainable."""
    if job.parent is None or "joint" in job.strategy.methods:
        return fresh_adapter(base, job.lora, job.train.seed)
    if "olora" in job.strategy.methods:
        return grown_adapter(base, result_files(job.parent)["adapter"], job.lora, job.train.seed)
    return with_adapter(base, result_files(job.parent)["adapter"], trainable=True)


def carry_state(job: TrainJob, into: Path, *, but: Collection[str], new: Sequence[Example]) -> None:
    """Copies the parent's continual state, but for the files that active methods write themselves.

    A memory at rest takes in the new rows all the same, so that later they can be rehearsed. What is about an
    adapter's parameters stays behind when the adapter does not go on as it was.
    """
    if job.parent is None:
        return
    for path in _kept(job):
        if path.name not in but:
            shutil.copy2(path, into / path.name)
    memory = replay_memory.load(into)
    if memory is not None:
        spec, rows = job.strategy, [seen(row) for row in new]
        replay_memory.save(replay_policies.after(memory, rows, room(spec), spec.replay_policy), into)


def _kept(job: TrainJob) -> list[Path]:
    """The parent's state files that the new adapter has a use for."""
    assert job.parent is not None
    files = sorted(result_files(job.parent)["state"].iterdir())
    if combinations.UNBLENDABLE.intersection(job.strategy.methods):
        return [path for path in files if path.name in _ABOUT_ROWS]
    return files


def notes(job: TrainJob, model: Module, files: dict[str, str]) -> list[str]:
    """Where this cycle differs from its parent. `files` are the active methods' state files, by method."""
    if job.parent is None:
        return []
    state = result_files(job.parent)["state"]
    before = TrainReport.read(result_files(job.parent)["report"]).strategy
    said = []
    if before != job.strategy.name:
        said.append(f"strategy changed from {before} to {job.strategy.name}")
    for method, file in files.items():
        if not (state / file).exists():
            said.append(f"{method} begins with this cycle and knows nothing of earlier ones")
        elif method not in before.split("+") and file != replay_memory.FILE:
            said.append(f"{method} was at rest and knows nothing of the cycles that were learned meanwhile")
    kept = {path.name for path in _kept(job)} | set(files.values())
    said += [
        f"{path.name} was left behind: it is about the parameters of an adapter that does not go on"
        for path in sorted(state.iterdir())
        if path.name not in kept
    ]
    return said if "joint" in job.strategy.methods else said + _lora_notes(job, model)


def _lora_notes(job: TrainJob, model: Module) -> list[str]:
    """An adapter that goes on keeps its shape, and one that grows its places; settings that ask for others
    are named."""
    assert job.parent is not None
    config = adapter_config(result_files(job.parent)["adapter"])
    grows = "olora" in job.strategy.methods
    lora, layers = job.lora, sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    settings = [  # name, what is asked for, what the adapter has, whether they differ
        ("rank", lora.rank, config["r"], lora.rank != config["r"]),
        ("alpha", lora.alpha, config["lora_alpha"], _alpha_differs(lora, config, grows=grows)),
        ("dropout", lora.dropout, config["lora_dropout"], lora.dropout != config["lora_dropout"]),
        ("targets", lora.targets, ", ".join(layers), not follows_targets(model, lora.targets)),
    ]
    return [
        f"lora.{name} = {asked} was not used: the champion's adapter continues with {kept}"
        for name, asked, kept, differs in settings
        if differs and (name in ("targets", "alpha") or not grows)
    ]


def _alpha_differs(lora: LoraSpec, config: dict[str, Any], *, grows: bool) -> bool:
    """Of an adapter that grows, alpha grows with the rank: what must not change is alpha / rank."""
    if grows:
        return lora.alpha * int(config["r"]) != lora.rank * int(config["lora_alpha"])
    return lora.alpha != int(config["lora_alpha"])
