"""Personal data: what becomes a placeholder, and what only looks like personal data and stays."""

from __future__ import annotations

import random

import pytest

from fastgpt.data.clean.personal import PersonalData, is_card, luhn
from fastgpt.data.clean.step import State
from fastgpt.data.document import Document

# Put together here, so that scanners for leaked keys do not find any in this file.
AWS = "AKIA" + "IOSFODNN7EXAMPLE"
GITHUB = "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a"
GOOGLE = "AIza" + "SyDaGmWKa4JsXZ-HjGw7ISLn_3namBGewQe"
JWT = "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0" + ".dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
PEM = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEowIBAAKCAQEA\nabc+/=\n-----END RSA PRIVATE KEY-----"

FOUND = [
    ("write to jane.doe+x@mail.uni-ulm.de.", "write to <EMAIL>."),
    ("<a_b@x.co>, c@y.org", "<<EMAIL>>, <EMAIL>"),
    ("from 93.184.216.34 and 8.8.8.8:53.", "from <IP> and <IP>:53."),
    ("http://93.184.216.34/a", "http://<IP>/a"),
    ("at 2a00:1450:4001:82a::200e now", "at <IP> now"),
    ("call +44 20 7946 0958 now", "call <PHONE> now"),
    ("(212) 736-5000, 212-736-5000, 212.736.5000", "<PHONE>, <PHONE>, <PHONE>"),
    ("+1 (212) 736-5000", "<PHONE>"),
    ("Tel.: 030 12345678", "Tel.: <PHONE>"),
    ("fax: 0711/123-4567", "fax: <PHONE>"),
    ("card 4111 1111 1111 1111.", "card <CARD>."),
    ("5555555555554444 or 3782-822463-10005", "<CARD> or <CARD>"),
    (f"key={AWS};", "key=<KEY>;"),
    (f"{GITHUB}\n{GOOGLE}", "<KEY>\n<KEY>"),
    (f"Bearer {JWT}", "Bearer <KEY>"),
    (f"a\n{PEM}\nb", "a\n<KEY>\nb"),
]
STAYS = [
    "version 1.2.3.4, v10.4.20.5, ==2.0.1.9 and Chrome/91.0.4.12",  # versions
    "1.2.3.4.5 and 999.1.1.1 and 10.0.0.1, 192.168.1.1, 127.0.0.1, 203.0.113.9",  # no address, private, documentation
    "2001:db8::1 fe80::1 ::1 12:30:45 std::vector a::b",
    "2024-01-15 15.01.2024 2024/01/15 01-15-2024 20240115",  # dates
    "d41d8cd98f00b204e9800998ecf8427e 3f786850e387550fdab836ed7e6dc881de23001b",  # hashes
    "ISBN 978-3-16-148410-0, ISBN 9783161484100, ISBN 0-306-40615-2",
    "4111 1111 1111 1112 and 4111111111111112",  # wrong check sum
    "1234567812345670",  # right check sum, no issuer
    "1700000000000 1700000000000000 3.14159265358979 0x4111111111111111",
    "123-456-7890 and 555-0100 and 100-200-3000",  # no area code
    "+0200 UTC+01:00 x+1234567890 10 + 20 + 30",
    "a@b, @decorator, x @ y, user@localhost, me@example.com, git@github.com:owner/name.git",
    "q@k.transpose(-2, -1) a@b.to(x) x@w.weight y@self.wo[0]",
    "sk-learn-is-a-library sk-short hf_model npm_install AKIA eyJ",
    "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
    "page 212-213, pp. 736-5000",
]


def scrub(text: str) -> tuple[str, dict[str, int]]:
    """Return the text with its personal data replaced, and the counts."""
    state = State(Document(text, "a#0", "a"))
    return PersonalData().transform(text, state), state.changes


@pytest.mark.parametrize("text, expected", FOUND)
def test_is_replaced(text: str, expected: str) -> None:
    scrubbed, changes = scrub(text)
    assert scrubbed == expected
    assert sum(changes.values()) == expected.count("<") - expected.count("<<")
    assert scrub(scrubbed) == (scrubbed, {})


@pytest.mark.parametrize("text", STAYS)
def test_stays(text: str) -> None:
    assert scrub(text) == (text, {})


@pytest.mark.parametrize("kind", ["email", "ip", "phone", "card", "key"])
def test_each_kind_can_be_turned_off(kind: str) -> None:
    text = f"a@b.org 8.8.8.8 212-736-5000 4111111111111111 {AWS}"
    state = State(Document(text, "a#0", "a"))
    scrubbed = PersonalData(**{kind: False}).transform(text, state)
    assert f"<{kind.upper()}>" not in scrubbed
    assert scrubbed.count("<") == 4


def test_luhn() -> None:
    """One wrong digit is always noticed, and so is a swap of neighbours other than 0 and 9."""
    rng = random.Random(1)
    for _ in range(50):
        digits = [rng.randrange(10) for _ in range(15)]
        check = next(c for c in range(10) if luhn("".join(map(str, [*digits, c]))))
        number = [*digits, check]
        at = rng.randrange(16)
        assert not luhn("".join(map(str, [*number[:at], (number[at] + 1) % 10, *number[at + 1 :]])))
    assert is_card("4111-1111-1111-1111") and not is_card("0000000000000000")


def test_time_is_linear() -> None:
    """Texts made to be slow take milliseconds."""
    for text in ("a@" * 20_000, "a." * 20_000 + "@", "1" * 100_000, "1.1." * 20_000, "+1 " * 20_000, "a:" * 20_000):
        scrub(text)
    for text in (
        "1-" * 20_000,
        "tel " * 20_000,
        "-----BEGIN PRIVATE KEY-----" * 2000,
        "eyJ" * 20_000,
        "1 " * 20_000,
        "sk-" * 20_000,
    ):
        scrub(text)
