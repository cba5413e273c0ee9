"""Sentences about a board, computed from its numbers: nothing here is written by hand. Pure."""

from collections.abc import Mapping

from benchmarks.quality.summary import JOINT, NAIVE, Board, Entry, costs, growth

# What a method should reach to be the default.
NEAR_JOINT = 0.02  # of average accuracy below joint training
FORGETS = 0.02
TIME = 1.5  # x naive
MEMORY = 0.05  # of the rows seen
TARGET = (
    f"The target (within {NEAR_JOINT * 100:.0f} points of joint, forgetting at most {FORGETS * 100:.0f}, "
    f"at most {TIME:g} x naive's time, a memory of at most {MEMORY:.0%} of the rows seen)"
)
CLOSEST = 4  # of those who miss it are named
HARDLY = 0.05  # of average accuracy above naive training
GROWS = 0.005  # of a cost's beginning an experience: what is above is no longer flat


def lines(board: Board) -> list[str]:
    """The conclusions, as a list."""
    said = [_bounds(board), _best(board), _among_labels(board), _useless(board), _spaces(board)]
    said += [_target(board), _changed(board)]
    return [f"- {sentence}" for sentence in said if sentence]


def checks(entry: Entry, joint: Entry | None) -> dict[str, bool | None]:
    """The parts of the target; None where a number is missing."""
    forgets, time = entry.metric("forgetting"), entry.time
    return {
        "near joint": _within(joint.accuracy - entry.accuracy, NEAR_JOINT) if joint else None,
        "forgets little": _within(forgets.mean, FORGETS) if forgets else None,
        "fast": _within(time.mean, TIME) if time else None,
        "small": _within(entry.memory_share, MEMORY),
    }


def _within(value: float, limit: float) -> bool:
    return round(value, 6) <= limit  # sums of decimals are off by a trifle


def _bounds(board: Board) -> str:
    naive, joint = board.entry(NAIVE), board.entry(JOINT)
    if naive is None:
        return ""
    forgets = naive.metric("forgetting")
    told = f"Naive training ends at {_points(naive.accuracy)}"
    told += f" and forgets {_points(forgets.mean)} points" if forgets else ""
    return told + (f"; joint training reaches {_points(joint.accuracy)}." if joint else ".")


def _best(board: Board) -> str:
    if not board.rivals:
        return ""
    best, joint = board.rivals[0], board.entry(JOINT)
    told = f"Best is `{best.name}` with {_points(best.accuracy)}"
    if joint:
        gap = (joint.accuracy - best.accuracy) * 100
        told += f", {abs(gap):.1f} points {'below' if gap >= 0 else 'above'} joint training"
    told += f", in {best.time.mean:.2f} x naive's time" if best.time else ""
    return f"{told}, with {best.memory_share:.1%} of the rows remembered.{_noise(board)}"


def _among_labels(board: Board) -> str:
    """The last model, asked as tasks of kind `labels` are: an answer that is no label cannot be given."""
    best, joint = next(iter(board.rivals), None), board.entry(JOINT)
    if best is None or joint is None:
        return ""
    ours, bound = best.extra("labels_accuracy"), joint.extra("labels_accuracy")
    if ours is None or bound is None:
        return ""
    return (
        f"Asked for one of the task's labels, `{best.name}` ends at {ours.told(100)} and joint training at "
        f"{bound.told(100)}."
    )


def _useless(board: Board) -> str:
    """What does hardly better than nothing."""
    naive = board.entry(NAIVE)
    if naive is None:
        return ""
    near = [entry for entry in board.rivals if entry.accuracy - naive.accuracy <= HARDLY]
    told = ", ".join(f"`{entry.name}` {_points(entry.accuracy)}" for entry in near)
    return f"Within {HARDLY * 100:.0f} points of naive, or below: {told}." if near else ""


def _spaces(board: Board) -> str:
    """EWC on the factors against EWC on their product."""
    kinds = [board.entry(name) for name in ("ewc", "ewc-online", "ewc-lora")]
    if kinds[0] is None or kinds[-1] is None:
        return ""
    best_first = sorted((entry for entry in kinds if entry is not None), key=lambda entry: -entry.accuracy)
    told = [
        f"`{entry.name}` {_points(entry.accuracy)}, forgetting {_points(forgets.mean)}, "
        f"state {entry.state_bytes / 1e6:.1f} MB"
        for entry in best_first
        if (forgets := entry.metric("forgetting"))
    ]
    return (
        "EWC on the factors A and B (`ewc`; fading, `ewc-online`) and on their product (`ewc-lora`): "
        f"{'; '.join(told)}."
    )


