"""What users said as rows for `fastgpt finetune`: preference pairs, or rated completions for KTO.

Of several records of one user on one answer the last one counts, and of several users the majority. For pairs, the
n-th answer with thumbs up goes with the n-th of the same prompt with thumbs down.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass
class Votes:
    """The votes on all answers.

    Attributes:
        balance: prompt -> answer -> users for it less users against it, in the order of the records.
        compared: prompt -> (chosen, rejected) -> users.
        left: what gives no row, by reason.
    """

    balance: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    compared: dict[str, Counter[tuple[str, str]]] = field(default_factory=lambda: defaultdict(Counter))
    left: Counter[str] = field(default_factory=Counter)

    def pairs(self) -> Iterator[Row]:
        """Yield rows of prompt, chosen and rejected."""
        for prompt in dict.fromkeys([*self.compared, *self.balance]):
            found = [pair for pair, n in self.compared[prompt].items() if n > self.compared[prompt][pair[::-1]]]
            self.left["comparisons without a majority"] += len(self.compared[prompt]) - len(found)
            up, down = self._by_verdict(prompt)
            self.left["answers without one of the same prompt that has the other thumb"] += abs(len(up) - len(down))
            for chosen, rejected in dict.fromkeys([*found, *zip(up, down)]):
                yield {**_side(prompt, chosen, "chosen"), **_side(prompt, rejected, "rejected")}

    def rated(self) -> Iterator[Row]:
        """Yield rows of prompt, completion and label."""
        for prompt in dict.fromkeys([*self.compared, *self.balance]):
            for (chosen, rejected), n in self.compared[prompt].items():
                for answer, vote in ((chosen, n), (rejected, -n)):
                    self.balance[prompt][answer] = self.balance[prompt].get(answer, 0) + vote
            up, down = self._by_verdict(prompt)
            for answer, label in [*((a, True) for a in up), *((a, False) for a in down)]:
                yield {**_side(prompt, answer, "completion"), "label": label}

    def _by_verdict(self, prompt: str) -> tuple[list[str], list[str]]:
        """Return the answers with a majority for and against them; texts that are empty are left out."""
        votes = self.balance[prompt]
        self.left["empty answers"] += sum(not answer.strip() for answer in votes)
        self.left["answers without a majority"] += sum(not n for answer, n in votes.items() if answer.strip())
        written = {answer: n for answer, n in votes.items() if answer.strip()}
        return [a for a, n in written.items() if n > 0], [a for a, n in written.items() if n < 0]


def count(records: Iterable[Row]) -> Votes:
    """Return the votes of the records of a store."""
    newest: dict[tuple[str, int, str], Row] = {}
    for record in records:
        key = (record["id"], record.get("index", 0), record.get("user") or "")
        newest.pop(key, None)
        newest[key] = record
    votes = Votes()
    for record in newest.values():
        prompt = json.dumps(record["messages"] if "messages" in record else record["prompt"], ensure_ascii=False)
        if "chosen" in record:
            if record["chosen"].strip() and record["rejected"].strip():
                votes.compared[prompt][record["chosen"], record["rejected"]] += 1
            else:
                votes.left["empty answers"] += 1
        elif record["rating"] != "none":
            vote = 1 if record["rating"] == "up" else -1
            votes.balance[prompt][record["answer"]] = votes.balance[prompt].get(record["answer"], 0) + vote
    return votes


def _side(prompt: str, text: str, name: str) -> Row:
    """Return the prompt and a text after it: messages, as the prompt was."""
    value = json.loads(prompt)
    return {"prompt": value, name: text if isinstance(value, str) else [{"role": "assistant", "content": text}]}
