"""Kinds of secrets and personal data: how each is written, and what checks it beyond its form."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_IBAN_LENGTHS = {
    country[:2]: int(country[2:])
    for country in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 "
        "FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 "
        "LU20 LV21 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 "
        "SK24 SM27 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
    ).split()
}
"""Country to length, from the IBAN registry of SWIFT (ISO 13616)."""


class Kind(NamedTuple):
    """One kind of secret."""

    name: str
    needles: tuple[str, ...]
    """Small letters: a text without all of them is not searched. Empty: always searched."""
    pattern: re.Pattern[str]
    """The secret is the group `value`, else the match."""
    sure: Callable[[str], float]
    """Confidence in a value that has the form; 0 where it is none."""


def entropy(text: str) -> float:
    """Return the bits per character of a text, by the frequencies of its characters."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values()) if text else 0.0


def luhn(digits: str) -> bool:
    """Whether the last digit checks the others by the Luhn formula (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def iban_is_valid(text: str) -> bool:
    """Whether country, length and check digits of an IBAN agree (ISO 13616, mod 97)."""
    bare = re.sub(r"\s", "", text).upper()
    if _IBAN_LENGTHS.get(bare[:2]) != len(bare):
        return False
    return int("".join(str(int(character, 36)) for character in bare[4:] + bare[:4])) % 97 == 1


def github_checksum(body: str) -> str:
    """Return the six characters that end a GitHub token: CRC-32 of its random part, in base 62.

    https://github.blog/engineering/platform-security/behind-githubs-new-authentication-token-formats/
    """
    number, text = zlib.crc32(body.encode()), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        text = _BASE62[digit] + text
    return text


def _always(value: str) -> float:
    return 1.0


def _random(value: str) -> float:
    """Keys are drawn at random: names of things and placeholders in their place repeat themselves."""
    return 0.95 if entropy(value[-20:]) >= 3.0 and re.search(r"\d", value) else 0.0


def _mixed(value: str) -> float:
    """As `_random`, for a prefix so short that names of other things have it too."""
    return _random(value) if re.search("[a-z]", value[3:]) and re.search("[A-Z]", value) else 0.0


def _github(value: str) -> float:
    body = value[4:]
    return 1.0 if github_checksum(body[:-6]) == body[-6:] else 0.7 * (_random(value) > 0)


def _jwt(value: str) -> float:
    head = value.split(".")[0]
    try:
        header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (ValueError, binascii.Error):
        return 0.0
    return 1.0 if isinstance(header, dict) and "alg" in header else 0.0


_CARD_BRANDS = re.compile(
    r"4\d{12}(?:\d{3}(?:\d{3})?)?|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|"
    r"(?:6011|64[4-9]\d|65\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|62\d{14}"
)
"""Visa, Mastercard, American Express, Discover, JCB, Diners Club, UnionPay: first digits and lengths."""


def _card(value: str) -> float:
    digits = re.sub(r"\D", "", value)
    return 0.95 if _CARD_BRANDS.fullmatch(digits) and luhn(digits) and len(set(digits)) > 1 else 0.0


def _iban(value: str) -> float:
    return 1.0 if iban_is_valid(value) else 0.0


_PLACEHOLDER = re.compile(
    r"(?:\W*|x+|none|null|nil|true|false|undefined|required|optional|redacted|removed|hidden|masked|string|str|text|bytes|"
    r"int|any|self|not|is|was|has|the|a|an|for|to|and|or|(?:your|my|new|old|current|the)?[\s_-]*(?:password|passwd|pwd|secret|"
    r"token|api[\s_-]?key|key|passphrase)(?:[\s_-]*here)?|change[\s_-]?me|example|placeholder|todo|tbd)\W*",
    re.IGNORECASE,
)
_CODE = re.compile(r"https?://.*|[\w.]*[(\[].*|\$\{?\w.*|\{\{?.*|<.*|%\(.*|os\.\w+.*|[\w]+\.[\w.]*[a-z_]", re.DOTALL)


def _password(value: str) -> float:
    """A field says that it is one; what stands there may be a placeholder, or code that reads it."""
    return 0.0 if _PLACEHOLDER.fullmatch(value) or _CODE.fullmatch(value) else 0.9


def _said(value: str) -> float:
    """Without quotes a word may follow that is no password, in prose and in code: one with a digit or a sign is."""
    return 0.8 if _password(value) and len(value) >= 5 and re.search(r"\d|[^\w.,;:!?'\"-]", value) else 0.0


def _token(value: str) -> float:
    return 0.9 if _password(value) and len(value) >= 12 and entropy(value) >= 3.0 and re.search(r"\d", value) else 0.0


def _phone(value: str) -> float:
    return 0.6 if 9 <= len(re.sub(r"\D", "", value)) <= 15 else 0.0


def _kind(name: str, needles: str, pattern: str, sure: Callable[[str], float], flags: int = 0) -> Kind:
    return Kind(name, tuple(needles.split()), re.compile(pattern, flags), sure)


_ASSIGNED = r"\\?[\"']?[ \t]*(?:[:=]|=>|:=)[ \t]*"
_QUOTED = r"(?:\\\"(?P<escaped>(?:[^\"\\\n]|\\(?!\"))+)\\\"|\"(?P<double>(?:[^\"\\\n]|\\.)+)\"|'(?P<single>[^'\n]+)')"
_BARE = r"(?P<value>[^\s\"',;<>{}()\[\]\\]{5,200})(?![^\s\"',;<>{}\\])"
_PASSWORD = r"\b(?:\w{1,40}[_-])?(?:password|passwd|pwd|passphrase)"
_SECRET = (
    r"\b(?:\w{1,40}[_-])?(?:secret|api[_-]?key|access[_-]?key|secret[_-]?(?:access[_-]?)?key|client[_-]?secret|"
    r"auth[_-]?token|access[_-]?token|refresh[_-]?token|private[_-]?token)"
)

KINDS = (
    _kind("private key", "private key", (
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----.{20,16000}?"
        r"-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    ), _always, re.DOTALL),
    _kind("AWS access key", "akia asia", r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b", lambda value: 0.95),
    _kind("GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_", r"\bgh[pousr]_[A-Za-z0-9]{36}\b", _github),
    _kind("GitHub token", "github_pat_", r"\bgithub_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b", _random),
    _kind("GitLab token", "glpat-", r"\bglpat-[A-Za-z0-9_-]{20,100}", _random),
    _kind("OpenAI or Anthropic key", "sk-", r"\bsk-(?:(?:proj|svcacct|admin|ant)-)?[A-Za-z0-9_-]{20,200}", _mixed),
    _kind("Slack token", "xox xapp-", r"\bx(?:ox[abeoprs]|app)-[0-9A-Za-z-]{10,250}", _random),
    _kind("Slack webhook", "hooks.slack.com", r"https://hooks\.slack\.com/services/(?P<value>T\w+/B\w+/\w{20,})",
          _always),
    _kind("Google API key", "aiza", r"\bAIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])", _random),
    _kind("Google OAuth secret", "gocspx-", r"\bGOCSPX-[0-9A-Za-z_-]{28}", _random),
    _kind("Stripe key", "k_live_ k_test_", r"\b[rs]k_(?:live|test)_[0-9A-Za-z]{16,}\b", _random),
    _kind("Hugging Face token", "hf_", r"\bhf_[A-Za-z0-9]{30,}\b", _random),
    _kind("npm token", "npm_", r"\bnpm_[A-Za-z0-9]{36}\b", _random),
    _kind("JSON web token", "eyj",
          r"\beyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{0,1000}", _jwt),
    _kind("card number", "", r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)", _card),
    _kind("IBAN", "", r"\b[A-Z]{2}\d\d(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)\b", _iban),
    _kind("password", "passw pwd passphrase", _PASSWORD + _ASSIGNED + _QUOTED, _password, re.IGNORECASE),
    _kind("password", "passw pwd passphrase", _PASSWORD + _ASSIGNED + _BARE, _said, re.IGNORECASE),
    _kind("password", "passw passphrase", (
        r"\b(?:password|passphrase|passwort) (?:is|to|=) (?:now )?[\"'`]?(?P<value>[^\s\"'`<>]{4,64}[^\s\"'`<>.,;:!?)])"
    ), _said, re.IGNORECASE),
    _kind("secret in a field", "secret token api", _SECRET + _ASSIGNED + _QUOTED, _token, re.IGNORECASE),
    _kind("secret in a field", "secret token api", _SECRET + _ASSIGNED + _BARE, _token, re.IGNORECASE),
    _kind("e-mail address", "@",
          r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,5}[A-Za-z]{2,24}\b", lambda value: 0.9),
    _kind("phone number", "", (
        r"(?<![\w.-])(?:\+\d{1,3}[ -]?(?:\(\d{1,4}\)[ -]?)?|\(\d{2,4}\)[ -]?|\d{3}-)\d{2,4}"
        r"(?:[ -]?\d{2,4}){1,3}(?![\w-]|\.\d)"
    ), _phone),
)  # fmt: skip
