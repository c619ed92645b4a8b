"""Paraphrases of prompts by a model, asked for once and stored in the run's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastgpt.core.progress import bar
from fastgpt.finetune.asking.dialogue import LEFT_OUT, Ask, Dialogue, LeftOut, Replier, seed_of
from fastgpt.finetune.asking.endpoint import Endpoint
from fastgpt.finetune.asking.journal import Journal
from fastgpt.finetune.asking.keys import key_of
from fastgpt.finetune.asking.own import OwnModel
from fastgpt.finetune.augment.rows import Fields, answer, asked, with_asked
from fastgpt.finetune.augment.steps import Step


def paraphrased(step: Step, rows: Sequence[Fields], folder: Path, seed: int, device: str) -> Iterator[Fields | LeftOut]:
    """Yield each row with its prompt in other words, or why it has no paraphrase of use.

    Args:
        folder: of the run. What the model said is stored there and not asked again.

    Raises:
        UserError: the model or the endpoint cannot be used.
    """
    texts = list(dict.fromkeys(asked(row) for row in rows))
    made_by = {"model": step.paraphrase, "endpoint": step.endpoint, "instruction": step.instruction, "seed": seed}
    made_by |= {"max_tokens": step.max_tokens, "temperature": step.temperature}
    with Journal(folder / f"paraphrases-{step.name}.jsonl", made_by) as journal:
        known = {record["key"] for record in journal.records}
        if missing := [text for text in texts if _key(text) not in known]:
            _ask(journal, missing, _replier(step, device), step, seed)
        found = {record["key"]: record for record in journal.records}
    for row in rows:
        record = found[_key(asked(row))]
        why = record.get(LEFT_OUT) or _fault(step, asked(row), record["paraphrase"], answer(row))
        yield LeftOut(why) if why else with_asked(row, record["paraphrase"])


def _replier(step: Step, device: str) -> Replier:
    if step.endpoint:
        return Endpoint(step.endpoint, step.paraphrase, key=key_of(step.key_env), at_once=step.at_once)
    return OwnModel(step.paraphrase, step.at_once, device)


def _ask(journal: Journal, texts: list[str], replier: Replier, step: Step, seed: int) -> None:
    shown = bar(len(texts), desc=f"paraphrases {step.name}", unit="text", leave=False)
    try:
        for text, record in zip(texts, replier.records(_dialogue(text, step, seed) for text in texts)):
            journal.add({"key": _key(text), "text": text, **record})
            shown.update()
    finally:
        shown.close()


def _dialogue(text: str, step: Step, seed: int) -> Dialogue:
    message = {"role": "user", "content": f"{step.instruction.strip()}\n\n{text.strip()}"}
    (reply,) = yield [Ask([message], seed_of(seed, text), step.max_tokens, step.temperature)]
    if reply.cut:
        raise LeftOut("longer than max_tokens")
    return {"paraphrase": reply.text.replace("\0", "").strip()}


def _fault(step: Step, text: str, new: str, kept: str) -> str:
    """Return what is wrong with a paraphrase; empty if nothing is. kept: the answer, which stays where the text has
    it."""
    before, after = (" ".join(t.split()) for t in (text, new))
    if before.casefold() == after.casefold():
        return "equal to the text"
    if not step.shortest * len(before) <= len(after) <= step.longest * len(before) or not after:
        return "too short or too long"
    return "the answer is lost" if kept and kept in text and kept not in new else ""


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
