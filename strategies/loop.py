"""How one experience is learned: an Avalanche template for causal language models, and the train stage.

`Learner` is the template: passes, optimiser steps, epochs, with checkpoints on the way; what a method
does, it does in Avalanche's callbacks, and the loop knows none of them. `train` is the stage: a snapshot
directory in, a result directory out.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.templates.base_sgd import BaseSGDTemplate
from avalanche.training.templates.update_type import SGDUpdate
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from storage import artifacts
from storage.errors import IntegrityError, Interrupted, NonFiniteLoss
from strategies import catalogue, checkpoint, inheritance, result
from strategies.batches import IGNORED, Batch, Example, answer_logits, collate, nll
from strategies.checkpoint import Checkpoints, Course
from strategies.contract import CurvePoint, Progress, TrainJob, TrainReport, TrainSpec, result_files
from strategies.experience import LanguageExperience, Loader, Step, read_experience
from strategies.method import Method
from strategies.model import Base, deterministic, load_base, trainable

Tell = Callable[[Progress], None]


class Learner(SGDUpdate, BaseSGDTemplate):
    """Learns the answers of one experience with AdamW.

    Avalanche's `iteration` and `update` are an optimiser step here, its `forward` and `backward` one of
    the step's passes. The loss of a step is the mean over all its answer tokens, however it is cut.
    """

    PLUGIN_CLASS = SupervisedPlugin

    def __init__(
        self,
        *,
        base: Base,
        model: Module,
        spec: TrainSpec,
        methods: Sequence[Method],
        checkpoints: Checkpoints,
        tell: Tell,
        should_stop: Callable[[], bool],
    ) -> None:
        super().__init__(
            model=model,
            optimizer=_adamw(model, spec),
            train_mb_size=spec.batch_size,
            train_epochs=spec.epochs,
            device=base.device,
            plugins=list(methods),
            evaluator=_NoEvaluator(),
        )
        self.base = base
        self.spec = spec
        self.checkpoints = checkpoints
        self.tell = tell
        self.should_stop = should_stop
        self.course = Course()
        self.best: dict[str, Tensor] = {}  # the adapter with the best validation loss, when that matters
        self.loss: Tensor = self._make_empty_loss()
        self.step_loss = self.loss
        self.penalty = self.loss
        self.total_steps = 0
        self.replay_rows = 0  # in an epoch
        self.rehearsed: set[str] = set()  # remembered rows that were drawn
        self.last_pass = False
        self.examples: Sequence[Example] = ()  # of the pass
        self.methods = {type(method).__name__: method for method in methods}
        self._saved: dict[str, Tensor] | None = None
        self._has_begun = False  # whether model and optimiser are where `course` says
        self._mark, self._cpu_mark = time.monotonic(), time.process_time()
        self._begun_at = (0, 0.0)  # steps and seconds when this process took over

    # For methods.

    def penalise(self, term: Tensor) -> None:
        """Adds a method's term to the loss of the step. Call it in `before_backward`."""
        self.loss = self.loss + term
        self.penalty = self.penalty + term.detach()

    def check_stop(self) -> None:
        """Raises `Interrupted`, with everything so far on disk, when a stop was asked for.

        Before the first step there is nothing to save: the model is still the parent's, and a checkpoint
        that will be continued is on disk already.
        """
        if self.should_stop():
            if self._has_begun:
                self.save_checkpoint()
            raise Interrupted()

    # One experience.

    def make_train_dataloader(self, **kwargs: Any) -> None:
        self.dataloader = Loader(
            self.experience.new,
            batch_size=self.spec.batch_size,
            accumulation=self.spec.accumulation,
            seed=self.spec.seed,
        )

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        self.make_optimizer()

    def make_optimizer(self, **kwargs: Any) -> None:
        self.optimizer = _adamw(self.model, self.spec)

    def _train_exp(self, experience: LanguageExperience, eval_streams: Any = None, **kwargs: Any) -> None:
        self.total_steps = sum(len(self.dataloader.steps(epoch)) for epoch in range(self.spec.epochs))
        self.replay_rows = sum(example.replayed for example in self.dataloader.rows(0))
        self._begin()
        while self.course.epoch < self.spec.epochs and not self.has_stalled:
            self._before_training_epoch(**kwargs)
            self.training_epoch(**kwargs)
            self._after_training_epoch(**kwargs)
            self._finish_epoch()
        drawn = (row for epoch in range(self.course.epoch) for row in self.dataloader.rows(epoch))
        self.rehearsed = {row.row_hash for row in drawn if row.replayed}
        if self.best:
            checkpoint.put(trainable(self.model), self.best)

    def training_epoch(self, **kwargs: Any) -> None:
        for step in self.dataloader.steps(self.course.epoch)[self.course.step :]:
            self.check_stop()
            self.learn(step, **kwargs)
            self._record(step)

    # One optimiser step.

    def learn(self, step: Step, **kwargs: Any) -> None:
        self.step, self.step_loss, self.penalty = step, self._make_empty_loss(), self._make_empty_loss()
        self._before_training_iteration(**kwargs)
        self.optimizer.zero_grad()
        for n, examples in enumerate(step.passes):
            self.last_pass = n == len(step.passes) - 1
            self.examples = examples
            self.mbatch = collate(examples, self.base.prompter.pad_id).to(self.device)
            self.loss = self._make_empty_loss()
            self._before_forward(**kwargs)
            self.mb_output = self.forward()
            self._after_forward(**kwargs)
            self.loss = self.loss + self.criterion()
            self.step_loss += self.loss.detach()
            self._before_backward(**kwargs)
            self.backward()
            self._after_backward(**kwargs)
        self._before_update(**kwargs)
        self.optimizer_step()
        self._after_update(**kwargs)
        self._after_training_iteration(**kwargs)

    def forward(self) -> Tensor:
        """Logits [B, K, V] for the answers' columns."""
        with self.base.autocast():
            return answer_logits(self.model, self.mbatch)

    def criterion(self) -> Tensor:
        """This pass's share of the mean negative log-likelihood over the step's answer tokens."""
        logits, targets = self.mb_output.float().flatten(0, 1), self.mbatch.targets.flatten()
        total = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return total / self.step.answer_tokens

    def optimizer_step(self) -> None:
        norm = clip_grad_norm_(trainable(self.model).values(), self.spec.clip_norm)
        rate = learning_rate(self.course.steps, self.total_steps, self.spec)
        for name, value in (("loss", self.step_loss), ("penalty", self.penalty), ("gradient", norm)):
            if not torch.isfinite(value).all():
                raise NonFiniteLoss(
                    f"the {name} became {value.item()} at step {self.course.steps + 1} of {self.total_steps} "
                    f"(learning rate {rate:g}); the update was not applied. Lower training.learning_rate"
                )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    # Between steps and epochs.

    @property
    def has_stalled(self) -> bool:
        return 0 < self.spec.patience <= self.course.stale_epochs

    def _record(self, step: Step) -> None:
        course, seconds = self.course, self.count_time()
        course.step += 1
        course.steps += 1
        point = CurvePoint(
            step=course.steps,
            loss=self.step_loss.item(),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            penalty=self.penalty.item(),
            replayed=step.replayed,
            rows_per_second=len(step.rows) / max(seconds, 1e-9),
        )
        course.curve.append(point)
        self.tell(
            Progress(
                stage="train",
                step=course.steps,
                steps=self.total_steps,
                loss=point.loss,
                rows_per_second=point.rows_per_second,
                left=self._seconds_left(),
            )
        )
        if course.steps % self.spec.checkpoint_steps == 0:
            self.save_checkpoint()

    def _seconds_left(self) -> float:
        steps, seconds = self._begun_at
        pace = (self.course.seconds - seconds) / max(self.course.steps - steps, 1)
        return pace * (self.total_steps - self.course.steps)

    def _finish_epoch(self) -> None:
        course = self.course
        if self.experience.validation:
            loss = self.validate()
            course.validation_losses.append(loss)
            if course.best_epoch is None or loss < course.validation_losses[course.best_epoch]:
                course.best_epoch = course.epoch
                if self.spec.patience:
                    self.best = {name: p.detach().clone() for name, p in trainable(self.model).items()}
                    for method in self.methods.values():
                        method.mark_best()
        course.epoch, course.step = course.epoch + 1, 0
        self.save_checkpoint()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean negative log-likelihood over the answer tokens of the validation rows."""
        rows = sorted(self.experience.validation, key=lambda row: row.length)
        starts = range(0, len(rows), self.spec.batch_size)
        total, tokens = 0.0, 0
        self.model.eval()
        for n, start in enumerate(starts):
            self.check_stop()
            batch = collate(rows[start : start + self.spec.batch_size], self.base.prompter.pad_id)
            loss, count = self._nll(batch.to(self.device))
            total, tokens = total + loss, tokens + count
            self.tell(Progress(stage="validate", step=n + 1, steps=len(starts)))
        self.model.train()
        if not math.isfinite(total):
            raise NonFiniteLoss(
                f"the validation loss became {total} after epoch {self.course.epoch + 1}; "
                "try a lower training.learning_rate"
            )
        return total / tokens

    def _nll(self, batch: Batch) -> tuple[float, int]:
        with self.base.autocast():
            loss, count = nll(self.model, batch)
        return loss.item(), count

    # Checkpoints.

    def continue_from(self, course: Course, tensors: dict[str, Tensor]) -> None:
        """Makes the next `train` go on where a checkpoint was saved."""
        self.course, self._saved = course, tensors
        self.course.resumed += 1

    def save_checkpoint(self) -> None:
        parameters = trainable(self.model)
        parts: dict[str, dict[str, Tensor]] = {
            "model": dict(parameters),
            "best": self.best,
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, dict(parameters)),
            "random": checkpoint.random_states(self.device),
            "methods": checkpoint.joined({name: m.midway() for name, m in self.methods.items()}),
        }
        self.count_time()
        self.checkpoints.save(self.course, checkpoint.joined(parts))

    def _begin(self) -> None:
        torch.manual_seed(self.spec.seed)  # whatever loading the model drew
        if self._saved is not None:
            parameters: dict[str, Tensor] = dict(trainable(self.model))
            checkpoint.put(parameters, checkpoint.under("model/", self._saved))
            saved = checkpoint.under("optimizer/", self._saved)
            checkpoint.restore_optimizer(self.optimizer, parameters, saved)
            self.best = {n: t.to(self.device) for n, t in checkpoint.under("best/", self._saved).items()}
            for name, method in self.methods.items():
                method.resume(checkpoint.under(f"methods/{name}/", self._saved))
            checkpoint.restore_random_states(checkpoint.under("random/", self._saved), self.device)
            self._saved = None
        self._has_begun = True
        self.count_time()  # what methods did beforehand is training, too
        self._begun_at = (self.course.steps, self.course.seconds)

    def count_time(self) -> float:
        """Seconds since the last call, which are added to the training's."""
        now, cpu = time.monotonic(), time.process_time()
        seconds, self._mark = now - self._mark, now
        self.course.seconds += seconds
        self.course.cpu_seconds += cpu - self._cpu_mark
        self._cpu_mark = cpu
        return seconds