def _noise(board: Board) -> str:
    """Who cannot be told from the best: within one standard deviation of either."""
    best, *others = board.rivals
    stat = best.metric("average_accuracy")
    near = []
    for entry in others:
        found = entry.metric("average_accuracy")
        if (
            stat
            and found
            and stat.deviation
            and stat.mean - found.mean <= max(stat.deviation, found.deviation)
        ):
            near.append(f"`{entry.name}`")
    if len(board.seeds) == 1 and others:
        return " One seed each: small differences mean nothing."
    return f" Within one standard deviation of it: {', '.join(near)}." if near else ""


def _target(board: Board) -> str:
    told = standing(board)
    return f"{TARGET} is {told}" if told else ""


def standing(board: Board) -> str:
    """Who meets the target, or how far from each of its parts the best with a small memory are."""
    joint = board.entry(JOINT)
    if joint is None or not board.rivals:
        return ""
    met = [f"`{entry.name}`" for entry in board.rivals if all(checks(entry, joint).values())]
    if met:
        return f"met by {', '.join(met)}."
    small = [entry for entry in board.rivals if _within(entry.memory_share, MEMORY)][:CLOSEST]
    far = "; ".join(f"`{entry.name}` {_distance(entry, joint)}" for entry in small)
    return f"met by none. The best with such a memory: {far or 'not measured'}."


def _distance(entry: Entry, joint: Entry) -> str:
    forgets, time = entry.metric("forgetting"), entry.time
    told = [f"is {_points(joint.accuracy - entry.accuracy)} points below joint"]
    told += [f"forgets {_points(forgets.mean)}"] if forgets else []
    told.append(f"takes {time.mean:.2f} x naive's time" if time else "was not timed beside naive")
    return ", ".join(told)


def _changed(board: Board) -> str:
    told = [
        f"`{entry.name}` gives the newest to {newest} % of the changed questions, the stale one to "
        f"{stale} %, and is right on {rest} % of the others"
        for entry in board.rivals
        if entry.extra("changed_accuracy")
        for newest, stale, rest in [
            [_points(_extra(entry, n)) for n in ("changed_accuracy", "stale_share", "unchanged_accuracy")]
        ]
    ]
    return f"Renamed answers: {'; '.join(told)}." if told else ""


def flat(entry: Entry) -> list[str]:
    """For each cost of the first run: its name, how it began, how it ended, its slope."""
    return [
        f"| `{entry.name}` | {name} | {found.first:.4g} | {found.last:.4g} | {slope:+.2%} |"
        for name, values in costs(entry.runs[0]).items()
        for found in [growth(values)]
        for slope in [round(found.relative, 4) + 0.0]  # no -0.00 %
    ]


def growths(board: Board) -> list[str]:
    """For each cost: where it grows, and that it is flat elsewhere."""
    found: dict[str, dict[str, float]] = {}
    for entry in board.measured:
        for cost, values in costs(entry.runs[0]).items():
            found.setdefault(cost, {})[entry.name] = growth(values).relative
    return [f"- {_growth(cost, slopes)}" for cost, slopes in found.items()]


def _growth(cost: str, slopes: Mapping[str, float]) -> str:
    grows = ", ".join(f"`{name}` {slope:+.1%}" for name, slope in slopes.items() if slope > GROWS)
    if not grows:
        return f"The {cost} is flat for all: it grows by at most {GROWS:.1%} of its beginning an experience."
    flat = ", ".join(f"`{name}`" for name, slope in slopes.items() if slope <= GROWS)
    return f"The {cost} grows, in shares of its beginning an experience: {grows}. Flat: {flat or 'none'}."


def _extra(entry: Entry, name: str) -> float:
    found = entry.extra(name)
    return found.mean if found else 0.0


def _points(share: float) -> str:
    return f"{share * 100:.1f}"
