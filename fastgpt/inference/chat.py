"""Conversations as prompts: a template turns messages into text, and the oldest turns go when they do not fit.

A template is a Jinja template as transformers uses them (chat_template.jinja): it gets `messages`, a list of
{"role", "content"}, `add_generation_prompt`, `eos_token` and `bos_token`, and runs in Jinja's sandbox. Special tokens
that it writes become their ids; a message may not contain their text.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from fastgpt.core.errors import UserError, cause_of
from fastgpt.inference.requests import TextTokenizer

FILE = "chat_template.jinja"
# "User: ...\nAssistant: ...\nUser: ...\nAssistant:"
DEFAULT = """\
{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""

Message = dict[str, str]


class ChatTokenizer(TextTokenizer, Protocol):
    """A tokenizer that knows special tokens."""

    def encode(self, text: str, specials: bool = False) -> Any:
        """Return the ids of a text; specials: special tokens in it become their ids."""


class Template:
    """A chat template.

    Attributes:
        where: its file, or "the default template".
        default: whether it is the default one.
        stop: what the template writes after a reply, where a reply therefore ends; empty if it writes nothing.

    Raises:
        UserError: the template is not valid, refuses a plain conversation, or Jinja is not installed.
    """

    def __init__(
        self,
        text: str = DEFAULT,
        where: str = "the default template",
        eos_token: str = "",
        bos_token: str = "",
    ) -> None:
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment

            from fastgpt.inference import generation_tag
        except ImportError:
            raise UserError("chat templates need Jinja, expected `pip install jinja2`") from None

        def refuse(message: str) -> NoReturn:
            raise UserError(f"{where}: {message}")

        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", generation_tag.GenerationTag]
        )
        env.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form))
        env.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
        self.where, self._marks = where, (generation_tag.BEGIN, generation_tag.END)
        self._names: dict[str, Any] = {"eos_token": eos_token, "bos_token": bos_token}
        self.default = text == DEFAULT
        self._template = self._guard(lambda: env.from_string(text))
        self.stop = self._end_of_reply()

    @classmethod
    def of_run(cls, checkpoint: Path, eos_token: str, bos_token: str = "") -> Template:
        """Return the template in the folder of a checkpoint, or of its run, or the default one."""
        for file in (checkpoint / FILE, checkpoint.parent / FILE):
            if file.is_file():
                try:
                    return cls(file.read_text(encoding="utf-8"), str(file), eos_token, bos_token)
                except (OSError, UnicodeDecodeError) as e:
                    raise UserError(f"{file} cannot be read ({cause_of(e)})") from None
        return cls(eos_token=eos_token)

    def _guard(self, function: Callable[[], Any]) -> Any:
        """Return function(); an error of the template becomes one sentence."""
        try:
            return function()
        except UserError:
            raise
        except Exception as e:  # a template can raise anything
            raise UserError(f"{self.where} is not a valid chat template ({' '.join(str(e).split())})") from None

    def render(self, messages: Sequence[Mapping[str, Any]], ask: bool = True, tools: Any = None) -> str:
        """Return the text of a conversation; ask: followed by what begins a reply; tools: what the template may list as
        tools."""
        begin, end = self._marks
        return self._marked(messages, ask, tools).replace(begin, "").replace(end, "")

    def render_open(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a conversation up to the end of its last message's content, where a model can continue it.

        Raises:
            UserError: the template does not write that content.
        """
        *before, last = messages
        mark = "\ufdd2"  # a noncharacter, which no text has
        text, found, _ = self.render([*before, {**last, "content": last["content"] + mark}], ask=False).rpartition(mark)
        if not found:
            raise UserError(f"{self.where} does not write the last message, expected one that a model can continue")
        return text

    def generated(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[tuple[int, int]]:
        """Return where the `{% generation %}` blocks of a template lie in the text of a conversation, as (first
        character, last + 1); none if it has no such blocks."""
        begin, end = self._marks
        spans, at, first = [], 0, 0
        for part in re.split(f"([{begin}{end}])", self._marked(messages, False, tools)):
            if part == begin:
                first = at
            elif part == end:
                spans.append((first, at))
            else:
                at += len(part)
        return spans

    def _marked(self, messages: Sequence[Mapping[str, Any]], ask: bool, tools: Any) -> str:
        names = self._names | {"messages": messages, "add_generation_prompt": ask}
        names |= {} if tools is None else {"tools": tools}
        return str(self._guard(lambda: self._template.render(**names)))

    def _end_of_reply(self) -> str:
        """Return what follows a reply: a mark, as in "<|im_end|>", or else what begins the next message."""
        marks = ("FIRSTREPLY", "NEXTMESSAGE")
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marks[0]}]
        after = self.render(turns, ask=False).partition(marks[0])[2]
        if not after.strip():
            text = self.render([*turns, {"role": "user", "content": marks[1]}], ask=False)
            after = text.partition(marks[0])[2].partition(marks[1])[0].rstrip()
            return after if after.strip() else ""
        return after.strip()


class Conversation:
    """The messages of a conversation that fit into a model's context.

    Args:
        template: turns messages into text.
        tokenizer: encodes that text.
        room: the most tokens that a prompt may have.
        system: content of a system message that always comes first; empty: none.
    """

    def __init__(self, template: Template, tokenizer: ChatTokenizer, room: int, system: str = "") -> None:
        self.template, self.tokenizer, self.room = template, tokenizer, room
        self.system = [{"role": "system", "content": self._checked(system)}] if system else []
        self.messages: list[Message] = []

    def _checked(self, content: str) -> str:
        special = next((s for s in self.tokenizer.specials if s in content), None)
        if special is not None:
            raise UserError(f"the message contains {special}, expected text without special tokens")
        return content

    def ask(self, content: str) -> tuple[list[int], int]:
        """Append a message of the user; return the prompt's ids and how many of the oldest turns were dropped to fit
        them. The conversation is unchanged if this raises.

        Raises:
            UserError: the message does not fit even alone, contains a special token, or the template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": self._checked(content)}]
        dropped = 0
        prefix = self.tokenizer.prefix if self.template.default else ()  # another template writes its bos_token
        while True:
            ids = [*prefix, *self.tokenizer.encode(self.template.render([*self.system, *messages]), specials=True)]
            if len(ids) <= self.room:
                self.messages = messages
                return [int(i) for i in ids], dropped
            if len(messages) == 1:
                raise UserError(f"the message needs {len(ids)} tokens, expected at most {self.room}")
            messages, dropped = messages[2:], dropped + 1

    def answer(self, content: str) -> None:
        """Append the reply to the last message."""
        self.messages.append({"role": "assistant", "content": content})

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.messages = []
