"""Preference pairs from a constitution.

- revise: the model answers a prompt, criticises its answer by a rule, and revises it. The revision is chosen, the
  answer rejected.
- compare: the model answers twice, and then says which answer is better by a rule: with d the log-probability of
  "A" less that of "B" as its reply, once with the first answer as A and once with the second, the first is chosen if
  (d_1 - d_2) / 2 > 0. A preference for a letter or a place cancels out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastgpt.core.errors import UserError
from fastgpt.finetune.asking.dialogue import Ask, Dialogue, LeftOut, Message, Reply, seed_of
from fastgpt.finetune.pairs.constitution import Constitution, Rule

Mode = Literal["revise", "compare"]
MODES: tuple[Mode, ...] = get_args(Mode)
LABELS = ("A", "B")
QUESTION = """\
{conversation}

Answer A:
{first}

Answer B:
{second}

{comparison}
Reply with A or B alone."""


@dataclass(frozen=True)
class Settings:
    """How pairs are made.

    Attributes:
        mode: "revise" or "compare".
        seed: of the rules that are drawn, and of the replies.
        temperature, max_tokens: of the replies.
        keep_cut: keep texts that max_tokens cut off.
    """

    mode: Mode = "revise"
    seed: int = 0
    temperature: float = 1.0
    max_tokens: int = 256
    keep_cut: bool = False


def rules_of(constitution: Constitution, mode: Mode) -> list[Rule]:
    """Return the rules that a mode draws from.

    Raises:
        UserError: no rule has what the mode needs.
    """
    found = [rule for rule in constitution.rules if mode == "revise" or rule.comparison.strip()]
    if not found:
        raise UserError("no rule of the constitution has the key comparison, which mode compare needs")
    return found


def dialogue_of(number: int, prompt: list[Message], rules: Sequence[Rule], settings: Settings) -> Dialogue:
    """Return the dialogue that makes the pair of a prompt; its record is a row of format `preference`.

    Args:
        number: of the prompt; with the seed it decides the rule and the replies.
        prompt: messages, the last one of the user.
    """
    rule = random.Random(seed_of(settings.seed, number, "rule")).choice(list(rules))
    make = _revised if settings.mode == "revise" else _compared
    return make(number, prompt, rule, settings)


def _revised(number: int, prompt: list[Message], rule: Rule, settings: Settings) -> Dialogue:
    turns = [*_shown(rule), *prompt]
    (answer,) = yield [_ask(turns, settings, number, "answer")]
    rejected = _text(answer, "answer", settings)
    turns += [_said(rejected), _asked(rule.critique)]
    (critique,) = yield [_ask(turns, settings, number, "critique")]
    turns += [_said(_text(critique, "critique", settings)), _asked(rule.revision)]
    (revision,) = yield [_ask(turns, settings, number, "revision")]
    chosen = _text(revision, "revision", settings)
    texts = {"answer": answer.text, "critique": critique.text, "revision": revision.text}
    return _record(number, prompt, chosen, rejected, rule, settings, texts)


def _compared(number: int, prompt: list[Message], rule: Rule, settings: Settings) -> Dialogue:
    drawn = yield [_ask(prompt, settings, number, name) for name in ("first", "second")]
    first, second = (_text(reply, "answer", settings) for reply in drawn)
    if first == second:
        raise LeftOut("equal sides")
    votes = yield [_judge(prompt, rule, *sides) for sides in ((first, second), (second, first))]
    d_1, d_2 = (vote.logprobs[0] - vote.logprobs[1] for vote in votes)
    margin = (d_1 - d_2) / 2
    if margin == 0:
        raise LeftOut("no answer is better")
    chosen, rejected = (first, second) if margin > 0 else (second, first)
    record = _record(number, prompt, chosen, rejected, rule, settings, {"answers": [reply.text for reply in drawn]})
    return record | {"margin": abs(margin), "position_bias": (d_1 + d_2) / 2}


def _judge(prompt: list[Message], rule: Rule, first: str, second: str) -> Ask:
    """Return the question which of two answers is better."""
    conversation = "\n\n".join(f"{m['role'].capitalize()}:\n{m['content']}" for m in prompt)
    parts = dict(conversation=conversation, first=first, second=second, comparison=rule.comparison.strip())
    return Ask([_asked(QUESTION.format(**parts))], temperature=0.0, labels=LABELS)


def _shown(rule: Rule) -> list[Message]:
    """Return the examples of a rule as turns."""
    turns = []
    for example in rule.examples:
        turns += [_asked(example.prompt), _said(example.answer), _asked(rule.critique), _said(example.critique)]
        turns += [_asked(rule.revision), _said(example.revision)]
    return turns


def _ask(turns: list[Message], settings: Settings, number: int, name: str) -> Ask:
    seed = seed_of(settings.seed, number, name)
    return Ask(list(turns), seed, settings.max_tokens, settings.temperature)


def _text(reply: Reply, name: str, settings: Settings) -> str:
    """Return the text of a reply.

    Raises:
        LeftOut: it is empty, or cut off.
    """
    text = reply.text.replace("\0", "").strip()
    if not text:
        raise LeftOut(f"empty {name}")
    if reply.cut and not settings.keep_cut:
        raise LeftOut(f"{name} longer than max_tokens")
    return text


def _record(
    number: int,
    prompt: list[Message],
    chosen: str,
    rejected: str,
    rule: Rule,
    settings: Settings,
    texts: dict[str, Any],
) -> dict[str, Any]:
    if chosen == rejected:
        raise LeftOut("equal sides")
    row: dict[str, Any] = {"prompt": prompt, "chosen": [_said(chosen)], "rejected": [_said(rejected)]}
    return row | {"rule": rule.name, "mode": settings.mode, "number": number, **texts}


def _asked(text: str) -> Message:
    return {"role": "user", "content": text.strip()}


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text.strip()}
