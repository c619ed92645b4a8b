"""Replies of a model behind an endpoint that speaks OpenAI's protocol: POST {url}/chat/completions."""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from fastgpt.core.errors import UserError
from fastgpt.data.read.web import BROKEN, TRANSIENT, USER_AGENT, NoRedirect
from fastgpt.finetune.asking.dialogue import LEFT_OUT, Ask, Dialogue, LeftOut, Record, Reply

REFUSED = (400, 413, 422)  # of one request, unless it is the first
LONGEST_WAIT = 600.0  # seconds that a server may ask to wait; a limit by the minute or the hour needs more than a few
MOST_BYTES = 32 << 20  # of an answer
TOP = 20  # most likely tokens to ask for, the most that OpenAI allows
WORDS = 300  # characters of a server's message in an error


class Broken(Exception):
    """An answer that another attempt may mend; `wait`: the seconds that the server asks for."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Endpoint:
    """A model behind an endpoint, as what replies in dialogues.

    Args:
        url: up to the version, as in https://api.example.org/v1.
        model: its name there.
        key: sent as a bearer token; empty: none is sent.
        at_once: requests at the same time.
        timeout: seconds of silence after which an attempt fails.
        retries: attempts after the first where the server is busy or broken (408, 425, 429, 5xx), silent, or its answer
            ends early. backoff: seconds before the first of them; they double, up to a minute, and a random share is
            taken off, unless the server says how long to wait (Retry-After).
        body: fields to add to every request; null removes one.

    Raises:
        UserError: the URL is none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        at_once: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise UserError(f"endpoint is {url!r}, expected an address as in https://HOST/v1")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.name, self.at_once = model, at_once
        self.key, self.timeout, self.retries, self.backoff, self.body = key, timeout, retries, backoff, dict(body or {})
        self.identity = {"model": model, "endpoint": self.url, "body": self.body}
        self._open = urllib.request.build_opener(NoRedirect).open
        self._stop = threading.Event()
        self._answered = False

    def records(self, dialogues: Iterable[Dialogue]) -> Iterator[Record]:
        """Hold dialogues, each in a thread; yield their records in order.

        Raises:
            UserError: the endpoint refuses the first request, or cannot be reached after all attempts.
        """
        running: deque[Future[Record]] = deque()
        self._stop.clear()
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                for dialogue in dialogues:
                    running.append(pool.submit(self._hold, dialogue))
                    if len(running) >= 2 * self.at_once:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:  # after an error or an interruption, nothing is asked any more
                self._stop.set()
                for future in running:
                    future.cancel()

    def _hold(self, dialogue: Dialogue) -> Record:
        replies: list[Reply] | None = None
        try:
            while True:
                asks = next(dialogue) if replies is None else dialogue.send(replies)
                replies = [self.reply(ask) for ask in asks]
        except StopIteration as end:
            record: Record = end.value
            return record
        except LeftOut as reason:
            return {LEFT_OUT: str(reason)}

    def reply(self, ask: Ask) -> Reply:
        """Return the reply to a request.

        Raises:
            LeftOut: the endpoint refuses this request, or does not consider the labels.
            UserError: as `records`.
        """
        fields: dict[str, Any] = {"model": self.name, "messages": ask.messages, "temperature": ask.temperature}
        fields |= {"max_tokens": ask.max_tokens, "seed": ask.seed}
        if ask.labels:
            fields |= {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
        fields = {k: v for k, v in (fields | self.body).items() if v is not None}
        for attempt in range(self.retries + 1):
            try:
                choice = self._choice(fields)
                self._answered = True
                return self._labels(choice, ask.labels) if ask.labels else _text(choice)
            except Broken as e:
                if attempt == self.retries:
                    times = f"after {attempt + 1} attempts" if attempt else "and no attempts are left"
                    raise UserError(f"endpoint: {self.url} {e}, {times}; run the command again to continue") from None
                wait = min(self.backoff * 2**attempt, 60.0) * random.uniform(0.5, 1) if e.wait is None else e.wait
                if self._stop.wait(wait):
                    raise LeftOut("interrupted") from None  # the record is dropped
        raise AssertionError("the last attempt returns or raises")

    def _choice(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Send a request once; return the choice in its answer."""
        headers = {"Content-Type": "application/json", "User-Agent": USER_AGENT}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(self.url, json.dumps(fields).encode(), headers, method="POST")
        try:
            with self._open(request, timeout=self.timeout) as response:
                raw = response.read(MOST_BYTES + 1)
        except urllib.error.HTTPError as e:
            raise self._refusal(e) from None
        except BROKEN as e:
            raise Broken(f"cannot be reached ({getattr(e, 'reason', None) or e or type(e).__name__})") from None
        try:
            choice = json.loads(raw)["choices"][0]
            if isinstance(choice["message"], dict):
                return dict(choice)
        except (ValueError, KeyError, IndexError, TypeError):
            pass
        raise Broken("gives an answer that is cut off or has no choices")

    def _refusal(self, e: urllib.error.HTTPError) -> Exception:
        """Return what an answer with an error status means."""
        with e:
            try:
                said = e.read(MOST_BYTES).decode("utf-8", errors="replace")
            except (OSError, http.client.HTTPException):
                said = ""
        said = " ".join(said.split())[:WORDS]
        said = said.replace(self.key, "***") if self.key else said
        status = f"answers {e.code} {e.reason}" + (f" ({said})" if said else "")
        if e.code in TRANSIENT or e.code >= 500:
            return Broken(status, retry_after(e.headers.get("Retry-After")))
        if e.code in REFUSED and self._answered:
            return LeftOut(f"refused by the endpoint ({e.code})")
        return UserError(f"endpoint: {self.url} {status}")

    def _labels(self, choice: dict[str, Any], labels: tuple[str, ...]) -> Reply:
        """Return the log-probability of each label as the first token. One that is not among the most likely tokens
        gets the log-probability of the least likely of these, which is an upper bound."""
        try:
            top = [
                (str(t["token"]).strip(), float(t["logprob"])) for t in choice["logprobs"]["content"][0]["top_logprobs"]
            ]
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(f"endpoint: {self.url} gives no top_logprobs, which comparing needs") from None
        found = [[value for token, value in top if token == label] for label in labels]
        if not any(found):
            raise LeftOut("the reply would be none of the labels")
        least = min(value for _, value in top)
        return Reply("", logprobs=tuple(_log_sum_exp(v) if v else least for v in found))


def _text(choice: dict[str, Any]) -> Reply:
    content = choice["message"].get("content")
    text = content if isinstance(content, str) else ""
    text = text.encode("utf-8", errors="replace").decode()  # half a surrogate pair is not text
    return Reply(text, choice.get("finish_reason") == "length")


def _log_sum_exp(values: list[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header, in seconds or as a date, asks to wait; None without one."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_WAIT) if math.isfinite(seconds) else None
