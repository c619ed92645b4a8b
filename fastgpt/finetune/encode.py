"""From texts and conversations to token ids, and which of them are learned.

Ids are those that the model sees when it generates:

- A prompt has the ids of its text alone. Where the text of prompt and completion together begins with these ids, the
  completion has the rest of them (TRL's ids); where a token would reach over the seam, the completion is encoded by
  itself. Spaces that end a prompt move to its completion, as in lm_eval: a model that was asked without them
  generates them.
- The text of a special token within a prompt or a completion is ordinary text. In a conversation, whose text is made
  by a template that writes special tokens, it is a defect.
- A text and a completion end with the end-of-text token, which is learned like any other. So does a conversation that
  ends with a reply behind which the template writes no special token.
- The replies of a conversation are where rendering the messages before a reply, as a question, and those up to its
  end, differ. So a template that renders earlier messages otherwise once others follow is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.finetune.formats import Chat, Source, Text, Wrong
from fastgpt.inference.chat import Template

Loss = Literal["completions", "all"]
Ids = npt.NDArray[np.uint32]
ANCHORS = ("", "\n", "0", ".", "a", "Z")  # texts behind which a completion may be encoded by itself


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence of tokens.

    Attributes:
        ids: (n,) uint32.
        learned: (n,) bool, whether the loss counts the prediction of a token. Never the first, which nothing predicts.
        plain: whether it is a text without a prompt, which may be split.
    """

    ids: Ids
    learned: npt.NDArray[np.bool_]
    plain: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt(self) -> int:
        """The number of tokens before the first that is learned; all if none is."""
        return int(self.learned.argmax()) if self.learned.any() else len(self.ids)


