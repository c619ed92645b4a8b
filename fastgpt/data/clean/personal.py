"""Personal data: e-mail addresses, public IP addresses, phone numbers, card numbers and keys become placeholders.

A cheap search comes before each expensive one. What only looks like personal data stays: version numbers, dates,
hashes, ISBNs, private and documentation addresses, and digits that fail the check sum of cards (Luhn, ISO/IEC 7812).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from fastgpt.data.clean.step import State, Step

_LOCAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]*\Z")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9@])")
# Country codes and the other common top-level domains; they tell a@b.org from the product of matrices a@b.weight.
_TOP_LEVEL = frozenset(
    (
        "ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz "
        "ca cc cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk "
        "fm fo fr ga gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir "
        "is it je jm jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk "
        "ml mm mn mo mp mq mr ms mt mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl "
        "pm pn pr ps pt pw py qa re ro rs ru rw sa sb sc sd se sg sh si sk sl sm sn so sr ss st su sv sx sy sz tc "
        "td tf tg th tj tk tl tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw "
        "com org net edu gov mil int info biz name pro aero coop museum mobi jobs travel asia cat post tel xxx app "
        "dev page blog shop store online site website space tech cloud digital email agency academy company network "
        "systems software solutions services support studio design media news world today live life team group "
        "global international foundation institute university school health care law xyz top club wiki bio eco art"
    ).split()
)
_RESERVED = re.compile(
    r"(?:.*\.)?(?:example\.(?:com|org|net|edu)|example|test|invalid|localhost|local)", re.I
)  # RFC 2606
# A pattern begins with a set of characters, which the search skips to quickly; what must stand before comes after it.
_IPV4 = re.compile(r"[0-9](?<![\w.][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w]|\.[0-9])")
_IPV6 = re.compile(r"[23](?<![\w:.][23])[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:])")
# A number after one of these is a version or a section.
_VERSION = re.compile(
    r"(?:\b(?:version|versions|ver|v|release|rev|revision|build|section|sect|chapter|update|patch)[.:]? *"
    r"|§ *|[=><~!]= *|[~^]|[A-Za-z0-9]/|[A-Za-z]-)\Z",
    re.I,
)
_PHONE = re.compile(
    r"[+(0-9](?<![\w+./-][+(0-9])(?:"
    r"(?<=\+)[1-9][0-9]{0,2}(?:[ .-]?\(?[0-9]{1,5}\)?){2,6}"  # +44 20 7946 0958
    r"|(?<=\()[2-9][0-9]{2}\) ?[2-9][0-9]{2}[-. ][0-9]{4}"  # (212) 736-5000
    r"|(?:(?<=[2-9])|(?<=1)[-. ][2-9])[0-9]{2}(?P<sep>[-. ])[2-9][0-9]{2}(?P=sep)[0-9]{4}"  # 212-736-5000
    r")(?![\w]|[-.][0-9])"
)
_NUMBER = re.compile(r"[(+0-9](?<![\w.][(+0-9])(?:[ ./()-]{0,2}[0-9]){6,14}(?![\w]|[-.][0-9])")
_NAME = re.compile(  # what makes a number a phone number
    r"\b(?:(?:tele)?(?:phone|fax)|tel|mobile|cell|call)(?: (?:no|number))?[.:]{0,2} ?\Z", re.I
)
_CARD = re.compile(
    r"[0-9](?<![\w.+/-][0-9])"
    r"(?:[0-9]{12,18}|[0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,7}|[0-9]{3}([ -])[0-9]{6}\2[0-9]{4,5})"
    r"(?![\w]|[-.][0-9])"
)
_ISSUER = re.compile(  # leading digits and lengths of the card networks
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}|2(?:2[2-9]|[3-6][0-9]|7[01])[0-9]{13}|27[01][0-9]{13}|3[47][0-9]{13}"
    r"|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}|35(?:2[89]|[3-8][0-9])[0-9]{12}|3(?:0[0-5]|[68][0-9])[0-9]{11}"
)
_PEM = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:[^-]|-(?!----)){0,20000}"
    r"(?:-----END [A-Z0-9 ]{1,40}-----)?"
)
_TOKENS: tuple[tuple[str, str], ...] = (  # what a token starts with, and the rest of it
    ("AKIA", r"[0-9A-Z]{16}"),  # AWS
    ("ASIA", r"[0-9A-Z]{16}"),
    ("ghp_", r"[A-Za-z0-9]{36}"),  # GitHub
    ("gho_", r"[A-Za-z0-9]{36}"),
    ("ghu_", r"[A-Za-z0-9]{36}"),
    ("ghs_", r"[A-Za-z0-9]{36}"),
    ("ghr_", r"[A-Za-z0-9]{36}"),
    ("github_pat_", r"[A-Za-z0-9_]{40,100}"),
    ("glpat-", r"[A-Za-z0-9_-]{20}"),  # GitLab
    ("xoxb-", r"[A-Za-z0-9-]{20,100}"),  # Slack
    ("xoxp-", r"[A-Za-z0-9-]{20,100}"),
    ("AIza", r"[0-9A-Za-z_-]{35}"),  # Google
    ("sk_live_", r"[A-Za-z0-9]{16,100}"),  # Stripe
    ("rk_live_", r"[A-Za-z0-9]{16,100}"),
    ("sk-", r"(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{32,200}"),  # OpenAI, Anthropic
    ("hf_", r"[A-Za-z]{34}"),  # Hugging Face
    ("npm_", r"[A-Za-z0-9]{36}"),
    ("pypi-", r"AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,300}"),
    ("SG.", r"[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"),  # SendGrid
    ("eyJ", r"[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,2000}"),  # JSON Web Token
)
_TOKEN = {start: re.compile(rf"(?<![A-Za-z0-9_]){re.escape(start)}{rest}(?![A-Za-z0-9])") for start, rest in _TOKENS}


def luhn(digits: str) -> bool:
    """Return whether digits satisfy the check sum of card numbers."""
    doubled = sum(sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (doubled + sum(int(d) for d in digits[-1::-2])) % 10 == 0


def is_card(text: str) -> bool:
    """Return whether digits, with spaces or hyphens, are a card number: issuer, length and check sum."""
    digits = re.sub("[ -]", "", text)
    return bool(_ISSUER.fullmatch(digits)) and luhn(digits) and len(set(digits)) > 1


def is_public(address: str) -> bool:
    """Return whether an IP address is valid and public."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def replace(
    pattern: re.Pattern[str], text: str, placeholder: str, holds: Callable[[re.Match[str]], bool]
) -> tuple[str, int]:
    """Return the text with the matches that `holds` accepts replaced, and their number."""
    number = 0

    def one(found: re.Match[str]) -> str:
        nonlocal number
        if not holds(found):
            return found[0]
        number += 1
        return placeholder

    return pattern.sub(one, text), number


