"""Text to token ids without torch, and without ever reading control tokens out of what users wrote.

The daemon measures rows with this; the worker's prompts are built on the same two encoders.
"""

import json
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from storage.errors import ModelError
from strategies.contract import PreparedBase

Encoder = Callable[[str], list[int]]


def plain_encoder(tokenizer: Tokenizer) -> Encoder:
    """Encodes text as text: `<|im_end|>` typed by a user becomes the ids of its letters.

    `encode_special_tokens` is not enough: it lets added tokens through that are not flagged special, and
    a Unigram model finds `</s>` in its own vocabulary. So what still comes out as control is cut apart.
    """
    copy = _bare(tokenizer)
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


def template_encoder(tokenizer: Tokenizer) -> Encoder:
    """Encodes the fixed parts of a chat template, where control tokens are meant."""
    copy = _bare(tokenizer)
    return lambda text: list(copy.encode(text, add_special_tokens=False).ids)


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


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither pads nor truncates."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
