"""Text to token ids without torch, and without ever reading control tokens out of what users wrote.

The daemon measures rows with this; the worker's prompts are built on the same two encoders.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from storage.errors import ModelError
from strategies.contract import PreparedBase

Encoder = Callable[[str], list[int]]

_NO_BOUNDARY: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


def plain_encoder(tokenizer: Tokenizer, *, first: bool = False) -> Encoder:
    """Encodes text as text: `<|im_end|>` typed by a user becomes the ids of its letters.

    The text stands in the middle of a template, or, with `first`, at the start of the sequence.
    `encode_special_tokens` is not enough: it lets added tokens through that are not flagged special, and
    a Unigram model finds `</s>` in its own vocabulary. So what still comes out as control is cut apart.
    """
    copy = _bare(tokenizer, first=first)
    copy.encode_special_tokens = True
    control = _control_ids(copy)

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        todo = [text]
        while todo:
            piece = todo.pop()
            found = copy.encode(piece, add_special_tokens=False)
            spans = [span for token, span in zip(found.ids, found.offsets, strict=True) if token in control]
            if spans:
                todo += reversed(_cut(piece, spans))
            else:
                ids += found.ids
        return ids

    return encode


def _control_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Added tokens that steer a model: flagged special, or written like `<think>` or `[INST]`.

    Added words and white space are text, and so is the token for unknown letters.
    """
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_id", tokenizer.token_to_id(model.get("unk_token") or ""))
    added = {n: token for n, token in tokenizer.get_added_tokens_decoder().items() if n != unknown}
    markup = ("<>", "[]")
    return frozenset(n for n, t in added.items() if t.special or t.content[:1] + t.content[-1:] in markup)


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The text in pieces, each span broken after its first character; a lone character is left out."""
    pieces, begin = [], 0
    for start, end in spans:
        pieces.append(text[begin : start + 1] if end - start > 1 else text[begin:start])
        begin = start + 1
    return [*pieces, text[begin:]]


def template_encoder(tokenizer: Tokenizer, *, first: bool = False) -> Encoder:
    """Encodes a fixed part of a chat template, where control tokens are meant: the first, or a later one."""
    whole = _bare(tokenizer, first=True)
    if first:
        return lambda text: list(whole.encode(text, add_special_tokens=False).ids)
    inside, control = _bare(tokenizer, first=False), _control_ids(whole)

    def encode(text: str) -> list[int]:
        found = whole.encode(text, add_special_tokens=False)
        # From the first control token on, the tokenizer's own habit is right, whatever it is.
        starts = (span[0] for token, span in zip(found.ids, found.offsets, strict=True) if token in control)
        head = next(starts, len(text))
        rest = whole.encode(text[head:], add_special_tokens=False)
        return [*inside.encode(text[:head], add_special_tokens=False).ids, *rest.ids]

    return encode


def count_tokens_factory(base: PreparedBase) -> Callable[[str, str], int]:
    """(prompt text, answer) → tokens of the whole sequence, the chat template's own included."""
    try:
        encode = plain_encoder(Tokenizer.from_file(base.tokenizer_file))
    except Exception as error:  # the library raises bare Exceptions
        raise ModelError(
            f"the tokenizer {base.tokenizer_file} cannot be read: {error}; "
            "remove the base's folder under models/, it is made again"
        ) from None
    return lambda prompt, answer: base.template_tokens + len(encode(prompt)) + len(encode(answer))


def _bare(tokenizer: Tokenizer, *, first: bool) -> Tokenizer:
    """A copy that neither pads nor truncates, and puts a word boundary before the text only if it is `first`.

    SentencePiece begins every sequence with its `▁`; in the middle of one it would be a space too many.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    if not first:
        # Edited as JSON, the one form that shows what a Sequence holds; without the large vocabulary.
        steps = Tokenizer(BPE())
        steps.normalizer, steps.pre_tokenizer = copy.normalizer, copy.pre_tokenizer
        parts = json.loads(steps.to_str())
        parts |= {name: _inside(parts[name]) for name in ("normalizer", "pre_tokenizer")}
        edited = Tokenizer.from_str(json.dumps(parts))
        copy.normalizer, copy.pre_tokenizer = edited.normalizer, edited.pre_tokenizer
    return copy


def _inside(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokenizer that puts nothing before the text."""
    if part is None or part["type"] == "Prepend":
        return None
    changed = {**part, **_NO_BOUNDARY.get(part["type"], {})}
    for steps in ("normalizers", "pretokenizers"):
        if steps in changed:
            changed[steps] = [step for step in map(_inside, changed[steps]) if step is not None]
    return changed
