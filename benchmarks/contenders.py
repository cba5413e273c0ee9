"""Who competes in `python -m benchmarks.quality`: a name, what it changes, and a line that says so.

To add one, add a line to `CONTENDERS`. Fields that are not named keep the values of the records in
`strategies.contract`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from strategies.contract import LoraSpec, StrategySpec, TrainSpec


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to learn a stream. `strategy`, `train` and `lora` are changes of the specs' fields."""

    name: str  # also part of a file name
    about: str
    strategy: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    joint: bool = False  # learns everything at once, from the base: the upper bound
    stock: str = ""  # "peft" or "avalanche": not Holdfast, see benchmarks/stock_*.py
    trial: bool = False  # tried while the defaults were looked for: runs when it is asked for by name

    def specs(self, train: TrainSpec, lora: LoraSpec) -> tuple[StrategySpec, TrainSpec, LoraSpec]:
        return (
            replace(StrategySpec(methods=()), **self.strategy),
            replace(train, **self.train),
            replace(lora, **self.lora),
        )


# Random rows, word for word, and what was the default weight of the champion's opinion: written out, so that
# another default does not spoil their records. So do the rate and the ratio of the contract's records, which
# are not those of a bot's settings.
_PLAIN = {"replay_policy": "balanced", "replay_dropout": 0.0}
_LWF = {"lwf_weight": 0.5}


def _small(*methods: str, **changes: Any) -> dict[str, Any]:
    """With a memory of 5 % of the rows seen."""
    return {
        "methods": methods,
        "replay_share": 0.05,
        **_PLAIN,
        **(_LWF if "lwf" in methods else {}),
        **changes,
    }


_DEFAULT = _small("replay", "lwf", replay_dropout=0.2, replay_ratio=0.4, replay_share=1.0)

