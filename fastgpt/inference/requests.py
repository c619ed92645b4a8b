"""What is asked of a generator, and what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastgpt.inference.grammar import Grammar

FinishReason = Literal["length", "stop", "eos", "content_filter"]


class TextTokenizer(Protocol):
    """What a generator needs of a tokenizer; fastgpt.data.Tokenizer has it."""

    eot: int
    n_vocab: int
    prefix: tuple[int, ...]  # before every prompt
    ends: tuple[int, ...]  # end a text
    specials: dict[str, int]  # special token -> id

    def encode(self, text: str) -> Any:
        """Return the ids of a text, a sequence of ints."""

    def prompt(self, text: str) -> list[int]:
        """Return `prefix` and the ids of a text."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; the bytes of a text are those of its tokens, one after the other."""


def bytes_of(tokenizer: TextTokenizer, token: int) -> bytes:
    """Return the bytes of a token; none if the model's vocabulary is larger than the tokenizer's and has it alone."""
    return tokenizer.decode_bytes([token]) if token < tokenizer.n_vocab else b""


@dataclass(frozen=True)
class Request:
    """A prompt to continue, with its settings.

    Attributes:
        prompt: a text, or its ids.
        max_new_tokens: the largest number of tokens to add.
        temperature: divides the logits; 0 selects the most likely token.
        top_k: sample only from the k most likely tokens; None is all.
        top_p: sample only from the most likely tokens whose probabilities sum to p; 1 is all.
        min_p: sample only from tokens at least min_p times as likely as the most likely one; 0 is all.
        repetition_penalty: divides positive logits and multiplies negative ones of tokens already in the text, prompt
            included; 1 changes nothing.
        stop: texts that end the result; they are not part of its text.
        ignore_eos: continue after an end-of-text token.
        seed: of the random numbers; None draws one. The same request with the same seed gives the same tokens whatever
            else is in the batch, up to the rounding of the logits.
        logprobs: None: no log-probabilities; n: those of the chosen tokens and of the n most likely ones.
        prompt_logprobs: the same for the tokens of the prompt, which then has to fit into the context.
        adapter: name of the adapter to use; None: the base model.
        presence_penalty: subtracted from the logits of tokens that were added before; 0 changes nothing.
        frequency_penalty: subtracted from the logits of a token for each time that it was added; 0 changes nothing.
        logit_bias: numbers to add to the logits of tokens, by id.
        grammar: what the new text must be; it ends where the grammar does. A text that is cut by max_new_tokens or by
            a stop string is only the beginning of one.

    Raises:
        ValueError: names the setting, its value and what is expected.
    """

    prompt: str | Sequence[int]
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    adapter: str | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    grammar: Grammar | None = None

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Request:
        """Return the request of values that went through JSON: a grammar is a dictionary there, and ids are texts."""
        grammar, bias = values.get("grammar"), values.get("logit_bias")
        made = {
            "grammar": None if grammar is None else Grammar(**grammar),
            "logit_bias": None if bias is None else {int(i): value for i, value in bias.items()},
        }
        return cls(**{**values, **made})

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty needs the number of times that each token was added."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"Request: {name} is {getattr(self, name)!r}, expected {expected}")

        inf = float("inf")
        require(self.max_new_tokens >= 0, "max_new_tokens", "0 or more")
        require(0 <= self.temperature < inf, "temperature", "0 or more")
        require(self.top_k is None or self.top_k >= 1, "top_k", "at least 1")
        require(0 < self.top_p <= 1, "top_p", "more than 0, at most 1")
        require(0 <= self.min_p <= 1, "min_p", "0 to 1")
        require(0 < self.repetition_penalty < inf, "repetition_penalty", "more than 0")
        texts = not isinstance(self.stop, str) and all(isinstance(s, str) and s for s in self.stop)
        require(texts, "stop", "a sequence of texts that are not empty")
        require(self.seed is None or self.seed >= 0, "seed", "0 or more")
        for name in ("presence_penalty", "frequency_penalty"):
            require(-inf < getattr(self, name) < inf, name, "a finite number")
        require(all(-inf < b < inf for b in (self.logit_bias or {}).values()), "logit_bias", "finite numbers")
        require(self.grammar is None or not self.ignore_eos, "ignore_eos", "False beside a grammar")
        for name in ("logprobs", "prompt_logprobs"):
            require(getattr(self, name) is None or getattr(self, name) >= 0, name, "0 or more")


@dataclass(frozen=True)
class Result:
    """A finished request.

    Attributes:
        ids: the new tokens, with those of an end-of-text token or a stop string.
        text: the new text, without them; empty without a tokenizer.
        finish_reason: "length": max_new_tokens was reached; "stop": a stop string, or the grammar is complete; "eos":
            an end-of-text token; "content_filter": whoever watched the text ended it.
        prompt_tokens: number of tokens of the prompt.
        seed: of the random numbers.
        logprobs: log-probability of each of ids by the model, before penalty, temperature and filters; None if not
            asked for.
        top_logprobs: for each of ids the most likely tokens, (id, log-probability), largest first; None if not asked
            for.
        prompt_logprobs, prompt_top_logprobs: the same for the tokens of the prompt; the first one has no
            log-probability (None) and no alternatives. None if not asked for.
        cached_tokens: tokens of the prompt that were not read again, because an earlier text begins with them.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """What one step added to a request.

    Attributes:
        number: of the request, as `Generator.add` returned it; `stream` counts its requests from 0.
        id: the new token; None if max_new_tokens is 0.
        text: text that is certain now, perhaps empty: characters may need several tokens, and what may become a stop
            string is held back.
        result: of a request that is finished; else None.
        logprob, top_logprobs: of the new token, as in Result; None if not asked for.
        error: why the request ended without a result: its logits are not finite, or its grammar reached a limit of the
            library.
    """

    number: int
    id: int | None
    text: str
    result: Result | None = None
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    error: str | None = None
