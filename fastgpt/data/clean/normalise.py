"""Normalisation: Unicode, mojibake, white space, punctuation, HTML, boilerplate lines, and case.

ASCII needs no work of the first two, and cheap searches (`in`, one regular expression) decide whether a text needs any
of the others. HTML is removed by tag name, so "a < b" and "List<int>" stay.
"""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass, field
from typing import ClassVar

from fastgpt.core.errors import UserError
from fastgpt.data.clean.step import State, Step

_SUSPECT = re.compile("[^\x00-\x7f‘’“”–—…•·°]")  # ftfy finds no mojibake among these characters
_SURROGATE = re.compile("[\ud800-\udfff]")
# Control characters but tab, newline and form feed; marks without width but the joiners; byte order marks, bidi
# overrides.
_INVISIBLE = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\ufffe\uffff"
_CONTROL = re.compile(f"[{_INVISIBLE}]")
_ASCII_CONTROL = bytes([*range(9), *range(14, 32), 127])
_ODD_SPACE = re.compile("[\x0b\x0c\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_TYPOGRAPHIC = str.maketrans(
    {"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "…": "...", "‐": "-", "‑": "-"}
)
_SHOUT = re.compile(r"([!?])\1{3,}")


@dataclass
class Unicode(Step):
    """Compose characters (NFC) and replace lone surrogates by U+FFFD."""

    name: ClassVar[str] = "unicode"

    def transform(self, text: str, state: State) -> str:
        if text.isascii():
            return text
        if _SURROGATE.search(text):
            text, number = _SURROGATE.subn("\ufffd", text)
            state.count("unicode.surrogates", number)
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
            state.count("unicode.nfc")
        return text


@dataclass
class Mojibake(Step):
    """Decode again the lines that were decoded with a wrong encoding, by ftfy; quotes, widths and entities stay."""

    name: ClassVar[str] = "mojibake"

    def __post_init__(self) -> None:
        try:
            from ftfy import fix_encoding
            from ftfy.badness import is_bad
        except ImportError:
            raise UserError(
                "the rule mojibake needs ftfy: `pip install 'fastgpt[data]'`, or set mojibake: false"
            ) from None
        self._fix, self._bad = fix_encoding, is_bad

    def transform(self, text: str, state: State) -> str:
        if text.isascii() or not _SUSPECT.search(text):
            return text
        lines = text.split("\n")
        for i, line in enumerate(lines):
            if _SUSPECT.search(line) and self._bad(line) and (fixed := self._fix(line)) != line:
                lines[i] = _SURROGATE.sub("\ufffd", fixed)
                state.count("mojibake.lines")
        return "\n".join(lines)


@dataclass
class Whitespace(Step):
    """Make line ends "\\n"; strip the ends of lines; limit blank lines; drop control characters.

    Attributes:
        collapse: make each run of spaces one space and strip the starts of lines; false keeps indentation and tables.
        controls: drop control characters and marks without width.
        trailing: strip the ends of lines.
        max_blank_lines: largest number of blank lines in a row; None keeps them.
    """

    name: ClassVar[str] = "whitespace"
    collapse: bool = True
    controls: bool = True
    trailing: bool = True
    max_blank_lines: int | None = 1

    def transform(self, text: str, state: State) -> str:
        before = text
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if self.controls:
            text = self._drop_controls(text, state)
        text = self._spaces(text)
        if self.max_blank_lines is not None:
            limit = "\n" * (self.max_blank_lines + 1)
            if limit + "\n" in text:
                text = re.sub(f"\n{{{len(limit)},}}", limit, text)
            text = text.strip("\n")
        if text != before:
            state.count("whitespace.documents")
        return text

    def _drop_controls(self, text: str, state: State) -> str:
        if text.isascii() and len(text.encode().translate(None, _ASCII_CONTROL)) == len(text):
            return text
        text, number = _CONTROL.subn("", text)
        state.count("whitespace.controls", number)
        return text

    def _spaces(self, text: str) -> str:
        if self.collapse:
            odd = "\t" in text or "\f" in text or "\v" in text or (not text.isascii() and _ODD_SPACE.search(text))
            if odd:
                text = re.sub("[\v\f\x85\u2028\u2029]", "\n", text)
            ends = text[:1].isspace() or text[-1:].isspace()
            if odd or ends or "  " in text or " \n" in text or "\n " in text:
                return "\n".join([" ".join(line.split()) for line in text.split("\n")])
        elif self.trailing and (" \n" in text or "\t\n" in text or text[-1:].isspace()):
            return "\n".join([line.rstrip(" \t") for line in text.split("\n")])
        return text


@dataclass
class Punctuation(Step):
    """Write typographic quotes, ellipses and hyphens in ASCII, and at most three "!" or "?" in a row."""

    name: ClassVar[str] = "punctuation"

    def transform(self, text: str, state: State) -> str:
        before = text
        if not text.isascii():
            text = text.translate(_TYPOGRAPHIC)
        if "!!!!" in text or "????" in text:
            text = _SHOUT.sub(r"\1\1\1", text)
        if text != before:
            state.count("punctuation.documents")
        return text


@dataclass
class Lowercase(Step):
    """Write everything in lower case."""

    name: ClassVar[str] = "lowercase"

    def transform(self, text: str, state: State) -> str:
        lower = text.lower()
        if lower != text:
            lower = lower if lower.isascii() else unicodedata.normalize("NFC", lower)
            state.count("lowercase.documents")
        return lower


_BLOCKS = (
    "address article aside blockquote br center dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 "
    "header hr li main nav ol option p pre section select table tbody td tfoot th thead title tr ul"
).split()
_INLINE = (
    "a abbr acronym area audio b base bdi bdo big body button canvas cite code col colgroup data datalist del "
    "details dfn "
    "dialog em embed font frame frameset head html i iframe img input ins kbd label legend link map mark meta meter "
    "noscript object optgroup output param path picture progress q rp rt ruby s samp script small source span strike "
    "strong style sub summary sup svg template textarea time track tt u var video wbr"
).split()
_TAG = re.compile(
    rf"<(/?)({'|'.join(sorted(_BLOCKS + _INLINE, key=len, reverse=True))})(?:[\s/][^<>]{{0,4000}})?>", re.I
)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_HIDDEN = ("script", "style", "noscript", "template")


@dataclass
class Html(Step):
    """Remove HTML tags, comments, scripts and styles that reading left; decode entities.

    Attributes:
        entities: decode entities such as "&amp;".
    """

    name: ClassVar[str] = "html"
    entities: bool = True

    def transform(self, text: str, state: State) -> str:
        if "<!--" in text:
            text = self._comments(text)
        if "<" in text:
            text = self._tags(text, state)
        if self.entities and "&" in text and ";" in text:
            text = re.sub("&(?:amp;)+", "&", text)
            text, number = _ENTITY.subn(lambda found: html.unescape(found[0]), text)
            state.count("html.entities", number)
        return text

    def _comments(self, text: str) -> str:
        parts, at = [], 0
        while (start := text.find("<!--", at)) >= 0 and (end := text.find("-->", start + 4)) >= 0:
            parts.append(text[at:start])
            at = end + 3
        return "".join(parts) + text[at:]

    def _tags(self, text: str, state: State) -> str:
        """Cut tags in one pass; what stands between <script> and </script> goes with them."""
        tags = list(_TAG.finditer(text))
        last_end = {found[2].lower(): found.start() for found in tags if found[1]}
        parts, at, hidden = [], 0, ""
        for found in tags:
            closing, tag = found[1], found[2].lower()
            if hidden:
                if closing and tag == hidden:
                    hidden, at = "", found.end()
                continue
            parts += [text[at : found.start()], "\n" if tag in _BLOCKS else ""]
            at = found.end()
            if not closing and tag in _HIDDEN and not found[0].endswith("/>") and last_end.get(tag, -1) >= at:
                hidden = tag
        state.count("html.tags", len(tags))
        return "".join(parts) + text[at:] if tags else text


# Lines of navigation, sharing and consent; each fills a whole line.
_BOILERPLATE = (
    r"skip to (?:main |the )?(?:content|navigation)",
    r"(?:back|go|return) to (?:the )?top",
    r"(?:toggle|open|close|main|site) (?:navigation|menu)",
    r"(?:log|sign) ?(?:in|out|up)(?: (?:or|/|\|) (?:log|sign) ?(?:in|up)| with \w+)?",
    r"(?:register|subscribe|subscribe now|unsubscribe|sign up for (?:our|the) newsletter)",
    r"(?:read|show|load|see|view) more",
    r"continue reading",
    r"(?:share|tweet|pin it|follow us|like us)(?: (?:this|on|via|with)\b[^.\n]{0,40})?",
    r"(?:print|email) this(?: page| article| post)?",
    r"(?:leave a (?:comment|reply)|post a comment|no comments(?: yet)?|\d+ comments?)",
    r"(?:previous|next|older|newer) (?:post|posts|article|page|entry)",
    r"(?:accept|allow|reject|decline|manage) (?:all )?(?:cookies|preferences)",
    r"(?:we|(?:this|our) (?:web ?)?site)(?: and our partners)? uses? cookies\b[^\n]{0,200}",
    r"by (?:using|continuing to (?:use|browse)) (?:this|our) (?:web ?)?site[^\n]{0,200}\bcookies\b[^\n]{0,100}",
    r"(?:cookie|privacy) (?:policy|settings|preferences|notice)",
    r"terms (?:of (?:use|service)|and conditions)",
    r"(?:©|\(c\)|copyright)[^\n]{0,60}\b(?:19|20)\d\d\b[^\n]{0,80}",
    r"all rights reserved",
    r"powered by [\w. ]{1,30}",
    r"advertisements?",
)
_LINE = re.compile(rf"^[ \t]*(?:{'|'.join(_BOILERPLATE)})[ \t.!|»›:]*$", re.I | re.M)


@dataclass
class Boilerplate(Step):
    """Remove lines that are navigation, sharing buttons, cookie notices or copyright notices.

    Attributes:
        lines: further regular expressions, each matched against whole lines, without regard to case.
    """

    name: ClassVar[str] = "boilerplate"
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._more = None
        if self.lines:
            try:
                self._more = re.compile(rf"^(?:{'|'.join(f'(?:{p})' for p in self.lines)})$", re.I | re.M)
            except re.error as e:
                raise UserError(f"lines: {e} in one of the {len(self.lines)} regular expressions") from None

    def transform(self, text: str, state: State) -> str:
        for pattern in filter(None, (_LINE, self._more)):
            if pattern.search(text):
                lines = text.split("\n")
                kept = [line for line in lines if not line or not pattern.fullmatch(line)]
                state.count("boilerplate.lines", len(lines) - len(kept))
                text = "\n".join(kept)
        return text
