"""C4's and FineWeb's rules for web pages, with the names and thresholds that datatrove gives them.

Sources: Raffel et al. 2020, JMLR 21, section 2.2 (C4); Penedo et al. 2024, arXiv 2406.17557, section 3.6 (FineWeb). A
threshold of None turns its rule off. A ratio equal to its threshold passes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from fastgpt.data.clean.features import Features
from fastgpt.data.clean.gopher import over, repeated
from fastgpt.data.clean.step import State, Step

# Unicode's Sentence_Terminal characters below U+3100, and the full-width forms.
TERMINALS = frozenset("!.?։؝؞؟۔܀܁܂߹࠷࠹࠽࠾।॥၊။።፧፨᙮᜵᜶។៕៖៙៚᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᭽᭾᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼⹓⹔。！？．｡")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE = re.compile(r"[.!?…。！？][\"'”’)\]]*\s+(?=\S)")


@dataclass
class C4(Step):
    """Drop lines, then texts with too few sentences, "lorem ipsum" or curly brackets.

    The lines that stay lose citation marks ("[1]", "[edit]") and the spaces around them.
    """

    name: ClassVar[str] = "c4"
    rules: ClassVar[tuple[str, ...]] = ("lorem_ipsum", "curly_bracket", "too_few_sentences")
    remove_citations: bool = True
    filter_no_terminal_punct: bool = True
    min_num_sentences: int | None = 5
    min_words_per_line: int | None = 3
    max_word_length: int | None = 1000
    filter_lorem_ipsum: bool = True
    filter_javascript: bool = True
    filter_curly_bracket: bool = True
    filter_policy: bool = True

    def _line(self, line: str) -> tuple[str, str]:
        """Return a line as it is kept, and the reason to leave it out ("" to keep it)."""
        words = line.split()
        if self.max_word_length is not None and len(line) > self.max_word_length:
            if max(map(len, words), default=0) > self.max_word_length:
                return line, "too_long_word"
        line = line.strip()
        if self.remove_citations and "[" in line:
            while (rest := _CITATION.sub("", line).strip()) != line:
                line = rest
            words = line.split()
        ending = line.endswith((".", "?", "!", '"', "'")) and not line.endswith("...")
        if self.filter_no_terminal_punct and not ending:
            return line, "no_terminal_punct"
        if self.min_words_per_line is not None and len(words) < self.min_words_per_line:
            return line, "too_few_words"
        return line, ""

    def _content(self, line: str, document: dict[str, bool]) -> tuple[str, str]:
        """Return the reason to leave a line out, and the rule by which it drops the whole text."""
        if document["lorem"] and "lorem ipsum" in line.lower():
            return "", "lorem_ipsum"
        if document["javascript"] and "javascript" in line.lower():
            return "javascript", ""
        if document["curly"] and "{" in line:
            return "", "curly_bracket"
        if document["policy"] and any(phrase in line.lower() for phrase in POLICY):
            return "policy", ""
        return "", ""

    def _walk(self, text: str, state: State) -> tuple[list[str], str | None]:
        """Return the lines that stay, and the rule by which a line drops the whole text."""
        lower, kept, rule = text.lower(), [], None
        document = {
            "lorem": self.filter_lorem_ipsum and "lorem ipsum" in lower,
            "javascript": self.filter_javascript and "javascript" in lower,
            "curly": self.filter_curly_bracket and "{" in text,
            "policy": self.filter_policy and any(phrase in lower for phrase in POLICY),
        }
        look = any(document.values())
        for line in text.splitlines():
            line, reason = self._line(line)
            if not reason and look:
                reason, drops = self._content(line, document)
                rule = rule or drops or None
            if reason:
                if line:
                    state.count(f"c4.line_{reason}")
            else:
                kept.append(line)
        return kept, rule

    def transform(self, text: str, state: State) -> str:
        return "\n".join(self._walk(text, state)[0])

    def apply(self, state: State) -> str | None:
        kept, rule = self._walk(state.text, state)
        if rule is None and self.min_num_sentences is not None and len(kept) < self.min_num_sentences:
            sentences = sum(1 + len(_SENTENCE.findall(line)) for line in kept)
            rule = "too_few_sentences" if sentences < self.min_num_sentences else None
        if rule is None:
            state.replace("\n".join(kept))
        return rule


@dataclass
class FineWeb(Step):
    """Drop texts of short lines, lines without punctuation, repeated lines, and lists."""

    name: ClassVar[str] = "fineweb"
    rules: ClassVar[tuple[str, ...]] = (
        "empty",
        "line_punct_ratio",
        "short_line_ratio",
        "char_dup_ratio",
        "list_ratio",
    )
    line_punct_thr: float | None = 0.12
    line_punct_exclude_zero: bool = False
    short_line_thr: float | None = 0.67
    short_line_length: int = 30
    char_duplicates_ratio: float | None = 0.01
    new_line_ratio: float | None = 0.3

    def decide(self, features: Features, state: State) -> str | None:
        lines, text = features.lines, features.text
        if not lines:
            return "empty"
        ended = sum(line[-1] in TERMINALS for line in lines) / len(lines)
        if self.line_punct_thr is not None and ended < self.line_punct_thr:
            if ended or not self.line_punct_exclude_zero:
                return "line_punct_ratio"
        short = sum(len(line) <= self.short_line_length for line in lines) / len(lines)
        if over(short, self.short_line_thr):
            return "short_line_ratio"
        breaks = text.count("\n")
        if over(repeated(lines)[1] / (len(text) - breaks), self.char_duplicates_ratio):
            return "char_dup_ratio"
        return "list_ratio" if over(breaks / max(features.n_words, 1), self.new_line_ratio) else None
