"""Sums of quadratics around past parameters, kept as one quadratic: H, its centre m, and a constant c.

Σᵢ Fᵢ(θ−θᵢ)² = H(θ−m)² + c, element by element, with H = ΣFᵢ. Exact, and as large after a hundred
experiences as after one. Knows tensors by parameter name; no model, no training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage.errors import UNREADABLE, IntegrityError

FORMAT = "2"  # of the file

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """Every tensor in float32, so that what is saved is what was used. Where H is 0, m does not matter."""

    curvature: Tensors  # H
    centre: Tensors  # m
    constant: float = 0.0  # c

    def at(self, parameters: Tensors) -> Tensor:
        """Σ H(θ−m)² + c, differentiable in θ."""
        terms = [
            (h * (parameters[name] - self.centre[name]).square()).sum() for name, h in self.curvature.items()
        ]
        return torch.stack(terms).sum() + self.constant

    @torch.no_grad()
    def plus(self, curvature: Tensors, centre: Tensors) -> "Quadratic":
        """This plus Σ F(θ−θ₀)².

        The textbook m = (Σ Fᵢθᵢ)/H and c = Σ Fᵢθᵢ² − Hm² subtract large, nearly equal numbers; here m moves
        from the old centre towards θ₀ by the weight F/H, and c grows by what the two centres disagree.
        """
        total, moved, constant = {}, {}, self.constant
        for name, old in self.curvature.items():
            new, gap = curvature[name], centre[name] - self.centre[name]
            total[name] = old + new
            weight = torch.where(total[name] > 0, new / total[name], 1.0)  # flat on both sides: take θ₀
            moved[name] = self.centre[name] + weight * gap
            constant += float((old * weight * gap.square()).sum(dtype=torch.float64))
        return Quadratic(curvature=total, centre=moved, constant=constant)

    def faded(self, decay: float) -> "Quadratic":
        """The same valley, `decay` times as steep."""
        flatter = {name: decay * h for name, h in self.curvature.items()}
        return Quadratic(curvature=flatter, centre=self.centre, constant=decay * self.constant)

    def to(self, device: torch.device) -> "Quadratic":
        return Quadratic(
            curvature={name: h.to(device) for name, h in self.curvature.items()},
            centre={name: m.to(device) for name, m in self.centre.items()},
            constant=self.constant,
        )


def relative(curvature: Tensors, centre: Tensors) -> dict[str, Tensor]:
    """Curvature scaled so that Σ H m² is 1: a penalty λ/2 Σ H(θ−m)² then costs λ/2 when all is lost (θ = 0),
    whatever the model, its gradients and its number of parameters."""
    whole = sum(float((h * centre[name].square()).sum(dtype=torch.float64)) for name, h in curvature.items())
    return {name: h / whole for name, h in curvature.items()} if whole > 0 else dict(curvature)


def check_fit(past: Quadratic, parameters: Mapping[str, Tensor], method: str) -> None:
    """Raises `IntegrityError` when the state belongs to other parameters."""
    expected = {name: p.shape for name, p in parameters.items()}
    if expected != {name: h.shape for name, h in past.curvature.items()}:
        raise IntegrityError(
            f"the {method.upper()} state belongs to an adapter of another shape; roll back to a version that "
            f"has both, or take {method} out of strategy.methods"
        )


def save(quadratic: Quadratic, path: Path) -> None:
    tensors = {f"curvature/{name}": h.detach().cpu().contiguous() for name, h in quadratic.curvature.items()}
    tensors |= {f"centre/{name}": m.detach().cpu().contiguous() for name, m in quadratic.centre.items()}
    tensors["constant"] = torch.tensor([quadratic.constant], dtype=torch.float64)
    save_file(tensors, path, metadata={"format": FORMAT})


def load(path: Path) -> Quadratic:
    """Raises `IntegrityError` when the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise KeyError(f"not of format {FORMAT}, whose curvature is relative")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        curvature, centre = _under("curvature/", tensors), _under("centre/", tensors)
        if {n: h.shape for n, h in curvature.items()} != {n: m.shape for n, m in centre.items()}:
            raise ValueError("centres and curvatures are of different parameters")
        return Quadratic(curvature=curvature, centre=centre, constant=float(tensors["constant"]))
    except (*UNREADABLE, SafetensorError, RuntimeError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}); run `daemon doctor`") from None


def _under(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
