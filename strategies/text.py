"""Questions and answers as token ids, in the model's own chat template.

The template is rendered once, around two placeholders; its fixed pieces are tokenised with control
tokens, what users wrote without. So a question can say anything and stays a question.
"""

import contextlib
from dataclasses import dataclass, field
from datetime import datetime

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from storage.errors import ModelError
from strategies.tokens import Encoder, plain_encoder, template_encoder

_DATE = datetime(2025, 1, 1)  # for every chat template that asks
# Private-use characters: no template contains them, and they are gone before anything is tokenised.
_QUESTION, _ANSWER = "\ue000\ue001", "\ue002\ue003"


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The fixed parts of a conversation, as ids: before the question, between, and after the answer."""

    before: list[int]
    between: list[int]
    end: list[int]


@dataclass
class Prompter:
    """Makes prompts and answers for one model. Not thread-safe, like the tokenizer it holds."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str = ""
    max_tokens: int = 512
    pieces: Pieces = field(init=False)
    _encode: Encoder = field(init=False)
    _encode_question: Encoder = field(init=False)  # which may come first in the sequence

    def __post_init__(self) -> None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError("this model's tokenizer has no fast form (tokenizer.json); choose another base")
        self._encode = plain_encoder(backend)
        self.pieces = _pieces(self.tokenizer, backend, self.system_prompt)
        self._encode_question = self._encode if self.pieces.before else plain_encoder(backend, first=True)

    def prompt_ids(self, question: str, context: str = "", *, longest: int | None = None) -> list[int]:
        """Everything up to where the model answers. A context comes before the question.

        Text beyond `max_tokens`, or beyond a prompt of `longest` tokens, is cut at its beginning, so that
        the question stays. Stored rows fit, as intake measures them; what people ask need not.
        """
        text = f"{context}\n\n{question}" if context else question
        room = self.max_tokens - self.template_tokens
        if longest is not None:
            room = min(room, longest - len(self.pieces.before) - len(self.pieces.between))
        return [*self.pieces.before, *self._encode_question(text)[-max(room, 1) :], *self.pieces.between]

    def answer_ids(self, answer: str) -> list[int]:
        """The answer and the token that ends it."""
        return [*self._encode(answer), *self.pieces.end]

    def decode(self, ids: list[int]) -> str:
        """Generated ids as text, up to the end of the turn."""
        stops = set(self.stop_ids)
        kept: list[int] = []
        for token in ids:
            if token in stops:
                break
            kept.append(token)
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's end of turn, and the model's end of text."""
        eos = self.tokenizer.eos_token_id
        return sorted({self.pieces.end[-1], *([eos] if eos is not None else [])})

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.stop_ids[0])

    @property
    def template_tokens(self) -> int:
        """Tokens around an empty question and answer, the system prompt included.

        Where the question comes first, one token is for the word boundary that it may begin with.
        """
        return (len(self.pieces.before) or 1) + len(self.pieces.between) + len(self.pieces.end)


def _pieces(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, system: str) -> Pieces:
    before, between, after = _split(_conversation(tokenizer, system))
    encode = template_encoder(backend)
    end = encode(after)
    # Not all_special_ids: many a model's end of turn is special without being anybody's bos or eos.
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    stop = next((n for n, token in enumerate(end) if token in special), None)
    if stop is not None:
        end = end[: stop + 1]
    elif tokenizer.eos_token_id is not None:
        end = [int(tokenizer.eos_token_id)]
    else:
        raise ModelError(
            "this model has neither an end-of-turn nor an end-of-text token; choose another base"
        )
    return Pieces(before=template_encoder(backend, first=True)(before), between=encode(between), end=end)


def _conversation(tokenizer: PreTrainedTokenizerBase, system: str) -> str:
    if not tokenizer.chat_template:
        bos = tokenizer.bos_token or ""
        told = f"{system}\n\n" if system else ""
        # Lines, not spaces: to most tokenizers a word and a word after a space are different tokens.
        return f"{bos}{told}Question:\n{_QUESTION}\nAnswer:\n{_ANSWER}{tokenizer.eos_token or ''}"
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    if not system:
        return _render(tokenizer, turns)
    with contextlib.suppress(Exception):  # templates refuse roles in their own words
        text = _render(tokenizer, [{"role": "system", "content": system}, *turns])
        if system.strip() in text:  # some say nothing and leave it out
            return text
    turns[0]["content"] = f"{system}\n\n{_QUESTION}"
    return _render(tokenizer, turns)


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    # Some templates put today's date into the prompt; the same rows must give the same adapter on any day.
    # The renderer takes no functions from its caller, but the compiled template that it keeps does.
    compiled = _compile_jinja_template(tokenizer.get_chat_template())
    compiled.environment.globals["strftime_now"] = _DATE.strftime
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _split(text: str) -> tuple[str, str, str]:
    before, found, rest = text.partition(_QUESTION)
    between, found_too, after = rest.partition(_ANSWER)
    if not found or not found_too:
        raise ModelError("this model's chat template changes what it is given; choose another base")
    return before, between, after
