"""The next stronger protection of old skills, for a training that learned but forgot. Free of torch.

What a method can do more of is a line of `_STRONGER`; a method that is not there has nothing to turn up.
No two methods that go together (`strategies.combinations`) turn up the same setting.
"""

from collections.abc import Callable
from dataclasses import replace

from strategies.contract import StrategySpec

MOST_REPLAYED = 4.0  # rows rehearsed for each new one: more would be training on the past


def _more_replay(spec: StrategySpec) -> StrategySpec:
    return replace(spec, replay_ratio=max(spec.replay_ratio, min(2 * spec.replay_ratio, MOST_REPLAYED)))


def _times(setting: str, factor: float) -> Callable[[StrategySpec], StrategySpec]:
    return lambda spec: replace(spec, **{setting: factor * getattr(spec, setting)})


_STRONGER: dict[str, Callable[[StrategySpec], StrategySpec]] = {
    "replay": _more_replay,
    "agem": _more_replay,
    "der": _times("der_weight", 2),
    "lwf": _times("lwf_weight", 2),
    "ewc": _times("ewc_lambda", 4),
    "ewc-lora": _times("ewc_lambda", 4),
    "si": _times("si_lambda", 4),
    "olora": _times("olora_lambda", 4),
    "merge": _times("merge_weight", 0.5),  # nearer to the champion
}


def strengthened(spec: StrategySpec) -> StrategySpec | None:
    """The same methods, each turned up one step; None when none of them can be turned up."""
    stronger = spec
    for method in spec.methods:
        stronger = _STRONGER.get(method, lambda same: same)(stronger)
    return stronger if stronger != spec else None


def changes(before: StrategySpec, after: StrategySpec) -> str:
    """`replay_ratio 0.5 → 1.0, ewc_lambda 1.0 → 4.0`, for people."""
    old, new = before.__dict__, after.__dict__
    return ", ".join(f"{name} {old[name]} → {new[name]}" for name in old if old[name] != new[name])