def scrub_email(text: str, placeholder: str) -> tuple[str, int]:
    """Return the text without e-mail addresses, and their number; each "@" is looked at once, so the time is linear."""
    parts, kept, at, number = [], 0, text.find("@"), 0
    while at >= 0:
        local = _LOCAL.search(text, max(kept, at - 64), at)
        domain = _DOMAIN.match(text, at + 1) if local else None
        if (
            local
            and domain
            and _is_mail(text, domain)
            and not _RESERVED.fullmatch(domain[0])
            and not _is_remote(text, local, domain)
        ):
            parts += [text[kept : local.start()], placeholder]
            kept, number = domain.end(), number + 1
        at = text.find("@", max(at + 1, kept))
    return "".join(parts) + text[kept:] if number else text, number


def _is_mail(text: str, domain: re.Match[str]) -> bool:
    """Return whether a domain has a known top level and no call or index follows it."""
    known = domain[0].rpartition(".")[2].lower() in _TOP_LEVEL
    return known and text[domain.end() : domain.end() + 1] not in ("(", "[")


def _is_remote(text: str, local: re.Match[str], domain: re.Match[str]) -> bool:
    """Return whether this is the address of a repository, such as git@github.com:owner/name."""
    return (
        local[0] == "git"
        or text[domain.end() : domain.end() + 1] == ":"
        and text[domain.end() + 1 : domain.end() + 2].isalnum()
    )


def scrub_ip(text: str, placeholder: str) -> tuple[str, int]:
    """Return the text without public IPv4 and IPv6 addresses, and their number."""

    def is_address(found: re.Match[str]) -> bool:
        return is_public(found[0]) and not _VERSION.search(text, max(0, found.start() - 16), found.start())

    text, fours = replace(_IPV4, text, placeholder, is_address) if text.count(".") > 2 else (text, 0)
    text, sixes = replace(_IPV6, text, placeholder, lambda f: is_public(f[0])) if text.count(":") > 1 else (text, 0)
    return text, fours + sixes


def scrub_phone(text: str, placeholder: str) -> tuple[str, int]:
    """Return the text without phone numbers, and their number."""

    def is_phone(found: re.Match[str]) -> bool:
        return found[0][0] != "+" or 9 <= sum(map(str.isdigit, found[0])) <= 15

    def is_named(found: re.Match[str]) -> bool:
        return bool(_NAME.search(text, max(0, found.start() - 24), found.start()))

    text, number = replace(_PHONE, text, placeholder, is_phone)
    text, named = replace(_NUMBER, text, placeholder, is_named)
    return text, number + named


def scrub_card(text: str, placeholder: str) -> tuple[str, int]:
    """Return the text without card numbers, and their number."""
    return replace(_CARD, text, placeholder, lambda found: is_card(found[0]))


def scrub_key(text: str, placeholder: str) -> tuple[str, int]:
    """Return the text without private keys and access tokens of common services, and their number."""
    number = 0
    if "-----BEGIN" in text:
        text, number = _PEM.subn(placeholder, text)
    for start, pattern in _TOKEN.items():
        if start in text:
            text, more = pattern.subn(placeholder, text)
            number += more
    return text, number


_DIGITS = re.compile(r"[0-9][0-9 ().+/-]{5}")  # without such a run there is neither a phone nor a card number
_SCRUBBERS: dict[str, Callable[[str, str], tuple[str, int]]] = {
    "key": scrub_key,
    "email": scrub_email,
    "card": scrub_card,
    "ip": scrub_ip,
    "phone": scrub_phone,
}


@dataclass
class PersonalData(Step):
    """Replace personal data by "<EMAIL>", "<IP>", "<PHONE>", "<CARD>" and "<KEY>"; each kind can be turned off."""

    name: ClassVar[str] = "personal_data"
    email: bool = True
    ip: bool = True
    phone: bool = True
    card: bool = True
    key: bool = True

    def transform(self, text: str, state: State) -> str:
        has_digits = _DIGITS.search(text) is not None
        for kind, scrub in _SCRUBBERS.items():
            if not getattr(self, kind) or (kind in ("phone", "card") and not has_digits):
                continue
            text, number = scrub(text, f"<{kind.upper()}>")
            state.count(f"personal_data.{kind}", number)
        return text
