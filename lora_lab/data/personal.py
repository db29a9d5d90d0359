"""Personal data in texts: where it is, and texts without it. Data cleaning and the server mask by the same rules.

What has a form of its own is found: e-mail addresses, phone numbers, cards, IBANs, ID numbers. Names and addresses are not, unless
somebody else finds them (`serve/presidio.py`). Checksums and numbering plans are those of python-stdnum and phonenumbers (Google's
libphonenumber), which come with the extras `text` and `serve`.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, get_args

Kind = Literal["email", "iban", "id_number", "card", "phone"]
# In this order: a number that is of two kinds is of the one that is harder to fulfil by chance.
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES: dict[str, str] = {
    "email": "e-mail addresses", "iban": "IBANs", "id_number": "ID numbers", "card": "card numbers", "phone": "phone numbers",
}  # fmt: skip
MARKS: dict[str, str] = {
    "email": "[EMAIL]", "iban": "[IBAN]", "id_number": "[ID]", "card": "[CARD]", "phone": "[PHONE]",
}  # fmt: skip
Finder = Callable[[str], Iterator[tuple[int, int]]]  # of a text: begin and end of each find
_NONE: Mapping[str, Finder] = {}
PACKAGES = ("stdnum", "phonenumbers")

# Where national numbers are dialled: the numbering plans of the languages that texts here are mostly in. Numbers with + are of anywhere.
_REGIONS = ("US", "CN", "GB", "DE", "FR")
_FIRST, _LAST = r"(?<![0-9A-Za-z])(?<![0-9][.,])", r"(?![0-9A-Za-z])(?![.,][0-9])"
_CJK = "\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff"  # their words have no blanks around them
_LETTER = rf"(?:(?![{_CJK}])\w)"
# RFC 5321's lengths bound the search, so that no text takes longer than its size says
_EMAIL = re.compile(
    rf"(?:(?<!{_LETTER})|(?<=_))(?:{_LETTER}|[.%+'-]){{1,64}}@(?:(?:{_LETTER}|-){{1,63}}\.){{1,8}}(?:xn--[0-9a-z-]{{1,59}}|(?:(?![\d_]){_LETTER}){{2,24}})",
    re.IGNORECASE,
)
_IBAN = re.compile(rf"{_FIRST}[A-Z]{{2}}[0-9]{{2}}(?:[ -]?[0-9A-Z]){{11,30}}", re.IGNORECASE)
# First digits and lengths of the card networks (ISO/IEC 7812), in the groups that are printed on cards.
_CARD = re.compile(
    rf"{_FIRST}(?=4|5[0-8]|6|3[04-9]|2[2-7])(?:[0-9]{{13,19}}|[0-9]{{4}}(?P<a>[ -])[0-9]{{4}}(?P=a)[0-9]{{4}}(?P=a)[0-9]{{4}}(?:(?P=a)[0-9]{{3}})?|"
    rf"[0-9]{{4}}(?P<b>[ -])[0-9]{{6}}(?P=b)[0-9]{{4,5}}|[0-9]{{6}}[ -][0-9]{{10,13}}){_LAST}"
)
_SAID = re.compile(
    r"(?:tel|phone|call|fax|mobile|mobil|cell|whatsapp|wechat|ssn|social security|电话|手机|致电|拨打|联系|传真|微信)",
    re.IGNORECASE,
)  # a bare row of digits is what one of these words before it says
_SAID_BEFORE = 24  # characters
_DIGITS = re.compile(r"[0-9](?:[^0-9]{0,3}[0-9]){6}")  # without so many, there is no number to look for
_AS_ASCII: dict[int, int | str | None] = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\u00ad\u200b\u200c\u200d\u2060\ufeff"), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2008\u2009\u202f\u3000"), " "),
}


@dataclasses.dataclass(frozen=True)
class Span:
    """Characters of a text that are personal."""

    start: int
    end: int
    kind: str


def missing() -> list[str]:
    """Packages that are needed and not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def spans(text: str, kinds: Collection[str] = KINDS, further: Mapping[str, Finder] = _NONE) -> list[Span]:
    """What is personal in a text, in order, none beside another twice. `missing` is empty.

    Args:
        further: other kinds, of what is left then.
    """
    plain = _plain(text)
    found: list[Span] = []
    finders: dict[str, Finder] = {kind: _FINDERS[kind] for kind in KINDS if kind in kinds}
    finders |= further
    for kind, find in finders.items():
        for start, end in find(plain):
            if not any(start < one.end and one.start < end for one in found):
                found.append(Span(start, end, kind))
        for one in found:
            plain = f"{plain[: one.start]}{'#' * (one.end - one.start)}{plain[one.end :]}"
    return sorted(found, key=lambda one: one.start)


def masked(
    text: str, kinds: Collection[str] = KINDS, further: Mapping[str, Finder] = _NONE
) -> tuple[str, collections.Counter[str]]:
    """The text with marks in the place of what is personal, and how much of each kind that was; see `spans`."""
    found, pieces, end = spans(text, kinds, further), list[str](), 0
    for one in found:
        pieces += [text[end : one.start], MARKS.get(one.kind, f"[{one.kind}]")]
        end = one.end
    return "".join([*pieces, text[end:]]), collections.Counter(one.kind for one in found)


