"""Text cleaning, off by default: markup, character forms, personal data, stop words and word endings, in one fixed order.

Cleaning removes information that a language model could use; it is for text that has to match a corpus cleaned in the
same way. Libraries, all with their data inside and none with a download: stopwordsiso (word lists of
github.com/stopwords-iso), snowballstemmer (Porter2, snowballstem.org/algorithms/english/stemmer.html), and rjieba, the
Rust form of jieba, for Chinese, which writes no spaces between words; for personal data see `personal.py`. They come with
the extra `text`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import unicodedata
from collections.abc import Collection
from html.parser import HTMLParser
from typing import Any, Literal, get_args

from lora_lab.data import personal
from lora_lab.errors import ConfigError, nearest

Step = Literal["strip_html", "nfkc", "mask_pii", "lowercase", "remove_stop_words", "stem", "collapse_spaces"]
Language = Literal["en", "zh"]
# The order in which steps are applied, however the user lists them. Markup goes before NFKC, which makes "<" of "＜";
# personal data before what changes words; stop words before stems, which are in no list; spaces last, to tidy what the
# others leave.
STEPS: tuple[Step, ...] = get_args(Step)

MASKS: Step = "mask_pii"  # the only step that changes answers too: what is personal must not be learned
# What each step imports, by language; a step that depends on the language and is absent would have no effect.
_PACKAGES: dict[tuple[str, str], list[str]] = {
    (MASKS, "en"): [*personal.PACKAGES],
    (MASKS, "zh"): [*personal.PACKAGES],
    ("remove_stop_words", "en"): ["stopwordsiso"],
    ("remove_stop_words", "zh"): ["stopwordsiso", "rjieba"],
    ("stem", "en"): ["snowballstemmer"],
}
_BREAKS = frozenset(
    "address article aside blockquote br dd details div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 "
    "header hr legend li main nav ol option p pre section summary table title tr ul".split()
)
# Letters and digits, and what is written against them: don't, state-of-the-art, 3.5, https://a.org/b are one word each.
_WORD = re.compile(r"(\w+(?:['’.\-/:@&=?#%+]+\w+)*)")
_DROPPED = "\0"  # stands for a removed word until the spaces around it are closed; no text needs this character
_GAP = re.compile(r"((?<![^\S\n])[^\S\n]++)?\0(?:[^\S\n]*\0)*([^\S\n]*)")


def require(steps: Collection[str], language: str) -> None:
    """Refuse what `clean` cannot do, before long work starts.

    Args:
        steps: `data.clean`, names of `STEPS` in any order.
        language: `data.clean_language`.

    Raises:
        ConfigError: a step is unknown, named twice or without effect in this language, the language is unknown, or a
            package is not installed; all of them at once.
    """
    problems = []
    if language not in get_args(Language):
        problems.append(f"data.clean_language={language}: must be one of {', '.join(get_args(Language))}.")
    for step in dict.fromkeys(steps):
        key = f"data.clean: {step}"
        if step not in STEPS:
            problems.append(f"{key}: must be one of {', '.join(STEPS)}.{nearest(step, STEPS)}")
        elif list(steps).count(step) > 1:
            problems.append(f"{key}: named twice, and a step is applied once. Name it once.")
        elif (step, language) == ("stem", "zh"):
            problems.append(
                f"{key}: Chinese words have no endings to remove, so with data.clean_language=zh the step has no "
                "effect. Leave it out, or set data.clean_language=en."
            )
        for package in _PACKAGES.get((step, language), []):
            if importlib.util.find_spec(package) is None:
                problems.append(
                    f"{key}: with data.clean_language={language} it needs the package {package}, which is not "
                    f'installed. pip install "lora-lab[text]", or leave the step out.'
                )
    if problems:
        raise ConfigError(*problems)


def clean(text: str, steps: Collection[str], language: str) -> str:
    """`text` after the named steps, applied in the order of `STEPS`; `require` has accepted `steps` and `language`.

    - strip_html: tags and comments go, script and style with their content; entities are decoded; block tags become
      line breaks, table cells spaces. The text is read as HTML: a `<` right before a letter opens a tag.
    - nfkc: Unicode NFKC (unicode.org/reports/tr15): full-width forms, ligatures and no-break spaces become plain ones,
      and so does Chinese punctuation that has an ASCII twin.
    - mask_pii: e-mail addresses, phone numbers, cards, IBANs and ID numbers become marks such as `[EMAIL]`.
    - lowercase: `str.lower`.
    - remove_stop_words: in any case; punctuation and numerals stay. The lists are wide: the English one also holds
      "not", "computer" and "system"; the Chinese one is for simplified characters, and also holds "不", "年" and "月".
    - stem: Porter2 on words of letters only, written in lower case; upper-case endings stay.
    - collapse_spaces: one space, at most one empty line, none at the ends; indentation is lost too.
    """
    for step in STEPS:
        if step in steps:
            text = _APPLY[step](text, language)
    return text


class _Text(HTMLParser):
    """Collects what a reader of the page would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden: str | None = None  # the open script or style
        self.gap = ""  # goes before the next text: white space around block tags means nothing in HTML

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self.hidden = tag
        self._separate(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == self.hidden:
            self.hidden = None
        self._separate(tag)

    def _separate(self, tag: str) -> None:
        if tag in _BREAKS:
            self.gap = "\n"
        elif tag in ("td", "th"):
            self.gap = self.gap or " "

    def handle_data(self, data: str) -> None:
        if self.hidden or (self.gap and data.isspace()):
            return
        if self.gap:
            data = data.lstrip()
            if self.parts:
                self.parts[-1] = self.parts[-1].rstrip() + self.gap
        self.parts.append(data)
        self.gap = ""


def _strip_html(text: str, language: str) -> str:
    parser = _Text()
    # `<![...>` is a comment in HTML (html.spec.whatwg.org, "incorrectly opened comment"); the parser can fail on it.
    parser.feed(re.sub(r"<!\[[^>]*>?", "", text))
    parser.close()
    return "".join(parser.parts)


@functools.cache
def _stop_words(language: str) -> frozenset[str]:
    from stopwordsiso import stopwords

    return frozenset(word for word in stopwords(language) if word[0].isalpha())  # the lists hold "10" and "，" too


def _remove_stop_words(text: str, language: str) -> str:
    if language == "zh":
        import rjieba

        words = rjieba.cut(text)
    else:
        words = _WORD.split(text)
    stops = _stop_words(language)
    return _GAP.sub(_close, "".join(_DROPPED if word.lower().replace("’", "'") in stops else word for word in words))


def _close(gap: re.Match[str]) -> str:
    """The white space that is left where words were: none before punctuation and at the ends of a line."""
    before, after = gap.string[gap.start() - 1 : gap.start()], gap.string[gap.end() : gap.end() + 1]
    if all(side.isascii() and side.isalnum() for side in (before, after)):
        return " "  # "GPT和BERT" must not become one word
    return gap[2] if gap[1] else ""


@functools.cache
def _stemmer(language: str) -> Any:
    """It holds the word that it works on: one per process, not for threads."""
    import snowballstemmer

    return snowballstemmer.stemmer({"en": "english"}[language])


@functools.lru_cache(maxsize=1 << 16)
def _stem_word(word: str, language: str) -> str:
    plain = word.replace("’", "'")
    return _stemmer(language).stemWord(plain) if plain.replace("'", "").isalpha() else word


def _stem(text: str, language: str) -> str:
    return _WORD.sub(lambda word: _stem_word(word[0], language), text)


def _collapse_spaces(text: str, language: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) for line in text.splitlines())).strip()


_APPLY = {
    "strip_html": _strip_html,
    "nfkc": lambda text, language: unicodedata.normalize("NFKC", text),
    "mask_pii": lambda text, language: personal.masked(text)[0],
    "lowercase": lambda text, language: text.lower(),
    "remove_stop_words": _remove_stop_words,
    "stem": _stem,
    "collapse_spaces": _collapse_spaces,
}
