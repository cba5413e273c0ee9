"""What a training takes over from its parent: the adapter, the continual state, and what people should know.

A parent is the result directory of an earlier training; without one everything starts fresh. Methods
that are not active now have their state carried along untouched, so that they can be taken up again.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from torch.nn import Module

from strategies.contract import TrainJob, TrainReport, result_files
from strategies.model import Base, fresh_adapter, with_adapter


def adapter(base: Base, job: TrainJob) -> Module:
    """The parent's adapter, or a fresh one that changes nothing yet; trainable."""
    if job.parent is None:
        return fresh_adapter(base, job.lora, job.train.seed)
    return with_adapter(base, result_files(job.parent)["adapter"], trainable=True)


def carry_state(parent: str | None, into: Path, *, but: Collection[str]) -> None:
    """Copies the parent's continual state, but for the files that active methods write themselves."""
    if parent is None:
        return
    for path in sorted(result_files(parent)["state"].iterdir()):
        if path.name not in but:
            shutil.copy2(path, into / path.name)


def notes(job: TrainJob, files: dict[str, str]) -> list[str]:
    """Where this cycle differs from its parent. `files` are the active methods' state files, by method."""
    if job.parent is None:
        return []
    state = result_files(job.parent)["state"]
    said = [
        f"{method} begins with this cycle and knows nothing of earlier ones"
        for method, file in files.items()
        if not (state / file).exists()
    ]
    before = TrainReport.from_json(result_files(job.parent)["report"].read_text(encoding="utf-8")).strategy
    if before != job.strategy.name:
        said.insert(0, f"strategy changed from {before} to {job.strategy.name}")
    return said + _lora_notes(job)


def _lora_notes(job: TrainJob) -> list[str]:
    """An adapter that goes on keeps its shape; settings that ask for another one are named."""
    assert job.parent is not None
    config = json.loads(
        (result_files(job.parent)["adapter"] / "adapter_config.json").read_text(encoding="utf-8")
    )
    wanted = {"r": job.lora.rank, "lora_alpha": job.lora.alpha, "lora_dropout": job.lora.dropout}
    named = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    return [
        f"lora.{named[key]} = {value} was not used: the champion's adapter continues with {config[key]}"
        for key, value in wanted.items()
        if config[key] != value
    ]
