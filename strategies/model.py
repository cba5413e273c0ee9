"""The base model and its LoRA adapters: load, make, save. The only importer of peft.

Weights come from safetensors only, code never comes from a model. The base is frozen: what trains is
what `trainable` returns, and nothing else.
"""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch.nn import Module, Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from storage.errors import UNREADABLE, ModelError
from strategies.contract import LoraSpec, ModelSpec
from strategies.text import Prompter

ALL_LINEAR = "all-linear"  # every linear layer but the one that makes the logits
UNLIMITED = 1_000_000  # tokens: the context of a model that names none
_CPU_INFO = Path("/proc/cpuinfo")
# Instructions without which bfloat16 on a CPU is emulated, many times slower than float32.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True, kw_only=True)
class Base:
    """A loaded base, ready for adapters."""

    spec: ModelSpec
    model: Module
    prompter: Prompter
    device: torch.device

    @property
    def context_tokens(self) -> int:
        return context_tokens(self.model)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 arithmetic where it was asked for or the hardware has it; what learns stays float32."""
        if not uses_bfloat16(self.spec.dtype, self.device):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def load_base(spec: ModelSpec) -> Base:
    """The base in evaluation mode, frozen. Raises `ModelError` when it cannot be loaded."""
    device = torch.device(choose_device(spec.device))
    model, tokenizer = load_folder(spec.path)
    model.requires_grad_(False)
    model.config.use_cache = False  # packing and training need it off; generation asks for it
    model.generation_config = GenerationConfig()  # a base's own (sampling, penalties) would not be greedy
    if uses_bfloat16(spec.dtype, device):
        _round_once(model)
    return Base(
        spec=spec,
        model=model.to(device).eval(),
        prompter=Prompter(tokenizer, spec.system_prompt, min(spec.max_tokens, context_tokens(model))),
        device=device,
    )


def _round_once(model: Any) -> None:
    """Frozen weights that autocast would round to bfloat16 in every pass are rounded here: the same numbers.

    Not those that embeddings share (tied heads): these are looked up, and a look-up is not rounded.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in looked_up:
            module.weight.data = module.weight.data.bfloat16()


def load_folder(path: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model (float32, as transformers makes it) and tokenizer of a local folder.

    Raises `ModelError` when something is damaged or missing; weights are never made up.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    safely: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **safely
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **safely)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"the base model at {path} cannot be loaded: {error}; check model.base and `free -m`"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"the base model at {path} lacks {len(missing)} of its weights, {missing[0]} first")
    return model, tokenizer


def context_tokens(model: Any) -> int:
    """The longest sequence that the model takes."""
    # A multimodal model's limit is in the text part of its configuration.
    named = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(int(named or UNLIMITED), UNLIMITED)


def fresh_adapter(base: Base, lora: LoraSpec, seed: int) -> PeftModel:
    """A new adapter that changes nothing yet; drawn from `seed`.

    `zero`: B is zero (Hu et al. 2021). `orthogonal`: A's columns and B's rows lie in orthogonal halves of the
    rank's space, so that BA is zero while both can learn from the first step (PEFT's own option; the rank
    must be even). PEFT's other starts (PiSSA, CorDA, …) rewrite the base, which must stay as it is.
    """
    torch.manual_seed(seed)
    targets = ALL_LINEAR if lora.targets == ALL_LINEAR else _names(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights="orthogonal" if lora.init == "orthogonal" else True,
    )
    try:
        return _lean(get_peft_model(base.model, config))
    except ValueError as error:
        raise ModelError(f"lora.targets = {lora.targets!r} does not fit this base: {error}") from error


def with_adapter(base: Base, folder: Path, *, trainable: bool) -> PeftModel:
    """The base with a saved adapter. Raises `ModelError` when the adapter is damaged or of another base."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(f"there is no adapter_model.safetensors in {folder}; run `daemon doctor`")
    adapter_config(folder)  # PEFT takes a damaged one for another kind of adapter, or for none
    try:
        with safe_open(weights, "pt") as file:
            found = set(file.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing weights: refused below
            model = PeftModel.from_pretrained(
                base.model, str(folder), is_trainable=trainable, torch_device=str(base.device)
            )
            wanted = set(_factors(model))
    except (*UNREADABLE, RuntimeError, SafetensorError, re.error) as error:  # some of its names are patterns
        raise ModelError(
            f"the adapter in {folder} cannot be loaded on this base: {error}; run `daemon doctor`"
        ) from error
    if different := found ^ wanted:
        model.unload()
        raise ModelError(
            f"the adapter in {folder} is not whole or of another base: {min(different)}; run `daemon doctor`"
        )
    return _lean(model)


def _lean(model: PeftModel) -> PeftModel:
    """Without PEFT's cast of each layer's input to the adapter's float32, which autocast undoes at once."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    return model


def adapter_config(folder: Path) -> dict[str, Any]:
    """What PEFT wrote about a saved adapter. Raises `ModelError` when it is damaged."""
    path = folder / "adapter_config.json"
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(config["r"], int) or not {*config["target_modules"]}:
            raise ValueError("it has no rank or no target modules")
        return config
    except UNREADABLE as error:
        raise ModelError(f"the adapter's {path} cannot be read: {error!r}; run `daemon doctor`") from None


