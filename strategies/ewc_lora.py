"""EWC in the space of the weights: the product ΔW = sBA is held where it mattered, not its factors.

    loss + λ/2 Σ F (ΔW − ΔW*)²

After EWC-LoRA (arXiv 2602.17559): what a model says depends on BA, and many B and A give the same. The
diagonal Fisher information of ΔW is as large as the model; here it is kept as the sums of its rows and of
its columns, F ≈ r cᵀ / Σr, as Adafactor keeps second moments (Shazeer & Stern 2018, arXiv 1804.04235).
Neither F nor ΔW is ever formed. ΔW* is the adapter that the training starts from: one anchor for all of the
past, whose importances add up, as online EWC without fading.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage.errors import UNREADABLE, IntegrityError, ModelError
from strategies.batches import Example, collate, nll
from strategies.ewc import check_finite, choose
from strategies.method import Method, in_batches
from strategies.model import LoraLayer, check_linear, lora_layers

_FIRST = "1"  # of the files that have no number, too
FORMAT = _FIRST  # of the file

Sums = dict[str, tuple[Tensor, Tensor]]  # layer → row sums [out], column sums [in]


class EwcLora(Method):
    """State: two vectors a layer, however many experiences they stand for."""

    file = "ewc_lora.safetensors"
    sums: Sums | None = None

    def load(self, state: Path) -> None:
        super().load(state)
        path = state / self.file
        self.sums = load(path) if path.exists() else None

    def save(self, state: Path) -> None:
        if self.sums is not None:
            save(self.sums, state / self.file)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        check_linear(strategy.model, "ewc-lora")
        layers = lora_layers(strategy.model)
        self.anchor = {
            name: (layer.a.detach().clone(), layer.b.detach().clone()) for name, layer in layers.items()
        }
        if self.sums is not None:
            _check_fit(self.sums, layers)
            self.sums = {
                name: (r.to(strategy.device), c.to(strategy.device)) for name, (r, c) in self.sums.items()
            }

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        if self.sums is None or not strategy.last_pass:
            return
        terms = [
            layer.scaling**2 * weighed_square(*self.sums[name], *_change(layer, *self.anchor[name]))
            for name, layer in lora_layers(strategy.model).items()
        ]
        strategy.penalise(self.spec.ewc_lambda / 2 * torch.stack(terms).sum())

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        rows = choose(strategy.experience.new, self.spec.fisher_rows, self.seed)
        fresh = _relative(fisher_sums(strategy, rows), lora_layers(strategy.model))
        if self.sums is None:
            self.sums = fresh
        else:
            self.sums = {name: (r + fresh[name][0], c + fresh[name][1]) for name, (r, c) in self.sums.items()}


def weighed_square(rows: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σᵢⱼ rᵢ cⱼ (LR)ᵢⱼ² / Σr for L [out, k] and R [k, in], in k × k space: tr((LᵀrL)(RcRᵀ)) / Σr."""
    among_rows = left.T @ (rows.unsqueeze(1) * left)
    among_columns = (right * columns) @ right.T
    return (among_rows * among_columns).sum() / rows.sum().clamp(min=torch.finfo(rows.dtype).tiny)


def _change(layer: LoraLayer, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """BA − B*A* as one product, [B−B*, B*] [A; A−A*]: without subtracting nearly equal products."""
    return torch.cat([layer.b - b, b], dim=1), torch.cat([layer.a, layer.a - a])


def fisher_sums(strategy: Any, rows: Sequence[Example]) -> Sums:
    """Row and column sums of the mean over rows of (∂ log p(answer | question) / ∂ΔW)².

    A row's gradient is G = Σₜ δₜ xₜᵀ over its tokens, x a layer's input and δ the gradient of its output;
    Σⱼ Gᵢⱼ² = δᵢᵀ (XXᵀ) δᵢ needs tokens × tokens only. Rows of a batch do not touch each other's x and δ.
    """
    layers = lora_layers(strategy.model)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = arguments[0].detach(), output

        return hook

    hooks = [layer.module.register_forward_hook(remember(name)) for name, layer in layers.items()]
    total = {
        name: (torch.zeros_like(layer.b[:, 0]), torch.zeros_like(layer.a[0]))
        for name, layer in layers.items()
    }
    try:
        for chosen in in_batches(strategy, rows, "fisher"):
            batch = collate(chosen, strategy.base.prompter.pad_id).to(strategy.device)
            with strategy.base.autocast():
                loss, _ = nll(strategy.model, batch)
            names = list(outputs)
            slopes = torch.autograd.grad(loss, [outputs[name] for name in names], allow_unused=True)
            for name, slope in zip(names, slopes, strict=True):
                if slope is not None:
                    if slope.dim() != 3:
                        raise ModelError(
                            f"the layer {name} sees tokens without their rows (a mixture of experts?), and "
                            "ewc-lora needs them apart; take it out of strategy.methods"
                        )
                    _add(total[name], inputs[name].float(), slope.float())
    finally:
        for hook in hooks:
            hook.remove()
    check_finite(t for pair in total.values() for t in pair)
    return {name: (r / len(rows), c / len(rows)) for name, (r, c) in total.items()}


def _add(total: tuple[Tensor, Tensor], x: Tensor, slope: Tensor) -> None:
    """x [B, T, in] and slope [B, T, out] of a batch."""
    total[0].add_(((x @ x.mT) @ slope).mul_(slope).sum(dim=(0, 1)))
    total[1].add_(((slope @ slope.mT) @ x).mul_(x).sum(dim=(0, 1)))


def _relative(sums: Sums, layers: Mapping[str, LoraLayer]) -> Sums:
    """Scaled so that Σ F ΔW² is 1: λ then is the price of losing all of what was learned, on any model."""
    with torch.no_grad():
        whole = sum(
            float(layer.scaling**2 * weighed_square(*sums[name], layer.b, layer.a))
            for name, layer in layers.items()
        )
    return {name: (r / whole, c / whole) for name, (r, c) in sums.items()} if whole > 0 else sums


def _check_fit(sums: Sums, layers: Mapping[str, LoraLayer]) -> None:
    expected = {name: (len(layer.b), layer.a.shape[1]) for name, layer in layers.items()}
    if expected != {name: (len(r), len(c)) for name, (r, c) in sums.items()}:
        raise IntegrityError(
            "the EWC state belongs to an adapter on other layers; roll back to a version that has both, "
            "or take ewc-lora out of strategy.methods"
        )


def save(sums: Sums, path: Path) -> None:
    tensors = {f"rows/{name}": r.cpu().contiguous() for name, (r, _) in sums.items()}
    tensors |= {f"columns/{name}": c.cpu().contiguous() for name, (_, c) in sums.items()}
    save_file(tensors, path, metadata={"format": FORMAT})


def load(path: Path) -> Sums:
    """Raises `IntegrityError` when the file is damaged, or of a format that is not known."""
    try:
        with safe_open(path, "pt") as file:
            if (found := (file.metadata() or {}).get("format", _FIRST)) != FORMAT:
                raise ValueError(f"format {found}, known is {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = [name.removeprefix("rows/") for name in tensors if name.startswith("rows/")]
        return {name: (tensors[f"rows/{name}"], tensors[f"columns/{name}"]) for name in names}
    except (*UNREADABLE, SafetensorError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}); run `daemon doctor`") from None
