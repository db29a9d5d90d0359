"""Values in the quotes that Hydra's grammar wants around what it cannot read: Chinese, `#`, `=`, full stops of other scripts.

That grammar knows ASCII letters and a few signs outside quotes. A value that it refuses is read here by the same rules (commas,
brackets, quotes, functions), only that a name may hold any character, and each such name is put in quotes.
"""

from __future__ import annotations

import re
from typing import Any

_PLAIN = re.compile(
    r"[\w/\-+.$%*@?|: \t]*", re.ASCII
)  # what the grammar reads without quotes, unless it ends in a blank
_FUNCTION = re.compile(
    r"(choice|range|interval|glob|tag|sort|shuffle|extend_list|int|float|str|bool|json_str)[ \t]*\(", re.ASCII
)
_ARGUMENT = re.compile(r"[A-Za-z_]\w*[ \t]*=[ \t]*", re.ASCII)
_BLANKS = " \t"
_KEY = "lora_lab_key_"  # begins the stand-in of a mapping's key, which the grammar takes in no quotes
_MAX_DEPTH = 30
# Signs of a full-width keyboard, and what each stands for.
_FULL_WIDTH = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {
    "、": ",", "。": ".", "“": '"', "”": '"', "‘": "'", "’": "'", "【": "[", "】": "]", "\u3000": " ", "—": "-", "–": "-", "−": "-",
}  # fmt: skip
_SEPARATING = frozenset("，：、［］｛｝【】；")
_CURLY = {"“": "”", "‘": "’", "「": "」", "『": "』", "＂": "＂", "＇": "＇"}


class NotReadable(ValueError):
    """A value that is no list of names, lists and mappings; it can only be one text."""


class FullWidth(ValueError):
    """A sign of a full-width keyboard where a plain one must be meant; the text is the sign."""


def quoted(value: str) -> str:
    """The value with quotes around each name that Hydra's grammar could not read.

    Raises:
        NotReadable: its brackets and quotes are not in order.
        FullWidth: a name in a list or mapping holds a full-width comma, colon or bracket, or a name is in curly quotes.
    """
    return _Reader(value).all()


def one_text(value: str) -> str:
    """The value as one text, whatever is in it."""
    end = len(value) - len(value.rstrip("\\"))
    text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value[: len(value) - end])
    return f"'{text}{value[len(value) - end :] * 2}'"


def written(value: Any) -> str:
    """A value as the grammar reads it back; a text that Hydra keeps with its quotes is that text."""
    value = getattr(value, "text", value)
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        pairs = (f"{_key_written(key)}:{written(one)}" for key, one in value.items())
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, str):
        return one_text(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _key_written(key: Any) -> str:
    return key if isinstance(key, str) and re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII) else _stand_in(str(key))


def plain_keys(node: Any) -> Any:
    """A read value with the keys of mappings as they were written."""
    if isinstance(node, list):
        return [plain_keys(one) for one in node]
    if not isinstance(node, dict):
        return node
    return {_key_of(key): plain_keys(value) for key, value in node.items()}


def _stand_in(key: str) -> str:
    return _KEY + key.encode("utf-8", "surrogatepass").hex()


def _key_of(key: Any) -> Any:
    if not isinstance(key, str) or not key.startswith(_KEY):
        return key
    try:
        return bytes.fromhex(key.removeprefix(_KEY)).decode("utf-8", "surrogatepass")
    except ValueError:  # somebody's own key
        return key


def full_width(text: str) -> str:
    """The text with plain signs in place of full-width ones outside plain quotes; equal to it if there are none."""
    parts = re.split(r"('[^']*'|\"[^\"]*\")", text)
    return "".join(
        part if place % 2 else "".join(_FULL_WIDTH.get(one, one) for one in part) for place, part in enumerate(parts)
    )


