"""The web server of the rating page: the page, the pair a rater sees next, and votes.

    GET  /TOKEN/             the page; /TOKEN/page.css and /TOKEN/page.js belong to it
    GET  /TOKEN/raters       {"raters": names, empty if any name is allowed}
    GET  /TOKEN/pair         ?rater=NAME[&place=N]   the pair at a place, or the first one without a vote
    POST /TOKEN/vote         {"rater", "place", "choice", "seconds", "comment"}

The token is random, so that other users of the machine, and other web pages in the browser, reach nothing. The browser
gets prompts and answers, and no name of a model.
"""

from __future__ import annotations

import hmac
import json
import math
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fastgpt.core.errors import UserError, cause_of
from fastgpt.evaluate.human.ratings import Ratings

PAGE = Path(__file__).parent / "page"
FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
CHOICES = ("first", "second", "tie", "both_bad")
BODY = 64 * 1024  # bytes of a vote at most
COMMENT, NAME = 4000, 60  # characters of a comment and of a rater's name at most
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_name(name: str) -> bool:
    """Return whether a rater may have this name."""
    return 0 < len(name) <= NAME and name.isprintable() and name == name.strip()


class Refused(Exception):
    """A request that is not answered: its status and a sentence."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves ratings until `shutdown`.

    Args:
        ratings: what is rated.
        token: first part of every path.
        raters: names that are allowed; empty: any.
        host, port: to bind to; port 0: a free one.

    Raises:
        UserError: the address cannot be bound.
    """

    daemon_threads = True

    def __init__(
        self, ratings: Ratings, token: str, raters: tuple[str, ...] = (), host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.ratings, self.token, self.raters = ratings, token, raters
        try:
            super().__init__((host, port), Handler)
        except OSError as e:
            raise UserError(f"cannot serve on {host}, port {port} ({cause_of(e)}), expected a free --port") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about a browser that has left; the traceback of another error is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The address of the page."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/{self.token}/"


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: Server
    server_version, sys_version = "fastgpt", ""
    timeout = 30  # seconds for a request to arrive

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: a line would contain the token."""

    def do_GET(self) -> None:
        """Answer a request for the page or a pair."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Take a vote."""
        self._answer(self._post)

    def _answer(self, action: Any) -> None:
        try:
            kind, body = action()
            status = HTTPStatus.OK
        except Refused as e:
            self.close_connection = True
            status, kind, body = e.status, "application/json", json.dumps({"error": str(e)}).encode()
        except OSError as e:  # a full disk: the rater must know that the vote is not kept
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json"
            body = json.dumps({"error": f"The vote could not be written ({cause_of(e)}). Try again."}).encode()
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _place(self) -> tuple[str, dict[str, list[str]]]:
        """Return the path behind the token, and the query."""
        parts = urlsplit(self.path)
        _, token, *rest = parts.path.split("/", 2)
        if not rest or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(HTTPStatus.NOT_FOUND, "no such page")
        return rest[0], parse_qs(parts.query)

    def _get(self) -> tuple[str, bytes]:
        path, query = self._place()
        if path in FILES:
            name, kind = FILES[path]
            return kind, (PAGE / name).read_bytes()
        if path == "raters":
            return _json({"raters": self.server.raters})
        if path == "pair":
            rater = self._rater(query.get("rater", [""])[0])
            return self._pair(rater, query.get("place", [None])[0])
        raise Refused(HTTPStatus.NOT_FOUND, "no such page")

    def _pair(self, rater: str, place: Any) -> tuple[str, bytes]:
        ratings = self.server.ratings
        at = ratings.next_place(rater) if place is None else self._checked_place(place)
        progress = {"done": ratings.done(rater), "total": len(ratings)}
        return _json(progress | ({"place": None} if at is None else ratings.shown(rater, at)))

    def _post(self) -> tuple[str, bytes]:
        path, _ = self._place()
        if path != "vote":
            raise Refused(HTTPStatus.NOT_FOUND, "no such page")
        row = self._body()
        rater, place = self._rater(row.get("rater")), self._checked_place(row.get("place"))
        choice, seconds, comment = row.get("choice"), row.get("seconds"), row.get("comment", "")
        if choice not in CHOICES:
            raise Refused(HTTPStatus.BAD_REQUEST, f"choice must be one of {', '.join(CHOICES)}")
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise Refused(HTTPStatus.BAD_REQUEST, "seconds must be a number, 0 or more")
        if not isinstance(comment, str) or len(comment) > COMMENT:
            raise Refused(HTTPStatus.BAD_REQUEST, f"comment must be a text of at most {COMMENT} characters")
        self.server.ratings.vote(rater, place, choice, float(seconds), comment)
        return _json({"done": self.server.ratings.done(rater), "total": len(self.server.ratings)})

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        if int(length) > BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body must have at most {BODY} bytes")
        try:
            row = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
        return row

    def _rater(self, name: Any) -> str:
        name = name.strip() if isinstance(name, str) else ""
        if not is_name(name):
            raise Refused(HTTPStatus.BAD_REQUEST, f"a name must have 1 to {NAME} printable characters")
        if self.server.raters and name not in self.server.raters:
            raise Refused(HTTPStatus.FORBIDDEN, "this name is not on the list of raters")
        return name

    def _checked_place(self, place: Any) -> int:
        at = int(place) if isinstance(place, str) and place.isdecimal() else place
        if type(at) is not int or not 0 <= at < len(self.server.ratings):
            raise Refused(HTTPStatus.BAD_REQUEST, f"place must be 0 to {len(self.server.ratings) - 1}")
        return at


def _json(value: Any) -> tuple[str, bytes]:
    # texts of models may hold lone surrogates, which UTF-8 cannot encode; \u escapes can
    return "application/json", json.dumps(value).encode()