def masked_within(
    value: Any, kinds: Collection[str] = KINDS, further: Mapping[str, Finder] = _NONE
) -> tuple[Any, collections.Counter[str]]:
    """The same for all texts in lists and mappings; keys stay."""
    counts: collections.Counter[str] = collections.Counter()

    def inside(one: Any) -> Any:
        if isinstance(one, str):
            text, own = masked(one, kinds, further)
            counts.update(own)
            return text
        if isinstance(one, dict):
            return {key: inside(part) for key, part in one.items()}
        return [inside(part) for part in one] if isinstance(one, list) else one

    return inside(value), counts


def _plain(text: str) -> str:
    """Digits, signs and blanks of all scripts as ASCII's, character by character."""
    if text.isascii():
        return text
    text = text.translate(_AS_ASCII)
    return "".join(
        str(unicodedata.decimal(one)) if not one.isascii() and unicodedata.decimal(one, None) is not None else one
        for one in text
    )


def _emails(text: str) -> Iterator[tuple[int, int]]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            start = match.start() + len(match[0]) - len(match[0].lstrip(".%+'-"))
            yield start, match.end()


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    from stdnum import iban

    for match in _IBAN.finditer(text):
        for end in range(len(match[0]), 14, -1):  # each country has one length, so that at most one end fits
            if match[0][end - 1].isalnum() and iban.is_valid(match[0][:end], check_country=False):
                yield match.start(), match.start() + end
                break


def _cards(text: str) -> Iterator[tuple[int, int]]:
    from stdnum import luhn

    if _DIGITS.search(text):
        for match in _CARD.finditer(text):
            if luhn.is_valid(re.sub("[ -]", "", match[0])):
                yield match.span()


@dataclasses.dataclass(frozen=True)
class _Id:
    """One country's ID number: how it is written, and what else must hold."""

    form: re.Pattern[str]
    holds: Callable[[str], bool]


def _of_china(number: str) -> bool:
    """Resident ID: a birth date and GB 11643's check character; districts come and go, so that they are not looked up."""
    from stdnum.cn import ric
    from stdnum.exceptions import ValidationError

    number = re.sub("[ -]", "", number).upper()
    try:
        ric.get_birth_date(number)
    except ValidationError:
        return False
    return bool(ric.calc_check_digit(number) == number[-1])


def _by(module: str) -> Callable[[str], bool]:
    def holds(number: str) -> bool:
        return bool(importlib.import_module(f"stdnum.{module}").is_valid(number))

    return holds


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(f"{_FIRST}{pattern}{_LAST}", re.IGNORECASE)


# Without a check character, or with a weak one, a number must be written in its groups.
_IDS = (
    _Id(_form(r"[1-9][0-9]{5}(?P<s>[ -]?)(?:18|19|20)[0-9]{6}(?P=s)[0-9]{3}[0-9X]"), _of_china),
    _Id(_form(r"[0-9]{3}(?P<s>[ -])[0-9]{2}(?P=s)[0-9]{4}"), _by("us.ssn")),
    _Id(_form(r"[0-9]{6}-[1-4][0-9]{6}"), _by("kr.rrn")),
    _Id(_form(r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}"), _by("br.cpf")),
    _Id(_form(r"[A-Z]{6}[0-9LMNP-V]{2}[A-EHLMPR-T][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z]"), _by("it.codicefiscale")),
    _Id(_form(r"[1-478][ ]?[0-9]{2}[ ]?[0-9]{2}[ ]?[0-9][0-9AB][ ]?[0-9]{3}[ ]?[0-9]{3}[ ]?[0-9]{2}"), _by("fr.nir")),
    _Id(_form(r"[2-9][0-9]{3}(?P<s>[ -])[0-9]{4}(?P=s)[0-9]{4}"), _by("in_.aadhaar")),
)
_BARE_SSN = _form(r"[0-9]{9}")


def _ids(text: str) -> Iterator[tuple[int, int]]:
    if not _DIGITS.search(text) and not re.search(r"[0-9]{2}[A-Z][0-9]{2}[A-Z]", text, re.IGNORECASE):
        return
    for one in _IDS:
        for match in one.form.finditer(text):
            if one.holds(match[0].replace(" ", "-") if one is _IDS[1] else match[0]):
                yield match.span()
    for match in _BARE_SSN.finditer(text):
        before = text[max(0, match.start() - _SAID_BEFORE) : match.start()].lower()
        if ("ssn" in before or "social security" in before) and _IDS[1].holds(match[0]):
            yield match.span()


def _phones(text: str) -> Iterator[tuple[int, int]]:
    if not _DIGITS.search(text):
        return
    from phonenumbers import Leniency, PhoneNumberMatcher

    for region in _REGIONS:
        for match in PhoneNumberMatcher(text, region, leniency=Leniency.STRICT_GROUPING):
            if _is_dialled(text, match.start, match.raw_string):
                yield match.start, match.end


def _is_dialled(text: str, start: int, number: str) -> bool:
    """Whether a number that some plan has is one that is written to be called, and not an amount or an order."""
    before = text[max(0, start - _SAID_BEFORE) : start]
    if re.search(r"[0-9][.,]$", before):  # behind a decimal point
        return False
    if not number.isdecimal():
        return True
    return number[0] == "0" or bool(re.fullmatch("1[3-9][0-9]{9}", number)) or bool(_SAID.search(before))


_FINDERS: dict[Kind, Finder] = {
    "email": _emails, "iban": _ibans, "id_number": _ids, "card": _cards, "phone": _phones,
}  # fmt: skip
