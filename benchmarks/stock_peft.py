"""Beside Holdfast: sequential fine-tuning with PEFT alone, the way its documentation shows.

`get_peft_model`, AdamW with a linear schedule, `for batch in loader`, float32; each experience goes on with
the adapter of the one before. Of Holdfast only rows and bookkeeping are used; the exams are the same.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from benchmarks.quality.learning import ShouldStop, Trained, Work, write_snapshot
from benchmarks.quality.streams import Stream
from storage.artifacts import atomic_dir, made_for
from storage.errors import Interrupted
from storage.rows import Row
from strategies.contract import LoraSpec, TrainReport, TrainSpec, result_files


def learn(work: Work, stream: Stream, should_stop: ShouldStop) -> Iterator[Trained]:
    """One adapter, trained on the new rows of each experience in turn."""
    _, training, lora = work.plan.specs()
    parent: Path | None = None
    for number, experience in enumerate(stream.experiences):
        snapshot = write_snapshot(work, stream, number, None)
        out = work.folder / f"train-{number + 1}"
        digest = digest_of(work, number, snapshot.id)
        if not made_for(out, digest):
            start_with(training)
            model, tokenizer = load(work.model.path)
            model = continued(model, parent) if parent else with_lora(model, lora)
            data = [encoded(tokenizer, row, work.model.max_tokens) for row in experience.train]
            began = time.process_time()
            steps = fine_tune(model, data, tokenizer.pad_token_id, training, should_stop)
            keep(model, out, digest, report(work, len(data), steps, time.process_time() - began))
        yield Trained(snapshot=snapshot, result=out, digest=digest, report=read_report(out))
        parent = out


def fine_tune(
    model: Any, data: Sequence[dict[str, list[int]]], pad: int, spec: TrainSpec, should_stop: ShouldStop
) -> int:
    """The loop of PEFT's documentation; returns its steps."""
    rows: Any = list(data)
    loader: DataLoader[Any] = DataLoader(
        rows, batch_size=spec.batch_size, shuffle=True, collate_fn=partial(padded, pad=pad)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    steps = len(loader) * spec.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps)
    model.train()
    for _ in range(spec.epochs):
        for batch in loader:
            if should_stop():
                raise Interrupted()
            loss = model(**batch.to(model.device)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return steps


def with_lora(model: Any, lora: LoraSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if lora.targets == "all-linear" else lora.targets.split(",")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def continued(model: Any, parent: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(result_files(parent)["adapter"]), is_trainable=True)


def load(path: str) -> tuple[Any, Any]:
    """Base and tokenizer, on the GPU when there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.to(device), tokenizer


def encoded(tokenizer: Any, row: Row, longest: int) -> dict[str, list[int]]:
    """The conversation in the model's chat template; only the answer has labels."""
    question = [{"role": "user", "content": row.question}]
    answer = [{"role": "assistant", "content": row.answer}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(question + answer, tokenize=False)
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    told = tokenizer(whole.removeprefix(prompt), add_special_tokens=False)["input_ids"]
    ids = [*asked, *told]
    labels = [*(-100 for _ in asked), *told]
    return {"input_ids": ids[-longest:], "labels": labels[-longest:]}


def padded(examples: Sequence[dict[str, list[int]]], pad: int) -> Any:
    """A batch as transformers models take it, padded on the right."""
    from transformers import BatchEncoding

    width = max(len(example["input_ids"]) for example in examples)

    def filled(name: str, filling: int) -> torch.Tensor:
        return torch.tensor([[*e[name], *[filling] * (width - len(e[name]))] for e in examples])

    mask = [[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]
    return BatchEncoding(
        {
            "input_ids": filled("input_ids", pad),
            "attention_mask": torch.tensor(mask),
            "labels": filled("labels", -100),
        }
    )


# What a result directory needs, so that the exams find it.


def start_with(training: TrainSpec) -> None:
    torch.set_num_threads(training.threads or torch.get_num_threads())
    torch.manual_seed(training.seed)


def digest_of(work: Work, number: int, snapshot: str) -> str:
    return hashlib.sha256(
        f"{work.plan.digest} {work.model.fingerprint} {number} {snapshot}".encode()
    ).hexdigest()


def keep(model: Any, out: Path, digest: str, told: TrainReport) -> None:
    with atomic_dir(out, {"job": digest}) as folder:
        model.save_pretrained(str(result_files(folder)["adapter"]))
        result_files(folder)["state"].mkdir()
        result_files(folder)["report"].write_text(told.to_json() + "\n", encoding="utf-8")


def read_report(out: Path) -> TrainReport:
    return TrainReport.from_json(result_files(out)["report"].read_text(encoding="utf-8"))


def report(work: Work, rows: int, steps: int, seconds: float, memory: int = 0) -> TrainReport:
    return TrainReport(
        strategy=work.plan.contender,
        rows=rows,
        replay_rows=0,
        steps=steps,
        epochs=int(work.plan.specs()[1].epochs),
        stopped_early=False,
        seconds=seconds,
        cpu_seconds=seconds,
        final_loss=0.0,
        memory_rows=memory,
    )
