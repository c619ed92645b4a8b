"""Replies of a model in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.target import open_target
from fastgpt.finetune.asking.dialogue import LEFT_OUT, Ask, Dialogue, LeftOut, Record, Reply
from fastgpt.finetune.encode import Encoder
from fastgpt.finetune.formats import Chat, Wrong
from fastgpt.inference import Generator, Request
from fastgpt.inference.chat import Template

LABEL = 8  # tokens of a label, at most


class OwnModel:
    """A model of this machine, as what replies in dialogues.

    Args:
        path: a run, a checkpoint, or the folder of a model. Its chat template is used, or else the default one.
        at_once: dialogues that are held together, as rows of a batch.

    Raises:
        UserError: as open_target.
    """

    def __init__(self, path: str, at_once: int = 16, device: str = "auto") -> None:
        target = open_target(path, device=device)
        self.name, self.at_once, self.tokenizer = path, at_once, target.tokenizer
        eos = self.tokenizer.decode_bytes([self.tokenizer.eot]).decode()
        self.template = target.chat or Template(eos_token=eos)
        self.identity = {"model": path, "weights": target.about["fingerprint"], "endpoint": None}
        self.engine = Engine(target)
        self.generator = Generator(target.model, self.tokenizer, max_batch=at_once)
        self.encoder = Encoder(self.tokenizer, self.template)

    def records(self, dialogues: Iterable[Dialogue]) -> Iterator[Record]:
        """Hold dialogues; yield their records in order."""
        waiting = iter(dialogues)
        while some := list(islice(waiting, self.at_once)):
            yield from self._together(some)

    def _together(self, dialogues: list[Dialogue]) -> list[Record]:
        """Hold a few dialogues in step: the requests of all of them are one batch."""
        found: dict[int, Record] = {}
        replies: dict[int, Any] = dict.fromkeys(range(len(dialogues)))
        while replies:
            asked: dict[int, list[Ask]] = {}
            for i, given in replies.items():
                try:
                    if isinstance(given, LeftOut):
                        raise given
                    asked[i] = dialogues[i].send(given)
                except StopIteration as end:
                    found[i] = end.value
                except LeftOut as reason:
                    found[i] = {LEFT_OUT: str(reason)}
            replies = self._replies(asked)
        return [found[i] for i in range(len(dialogues))]

    def _replies(self, asked: dict[int, list[Ask]]) -> dict[int, Any]:
        """Return the replies of each dialogue, or LeftOut for one with a request that cannot be answered."""
        replies: dict[int, Any] = {}
        texts: list[tuple[int, int, Request]] = []
        for i, asks in asked.items():
            try:
                replies[i] = [self._labels(ask) if ask.labels else None for ask in asks]
                texts += [(i, n, self._request(ask)) for n, ask in enumerate(asks) if not ask.labels]
            except LeftOut as reason:
                replies[i] = reason
        texts = [text for text in texts if isinstance(replies[text[0]], list)]
        for (i, n, _), result in zip(texts, self.generator.generate([request for *_, request in texts])):
            replies[i][n] = Reply(result.text, result.finish_reason == "length")
        return replies

    def _request(self, ask: Ask) -> Request:
        ids = self._prompt(ask, ask.max_tokens)
        stop = (self.template.stop,) if self.template.stop else ()
        return Request(ids, ask.max_tokens, temperature=ask.temperature, seed=ask.seed, stop=stop)

    def _prompt(self, ask: Ask, room: int) -> list[int]:
        """Return the ids of the conversation, behind which `room` tokens fit into the context.

        Raises:
            LeftOut: they do not, the template refuses the messages, or these hold a special token.
        """
        if any(token in m["content"] for m in ask.messages for token in self.tokenizer.specials):
            raise LeftOut("a text holds a special token")
        try:
            text = self.template.render(ask.messages)
        except UserError:
            raise LeftOut("refused by the chat template") from None
        prefix = self.tokenizer.prefix if self.template.default else ()
        ids = [*prefix, *(int(i) for i in self.tokenizer.encode(text, specials=True))]
        if len(ids) + room > self.generator.context:
            raise LeftOut("longer than the context of the model")
        return ids

    def _labels(self, ask: Ask) -> Reply:
        """Return the log-probability that the reply begins with each label."""
        self._prompt(ask, LABEL)
        pairs = []
        for label in ask.labels:
            try:
                chat = Chat([*ask.messages, {"role": "assistant", "content": label}], len(ask.messages))
                example = self.encoder.example(chat)
            except Wrong as wrong:
                raise LeftOut(wrong.kind) from None
            ids, before = example.ids.tolist(), example.prompt
            end = next((n for n in range(before + 1, len(ids)) if self._says(ids[before:n], label)), len(ids))
            pairs.append((ids[:before], ids[before:end]))
        return Reply("", logprobs=tuple(scored.logprob for scored in self.engine.loglikelihoods(pairs)))

    def _says(self, ids: list[int], label: str) -> bool:
        return self.tokenizer.decode_bytes(ids).strip() == label.encode()
