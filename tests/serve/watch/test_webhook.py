"""Webhooks: signed, delivered after failures, and never in the way of who sends them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time

import pytest
from serve.watch.receivers import receiver, until

from fastgpt.core.errors import UserError
from fastgpt.serve.watch import webhook
from fastgpt.serve.watch.webhook import Webhook, read_secret, read_url, signature


def test_an_event_is_signed_and_delivered() -> None:
    failures = list[str]()
    with receiver() as to:
        hook = Webhook(to.url, b"key", failures.append)
        hook.send("flag.found", name="rude")
        hook.close()
    ((body,), (headers,)) = to.bodies, to.headers
    assert to.events[0]["type"] == "flag.found" and to.events[0]["data"] == {"name": "rude"} and not failures
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = base64.b64encode(hmac.new(b"key", signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{digest}" and abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert headers["content-type"] == "application/json"


def test_the_signature_of_the_specification() -> None:
    """The example of the libraries at standardwebhooks.com."""
    secret = read_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_failed_attempts_are_repeated() -> None:
    failures = list[str]()
    with receiver() as to:
        to.statuses = [500, 429]
        hook = Webhook(to.url, b"", failures.append, waits=(0.01, 0.01, 0.01))
        hook.send("a")
        until(lambda: len(to.bodies) == 3)
        assert len({h["webhook-id"] for h in to.headers}) == 1 and "webhook-signature" not in to.headers[0]
        to.statuses = [400, 302]  # these would not end otherwise
        hook.send("b")
        hook.send("c")
        until(lambda: len(failures) == 2)
        assert len(to.bodies) == 5
        to.statuses = [503] * 4
        hook.send("d")
        until(lambda: len(failures) == 3)
        assert failures == ["delivery"] * 3 and len(to.bodies) == 9
        hook.close()


def test_a_receiver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "QUEUE", 2)
    failures = list[str]()
    with receiver() as to:
        to.statuses = [0] * 10
        hook = Webhook(to.url, b"", failures.append, waits=(60.0,), timeout=0.05)
        hook.send("a")
        until(lambda: bool(to.bodies))
        for _ in range(4):
            hook.send("b")
        assert failures == ["queue"] * 2
        hook.close(seconds=5)
        assert failures == ["queue"] * 2 + ["delivery"] * 3
    failures.clear()
    hook = Webhook(to.url, b"", failures.append, waits=(0.01,))  # nobody listens there now
    hook.send("a")
    until(lambda: failures == ["delivery"])


def test_what_is_no_address_or_secret() -> None:
    assert read_url("https://example.org/hook?x=1") and read_secret("plain") == b"plain"
    for text in ("example.org", "ftp://example.org", "http://"):
        with pytest.raises(UserError, match="expected an address that begins with https://"):
            read_url(text)
    with pytest.raises(UserError, match="expected base64"):
        read_secret("whsec_!")
