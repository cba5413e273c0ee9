"""The quality benchmark: every contender on every stream, and the page with what was measured.

    python -m benchmarks.quality --size wide --clinc DIR --clbench DIR
    python -m benchmarks.quality --size wide --pages-only --page docs/benchmarks.md

Each run (stream, order, seed, contender) leaves a record in benchmarks/records/, and is not made again. An
interrupted benchmark continues where it stopped, with the same command.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.quality import pages, plan, records, synthetic, work
from benchmarks.quality.learning import Work
from benchmarks.quality.plan import ORDERS, PRESETS, TINY, Choice, Places, Plan
from benchmarks.stream import parse_change, to_its_end
from strategies.base import prepare
from strategies.contract import ModelSpec, PrepareJob


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return to_its_end(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    chosen = plan.plans(_choice(options))
    if options.list:
        for one in chosen:
            print(one.name, "recorded" if records.find(one, options.records) else "")
        return 0
    failed = [] if options.pages_only else work.carry_out(_works(options, chosen), options.jobs)
    if options.page:
        pages.update(options.page, options.size, options.records)
        print(f"{options.page} is up to date")
    else:
        print(f"\n{pages.text(options.size, options.records)}\n")
        print("with pictures, in a page: the same command with --pages-only --page FILE")
    if failed:
        print(f"without a result: {', '.join(failed)}; the same command tries again", file=sys.stderr)
    return 1 if failed else 0


def _works(options: argparse.Namespace, chosen: Sequence[Plan]) -> list[Work]:
    places = Places(clinc=options.clinc, clbench=options.clbench)
    for one in chosen:
        if records.find(one, options.records) is None:
            places.of(one.stream)  # missing data are told before a base is made ready
    out = options.out.resolve()
    models = {base: _base(base, out) for base in {one.base for one in chosen}}
    return [
        Work(
            plan=one,
            model=models[one.base],
            out=out,
            places=places,
            records=options.records.resolve(),
            keep=options.keep,
        )
        for one in chosen
    ]


def _base(name: str, out: Path) -> ModelSpec:
    """Made ready once."""
    if name == TINY:
        return synthetic.tiny_base(out / "bases" / TINY)
    folder = out / "bases" / re.sub(r"\W+", "-", name).strip("-")
    ready = prepare(PrepareJob(base=name, out=str(folder)), lambda told: print(f"preparing {told.detail}"))
    return ModelSpec(path=ready.path, fingerprint=ready.fingerprint)


def _choice(options: argparse.Namespace) -> Choice:
    asked = {name: getattr(options, name) for name in ("domains", "rows", "validation", "suite")}
    return Choice(
        size=options.size,
        streams=options.streams,
        orders=options.orders,
        seeds=options.seeds,
        contenders=options.contenders,
        base=options.base,
        sizes={name: value for name, value in asked.items() if value is not None},
        train=dict(map(parse_change, options.train)),
    )


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    sizes = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    orders = "; ".join(f"{name}: {', '.join(found)}" for name, found in ORDERS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--size", choices=PRESETS, default="small", help=sizes)
    add("--clinc", type=Path, help="folder with rows.jsonl, or data/ of github.com/clinc/oos-eval")
    add("--clbench", type=Path, help="folder with rows.jsonl: id, task, question, answer, split a line")
    add("--streams", type=_names, help="only these, separated by commas")
    add("--orders", type=_names, help=f"only these ({orders})")
    add("--seeds", type=_numbers, help="these instead of the preset's, as in 0,1,2")
    add("--contenders", type=_names, help=f"only these of {', '.join(CONTENDERS)}")
    add("--domains", type=int, help="experiences a stream")
    add("--rows", type=int, help="training rows an experience")
    add("--validation", type=int, help="validation rows an experience")
    add("--suite", type=int, help="suite rows a task")
    add("--train", action="append", default=[], metavar="FIELD=VALUE", help="as in epochs=3, of TrainSpec")
    add("--base", help="a package, folder, GGUF file or hub name, for streams that measure quality")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at once, one thread each")
    add("--out", type=Path, default=Path(".bench/quality"), help="working files, which may be deleted")
    add("--keep", action="store_true", help="keep adapters and snapshots of finished runs")
    add("--records", type=Path, default=records.FOLDER, help="where the records of finished runs are")
    add("--page", type=Path, help="page whose section of this size is rewritten from all records")
    add("--pages-only", action="store_true", help="run nothing: the page alone, which needs no data")
    add("--list", action="store_true", help="show the runs in the order of work, and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
