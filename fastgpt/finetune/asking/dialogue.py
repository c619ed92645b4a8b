"""Questions to a model, one after the other: a dialogue is a generator that yields requests and is sent replies.

    def dialogue() -> Dialogue:
        (answer,) = yield [Ask([{"role": "user", "content": "2 + 2?"}], seed=1)]
        return {"answer": answer.text}

The same dialogue runs against a model (own.py, many at a time in one batch) and an endpoint (endpoint.py, in threads).
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]
LEFT_OUT = "left_out"  # the key of a record that has no more than the reason


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        messages: the conversation that the model replies to.
        seed: of the reply, which is drawn at `temperature` and has at most max_tokens tokens.
        labels: ask for the log-probabilities of these replies instead of a text.
    """

    messages: list[Message]
    seed: int = 0
    max_tokens: int = 256
    temperature: float = 1.0
    labels: tuple[str, ...] = ()


class Reply(NamedTuple):
    """The reply to a request: its text, whether max_tokens cut it off, and the log-probability of each label, in
    nats."""

    text: str
    cut: bool = False
    logprobs: tuple[float, ...] = ()


Record = dict[str, Any]
Dialogue = Generator[list[Ask], list[Reply], Record]


class LeftOut(Exception):
    """The reason why a dialogue gives no record of use. A dialogue may raise it, and what replies."""


class Replier(Protocol):
    """What replies.

    Attributes:
        name: of the model, for records.
        identity: what its replies depend on.
    """

    name: str
    identity: dict[str, Any]

    def records(self, dialogues: Iterable[Dialogue]) -> Iterator[Record]:
        """Hold dialogues, several at a time; yield their records in order, {LEFT_OUT: reason} where LeftOut was
        raised."""


def seed_of(*parts: int | str) -> int:
    """Return a seed of 31 bits that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little") >> 1
