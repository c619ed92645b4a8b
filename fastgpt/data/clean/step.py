"""Step, the interface of a cleaning rule, and the text on its way through the steps."""

from __future__ import annotations

from typing import ClassVar

from fastgpt.data.clean.features import Features
from fastgpt.data.document import Document

LONGEST = 1 << 22


class State:
    """A document on its way through the steps.

    Attributes:
        document: the document as it was read; never changed.
        meta: fields of the document, which steps may add to.
        changes: what the steps changed: counts by name.
        text: the text as the steps so far left it.
        features: features of its first LONGEST characters, on which rules decide; this bounds their memory.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.meta = document.meta
        self.changes: dict[str, int] = {}
        self.text = document.text
        self.features = Features(self.text[:LONGEST])

    def replace(self, text: str) -> None:
        """Set the text."""
        if text != self.text:
            self.text, self.features = text, Features(text[:LONGEST])

    def count(self, name: str, number: int = 1) -> None:
        """Count changes under a name."""
        if number:
            self.changes[name] = self.changes.get(name, 0) + number


class Step:
    """A rule with its settings; a dataclass below this class for each rule.

    Attributes:
        name: key of the rule in a recipe.
        rules: names under which the rule drops documents.
    """

    name: ClassVar[str]
    rules: ClassVar[tuple[str, ...]] = ()

    def transform(self, text: str, state: State) -> str:
        """Return the text as this step changes it; changes are counted in `state`."""
        return text

    def decide(self, features: Features, state: State) -> str | None:
        """Return the name of the rule that drops the text, or None to keep it."""
        return None

    def apply(self, state: State) -> str | None:
        """Transform the text of `state`, then return the name of the rule that drops it, or None."""
        state.replace(self.transform(state.text, state))
        return self.decide(state.features, state)
