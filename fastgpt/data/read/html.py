"""HTML to text: the main content by trafilatura, with code blocks as they are.

trafilatura's text and markdown lose the blank lines inside code; its XML keeps them. So the text is made from the XML,
and in the same way from fragments of HTML that are content throughout (the bodies of StackExchange posts).
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterator
from typing import Any

from fastgpt.data.document import Document
from fastgpt.data.read.defects import need
from fastgpt.data.read.reading import Reading

CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{1,40})""", re.IGNORECASE)
SPACE = re.compile(r"[ \t\r\n\f]+")
BLOCKS = frozenset(
    "address article aside blockquote body center dd details dir div dl dt fieldset figcaption figure footer form h1 h2"
    " h3 h4 h5 h6 header hr html li list item main nav ol p pre quote row section summary table tbody tfoot thead tr ul"
    " head doc".split()
)
TIGHT = frozenset("li item tr row dd dt".split())  # on lines of their own, with no blank line between them
SHORT = 250  # characters; of so little text trafilatura keeps nothing
DROPPED = frozenset("script style template noscript title comments svg math iframe object".split())


def read_html(reading: Reading) -> Iterator[Document]:
    """Yield the one document of an HTML file: its main content, with the page's title in meta."""
    raw = reading.whole(reading.text_chunks(), "page")
    if raw is None:
        return
    html = decode_html(reading, raw, reading.first)
    if html is not None:
        title, text = page_text(html)
        document = reading.document(text, 0, 0, None, {"title": title} if title else None)
        if document is not None:
            yield document


def decode_html(reading: Reading, raw: bytes, byte: int, charset: str = "") -> str | None:
    """Return a page as text: in the charset declared by the server or in the page, else in UTF-8.

    None, with a report, if the bytes are not in that charset and the mode is "skip".
    """
    codec = charset_of(raw, charset)
    if codec == "utf-8":
        return reading.decode(raw, byte, "page")
    try:
        text = raw.decode(codec)
    except UnicodeError as e:
        at = e.start if isinstance(e, UnicodeDecodeError) else 0
        problem = f"byte 0x{raw[at]:02x} is not {codec}, the charset that the page declares"
        reading.report("wrong charset", problem, "convert the page to UTF-8, or use mode replace", byte + at)
        if reading.format.mode != "replace":
            return None
        text = raw.decode(codec, "replace")
    return reading.strict(text, byte, raw)


def charset_of(raw: bytes, declared: str = "") -> str:
    """Return Python's name of a page's charset: declared by the server, in the page, or UTF-8."""
    found = CHARSET.search(raw, 0, 4096)
    try:
        codec = codecs.lookup(declared or (found[1].decode() if found else "utf-8"))
    except LookupError:
        return "utf-8"
    return codec.name if codec._is_text_encoding and codec.name != "ascii" else "utf-8"


def page_text(html: str) -> tuple[str, str]:
    """Return (title, text) of a page: its main content, or all of it if trafilatura finds none."""
    trafilatura = need("trafilatura", "reading HTML")
    etree = need("lxml.etree", "reading HTML", "lxml")
    need("lxml_html_clean", "reading HTML")
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it warns of every page that has little text
    page = _parsed(html)
    if page is None:
        return "", ""
    found = page.find(".//title")
    title = SPACE.sub(" ", "".join(found.itertext())).strip() if found is not None else ""
    everything = tree_text(page)
    if len(everything) < SHORT:
        return title, everything
    for pre in page.iter("pre"):  # trafilatura takes <pre> with <br> for a quotation
        text = _allowed(_verbatim(pre))  # it may have been written as &#1;
        for child in list(pre):
            pre.remove(child)
        pre.text = None
        code = etree.SubElement(pre, "code")
        code.text = text + "\n" if "\n" in text else f"{text}\n\n"
    xml = trafilatura.extract(page, output_format="xml", include_comments=False, include_tables=True)
    text = tree_text(etree.fromstring(xml.encode())) if xml else ""
    return title, text or everything


def _parsed(html: str) -> Any:
    """Return the tree of a page, None if it is empty. (lxml refuses text that declares an encoding.)"""
    lxml_html = need("lxml.html", "reading HTML", "lxml")
    etree = need("lxml.etree", "reading HTML", "lxml")
    try:
        return lxml_html.document_fromstring(
            _allowed(html).encode("utf-8", "replace"), parser=lxml_html.HTMLParser(encoding="utf-8")
        )
    except etree.ParserError:
        return None


def fragment_text(html: str) -> str:
    """Return the text of a piece of HTML that is content throughout."""
    page = _parsed(html)
    return "" if page is None else tree_text(page)


def _allowed(html: str) -> str:
    """Return HTML without the characters that XML forbids."""
    return re.sub("[\0-\x08\x0b\x0e-\x1f\ufffe\uffff]", "\ufffd", html)


def tree_text(root: Any) -> str:
    """Return the text of a tree of HTML or of trafilatura's XML.

    Blocks are separated by a blank line, items of lists and rows of tables by a line end; white space is one space,
    except in blocks of code, which stay as they are.
    """
    writer = _Writer()
    writer.walk(root)
    writer.flush()
    return writer.text()


def _verbatim(node: Any) -> str:
    """Return the text of a block of code."""
    for child in node.iter("br", "lb"):
        child.text = "\n"
    return "".join(node.itertext()).replace("\r\n", "\n").strip("\n").rstrip()


class _Writer:
    def __init__(self) -> None:
        self.blocks: list[tuple[str, bool]] = []  # text, and whether it is an item of a list or a row of a table
        self.line: list[str] = []
        self.tight = False

    def flush(self, tight: bool = False) -> None:
        """End the block in progress; the next one is an item or a row if `tight`."""
        parts = "".join(self.line).split("\v")
        text = "\n".join(SPACE.sub(" ", part).strip() for part in parts).strip()
        if text == "-":  # an item whose text is in a block of its own
            return
        self.line.clear()
        if text:
            self.blocks.append((text, self.tight))
        self.tight = tight

    def walk(self, node: Any) -> None:
        """Write an element, without its tail."""
        tag = node.tag if isinstance(node.tag, str) else ""
        tag = tag.rpartition("}")[2].lower()
        if not tag or tag in DROPPED:
            return
        if tag == "pre" or (tag == "code" and "\n" in "".join(node.itertext())):
            self.flush()
            text = _verbatim(node)
            if text.strip():
                self.blocks.append((text, False))
            return
        if tag in ("br", "lb"):
            self.line.append("\v")
        block = tag in BLOCKS
        if block:
            self.flush(tag in TIGHT)
        if tag in ("li", "item"):
            self.line.append("- ")
        self.line.append((node.text or "").replace("\v", " "))
        for i, child in enumerate(node):
            if i and tag in ("tr", "row"):
                self.line.append(" | ")
            self.walk(child)
            self.line.append((child.tail or "").replace("\v", " "))
        if block:
            self.flush()

    def text(self) -> str:
        out: list[str] = []
        before = False
        for text, tight in self.blocks:
            if out:
                out.append("\n" if tight and before else "\n\n")
            out.append(text)
            before = tight
        return "".join(out)
