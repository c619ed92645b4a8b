"""The model of EleutherAI's LM Evaluation Harness that scores and generates with `Engine`.

It gives what the harness's own `hf` model gives for the exported model, with one exception on purpose: a tokenizer that
puts a start token before every text does not have that token scored by `loglikelihood_rolling`.

Source: lm_eval 0.4.13, lm_eval/api/model.py and lm_eval/models/huggingface.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastgpt.core import progress
from fastgpt.core.errors import UserError
from fastgpt.evaluate.engine import Engine, Pair
from fastgpt.inference import Request
from fastgpt.inference.chat import FILE

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:
    raise UserError("tasks of the LM Evaluation Harness need lm_eval, expected `pip install fastgpt[eval]`") from None

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of a Request
KNOWN = {*SAMPLING, "until", "max_gen_toks", "do_sample"}
IDLE = {"num_beams": 1, "use_cache": True}  # settings of tasks that say what happens anyway


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model of lm_eval.

    Args:
        engine: scores and generates.
        show: display progress bars.

    Attributes:
        truncated: prompts so far that did not fit into the context and lost their first tokens.
    """

    def __init__(self, engine: Engine, *, show: bool = False) -> None:
        super().__init__()
        self.engine, self.show, self.truncated = engine, show, 0
        self.text_tokenizer = engine.target.tokenizer
        self._prefix_text = self.text_tokenizer.decode_bytes([self.prefix_token_id]).decode()

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eot

    @property
    def prefix_token_id(self) -> int:
        return self.engine.start

    @property
    def max_length(self) -> int:
        return self.engine.context

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def device(self) -> Any:
        return self.engine.device

    @property
    def tokenizer_name(self) -> str:
        """Identify the tokenizer and its template, for the harness's cache of requests."""
        return self.text_tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, special tokens in it included, after those that the tokenizer puts first.

        Args:
            add_special_tokens: whether the latter are added; default: unless the text begins with the start token.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        prefix = self.text_tokenizer.prefix if add_special_tokens else ()
        return [*prefix, *self.text_tokenizer.encode(string, specials=True).tolist()]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score the continuation of each request's (context, continuation).

        Raises:
            UserError: a continuation has no token of its own, or more than fit into the context.
        """
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        bar = self._bar(len(requests), "log-likelihoods")
        scored = self.engine.loglikelihoods([self._pair(*request) for request in requests], bar.update)
        bar.close()
        self.truncated += len({texts[0] for (texts, *_), s in zip(requests, scored) if s.truncated})
        answers = [(s.logprob, s.greedy) for s in scored]
        for (texts, *_), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _pair(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> Pair:
        if 0 < len(continuation) <= self.max_length:
            return context or [self.prefix_token_id], continuation
        raise UserError(
            f"the continuation {texts[1][:40]!r} of {texts[0][-40:]!r} has {len(continuation)} tokens of its own, "
            f"expected 1 to {self.max_length}"
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of each request's text in nats, each token scored once after a start token."""
        texts = [request.args[0] for request in requests]
        sums = [nats for nats, _ in self.engine.rolling([self.tok_encode(text, False) for text in texts])]
        for text, nats in zip(texts, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), nats)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continue each request's context up to the first of its stop texts, which is left out.

        Raises:
            UserError: a request has settings that this model does not know, or leaves no room for its context.
        """
        asked = [self._request(i, *request.args) for i, request in enumerate(requests)]
        results = self.engine.generate(asked)
        texts = [self._text(result.ids, request.stop) for request, result in zip(asked, results)]
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, number: int, context: str, settings: Mapping[str, Any]) -> Request:
        given = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        other = sorted(k for k in given.keys() - KNOWN if given[k] != IDLE.get(k, object()))
        if other:
            raise UserError(f"generation has the setting {other[0]}, expected only {', '.join(sorted(KNOWN))}")
        room = self.max_length - given["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"max_gen_toks is {given['max_gen_toks']}, expected less than the model's context, {self.max_length}"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(ids) > room
        options = {name: given[name] for name in SAMPLING if name in given}
        options["temperature"] = options.get("temperature", 1.0) if given["do_sample"] else 0.0
        stop = [text for text in given["until"] if text]
        try:
            return Request(ids[-room:], given["max_gen_toks"], stop=stop, seed=number, **options)
        except ValueError as e:
            raise UserError(f"generation: {e}") from None

    def _text(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """Return the text of generated ids without special tokens, up to the first stop text."""
        specials = set(self.text_tokenizer.specials.values())
        text = self.text_tokenizer.decode(i for i in ids if i not in specials and i < self.text_tokenizer.n_vocab)
        for end in stop:
            text = text.partition(end)[0]
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the chat template; None if none is to be used."""
        if chat_template is False or self.engine.target.chat is None:
            return None
        return self.text_tokenizer.companions.get(FILE)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation; without add_generation_prompt it ends with its last message.

        Raises:
            UserError: there is no chat template, or it refuses the conversation.
        """
        template = self.engine.target.chat
        if template is None:
            raise UserError(f"{self.engine.target.name} has no chat template, expected {FILE} beside its tokenizer")
        text = template.render(chat_history, ask=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        at = text.rfind(last.strip())
        if at < 0:
            raise UserError(f"{template.where} does not write the last message, expected a text that ends with it")
        kept = last.lstrip() if text.startswith(last.lstrip(), at) else last.strip()
        return text[: at + len(kept)]

    def _bar(self, total: int, name: str) -> Any:
        return progress.bar(total, desc=name, leave=False) if self.show else progress.NoBar(total)
