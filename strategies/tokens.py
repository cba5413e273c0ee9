"""Text to token ids without torch, and without ever reading control tokens out of what users wrote.

The daemon measures rows with this; the worker's prompts are built on the same two encoders.
"""

import json
import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from storage.errors import ModelError
from strategies.contract import PreparedBase

Encoder = Callable[[str], list[int]]


def plain_encoder(tokenizer: Tokenizer) -> Encoder:
    """Encodes text as text: `<|im_end|>` typed by a user becomes the ids of its letters.

    `encode_special_tokens` is not enough: it lets added tokens through that are not flagged special, and
    a Unigram model finds `</s>` in its own vocabulary. So what still comes out as control is cut apart.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.no_padding()
    copy.no_truncation()
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
    """Every added token, but for runs of white space (some models have them) and the unknown token."""
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_id", tokenizer.token_to_id(model.get("unk_token") or ""))
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(n for n, token in added.items() if token.content.strip() and n != unknown)


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The text in pieces, each span broken after its first character; a lone character is left out."""
    pieces, begin = [], 0
    for start, end in spans:
        pieces.append(text[begin : start + 1] if end - start > 1 else text[begin:start])
        begin = start + 1
    return [*pieces, text[begin:]]


def template_encoder(tokenizer: Tokenizer) -> Encoder:
    """Encodes the fixed parts of a chat template, where control tokens are meant."""
    copy = _bare(tokenizer.to_str())
    return lambda text: list(copy.encode(text, add_special_tokens=False).ids)


def count_tokens_factory(base: PreparedBase) -> Callable[[str, str], int]:
    """(prompt text, answer) → tokens of the whole sequence, the chat template's own included."""
    try:
        encode = plain_encoder(Tokenizer.from_file(base.tokenizer_file))
    except Exception as error:  # the library raises bare Exceptions
        raise ModelError(
            f"the tokenizer {base.tokenizer_file} cannot be read: {error}; remove its folder, it is made again"
        ) from None
    return lambda prompt, answer: base.template_tokens + len(encode(prompt)) + len(encode(answer))


def _bare(state: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(state)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _is_markup(content: str) -> bool:
    """Whether an added token is written like `<think>` or `[INST]`, rather than a word or white space.

    Many models leave such tokens unmarked, though they steer them.
    """
    return content[:1] + content[-1:] in ("<>", "[]")


def _control_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that the tokenizer calls special; not the one for unknown letters, which is honest text."""
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    unknown = tokenizer.token_to_id(model.get("unk_token") or "")
    added = tokenizer.get_added_tokens_decoder()
    return {n for n, token in added.items() if token.special} - {unknown, model.get("unk_id")}