class _NoEvaluator(SupervisedPlugin):
    """Avalanche's metrics and loggers do not fit language models: ours come from stored predictions."""

    def get_last_metrics(self) -> dict[str, float]:
        return {}


def learning_rate(step: int, steps: int, spec: TrainSpec) -> float:
    """Linear warm-up, then half a cosine towards zero; `step` counts from 0."""
    rising = math.ceil(spec.warmup * steps)
    if step < rising:
        return spec.learning_rate * (step + 1) / rising
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def train(job: TrainJob, tell: Tell, should_stop: Callable[[], bool]) -> TrainReport:
    """Runs a job to its complete result directory. Calling it again continues, or finds the result;
    what another job left there is replaced.

    Raises `Interrupted` after a checkpoint when `should_stop` says so, `NonFiniteLoss` before an update
    that would spoil the adapter, `IntegrityError` when snapshot or parent are not what was written.
    """
    out, checkpoints = Path(job.out), Checkpoints(Path(job.work), job)
    if not artifacts.made_for(out, job.digest):
        for given in (job.snapshot, job.parent):
            if given is not None:
                artifacts.verify(given)
        with deterministic(job.train.seed, job.train.threads, job.model.device):
            _run(job, checkpoints, tell, should_stop)
    checkpoints.clear()
    return TrainReport.read(result_files(out)["report"])


