"""Send events to a webhook: JSON by POST, in the form of the Standard Webhooks specification (standardwebhooks.com).

    {"type": "flag.found", "timestamp": "...", "data": {...}}

A thread sends them one after the other, so that a slow receiver delays no answer; events that find the queue full, and
those that no attempt delivers, are counted and dropped. With a secret, the header webhook-signature is "v1," and the
base64 of HMAC-SHA256 over "ID.TIMESTAMP.BODY"; the receiver has to compare it, and refuse old timestamps.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import queue
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from fastgpt.core.errors import UserError
from fastgpt.data.read.web import BROKEN, TRANSIENT, USER_AGENT, NoRedirect
from fastgpt.serve.watch.store import now

log = logging.getLogger("fastgpt")
QUEUE, TIMEOUT = 1000, 5.0  # events that may wait; seconds of an attempt
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between the attempts for an event


def read_url(text: str) -> str:
    """Return the address of a webhook. Raises UserError."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--webhook is {text!r:.200}, expected an address that begins with https:// or http://")
    return text


def read_secret(text: str) -> bytes:
    """Return the key of a secret: base64 after "whsec_", else the text. Raises UserError."""
    if not text.startswith("whsec_"):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise UserError("FASTGPT_WEBHOOK_SECRET begins with whsec_, expected base64 after it") from None


def signature(secret: bytes, id: str, timestamp: str, body: bytes) -> str:
    """Return the header webhook-signature."""
    signed = hmac.new(secret, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(signed).decode()


class Webhook:
    """Sends events from a thread.

    Args:
        url: where to.
        secret: signs them; empty: unsigned.
        failed: called with "queue" or "delivery" for each event that is dropped.
        waits: seconds between attempts.
    """

    def __init__(
        self,
        url: str,
        secret: bytes,
        failed: Callable[[str], None],
        waits: tuple[float, ...] = WAITS,
        timeout: float = TIMEOUT,
    ) -> None:
        self.url, self.secret, self.failed, self.waits, self.timeout = url, secret, failed, waits, timeout
        self._queue = queue.Queue[bytes | None](QUEUE)
        self._closing = threading.Event()
        self._opener = urllib.request.build_opener(NoRedirect)
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def send(self, kind: str, **data: Any) -> None:
        """Queue an event; never waits."""
        try:
            self._queue.put_nowait(json.dumps({"type": kind, "timestamp": now(), "data": data}).encode())
        except queue.Full:
            self.failed("queue")

    def close(self, seconds: float = TIMEOUT) -> None:
        """Send what waits, for some seconds at most and without further attempts, and end the thread."""
        self._closing.set()
        end = time.monotonic() + seconds
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while (body := self._queue.get()) is not None:
            if not self._deliver(body):
                self.failed("delivery")

    def _deliver(self, body: bytes) -> bool:
        id = f"msg_{secrets.token_hex(12)}"  # the same in all attempts, so that the receiver can tell repeated ones
        for wait in (*self.waits, None):
            why, again = self._post(id, body)
            if not why:
                return True
            if not again or wait is None or self._closing.wait(wait):
                log.warning("webhook: an event was not delivered (%s)", why)
                break
        return False

    def _post(self, id: str, body: bytes) -> tuple[str, bool]:
        """Make one attempt; return why it failed, and whether another one may succeed."""
        timestamp = str(int(time.time()))
        headers = {"Content-Type": "application/json", "User-Agent": USER_AGENT}
        headers |= {"webhook-id": id, "webhook-timestamp": timestamp}
        if self.secret:
            headers["webhook-signature"] = signature(self.secret, id, timestamp, body)
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout):
                return "", False
        except urllib.error.HTTPError as e:
            return f"status {e.code}", e.code in TRANSIENT
        except BROKEN as e:
            return type(e).__name__, True