class _Reader:
    """Reads a value from left to right, and writes it anew."""

    def __init__(self, text: str):
        self.text, self.place = text, 0

    def all(self) -> str:
        """The whole value: one element, or several between commas."""
        return ",".join(self._elements("", inside=False))

    def _elements(self, end: str, inside: bool, depth: int = 0) -> list[str]:
        """Elements up to the closing bracket `end` (which is passed), or to the end of the text."""
        found: list[str] = []
        self._blanks()
        if end and self._next() == end:
            self.place += 1
            return found
        while True:
            found.append(self._element(f",{end}", inside, depth))
            if self._ends(end):
                return found

    def _ends(self, end: str) -> bool:
        """Whether a closing bracket, or the text's end, was passed, and not a comma."""
        sign, self.place = self._next(), self.place + 1
        if sign not in ("", ",", end) or (sign == "" and end):
            raise NotReadable
        return sign == end

    def _element(self, stops: str, inside: bool, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise NotReadable
        self._blanks()
        sign, start = self._next(), self.place
        function = _FUNCTION.match(self.text, self.place)
        try:
            found = self._whole(sign, function, depth)
            self._blanks()
            if found is not None and (self._next() == "" or self._next() in stops):
                return found
        except NotReadable:
            if not function:
                raise
        self.place = start
        if sign in ("'", '"') or (sign in ("[", "{") and stops != ","):
            raise NotReadable
        return self._name(stops, inside)  # also a path such as `[1] first.jsonl`

    def _whole(self, sign: str, function: re.Match[str] | None, depth: int) -> str | None:
        """A quoted text, a list, a mapping or a function; None if there is none of them here."""
        if sign in ("'", '"'):
            return self._quote(sign)
        if sign == "[":
            self.place += 1
            return f"[{','.join(self._elements(']', True, depth + 1))}]"
        if sign == "{":
            self.place += 1
            return f"{{{','.join(self._pairs(depth + 1))}}}"
        if function:
            self.place = function.end()
            return f"{function[1]}({','.join(self._arguments(depth + 1))})"
        return None

    def _pairs(self, depth: int) -> list[str]:
        found: list[str] = []
        self._blanks()
        if self._next() == "}":
            self.place += 1
            return found
        while True:
            self._blanks()
            key = self._key()
            self._blanks()
            if self._next() != ":":
                raise NotReadable
            self.place += 1
            found.append(f"{key}:{self._element(',}', True, depth)}")
            if self._ends("}"):
                return found

    def _key(self) -> str:
        if self._next() in ("'", '"'):
            return _key_written(_unquoted(self._quote(self._next())))
        name = self._atom(":,}")
        _check(name, True)
        if not name:
            raise NotReadable
        return name if _PLAIN.fullmatch(name) else _stand_in(name)

    def _arguments(self, depth: int) -> list[str]:
        found: list[str] = []
        self._blanks()
        if self._next() == ")":
            self.place += 1
            return found
        while True:
            self._blanks()
            named = _ARGUMENT.match(self.text, self.place)
            self.place = named.end() if named else self.place
            found.append((named[0] if named else "") + self._element(",)", False, depth))
            if self._ends(")"):
                return found

    def _name(self, stops: str, inside: bool) -> str:
        name = self._atom(stops)
        _check(name, inside)
        if not name:
            raise NotReadable
        return name if "${" not in name and _PLAIN.fullmatch(name) else one_text(name)

    def _atom(self, stops: str) -> str:
        """Text up to one of these signs; one behind a backslash belongs to it, and so does what stands in `${...}`."""
        text, parts, depth = self.text, [], 0
        while self.place < len(text) and (depth or text[self.place] not in stops):
            sign = text[self.place]
            if sign == "\\" and text[self.place + 1 : self.place + 2] and text[self.place + 1] in stops:
                self.place += 1
                sign = text[self.place]
            elif text.startswith("${", self.place):
                depth += 1
            elif sign == "}" and depth:
                depth -= 1
            parts.append(sign)
            self.place += 1
        return "".join(parts).strip(_BLANKS)

    def _quote(self, sign: str) -> str:
        """A text in quotes, as it stands; a quote behind an odd number of backslashes does not end it."""
        start, self.place = self.place, self.place + 1
        while self.place < len(self.text):
            if self.text[self.place] == sign:
                before = self.text[start + 1 : self.place]
                if (len(before) - len(before.rstrip("\\"))) % 2 == 0:
                    self.place += 1
                    return self.text[start : self.place]
            self.place += 1
        raise NotReadable

    def _next(self) -> str:
        return self.text[self.place : self.place + 1]

    def _blanks(self) -> None:
        while self._next() and self._next() in _BLANKS:
            self.place += 1


def _unquoted(text: str) -> str:
    return text[1:-1].replace("\\" + text[0], text[0])


def _check(name: str, inside: bool) -> None:
    """Refuse signs that can only have been meant as plain ones."""
    if len(name) > 1 and _CURLY.get(name[0]) == name[-1]:
        raise FullWidth(name[0])
    sign = next((one for one in name if one in _SEPARATING), None) if inside else None
    if sign is not None:
        raise FullWidth(sign)
