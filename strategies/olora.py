"""O-LoRA: each cycle learns an adapter of its own, orthogonal to all before it; the model adds them up.

    loss + λ Σ_layers ‖A_new A_oldᵀ‖²

Wang et al. 2023 (arXiv 2310.14152, eq. 7–8). The sum of adapters of rank r is one adapter whose factors
stand side by side, so what is saved is an ordinary adapter, whose rank grows by r in every cycle.
"""

from pathlib import Path
from typing import Any

import torch

from strategies.contract import result_files
from strategies.method import Method
from strategies.model import adapter_config, trainable


class OLora(Method):
    """No state: the old adapters are the first rows of A and the first columns of B."""

    old = 0  # their rank together

    def load(self, state: Path) -> None:
        super().load(state)
        self.old = int(adapter_config(result_files(state.parent)["adapter"])["r"])

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.kept = {name: part.clone() for name, part in self._old_parts(strategy).items()}

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        if not self.old or not strategy.last_pass:
            return
        factors = [p for name, p in trainable(strategy.model).items() if ".lora_A." in name]
        overlaps = [(a[self.old :] @ a[: self.old].detach().T).square().sum() for a in factors]
        strategy.penalise(self.spec.olora_lambda * torch.stack(overlaps).sum())

    @torch.no_grad()
    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Old adapters do not learn, and their gradients have no say in the clipping."""
        for name, p in trainable(strategy.model).items():
            if p.grad is not None:
                self._part(name, p.grad).zero_()

    @torch.no_grad()
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Whatever the optimiser did to them (weight decay, momentum) is undone."""
        for name, part in self._old_parts(strategy).items():
            part.copy_(self.kept[name])

    def _old_parts(self, strategy: Any) -> dict[str, torch.Tensor]:
        return {name: self._part(name, p.detach()) for name, p in trainable(strategy.model).items()}

    def _part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: self.old] if ".lora_A." in name else tensor[:, : self.old]
