"""Wikitext to plain text.

What is removed: comments, references, templates, tables, files, categories and links to other languages, HTML tags,
magic words such as __NOTOC__. What is kept: the text of links and of bold and italic words, headings on lines of their
own, list items as "- ", and the contents of <pre>, <source>, <syntaxhighlight>, <nowiki> and <math> as they are.
Templates are not expanded, so what only they say (units, dates of birth) is missing.
"""

from __future__ import annotations

import html
import re

COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
KEPT = ("pre", "source", "syntaxhighlight", "nowiki", "math")
REMOVED = ("ref", "gallery", "timeline", "imagemap", "score", "templatestyles", "graph")
PAIRED = re.compile(r"<(" + "|".join(KEPT + REMOVED) + r")\b([^<>]*)>", re.IGNORECASE)
# Patterns begin with fixed characters, which re looks for much faster: "\n" for the start of a line, not "^".
TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\{\{[^{}]*\}\}\}")
TABLE = re.compile(r"\n[ \t:]*\{\|[^\n]*(?:\n(?![ \t:]*\{\||[ \t]*\|\})[^\n]*)*\n[ \t]*\|\}")
INNER_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
DROPPED_LINK = re.compile(
    r"\s*(?:file|image|media|category|datei|bild|kategorie|fichier|catégorie|[a-z]{2,3})\s*:", re.I
)
OUTER_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//?[^\s\[\]]+(?:[ \t]+([^\[\]\n]*))?\]")
HEADING = re.compile(r"\n(={1,6})[ \t]*(.+?)[ \t]*\1[ \t]*$", re.MULTILINE)
ITEM = re.compile(r"\n([*#:;]+)[ \t]*")
QUOTES = re.compile(r"'''{0,3}")
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
BLANK = re.compile(r"\n\n\n+")
NESTING = 40


def plain_text(source: str) -> str:
    """Return the plain text of a page."""
    kept: list[str] = []
    text = _without_pairs(COMMENT.sub("", source.replace("\x01", "").replace("\x02", "")), kept)
    text = _repeated(TEMPLATE, "", text, "{{")
    text = _repeated(TABLE, "\n", "\n" + text, "{|")
    text = _repeated(INNER_LINK, _linked, text, "[[")
    text = OUTER_LINK.sub(lambda m: m[1] or "", text)
    text = HEADING.sub(r"\n\n\2\n", text)
    text = re.sub(r"<br\s*/?>", "\n", text, flags=re.IGNORECASE)
    text = re.sub(r"__[A-Z]{3,20}__", "", QUOTES.sub("", TAG.sub("", text)))
    text = ITEM.sub(lambda m: "\n" if m[1][-1] in ":;" else "\n- ", text)[1:]
    text = html.unescape(text).replace("\xa0", " ")
    text = BLANK.sub("\n\n", "\n".join(map(str.rstrip, text.split("\n")))).strip()
    return re.sub(r"\x01(\d+)\x02", lambda m: kept[int(m[1])], text)


def _without_pairs(text: str, kept: list[str]) -> str:
    """Return text without the elements of KEPT, whose contents are moved to `kept`, and of REMOVED.

    Ends are searched once for each kind of element after the last one found, so tags without an end cost nothing.
    """
    lower = text.lower()
    if len(lower) != len(text):  # a few letters change their length
        lower = text
    out: list[str] = []
    at = 0
    endless: set[str] = set()
    for found in PAIRED.finditer(text):
        name = found[1].lower()
        if found.start() < at or name in endless:
            continue
        if found[2].endswith("/"):
            out.append(text[at : found.start()])
            at = found.end()
            continue
        close = lower.find(f"</{name}", found.end())
        end = text.find(">", close) + 1 if close >= 0 else 0
        if not end:
            endless.add(name)
            continue
        out.append(text[at : found.start()])
        at = end
        if name in KEPT:
            inner = text[found.end() : close]
            kept.append(html.unescape(inner) if name in ("nowiki", "pre") else inner.strip("\n"))
            out.append(f"\x01{len(kept) - 1}\x02")
    return "".join(out) + text[at:]


def _linked(found: re.Match[str]) -> str:
    """Return the text of a link to a page; none for files, categories and other languages."""
    target, bar, label = found[1].partition("|")
    if not target.startswith(":") and DROPPED_LINK.match(target):
        return ""
    return label.rpartition("|")[2] if bar else target.lstrip(":")


def _repeated(pattern: re.Pattern[str], by: object, text: str, begin: str) -> str:
    """Replace from the innermost match outwards. begin: what every match begins
    with, but for spaces: a text without it needs no search."""
    for _ in range(NESTING):
        if begin not in text:
            break
        text, count = pattern.subn(by, text)  # type: ignore[call-overload]
        if not count:
            break
    return str(text)
