"""The next stronger protection of old skills, for a training that learned but forgot. Free of torch.

What a method can do more of is a line of `_STRONGER`; a method that is not there has nothing to turn up.
"""

from collections.abc import Callable
from dataclasses import replace

from strategies.contract import StrategySpec

MOST_REPLAYED = 4.0  # rows rehearsed for each new one: more would be training on the past


def _more_replay(spec: StrategySpec) -> StrategySpec:
    return replace(spec, replay_ratio=max(spec.replay_ratio, min(2 * spec.replay_ratio, MOST_REPLAYED)))


def _stiffer_weights(spec: StrategySpec) -> StrategySpec:
    return replace(spec, ewc_lambda=4 * spec.ewc_lambda)


_STRONGER: dict[str, Callable[[StrategySpec], StrategySpec]] = {
    "replay": _more_replay,
    "ewc": _stiffer_weights,
}


def strengthened(spec: StrategySpec) -> StrategySpec | None:
    """The same methods, each turned up one step; None when none of them can be turned up."""
    stronger = spec
    for method in spec.methods:
        stronger = _STRONGER.get(method, lambda same: same)(stronger)
    return stronger if stronger != spec else None


def changes(before: StrategySpec, after: StrategySpec) -> str:
    """`replay_ratio 0.5 → 1, ewc_lambda 1000 → 4000`, for people."""
    old, new = before.__dict__, after.__dict__
    return ", ".join(f"{name} {old[name]} → {new[name]}" for name in old if old[name] != new[name])
