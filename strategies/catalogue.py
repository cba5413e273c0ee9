"""The methods by name. To add one: write its file as a `Method`, and name it here and in `combinations`."""

from strategies.agem import AGem
from strategies.contract import StrategySpec
from strategies.der import Der
from strategies.ewc import Ewc
from strategies.ewc_lora import EwcLora
from strategies.joint import Joint
from strategies.lwf import Lwf
from strategies.merge import Merge
from strategies.method import Method
from strategies.olora import OLora
from strategies.replay import Replay
from strategies.si import Si

# In the order of their callbacks: what changes the final adapter comes before what remembers it.
METHODS: dict[str, type[Method]] = {
    "merge": Merge,
    "joint": Joint,
    "replay": Replay,
    "agem": AGem,
    "lwf": Lwf,
    "der": Der,
    "ewc": Ewc,
    "ewc-lora": EwcLora,
    "si": Si,
    "olora": OLora,
}


def build(spec: StrategySpec, seed: int) -> list[Method]:
    return [METHODS[name](spec, seed) for name in METHODS if name in spec.methods]
