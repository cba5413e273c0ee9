"""Where a training stands, on disk: enough to continue to the very adapter it would have made.

Tensors (adapter, optimiser, random states) are a safetensors file, the rest is `checkpoint.json`, which
names that file with its hash and is replaced last: whatever a crash leaves, it names a whole checkpoint.
Nothing is ever unpickled. Knows no method and no Avalanche.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.optim import Optimizer

from storage.artifacts import make_folder, write_file
from storage.errors import UNREADABLE, IntegrityError
from strategies.contract import CurvePoint, TrainJob
from strategies.model import choose_device, uses_bfloat16

FORMAT = 1
INFO = "checkpoint.json"


@dataclass(kw_only=True)
class Course:
    """How far a training has come. The one record here that changes as it goes."""

    epoch: int = 0
    step: int = 0  # optimiser steps done in this epoch
    steps: int = 0  # in all epochs
    validation_losses: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    resumed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def stale_epochs(self) -> int:
        """Epochs since the best validation loss."""
        return 0 if self.best_epoch is None else len(self.validation_losses) - 1 - self.best_epoch

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Course":
        return cls(**{**values, "curve": [CurvePoint.from_dict(point) for point in values["curve"]]})


def arithmetic(job: TrainJob) -> str:
    """What decides the last bits beside the job: kind of processor, number format, threads and torch."""
    device = torch.device(choose_device(job.model.device))
    numbers = "bfloat16" if uses_bfloat16(job.model.dtype, device) else "float32"
    threads = job.train.threads or torch.get_num_threads()
    return f"{device.type} in {numbers} with {threads} threads and torch {torch.__version__}"


class Checkpoints:
    """The newest checkpoint of one job in its `work` directory; those of other jobs are not seen."""

    def __init__(self, folder: Path, job: TrainJob) -> None:
        self.folder = Path(folder)
        self._job = job.digest
        self._made_on = arithmetic(job)

    def save(self, course: Course, tensors: dict[str, Tensor]) -> None:
        make_folder(self.folder)
        data = save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        digest = hashlib.sha256(data).hexdigest()
        name = f"checkpoint-{course.steps}-{digest[:8]}.safetensors"
        write_file(self.folder / name, data)
        info = {"format": FORMAT, "job": self._job, "made_on": self._made_on}
        info |= {"tensors": name, "sha256": digest}
        write_file(self.folder / INFO, json.dumps({**info, "course": dataclasses.asdict(course)}))
        self._tidy(keep=name)

    def load(self) -> tuple[Course, dict[str, Tensor]] | None:
        """What was saved last, or None. Raises `IntegrityError` when it is damaged, or was made in another
        arithmetic, in which the training would end in an adapter of neither."""
        path = self.folder / INFO
        if not path.exists():
            return None
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            if (info["format"], info["job"]) != (FORMAT, self._job):
                return None
            data = (self.folder / info["tensors"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != info["sha256"]:
                raise ValueError(f"{info['tensors']} was changed")
            made_on = info.get("made_on", self._made_on)  # the oldest do not say
            if made_on != self._made_on:
                told = f"the checkpoint {path} was made on {made_on}, this is {self._made_on}"
                raise IntegrityError(f"{told}; move it aside, and the training begins again")
            return Course.from_dict(info["course"]), load_tensors(data)
        except (*UNREADABLE, SafetensorError) as error:
            raise IntegrityError(
                f"the checkpoint {path} is damaged: {error}; move it aside, and the training begins again"
            ) from None

    def clear(self) -> None:
        (self.folder / INFO).unlink(missing_ok=True)
        self._tidy(keep=None)

    def _tidy(self, keep: str | None) -> None:
        for pattern in ("checkpoint-*.safetensors", ".checkpoint*.tmp"):
            for leftover in self.folder.glob(pattern):
                if leftover.name != keep:
                    leftover.unlink(missing_ok=True)


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts, as `PART/NAME`; `under` takes one apart again."""
    return {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimiser's state by parameter name, as `NAME/KEY`."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], saved: dict[str, Tensor]
) -> None:
    for name, parameter in parameters.items():
        for key, value in under(f"{name}/", saved).items():
            # Step counters stay on the CPU, where AdamW keeps them; moments go to their parameter.
            optimizer.state[parameter][key] = value.to(parameter.device) if value.ndim else value


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


@torch.no_grad()
def put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Writes values into parameters. Raises `IntegrityError` unless names and shapes are the same."""
    if {n: p.shape for n, p in parameters.items()} != {n: v.shape for n, v in values.items()}:
        raise IntegrityError("the checkpoint belongs to an adapter of another shape")
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
