"""Text to token ids without torch, and without ever reading control tokens out of what users wrote.

The daemon measures rows with this; the worker's prompts are built on the same two encoders.
"""

from collections.abc import Callable

from tokenizers import Tokenizer

from storage.errors import ModelError
from strategies.contract import PreparedBase

Encoder = Callable[[str], list[int]]


def plain_encoder(tokenizer: Tokenizer) -> Encoder:
    """Encodes text as text: `<|im_end|>` typed by a user becomes the ids of its letters."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.no_padding()
    copy.no_truncation()
    return lambda text: list(copy.encode(text, add_special_tokens=False).ids)


def template_encoder(tokenizer: Tokenizer) -> Encoder:
    """Encodes the fixed parts of a chat template, where control tokens are meant."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
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
