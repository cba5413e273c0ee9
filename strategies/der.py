"""Dark experience replay: remembered rows come with what the model thought of them when they were learned.

    loss + α Σ T² KL(then ‖ now) over replayed rows

Buzzega et al. 2020 (arXiv 2004.07211), DER++: replayed rows count with their labels and with their logits.
The paper compares whole logits by their squares; of a language model's vocabulary only the likeliest tokens
can be kept, so it is a divergence here (`strategies.distill`). The logits are those at the end of the
experience, where the paper has those of the step.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage.errors import UNREADABLE, IntegrityError
from strategies import distill
from strategies.contract import StrategySpec
from strategies.distill import Opinion
from strategies.method import Method
from strategies.replay import Rehearsal

FORMAT = 1  # of the file; one without a number is of the first


class Der(Method):
    """State: an opinion for each remembered row. Works with `replay`, whose memory it follows."""

    file = "der.safetensors"

    def __init__(self, spec: StrategySpec, seed: int) -> None:
        super().__init__(spec, seed)
        self.opinions: dict[str, Opinion] = {}

    def load(self, state: Path) -> None:
        super().load(state)
        path = state / self.file
        self.opinions = load(path) if path.exists() else {}

    def save(self, state: Path) -> None:
        if self.opinions:
            save(self.opinions, state / self.file)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        terms = [
            distill.divergence(distill.own(strategy.mb_output[n], row), self.opinions[row.row_hash])
            for n, row in enumerate(strategy.examples)
            if row.replayed and row.row_hash in self.opinions
        ]
        if terms:
            strategy.penalise(self.spec.der_weight * sum(terms) / strategy.step.answer_tokens)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Replay has decided by now who is remembered."""
        memory = next(plugin for plugin in strategy.plugins if isinstance(plugin, Rehearsal)).memory
        kept = set(memory.hashes)
        fresh = [row for row in strategy.experience.new if row.row_hash in kept]
        told = distill.opinions(strategy, fresh, hide_answers=False)
        self.opinions = {row: each for row, each in {**self.opinions, **told}.items() if row in kept}


def save(opinions: dict[str, Opinion], path: Path) -> None:
    rows = sorted(opinions)
    tensors = {
        "ids": torch.cat([opinions[row].ids for row in rows]),
        "logprobs": torch.cat([opinions[row].logprobs for row in rows]),
    }
    told = [[row, len(opinions[row].ids)] for row in rows]  # hash, answer tokens
    # Under one key: safetensors writes several in another order every time.
    save_file(tensors, path, metadata={"state": json.dumps({"format": FORMAT, "rows": told})})


def load(path: Path) -> dict[str, Opinion]:
    """Raises `IntegrityError` when the file is damaged, or of a format that is not known."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            if "state" in about:
                state = json.loads(about["state"])
            else:
                state = {"format": 1, "rows": json.loads(about["rows"])}
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']}, known is {FORMAT}")
            told = state["rows"]
            ids, logprobs = file.get_tensor("ids"), file.get_tensor("logprobs")
        lengths = [length for _, length in told]
        if sum(lengths) != len(ids) or ids.shape != logprobs.shape:
            raise ValueError("its parts do not fit together")
        parts: zip[tuple[list[Any], Tensor, Tensor]] = zip(
            told, ids.split(lengths), logprobs.split(lengths), strict=True
        )
        return {row: Opinion(ids=i, logprobs=p) for (row, _), i, p in parts}
    except (*UNREADABLE, SafetensorError, RuntimeError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}); run `daemon doctor`") from None
