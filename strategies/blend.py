"""Adapters between the champion's and a candidate's: no training, only arithmetic on their weights.

θ(α) = θ_champion + α (θ_candidate − θ_champion), as WiSE-FT does with whole models (Wortsman et al.
2021, arXiv 2109.01903). The candidate continued from the champion, so the two lie on one trajectory and
LoRA's factors may be averaged one by one; adapters of other shapes may not, and are refused.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from storage import artifacts
from storage.errors import ModelError
from strategies.contract import BlendJob, Progress, blended, result_files
from strategies.model import adapter_config

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What decides which update the factors stand for; with other values they cannot be averaged.
_SHAPE: tuple[str, ...] = ("peft_type", "r", "lora_alpha", "target_modules", "use_dora", "use_rslora")
_SHAPE += ("rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "modules_to_save")


def blend(job: BlendJob, on_progress: Callable[[Progress], None]) -> None:
    """Writes one adapter a share; complete or not at all, and found again when it is there.

    Raises `ModelError` when the adapters cannot be averaged, `IntegrityError` when one of the results is
    not what was written.
    """
    out = Path(job.out)
    if artifacts.made_for(out, job.digest):
        return
    for given in (job.champion, job.candidate):
        artifacts.verify(given)
    ends = [result_files(given)["adapter"] for given in (job.champion, job.candidate)]
    _check_config(*ends)
    champion, candidate = (_load(end / WEIGHTS) for end in ends)
    _check_shapes(champion, candidate)
    with artifacts.atomic_dir(out, {"job": job.digest}) as folder:
        for n, share in enumerate(job.shares):
            on_progress(Progress(stage="blend", step=n, steps=len(job.shares)))
            adapter = blended(folder, share)
            adapter.mkdir(parents=True)
            save_file(between(champion, candidate, share), adapter / WEIGHTS, metadata={"format": "pt"})
            shutil.copy2(ends[1] / CONFIG, adapter / CONFIG)


def between(champion: dict[str, Tensor], candidate: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """champion + share × (candidate − champion), tensor by tensor, computed in float32."""
    return {
        name: torch.lerp(start.float(), candidate[name].float(), share).to(start.dtype).contiguous()
        for name, start in sorted(champion.items())
    }


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter {path} cannot be read: {error}; run `daemon doctor`") from error


def _check_config(champion: Path, candidate: Path) -> None:
    one, other = adapter_config(champion), adapter_config(candidate)
    for key in _SHAPE:
        if one.get(key) != other.get(key):
            raise ModelError(
                f"adapters of other shapes cannot be blended: the champion's {key} is {one.get(key)}, "
                f"the candidate's {other.get(key)}"
            )


def _check_shapes(champion: dict[str, Tensor], candidate: dict[str, Tensor]) -> None:
    different = {
        name
        for name in champion.keys() | candidate.keys()
        if name not in champion or name not in candidate or champion[name].shape != candidate[name].shape
    }
    if different:
        raise ModelError(f"adapters of other shapes cannot be blended: they differ in {min(different)}")
