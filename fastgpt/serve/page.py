"""The chat page at /: page.html and its script page.js as one document, which loads only answers of this server."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Response

_HERE = Path(__file__).parent
_SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")
HTML = (_HERE / "page.html").read_text(encoding="utf-8").replace("<script></script>", f"<script>\n{_SCRIPT}</script>")


def digest(tag: str) -> str:
    """Return the source of a Content-Security-Policy that allows the page's own <style> or <script> and no other."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", HTML, re.S)
    assert found is not None, tag
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page(feedback: bool = False) -> Response:
    """Return the page; with thumbs, if the server keeps feedback."""
    html = HTML.replace('<html lang="en">', '<html lang="en" data-feedback>') if feedback else HTML
    return Response(html, media_type="text/html", headers=HEADERS)