class Encoder:
    """Encodes what the formats return.

    Args:
        template: of conversations.
        loss: "completions": completions and replies are learned, and plain text; "all": everything is.

    Attributes:
        special_texts: number of texts so far that hold the text of a special token as ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, loss: Loss = "completions") -> None:
        self.tokenizer, self.template, self.loss = tokenizer, template, loss
        self.special_texts = 0
        longest_first = sorted(tokenizer.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        self._special_ids = set(tokenizer.specials.values())
        self._eos = next(token for token, i in tokenizer.specials.items() if i == tokenizer.eot)

    def example(self, source: Source) -> Example:
        """Return the tokens of a text or a conversation.

        Raises:
            Wrong: a completion is empty, a message holds a special token, or the template refuses the messages.
            UserError: the template does not only append.
        """
        return self._text(source) if isinstance(source, Text) else self._chat(source)

    def words(self, words: list[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return the ids of words with a space between them, and the first token of each word."""
        text = " ".join(words)
        ids = self.plain(text)
        sizes = [len(self.tokenizer.decode_bytes([int(i)])) for i in ids]
        begins = np.array([0, *accumulate(sizes)]) - (sum(sizes) - len(text.encode()))  # a space may be added in front
        places = np.array([0, *accumulate(len(w.encode()) + 1 for w in words[:-1])])
        # a token may hold the space and the beginning of its word, so the word's first byte decides
        first = np.searchsorted(begins, places, side="right") - 1
        prefix = self.tokenizer.prefix
        return np.array([*prefix, *ids], np.uint32), first + len(prefix)

    def plain(self, text: str) -> Ids:
        """Return the ids of a text in which special tokens are ordinary text."""
        self.special_texts += self._special.search(text) is not None
        return self.tokenizer.encode(text)

    def _text(self, source: Text) -> Example:
        prompt = source.prompt.rstrip(" ")
        completion = source.prompt[len(prompt) :] + source.completion.removesuffix(self._eos)
        if not completion or completion.isspace():
            raise Wrong("empty completion", "the completion is empty", "fill it, or remove the row")
        self.special_texts += any(self._special.search(text) is not None for text in (prompt, completion))
        before = [*self.tokenizer.prefix, *(int(i) for i in self.tokenizer.encode(prompt))] if prompt else []
        if prompt:
            after = self._after(prompt, completion, specials=False)
        else:
            before, after = [*self.tokenizer.prefix], self.tokenizer.encode(completion).tolist()
        ids = np.array([*before, *after, self.tokenizer.eot], np.uint32)
        return self._example(ids, [(len(before), len(ids))], plain=not source.prompt)

    def _example(self, ids: Ids, spans: Sequence[tuple[int, int]], plain: bool = False) -> Example:
        learned = np.full(len(ids), self.loss == "all")
        for begin, end in spans:
            learned[begin:end] = True
        learned[0] = False
        return Example(ids, learned, plain)

    def _after(self, prompt: str, completion: str, specials: bool) -> list[int]:
        """Return the ids of a completion behind a prompt."""
        for anchor in (prompt, *ANCHORS):
            before = self.tokenizer.encode(anchor, specials=specials)
            whole = self.tokenizer.encode(anchor + completion, specials=specials)
            rest = whole[len(before) :]
            if np.array_equal(whole[: len(before)], before) and (
                anchor == prompt or self.tokenizer.decode_bytes(rest) == completion.encode()
            ):
                return [int(i) for i in rest]
        return [int(i) for i in self.tokenizer.encode(completion, specials=specials)]

    def _chat(self, chat: Chat) -> Example:
        for where, text in _strings(chat.messages, "messages"):
            if found := self._special.search(text):
                problem = f"field {where!r} contains {found[0]}, expected text without special tokens"
                raise Wrong("special token", problem, "remove it")
        text = self._render(chat, len(chat.messages), ask=False)
        spans = list(self._replies(chat, text))
        self._check_blocks(chat, [span[0] for span in spans])
        ids, cuts = self._ids_of(text, sorted({place for span in spans for place in span}))
        if chat.messages[-1]["role"] == "assistant" and ids[cuts[spans[-1][1]] - 1] not in self._special_ids:
            ids = [*ids[: cuts[spans[-1][1]]], self.tokenizer.eot]
            cuts[spans[-1][1]] += 1
        return self._example(np.array(ids, np.uint32), [(cuts[x], cuts[y]) for x, y in spans])

    def _render(self, chat: Chat, count: int, ask: bool) -> str:
        """Return the text of the first `count` messages.

        Raises:
            Wrong: the template refuses them.
        """
        try:
            return self.template.render(chat.messages[:count], ask, chat.tools)
        except UserError as e:
            raise Wrong("refused by the template", str(e), "repair the row, or use another template") from None

    def _replies(self, chat: Chat, text: str) -> Iterator[tuple[int, int]]:
        """Yield where the replies that are learned lie in the text of a conversation: each from where it is asked for
        to the end of what stops generation."""
        stop = self.template.stop
        for i, message in enumerate(chat.messages):
            if i < chat.first or message["role"] != "assistant":
                continue
            asked, ended = self._render(chat, i, ask=True), self._ended(chat, i + 1, text)
            if not (text.startswith(asked) and text.startswith(ended) and len(asked) < len(ended)):
                raise UserError(
                    f"{self.template.where} does not only append: it renders earlier messages otherwise once others "
                    "follow, or asks for a reply with text that is not before it; expected another template, or rows "
                    "with one reply each"
                )
            end = len(ended.rstrip())
            if stop and not ended.rstrip().endswith(stop):
                end = end + len(stop) if text.startswith(stop, end) else len(ended)
            yield len(asked), end

    def _ended(self, chat: Chat, count: int, text: str) -> str:
        """Return the text up to the end of a reply. Some templates write the end-of-text token behind the mark of the
        last reply alone; it is left out where others follow."""
        ended = self._render(chat, count, ask=False)
        shorter = ended.rstrip().removesuffix(self._eos)
        if text.startswith(ended) or not shorter.rstrip().endswith(tuple(self.tokenizer.specials)):
            return ended
        return shorter

    def _check_blocks(self, chat: Chat, begins: list[int]) -> None:
        """Raise UserError if the template marks replies elsewhere than they were found."""
        blocks = self.template.generated(chat.messages, chat.tools)
        if blocks and not all(any(first <= b <= end for first, end in blocks) for b in begins):
            raise UserError(
                f"{self.template.where} marks replies by {{% generation %}} elsewhere than behind what asks for them: "
                "expected each block to begin where add_generation_prompt ends"
            )

    def _ids_of(self, text: str, places: list[int]) -> tuple[list[int], dict[int, int]]:
        """Return the ids of a rendered text, and for each place in the text the number of ids before it."""
        encode, prefix = self.tokenizer.encode, self.tokenizer.prefix if self.template.default else ()
        whole = encode(text, specials=True)
        sizes = self._sizes(text, places, whole)
        if sizes is not None:
            return [*prefix, *whole.tolist()], {place: len(prefix) + size for place, size in zip(places, sizes)}
        ids, at, cuts = [*prefix], 0, {}  # a token reaches over a seam: encode what is between them
        for place in [*places, len(text)]:
            piece = text[at:place]
            ids += self._after(text[:at], piece, specials=True) if at else encode(piece, specials=True).tolist()
            cuts[place], at = len(ids), place
        return ids, cuts

    def _sizes(self, text: str, places: list[int], whole: Ids) -> list[int] | None:
        """Return how many ids the text before each place has alone, if `whole`, of all of it, begins with these."""

        def encode(begin: int, end: int) -> Ids:
            return self.tokenizer.encode(text[begin:end], specials=True)

        # A special token ends what is before it. With one between any two places, the text before a place has the ids
        # of the pieces before it, so each piece is encoded once.
        if all(self._special.search(text, begin, end) for begin, end in pairwise(places)):
            pieces = [encode(begin, end) for begin, end in pairwise([0, *places, len(text)])]
            if np.array_equal(np.concatenate(pieces), whole):
                return [int(size) for size in np.cumsum([len(piece) for piece in pieces[:-1]])]
        alone = [encode(0, place) for place in places]
        return [len(ids) for ids in alone] if all(np.array_equal(whole[: len(ids)], ids) for ids in alone) else None


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield the texts within messages, each with its place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _strings(inner, f"{where}[{i}]")
