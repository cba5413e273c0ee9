"""Streams that need no data: `long` (many small experiences), and `toy` for tests and CI; and a tiny base.

The rows mean nothing. What is measured on `long` is what grows with the number of experiences: state,
time of a step, time of an answer, memory of the process.
"""

from pathlib import Path

from benchmarks.clinc_rows import Sizes
from benchmarks.quality.clinc import renaming
from benchmarks.quality.streams import Experience, Stream
from benchmarks.sampling import FIRST_DAY, shuffled
from storage.rows import Row, Split
from strategies.contract import ModelSpec

ANSWERS = ("red", "green", "blue", "white")


def long(sizes: Sizes, *, order: str, seed: int) -> Stream:
    """`sizes.domains` experiences of invented rows; the answer follows from the question's word."""
    names = [f"skill {n}" for n in range(sizes.domains)]
    if order == "shuffled":
        names = sorted(names, key=lambda name: shuffled("order", name))
    experiences = tuple(
        Experience(
            name=name,
            train=_rows(name, Split.TRAIN, sizes.rows, seed),
            validation=_rows(name, Split.VALIDATION, sizes.validation, seed),
            suites={name: _rows(name, Split.SUITE, sizes.suite, seed)},
        )
        for name in names
    )
    return Stream(name="long", order=order, experiences=experiences, labels=False).tidy()


def toy(sizes: Sizes, *, order: str, seed: int) -> Stream:
    """As `long`, with an answer of every task renamed in the experience after it."""
    invented = long(sizes, order=order, seed=seed)
    return renaming(Stream(name="toy", order=order, experiences=invented.experiences, labels=True))


def _rows(task: str, split: Split, count: int, seed: int) -> tuple[Row, ...]:
    return tuple(
        Row(
            id=f"{task}-{split}-{n}",
            task=task,
            question=f"{task}: {ANSWERS[n % 4]} thing {shuffled(seed, f'{split}{n}')[:6]}?",
            answer=f"{ANSWERS[n % 4]} {task.rpartition(' ')[2]}",
            created_at=FIRST_DAY,
            split=split,
        )
        for n in range(count)
    )


def tiny_base(folder: Path) -> ModelSpec:
    """A Llama of two layers that reads bytes, with random weights: made in a second, the same every time."""
    if not (folder / "config.json").exists():
        _make(folder)
    return ModelSpec(path=str(folder), fingerprint="tiny", max_tokens=256, dtype="float32", device="cpu")


def _make(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[1], eos_token=special[2], pad_token=special[0]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
