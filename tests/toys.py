"""Tiny but real parts: a Llama of two layers, a byte tokenizer with a chat template. Made in a second."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from storage.parquet import SnapshotRow
from storage.rows import Row
from strategies.contract import ModelSpec

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

torch.set_num_threads(1)  # threads only get into each other's way on models this small


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the three control tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def sentencepiece_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """One token a letter, and `▁` for spaces and before the text: as `scheme` of Metaspace says, or, with
    `prepend`, as a normaliser of older models does it."""
    letters = sorted({*"▁\n", *map(chr, range(33, 127))})
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    if scheme == "prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_base(
    directory: Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """A base model folder as transformers saves it; returns `directory`."""
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return _saved(model, tokenizer, directory)


def tiny_gpt2(directory: Path, *, positions: int) -> Path:
    """A base with learned positions: one token more than `positions` is an IndexError."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _saved(GPT2LMHeadModel(config), tokenizer, directory)


def tiny_multimodal(directory: Path) -> Path:
    """A Gemma 3 that could see: its vision tower has linear layers that no text goes through."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    words = len(tokenizer)
    shape = {"intermediate_size": 32, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={
            **shape,
            "vocab_size": words + 3,
            "hidden_size": 32,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 96,
            "sliding_window": 64,
        },
        vision_config={
            **shape,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=words,
        eoi_token_index=words + 1,
        image_token_index=words + 2,
    )
    return _saved(Gemma3ForConditionalGeneration(config), tokenizer, directory)


def _saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_model_spec(directory: Path, **changes: object) -> ModelSpec:
    """How the tiny base is used: float32, so that results can be compared to the last bit."""
    fields = {
        "path": str(directory),
        "fingerprint": "tiny",
        "max_tokens": 256,
        "dtype": "float32",
        "device": "cpu",
    }
    return ModelSpec(**{**fields, **changes})  # type: ignore[arg-type]


def teach_to_recite(model: LlamaForCausalLM, follows: Mapping[int, int]) -> None:
    """Sets the weights so that the model answers token `t` with token `follows[t]`, whatever came before."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:  # nothing is added to the embedding on its way up
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(torch.randn(embedding.shape, generator=generator))
        head.zero_()
        for token, after in follows.items():
            head[after] += embedding[token]


def tiny_rows(
    task: str, count: int, answers: Sequence[str] = ("red", "green", "a long blue answer")
) -> list[SnapshotRow]:
    """Rows of a task; questions and answers differ in length, and every other row has a context."""
    rows = []
    for n in range(count):
        row = Row(
            id=str(n),
            task=task,
            question=f"{task} {n}?" + "!" * (n * 7 % 5),
            answer=answers[n % len(answers)],
            context="It depends. " * (n % 2),
        )
        rows.append(
            SnapshotRow(
                hash=row.hash,
                id=row.id,
                task=task,
                question=row.question,
                answer=row.answer,
                context=row.context,
                split="suite",
            )
        )
    return rows
