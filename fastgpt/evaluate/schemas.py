"""Rows of the benchmarks' official files and hub exports, brought into the columns that the harness's tasks read.

One function per benchmark; each raises UserError with the file and the line if a key is missing or a choice is out of
range. Sources: the README files of the official downloads, and the data cards of the hub's copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastgpt.core.errors import UserError


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        where: "file:line", for errors.
        part: the subject or paradigm that the name of the file says, if its rows do not.
        label: the answer of a file of labels beside the rows.
    """

    values: Mapping[str, Any]
    where: str
    part: str = ""
    label: str | None = None

    def get(self, key: str, kind: type | tuple[type, ...] = str) -> Any:
        """Return a value.

        Raises:
            UserError: the key is missing, or its value is of another type.
        """
        if key not in self.values:
            raise UserError(f"{self.where} has no key {key!r}, expected it in each row (found {_names(self.values)})")
        value = self.values[key]
        if not isinstance(value, kind):
            raise UserError(f"{self.where}: {key} is {value!r}, expected {_kind(kind)}")
        _require_text(value, f"{self.where}: {key}")
        return value

    def choice(self, key: str, choices: Sequence[Any]) -> int:
        """Return which of `choices` an answer is.

        Raises:
            UserError: it is none of them.
        """
        value = self.values.get(key)
        if value is None:
            value = self.label
        if value is None:
            raise UserError(f"{self.where} has no key {key!r}, and there is no file of labels, expected one of them")
        found = [i for i, choice in enumerate(choices) if str(value).strip() == str(choice)]
        if not found:
            raise UserError(f"{self.where}: {key} is {value!r}, expected one of {_names(choices)}")
        return found[0]


def _require_text(value: Any, what: str) -> None:
    """Refuse a half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{what} is {text!r}, expected text that UTF-8 can hold")


def _names(values: Any) -> str:
    return ", ".join(map(str, values)) or "nothing"


def _kind(kind: type | tuple[type, ...]) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}
    return " or ".join(names[k] for k in (kind if isinstance(kind, tuple) else (kind,)))


def _texts(row: Row, key: str) -> list[str]:
    """Return a list of at least two texts."""
    texts = row.get(key, list)
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{row.where}: {key} is {texts!r}, expected at least 2 texts")
    return list(texts)


def hellaswag(row: Row) -> dict[str, Any]:
    """Return a row of HellaSwag; official files have the label as a number, the hub as text."""
    endings = _texts(row, "endings")
    label = row.choice("label", range(len(endings)))
    texts = {key: row.get(key) for key in ("activity_label", "ctx_a")}
    texts["ctx_b"] = row.get("ctx_b") if "ctx_b" in row.values else ""
    return {**texts, "endings": endings, "label": str(label)}


def winogrande(row: Row) -> dict[str, Any]:
    """Return a row of WinoGrande, whose sentence has a gap `_`."""
    values = {key: row.get(key) for key in ("sentence", "option1", "option2")}
    if "_" not in values["sentence"]:
        raise UserError(f"{row.where}: sentence is {values['sentence']!r}, expected a gap _ in it")
    return {**values, "answer": str(1 + row.choice("answer", ["1", "2"]))}


def mmlu(row: Row) -> dict[str, Any]:
    """Return a row of MMLU: the columns of a CSV file, or `question`, `choices` and `answer` as a number or letter."""
    choices = _texts(row, "choices")
    if len(choices) != 4:
        raise UserError(f"{row.where}: choices has {len(choices)} texts, expected 4")
    answer = row.choice("answer", [*range(4), *"ABCD"]) % 4
    part = row.values.get("subject") or row.part
    return {"question": row.get("question"), "choices": choices, "answer": answer, "part": part}


def lambada_openai(row: Row) -> dict[str, Any]:
    """Return a row of LAMBADA, a text of at least two words."""
    text = row.get("text")
    if len(text.split(" ")) < 2:
        raise UserError(f"{row.where}: text is {text!r}, expected at least 2 words")
    return {"text": text}


def _question(row: Row) -> tuple[str, dict[str, list[str]]]:
    """Return the stem and the choices; official files nest both, the hub has an object of lists."""
    question = row.values.get("question")
    if isinstance(question, dict):
        holder, key = Row(question, f"{row.where}, question"), "stem"
    else:
        holder, key = row, "question_stem" if "question_stem" in row.values else "question"
    stem, choices = holder.get(key), holder.get("choices", (list, dict))
    if isinstance(choices, dict):
        inner = Row(choices, f"{row.where}, choices")
        return stem, {"text": _texts(inner, "text"), "label": _texts(inner, "label")}
    if not all(isinstance(choice, dict) for choice in choices):
        raise UserError(f"{row.where}: choices is {choices!r}, expected objects with text and label")
    each = [Row(choice, f"{row.where}, choices") for choice in choices]
    return stem, {"text": [c.get("text") for c in each], "label": [c.get("label") for c in each]}


def arc(row: Row) -> dict[str, Any]:
    """Return a row of ARC."""
    stem, choices = _question(row)
    return {"question": stem, "choices": choices, "answerKey": _key(row, choices)}


def openbookqa(row: Row) -> dict[str, Any]:
    """Return a row of OpenBookQA."""
    stem, choices = _question(row)
    return {"question_stem": stem, "choices": choices, "answerKey": _key(row, choices)}


def _key(row: Row, choices: dict[str, list[str]]) -> str:
    if len(choices["text"]) != len(choices["label"]):
        raise UserError(f"{row.where}: choices has {len(choices['text'])} texts, expected {len(choices['label'])}")
    return choices["label"][row.choice("answerKey", choices["label"])]


def piqa(row: Row) -> dict[str, Any]:
    """Return a row of PIQA."""
    return {**{key: row.get(key) for key in ("goal", "sol1", "sol2")}, "label": row.choice("label", [0, 1])}


def blimp(row: Row) -> dict[str, Any]:
    """Return a row of BLiMP; its UID is the paradigm."""
    part = row.values.get("UID") or row.part
    return {**{key: row.get(key) for key in ("sentence_good", "sentence_bad")}, "part": part}


def boolq(row: Row) -> dict[str, Any]:
    """Return a row of BoolQ. The first release has the title apart from the passage, SuperGLUE's puts it before it."""
    passage, title = row.get("passage"), row.values.get("title")
    answer = "label" if "label" in row.values else "answer"
    label = row.choice(answer, [0, 1, False, True]) % 2
    passage = f"{title} -- {passage}" if title else passage
    return {"passage": passage, "question": row.get("question"), "label": label}


SCHEMAS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "mmlu": mmlu,
    "lambada_openai": lambada_openai,
    "arc_easy": arc,
    "arc_challenge": arc,
    "piqa": piqa,
    "blimp": blimp,
    "openbookqa": openbookqa,
    "boolq": boolq,
}
