"""Injects faults, says what came of them: python -m tests.faults --faults 500 --seed 1

Trial n of a seed is always the same; `--first n --faults 1` repeats it. With `--sweep` trial n is not left to
the dice: it is place after place, before and after it, in every way to stop a process there. Stops at the
first trial that fails unless `--go-on` is given, and leaves its bot in the folder.
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

from tests.faults import bench, kinds


def one(made: bench.Bench, seed: int, number: int, chosen: str | None = None) -> tuple[str, bench.Outcome]:
    """Trial `number` of a seed, of a chosen kind or of one that the dice choose."""
    dice = random.Random(f"{seed}/{number}")
    drawn = dice.choice(sorted(kinds.KINDS))
    name = chosen or drawn
    trial = made.trial(dice.choice(("new", "taught")), dice)
    return name, _over(trial, name, kinds.KINDS[name](trial))


def swept(made: bench.Bench, seed: int, number: int) -> tuple[str, bench.Outcome]:
    """Trial `number` of the sweep. The seed chooses the beginning, and which call of the place it is."""
    point, dice = kinds.POINTS[number - 1], random.Random(f"{seed}/{number}")
    trial = made.trial(dice.choice(("new", "taught")), dice)
    outcome = _over(trial, point.kind, kinds.stop_at(trial, point))
    if not outcome.went_off:
        raise bench.Broken(f"nothing came by: {point}")
    return str(point), outcome


def _over(trial: bench.Trial, name: str, how: str) -> bench.Outcome:
    trial.check_log(worker_may_trace=name in bench.WORKER_MAY_TRACE)
    if name not in kinds.NEEDS:  # those have checked, on the file system that is gone now
        trial.check()
    return bench.Outcome(went_off=trial.went_off(), how=how)


def again(seed: int, number: int, name: str | None, sweep: bool) -> str:
    only = " SWEEP=1" if sweep else f' KIND="{name}"' if name else ""
    return f"make test-faults FAULTS=1 SEED={seed} FIRST={number}{only}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, help="how many trials: 60, or the rest of the sweep")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, help="the number of the first trial")
    parser.add_argument("--kind", choices=sorted(kinds.KINDS), help="only this kind of fault")
    parser.add_argument("--sweep", action="store_true", help=f"the {len(kinds.POINTS)} points of the sweep")
    parser.add_argument("--folder", type=Path, default=Path(".bench/faults"))
    parser.add_argument("--go-on", action="store_true", help="after a failure")
    given = parser.parse_args()
    numbers = range(given.first, given.first + (given.faults or 60))
    if given.sweep:
        numbers = range(1, len(kinds.POINTS) + 1)[given.first - 1 :][: given.faults]
    made = bench.Bench(given.folder)
    made.prepare()
    may = {needs: needs(made.folder) for needs in set(kinds.NEEDS.values())}
    skipped = {name for name, needs in kinds.NEEDS.items() if not may[needs]}
    table: Counter[tuple[str, str]] = Counter()
    failed = []
    begun = time.monotonic()
    for number in numbers:
        name, drawn = given.kind or kinds_name(given.seed, number), time.monotonic()
        if given.sweep:
            name = kinds.POINTS[number - 1].kind
        if name in skipped:
            table[name, "skipped"] += 1
            continue
        try:
            if given.sweep:
                told, outcome = swept(made, given.seed, number)
            else:
                told, outcome = one(made, given.seed, number, given.kind)
        except Exception as error:
            failed.append(number)
            table[name, "failed"] += 1
            print(
                f"{number:5} {name}: FAILED: {error}\n"
                f"      {again(given.seed, number, given.kind, given.sweep)}",
                flush=True,
            )
            if not given.go_on:
                break
            continue
        table[name, outcome.how if outcome.went_off else "missed"] += 1
        how = outcome.how if outcome.went_off else "missed its place"
        print(f"{number:5} {told}: {how} ({time.monotonic() - drawn:.1f} s)", flush=True)
    print_table(table, time.monotonic() - begun, skipped)
    return 1 if failed else 0


def kinds_name(seed: int, number: int) -> str:
    return random.Random(f"{seed}/{number}").choice(sorted(kinds.KINDS))


def print_table(table: "Counter[tuple[str, str]]", seconds: float, skipped: set[str]) -> None:
    columns = ("recovered", "refused", "missed", "skipped", "failed")
    print("\n| fault | injected | " + " | ".join(columns) + " |\n|---|" + "---|" * (len(columns) + 1))
    for name in sorted({name for name, _ in table}):
        counts = [table[name, column] for column in columns]
        injected = table[name, "recovered"] + table[name, "refused"] + table[name, "failed"]
        print(f"| {name} | {injected} | " + " | ".join(map(str, counts)) + " |")
    injected = sum(n for (_, how), n in table.items() if how not in ("missed", "skipped"))
    print(f"\n{injected} faults in {seconds / 60:.0f} minutes")
    if skipped:
        print(f"skipped, as this account may not mount what they need: {', '.join(sorted(skipped))}")


if __name__ == "__main__":
    sys.exit(main())
