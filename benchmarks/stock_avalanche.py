"""Beside Holdfast: Avalanche as its own example for Hugging Face models uses it (its `examples/nlp.py`).

A `Naive` strategy whose batches are dictionaries, a `CLScenario` of experiences with a collating function,
and Avalanche's own plugins. What the example does for a translation model is done here for a causal one:
labels are shifted by one. As it stands the example does not run with Avalanche 0.6.0; `avalanche-example`
shows that, the others correct it in two places. What does not run leaves its exception as its result.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from avalanche.benchmarks import CLExperience, CLScenario, CLStream
from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin

from benchmarks.quality.learning import ShouldStop, Trained, Work, write_snapshot
from benchmarks.quality.streams import Stream
from benchmarks.stock_peft import (
    digest_of,
    encoded,
    keep,
    load,
    padded,
    read_report,
    report,
    start_with,
    with_lora,
)
from storage.artifacts import made_for
from storage.errors import HoldfastError, Interrupted, TrainingError
from storage.snapshots import Snapshot

PLUGINS: Mapping[str, Callable[[], list[Any]]] = {
    "avalanche-example": lambda: [ReplayPlugin(mem_size=200)],
    "avalanche-naive": list,
    "avalanche-replay": lambda: [ReplayPlugin(mem_size=200)],  # the example's
    "avalanche-ewc": lambda: [EWCPlugin(ewc_lambda=1000.0)],  # as in Avalanche's examples of EWC
}


class StockFailed(TrainingError):
    """Foreign code did not run on this stream."""


def learn(work: Work, stream: Stream, should_stop: ShouldStop) -> Iterator[Trained]:
    """All experiences in one go: the plugins' state is in the process. Interrupted, it begins again."""
    snapshots = [write_snapshot(work, stream, number, None) for number in range(len(stream.experiences))]
    outs = [work.folder / f"train-{number + 1}" for number in range(len(snapshots))]
    digests = [digest_of(work, number, snapshot.id) for number, snapshot in enumerate(snapshots)]
    if not all(made_for(out, digest) for out, digest in zip(outs, digests, strict=True)):
        try:
            _train(work, stream, snapshots, should_stop)
        except HoldfastError:
            raise
        except Exception as error:
            raise StockFailed(f"{type(error).__name__}: {error}, {_where(error)}") from error
    for snapshot, out, digest in zip(snapshots, outs, digests, strict=True):
        yield Trained(snapshot=snapshot, result=out, digest=digest, report=read_report(out))


def _train(work: Work, stream: Stream, snapshots: Sequence[Snapshot], should_stop: ShouldStop) -> None:
    _, training, lora = work.plan.specs()
    start_with(training)
    base, tokenizer = load(work.model.path)
    model = with_lora(base, lora)
    collate = partial(_collated, pad=tokenizer.pad_token_id, should_stop=should_stop)
    experiences = []
    for number, experience in enumerate(stream.experiences):
        data = [encoded(tokenizer, row, work.model.max_tokens) for row in experience.train]
        experiences.append(_experience(data, number, collate, work.plan.contender))
    plugins = PLUGINS[work.plan.contender]()
    strategy = HuggingFaceNaive(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=training.learning_rate),
        criterion=torch.nn.CrossEntropyLoss(ignore_index=-100),
        evaluator=EvaluationPlugin(loggers=[], strict_checks=False),
        train_epochs=training.epochs,
        train_mb_size=training.batch_size,
        plugins=plugins,
        device=str(base.device),
    )
    for number, experience in enumerate(CLScenario([CLStream("train", experiences)]).train_stream):
        began = time.process_time()
        strategy.train(experience, collate_fn=collate)
        seconds = time.process_time() - began
        told = report(
            work, len(experience.dataset), strategy.clock.train_exp_iterations, seconds, _held(plugins)
        )
        keep(model, work.folder / f"train-{number + 1}", digest_of(work, number, snapshots[number].id), told)


class HuggingFaceNaive(Naive):  # type: ignore[misc]  # Avalanche is untyped
    """The example's changes: batches are dictionaries, the criterion is over tokens."""

    @property
    def mb_x(self) -> Any:
        return self.mbatch["input_ids"]

    @property
    def mb_y(self) -> Any:
        return self.mbatch["labels"]

    def _unpack_minibatch(self) -> None:
        for name in self.mbatch:
            self.mbatch[name] = self.mbatch[name].to(self.device)

    def forward(self) -> Any:
        return self.model(
            input_ids=self.mb_x, attention_mask=self.mbatch["attention_mask"], labels=self.mb_y
        ).logits

    def criterion(self) -> Any:
        logits, labels = self.mb_output[:, :-1], self.mb_y[:, 1:]
        return self._criterion(logits.reshape(-1, logits.size(-1)), labels.reshape(-1))


def _experience(
    data: Sequence[dict[str, list[int]]], number: int, collate: Callable[[Any], Any], contender: str
) -> CLExperience:
    labels = DataAttribute(ConstantSequence(number, len(data)), "targets_task_labels")
    if contender == "avalanche-example":
        experience = CLExperience()
    else:
        experience = CLExperience(number, None)  # 0.6.0 asks for both
        experience.task_labels = [number]  # without them, 0.6.0 ignores the collating function
    experience.dataset = AvalancheDataset([list(data)], data_attributes=[labels], collate_fn=collate)
    return experience


def _collated(examples: Any, pad: int, should_stop: ShouldStop) -> Any:
    if should_stop():
        raise Interrupted()
    return padded(examples, pad)


def _held(plugins: Sequence[Any]) -> int:
    """Rows in the replay memory, which Avalanche keeps whole."""
    return sum(len(plugin.storage_policy.buffer) for plugin in plugins if isinstance(plugin, ReplayPlugin))


def _where(error: Exception) -> str:
    """The innermost place, without this machine's folders."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    path = trace.tb_frame.f_code.co_filename.replace("\\", "/")
    return f"at {path.rpartition('site-packages/')[2].rpartition('benchmarks/')[2]}:{trace.tb_lineno}"