def grown_adapter(base: Base, folder: Path, lora: LoraSpec, seed: int) -> PeftModel:
    """A saved adapter beside a fresh one of `lora.rank`, as one adapter that changes nothing more yet.

    BA + B'A' = [B, B'] [A; A']; alpha grows with the rank, so that the scale of the old one stays. It sits
    where the old one sits, whatever `lora.targets` says: on fewer layers, some of the old one would be lost.
    """
    old = with_adapter(base, folder, trainable=False)
    config, weights = old.peft_config["default"], _factors(old)
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    old.unload()
    rank, alpha = config.r + lora.rank, config.lora_alpha * (config.r + lora.rank) / config.r
    if alpha != round(alpha):
        raise ModelError(f"lora.rank = {lora.rank} does not fit beside an adapter of rank {config.r}")
    targets = ",".join(sorted(config.target_modules))
    shape = replace(lora, rank=rank, alpha=round(alpha), targets=targets, init="zero")
    grown = fresh_adapter(base, shape, seed)
    check_linear(grown, "olora")
    with torch.no_grad():
        for name, tensor in _factors(grown).items():
            part = tensor[: config.r] if ".lora_A." in name else tensor[:, : config.r]
            part.copy_(weights[name])
    return grown


def check_linear(model: PeftModel, method: str) -> None:
    """Raises `ModelError` for an adapter that also sits on embeddings, which the method would not see."""
    for name in _factors(model):
        if ".lora_embedding_" in name:
            raise ModelError(
                f"{method} needs adapters on linear layers alone, and this one has {name}; take {method} "
                "out of strategy.methods, or start a new bot with other lora.targets"
            )


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """A linear layer with its adapter: y = Wx + scaling · B A x."""

    module: Module
    a: Parameter  # [r, in]
    b: Parameter  # [out, r]
    scaling: float


def lora_layers(model: Module) -> dict[str, LoraLayer]:
    """The adapted layers by name, in a fixed order."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            adapter = module.active_adapters[0]
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            found[name] = LoraLayer(module=module, a=a, b=b, scaling=module.scaling[adapter])
    return found


def without_adapter(model: PeftModel) -> Module:
    """The base again, as it was before the adapter."""
    return model.unload()


def save_adapter(model: PeftModel, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json. The same adapter gives the same bytes."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text())
    values["base_model_name_or_path"] = None  # a path of this machine
    values["target_modules"] = sorted(values["target_modules"])  # a set's order, other in every process
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _factors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors as they are saved: without the embeddings that it may sit on, of the base."""
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def trainable(model: Module) -> dict[str, Parameter]:
    """The parameters that learn, by name, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def follows_targets(model: Module, targets: str) -> bool:
    """Whether the adapter sits on the modules that `lora.targets` names, and on no others."""
    beneath: Any = model.get_base_model
    inner = beneath()
    parts = {n: m for n, m in inner.named_modules() if ".base_layer" not in n and ".lora_" not in n}
    if targets == ALL_LINEAR:
        head, linear = inner.get_output_embeddings(), (torch.nn.Linear, Conv1D)
        wanted = {
            n for n, m in parts.items() if m is not head and isinstance(getattr(m, "base_layer", m), linear)
        }
    else:
        ends = tuple(f".{name}" for name in _names(targets))
        wanted = {name for name in parts if f".{name}".endswith(ends)}
    return wanted == {name for name, module in parts.items() if isinstance(module, BaseTunerLayer)}


def _names(targets: str) -> list[str]:
    return [name.strip() for name in targets.split(",")]


def uses_bfloat16(dtype: str, device: torch.device) -> bool:
    """Decided by flags, not by timing: the same machine must give the same adapter."""
    if dtype != "auto":
        return dtype == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(_cpu_flags() & _BFLOAT16_FLAGS)


@contextlib.contextmanager
def deterministic(seed: int, threads: int, device: str = "cpu") -> Iterator[None]:
    """Seeds torch's generators; same machine and number of threads, same result."""
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches: Any = torch.utils.deterministic  # a module made of properties, which mypy does not see
    filling = switches.fill_uninitialized_memory
    switches.fill_uninitialized_memory = False  # a debugging aid that costs a sixth of a step
    try:
        with _attention(choose_device(device)):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        switches.fill_uninitialized_memory = filling


def _attention(device: str) -> AbstractContextManager[Any]:
    """On CUDA the fused kernels sum their gradients in another order at every run; the plain one does not."""
    return sdpa_kernel(SDPBackend.MATH) if device.startswith("cuda") else contextlib.nullcontext()


def choose_device(wanted: str) -> str:
    """`auto` made definite. Raises `ModelError` for a GPU that is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"model.device = {wanted!r}, but torch sees no GPU; set it to auto")
    return wanted


def _cpu_flags() -> set[str]:
    try:
        text = _CPU_INFO.read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return set(line.split())