def _run(job: TrainJob, checkpoints: Checkpoints, tell: Tell, should_stop: Callable[[], bool]) -> None:
    tell(Progress(stage="load", detail="base model"))
    base = load_base(job.model)
    experience = read_experience(Path(job.snapshot), base.prompter)
    methods = catalogue.build(job.strategy, job.train.seed)
    for method in methods:
        if job.parent is not None:
            method.load(result_files(job.parent)["state"])
    learner = Learner(
        base=base,
        model=inheritance.adapter(base, job),
        spec=job.train,
        methods=methods,
        checkpoints=checkpoints,
        tell=tell,
        should_stop=should_stop,
    )
    _resume(learner, checkpoints)
    learner.train(experience, eval_streams=[])
    learner.count_time()
    with artifacts.atomic_dir(job.out, {"job": job.digest}) as folder:
        result.write(
            folder,
            job,
            model=learner.model,
            methods=methods,
            course=learner.course,
            new=experience.new,
            replay_rows=learner.replay_rows,
            rehearsed=learner.rehearsed,
        )


def _resume(learner: Learner, checkpoints: Checkpoints) -> None:
    """A damaged checkpoint costs time, not the cycle."""
    try:
        saved = checkpoints.load()
    except IntegrityError as error:
        checkpoints.clear()
        learner.course.notes.append(f"{error}; it was discarded and the training began again")
    else:
        if saved is not None:
            learner.continue_from(*saved)


def _adamw(model: Module, spec: TrainSpec) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model).values(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