_ALL = (
    Contender(name="naive", about="goes on training on the new rows alone"),
    Contender(
        name="joint", about="one training on all rows at once, from the base: the upper bound", joint=True
    ),
    Contender(
        name="replay",
        about="half as many remembered rows as new ones in every epoch, at most 1000 kept",
        strategy={"methods": ("replay",), **_PLAIN},
    ),
    Contender(
        name="replay-bounded",
        about="the same, at most 100 kept",
        strategy={"methods": ("replay",), "replay_size": 100, **_PLAIN},
        trial=True,
    ),
    Contender(
        name="replay5",
        about="replay with a memory of at most 5 % of the rows seen, as all names with a 5 have it",
        strategy=_small("replay"),
    ),
    Contender(
        name="replay5+der",
        about="also what the model thought of remembered rows",
        strategy=_small("replay", "der"),
    ),
    Contender(
        name="replay5+lwf", about="also the champion's opinion of all rows", strategy=_small("replay", "lwf")
    ),
    Contender(
        name="replay5+lwf-faster",
        about="the same with a learning rate half as high again, and 0.4 remembered rows for a new one",
        strategy=_small("replay", "lwf", replay_ratio=0.4),
        train={"learning_rate": 7.5e-4},
        trial=True,
    ),
    Contender(
        name="replay5+lwf-fastest",
        about="the same with twice the learning rate, and 0.35 remembered rows for a new one",
        strategy=_small("replay", "lwf", replay_ratio=0.35),
        train={"learning_rate": 1e-3},
        trial=True,
    ),
    Contender(
        name="replay5+lwf-firm",
        about="the same with a weight of 0.75",
        strategy=_small("replay", "lwf", replay_ratio=0.35, lwf_weight=0.75),
        train={"learning_rate": 1e-3},
        trial=True,
    ),
    Contender(
        name="replay5+der+lwf",
        about="both opinions, the champion's with a weight of 0.25, and 0.35 remembered rows for a new one",
        strategy=_small("replay", "der", "lwf", lwf_weight=0.25, replay_ratio=0.35),
        trial=True,
    ),
    Contender(
        name="replay5+merge",
        about="replay that ends 0.7 of the way from the champion",
        strategy=_small("replay", "merge"),
    ),
    Contender(name="replay5+ewc", about="replay and EWC on the factors", strategy=_small("replay", "ewc")),
    Contender(
        name="replay5-herding",
        about="replay of the rows that are most typical of their answers",
        strategy=_small("replay", replay_policy="herding"),
    ),
    Contender(
        name="replay5-thinned",
        about="replay of questions without a fifth of their tokens, others each time",
        strategy=_small("replay", replay_dropout=0.2),
    ),
    Contender(
        name="replay5-thinned+lwf",
        about="the same with the champion's opinion of all rows",
        strategy=_small("replay", "lwf", replay_dropout=0.2),
    ),
    Contender(
        name="replay5-thinned+lwf-faster",
        about="the same with a learning rate half as high again, and 0.4 remembered rows for a new one: the "
        "default methods, with a smaller memory",
        strategy=_small("replay", "lwf", replay_dropout=0.2, replay_ratio=0.4),
        train={"learning_rate": 7.5e-4},
    ),
    Contender(
        name="default",
        about="the default methods with their memory: at most 1000 rows",
        strategy=_DEFAULT,
        train={"learning_rate": 7.5e-4},
    ),
    Contender(
        name="as-shipped",
        about="the same for up to four epochs, stopped early by validation: the daemon's settings",
        strategy=_DEFAULT,
        train={"learning_rate": 7.5e-4, "epochs": 4},
    ),
    Contender(
        name="replay5-thinned+lwf-fastest",
        about="the same with twice the learning rate",
        strategy=_small("replay", "lwf", replay_dropout=0.2, replay_ratio=0.4),
        train={"learning_rate": 1e-3},
        trial=True,
    ),
    Contender(
        name="replay5-thinned+lwf-light",
        about="the same as replay5-thinned+lwf with a weight of 0.25",
        strategy=_small("replay", "lwf", replay_dropout=0.2, lwf_weight=0.25),
        trial=True,
    ),
    Contender(
        name="replay5-both",
        about="replay of the most typical rows without a fifth of their tokens",
        strategy=_small("replay", replay_policy="herding", replay_dropout=0.2),
        trial=True,
    ),
    Contender(
        name="replay5-both+lwf",
        about="the same with the champion's opinion of all rows, at a weight of 0.25",
        strategy=_small("replay", "lwf", replay_policy="herding", replay_dropout=0.2, lwf_weight=0.25),
        trial=True,
    ),
    Contender(
        name="replay5-reservoir",
        about="replay from a uniform sample of rows",
        strategy=_small("replay", replay_policy="reservoir"),
    ),
    Contender(
        name="replay5-hardest",
        about="replay, half of it of the rows that were forgotten most",
        strategy=_small("replay", replay_policy="hardest"),
    ),
    Contender(
        name="replay5-spaced",
        about="replay in which a task rests the longer, the better it is retained",
        strategy=_small("replay", replay_policy="spaced"),
    ),
    Contender(name="agem5", about="A-GEM", strategy=_small("agem")),
    Contender(
        name="lwf", about="distillation from the champion on new rows", strategy={"methods": ("lwf",), **_LWF}
    ),
    Contender(name="ewc", about="EWC on the LoRA factors", strategy={"methods": ("ewc",)}),
    Contender(
        name="ewc-online",
        about="EWC on the factors, where each experience's importances fade to 0.9 with every later one",
        strategy={"methods": ("ewc",), "ewc_mode": "online"},
    ),
    Contender(
        name="ewc-lora", about="EWC on their product, in weight space", strategy={"methods": ("ewc-lora",)}
    ),
    Contender(name="si", about="synaptic intelligence", strategy={"methods": ("si",)}),
    Contender(
        name="merge", about="ends at 0.7 of the way from the champion", strategy={"methods": ("merge",)}
    ),
    Contender(name="orthogonal", about="naive from PEFT's orthogonal start", lora={"init": "orthogonal"}),
    Contender(name="olora", about="a new orthogonal adapter each time", strategy={"methods": ("olora",)}),
)

# Not Holdfast: run on one stream, with one seed, unless they are asked for.
_STOCK = (
    Contender(name="stock-peft", about="a plain loop with PEFT as its documentation shows", stock="peft"),
    *(
        Contender(name=f"avalanche-{name}", about=about, stock="avalanche")
        for name, about in (
            ("example", "Avalanche's example for Hugging Face models as it stands"),
            ("naive", "the example with two corrections, without its replay"),
            ("replay", "the same with Avalanche's replay plugin and 200 rows, as in the example"),
            ("ewc", "the same with Avalanche's EWC plugin"),
        )
    ),
)

CONTENDERS: dict[str, Contender] = {contender.name: contender for contender in (*_ALL, *_STOCK)}
