"""How rows are kept in the memory and drawn from it. Pure functions, free of torch.

`balanced` gives every task equal room, and within a task every answer; `herding` does, too, and keeps the
most typical rows of an answer instead of random ones; `reservoir` keeps a uniform sample of all rows ever
seen; `hardest` and `spaced` keep as `balanced` does, and draw by what was forgotten.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from strategies.replay_memory import Memory, Room, Rows, Seed, Seen, Spacing, Tasks, Trace, priority

MOST_HARD = Fraction(1, 2)  # of a draw: rows with wrong labels are the hardest of all
FORGOTTEN = 0.1  # nats per answer token that a task's mean loss may rise before it counts as forgotten
LONGEST_INTERVAL = 16  # experiences

Draw = Callable[[Memory, int, Seed, int], list[str]]  # memory, count, seed, epoch → row hashes
Order = Callable[[Rows], list[str]]  # rows of an answer → their hashes, those first that stay longest


@dataclass(frozen=True, kw_only=True)
class Policy:
    keep: Callable[[Tasks, int, int], Tasks]  # tasks, rows, seed → what stays
    draw: Draw
    measures: bool = False  # whether it needs the losses of remembered rows
    ranks: bool = False  # whether it needs the new rows' ranks, of `strategies.herding`


def after(
    memory: Memory, rows: list[Seen], room: Room, policy: str, ranks: Mapping[str, int] | None = None
) -> Memory:
    """The memory after an experience, cut to its room."""
    grown = memory.with_rows(rows).ranked(ranks or {})
    return replace(grown, tasks=POLICIES[policy].keep(grown.tasks, room.of(grown.seen), grown.seed))


def balanced(tasks: Tasks, size: int, seed: int) -> Tasks:
    """Equal room for every task, and in it for every answer; what one leaves free goes to the others. Rows
    of an answer stay by the draw."""
    return _equal_tasks(tasks, size, seed, list)


def typical(tasks: Tasks, size: int, seed: int) -> Tasks:
    """The same, but the rows of an answer stay by their rank. Those that nobody ranked, of experiences under
    another policy, keep the places that the draw gave them, among each other."""

    def ranked(rows: Rows) -> list[str]:
        unranked = [row for row, trace in rows.items() if trace.rank is None]
        places = {row: place for place, row in enumerate(unranked)}
        places |= {row: trace.rank for row, trace in rows.items() if trace.rank is not None}
        return sorted(rows, key=places.__getitem__)

    return _equal_tasks(tasks, size, seed, ranked)


def _equal_tasks(tasks: Tasks, size: int, seed: int, order: Order) -> Tasks:
    room = share_out(size, {task: len(rows) for task, rows in sorted(tasks.items())})
    return {task: _equal_answers(rows, room[task], seed, order) for task, rows in tasks.items() if room[task]}


def _equal_answers(rows: Rows, size: int, seed: int, order: Order) -> Rows:
    answers: dict[str, dict[str, Trace]] = {}
    for row, trace in rows.items():
        answers.setdefault(trace.answer, {})[row] = trace
    first = sorted(answers, key=lambda answer: (priority(seed, answer), answer))
    room = share_out(size, {answer: len(answers[answer]) for answer in first})
    kept = {row for answer, found in answers.items() for row in order(found)[: room[answer]]}
    return {row: trace for row, trace in rows.items() if row in kept}


def reservoir(tasks: Tasks, size: int, seed: int) -> Tasks:
    """A uniform sample of all rows ever seen (Vitter 1985, algorithm R).

    R keeps each of the n rows so far with probability size / n. So does keeping the `size` smallest of
    n independent random priorities; and with priorities made from hashes, order does not matter. Where the
    size grows with the rows seen (`replay_share`), what was let go before does not come back, and the oldest
    rows are somewhat fewer.
    """
    everything = sorted(
        (row for rows in tasks.values() for row in rows), key=lambda row: (priority(seed, row), row)
    )
    kept = set(everything[:size])
    left = {task: {row: t for row, t in rows.items() if row in kept} for task, rows in tasks.items()}
    return {task: rows for task, rows in left.items() if rows}


def draw_equally(memory: Memory, count: int, seed: Seed, epoch: int) -> list[str]:
    """As equally from all tasks as they allow.

    Each task's rows form an endless stream: all of them in one order, then in another, and so on; an
    epoch continues where the one before it ended. Nothing comes twice before everything came once.
    """
    sizes = {task: len(rows) for task, rows in memory.tasks.items()}
    starts, stops = _drawn(sizes, count, epoch, seed), _drawn(sizes, count, epoch + 1, seed)
    drawn = []
    for task, rows in sorted(memory.tasks.items()):
        drawn += _stream(list(rows), starts[task], stops[task], f"{seed}/{task}")
    return drawn


def draw_uniformly(memory: Memory, count: int, seed: Seed, epoch: int) -> list[str]:
    """Every row as often as every other, whatever its task."""
    return _stream(memory.hashes, epoch * count, (epoch + 1) * count, str(seed)) if len(memory) else []


def draw_hardest(memory: Memory, count: int, seed: Seed, epoch: int) -> list[str]:
    """Half of the draw are the rows whose loss rose most since they were learned, the rest are drawn equally.

    After the maximal interference of Aljundi et al. 2019 (arXiv 1908.04742), measured after each
    experience instead of before each step, which costs one pass over the memory.
    """
    risen = sorted(
        (-trace.rise, row) for rows in memory.tasks.values() for row, trace in rows.items() if trace.rise > 0
    )
    hard = [row for _, row in risen[: int(count * MOST_HARD)]]
    return hard + draw_equally(memory, count - len(hard), seed, epoch)


def draw_due(memory: Memory, count: int, seed: Seed, epoch: int) -> list[str]:
    """Only from tasks whose turn it is; see `respaced`."""
    due = {task: rows for task, rows in memory.tasks.items() if _spacing(memory, task).wait <= 1}
    if not due or not count:
        return []
    wanted = Fraction(len(due), len(memory.tasks)) * count  # what is not due costs no time
    return draw_equally(replace(memory, tasks=due), max(1, round(wanted)), seed, epoch)


def respaced(memory: Memory, rehearsed: Collection[str]) -> Memory:
    """The turns after an experience that rehearsed these rows, as Leitner's boxes have it (Amiri et al. 2017,
    "Repeat before forgetting", EMNLP): a task that was rehearsed and retained waits twice as long, one whose
    mean loss rose by more than `FORGOTTEN` is due next time; so is one that was due and of which nothing was
    drawn.
    """
    spacing = {}
    for task, rows in sorted(memory.tasks.items()):
        now = _spacing(memory, task)
        rise = sum(trace.rise for trace in rows.values()) / len(rows)
        if rise > FORGOTTEN or task not in memory.spacing:
            spacing[task] = Spacing()
        elif now.wait > 1:
            spacing[task] = replace(now, wait=now.wait - 1)
        elif rows.keys() & rehearsed:
            longer = min(2 * now.interval, LONGEST_INTERVAL)
            spacing[task] = Spacing(interval=longer, wait=longer)
        else:
            spacing[task] = now
    return replace(memory, spacing=spacing)


POLICIES: dict[str, Policy] = {
    "balanced": Policy(keep=balanced, draw=draw_equally),
    "herding": Policy(keep=typical, draw=draw_equally, ranks=True),
    "reservoir": Policy(keep=reservoir, draw=draw_uniformly),
    "hardest": Policy(keep=balanced, draw=draw_hardest, measures=True),
    "spaced": Policy(keep=balanced, draw=draw_due, measures=True),
}


def share_out(room: int, wants: Mapping[str, int]) -> dict[str, int]:
    """Divides room equally; who wants less than an equal share leaves the rest to the others.

    Room that cannot be divided equally goes to the first that want it, one each.
    """
    level = _level(room, wants)
    given = {name: min(level, want) for name, want in wants.items()}
    rest = room - sum(given.values())
    hungry = [name for name in wants if wants[name] > level]
    for name in hungry[:rest]:
        given[name] += 1
    return given


def _level(room: int, wants: Mapping[str, int]) -> int:
    """The largest equal share that the room has for everybody."""
    return bisect_right(range(room + 1), room, key=lambda n: sum(min(n, want) for want in wants.values())) - 1


def _drawn(sizes: Mapping[str, int], count: int, epochs: int, seed: Seed) -> dict[str, int]:
    """Rows of each task in the first so many epochs: what cannot be divided equally goes round among them."""
    rounds, room = divmod(count, max(sum(sizes.values()), 1))
    level = _level(room, sizes)
    total = {task: epochs * (rounds * size + min(level, size)) for task, size in sizes.items()}
    order = sorted(sizes, key=lambda task: (priority(seed, task), task))
    hungry = [task for task in order if sizes[task] > level]
    rest = epochs * count - sum(total.values())
    for n, task in enumerate(hungry):
        total[task] += rest // len(hungry) + (n < rest % len(hungry))
    return total


def _stream(rows: list[str], start: int, stop: int, seed: str) -> list[str]:
    """Places `start` to `stop` of: all rows in one order, all rows in another order, and so on."""
    if stop <= start:
        return []
    turns = range(start // len(rows), (stop - 1) // len(rows) + 1)
    ordered = [
        row for turn in turns for row in sorted(rows, key=lambda row: (priority(f"{seed}/{turn}", row), row))
    ]
    skipped = turns.start * len(rows)
    return ordered[start - skipped : stop - skipped]


def _spacing(memory: Memory, task: str) -> Spacing:
    return memory.spacing.get(task, Spacing())
