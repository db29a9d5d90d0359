"""Text cleaning: exact results in English and Chinese, one order of steps, and refusals that say the way out."""

from __future__ import annotations

import importlib.util
import itertools
import random
import subprocess
import sys

import pytest

from lora_lab.data import clean as module
from lora_lab.data.clean import STEPS, clean, require
from lora_lab.data.personal import PACKAGES
from lora_lab.errors import ConfigError

LIBRARIES = ["stopwordsiso", "snowballstemmer", "rjieba", *PACKAGES]
needs_libraries = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in LIBRARIES), reason='needs pip install "lora-lab[text]"'
)
PAGE = (
    "<h1>The  Foxes&nbsp;&amp; Dogs</h1><p>The foxes are ＪＵＭＰＩＮＧ<br>over dogs.</p><script>if (1<2) {}</script>"
)


@pytest.mark.parametrize(
    ("text", "step", "result"),
    [
        ("<p>Hello &amp; <b>bold</b>\n</p>\n<p> two</p>", "strip_html", "Hello & bold\ntwo"),
        ("a<script>let x = '<b>';</script>b<style>p {}</style>c", "strip_html", "abc"),
        ("one<br>two<br/>three", "strip_html", "one\ntwo\nthree"),
        ("<ul>\n <li>one</li>\n <li>two</li>\n</ul>\n", "strip_html", "one\ntwo"),
        ("<table><tr><th>a</th><td>b</td></tr><tr><td>c</td></tr></table>", "strip_html", "a b\nc"),
        ("a <!-- note --><a href='x>y'>link</a> &#20320; &lt;b&gt;", "strip_html", "a link 你 <b>"),
        ("<![if !word]>a<![endif]> <![odd]>b", "strip_html", "a b"),
        ("a < b, 1<2, <|im_start|>\n  kept\n", "strip_html", "a < b, 1<2, <|im_start|>\n  kept\n"),
        ("ﬁne\u00a0Ａ１，你好！。", "nfkc", "fine A1,你好!。"),
        ("ÄRGER Ñ 你好", "lowercase", "ärger ñ 你好"),
        ("  a \t b\u3000c \r\n\n\n\n d\n", "collapse_spaces", "a b c\n\nd"),
        ("", "collapse_spaces", ""),
    ],
)
def test_steps_that_need_no_library(text, step, result):
    assert clean(text, [step], "en") == result
    assert clean(text, [step], "zh") == result


@needs_libraries
@pytest.mark.parametrize(
    ("text", "steps", "language", "result"),
    [
        ("The cat is on the mat.", ["remove_stop_words"], "en", "cat mat."),
        ("(the cat)  and a dog", ["remove_stop_words"], "en", "(cat) dog"),
        ("cat of\nthe dog\n\nis it?", ["remove_stop_words"], "en", "cat\ndog\n\n?"),
        ("It’s Don't DON'T dog's", ["remove_stop_words"], "en", "dog's"),
        ("10 cats, 3.5 dogs", ["remove_stop_words"], "en", "10 cats, 3.5 dogs"),
        ("the state-of-the-art at https://a.org/about?x=y", ["remove_stop_words"], "en", "state-of-the-art https://a.org/about?x=y"),
        ("is", ["remove_stop_words"], "en", ""),
        ("running dogs, flies; dog’s 3.5 https://a.org/flies 你好", ["stem"], "en", "run dog, fli; dog 3.5 https://a.org/flies 你好"),
        ("Foxes RUNNING", ["stem"], "en", "Fox RUNNING"),
        ("Foxes RUNNING", ["stem", "lowercase"], "en", "fox run"),
        ("the others", ["stem", "remove_stop_words"], "en", ""),
        (PAGE, STEPS, "en", "fox & dog\nfox jump\ndog."),
        ("我们的模型在训练中学习语言。", ["remove_stop_words"], "zh", "模型训练学习语言。"),
        ("但是，他喜欢苹果和香蕉！", ["remove_stop_words"], "zh", "，喜欢苹果香蕉！"),
        ("他说“北京的天气”。\n我们\n\n去上海", ["remove_stop_words"], "zh", "“北京天气”。\n\n\n上海"),
        ("GPT和BERT 的 模型", ["remove_stop_words"], "zh", "GPT BERT 模型"),
        ("2024年3月，１０个苹果", ["remove_stop_words"], "zh", "2024 3，１０苹果"),
        ("<b>li@example.com</b> 或 ＬＩ＠ＥＸＡＭＰＬＥ．ＣＯＭ", ["mask_pii", "strip_html", "lowercase"], "zh", "[email] 或 [email]"),
        ("<p>我们的ＧＰＵ</p><p>和  模型！</p>", [step for step in STEPS if step != "stem"], "zh", "gpu\n模型!"),
    ],
)  # fmt: skip
def test_words(text, steps, language, result):
    require(steps, language)
    assert clean(text, steps, language) == result


def test_no_steps_leave_the_text_alone():
    require([], "en")
    assert clean(PAGE, [], "en") == PAGE


@needs_libraries
def test_the_order_of_the_list_changes_nothing():
    assert {clean(PAGE, order, "en") for order in itertools.permutations(STEPS)} == {clean(PAGE, STEPS, "en")}


@needs_libraries
@pytest.mark.parametrize("step", ["nfkc", "mask_pii", "lowercase", "remove_stop_words", "collapse_spaces"])
def test_a_second_time_changes_nothing(step):
    # Not so for strip_html ("&amp;lt;" is decoded once) and stem (an ending may hide another one).
    pieces = ["the", "Cat", "a", "is", "don't", ".", ",", "'", "-", "’", "(", ")", ":", "\n", "\t", "ﬁ", "Ａ", *" " * 6]
    draw = random.Random(0)
    for _ in range(3000):
        once = clean("".join(draw.choices(pieces, k=draw.randint(1, 12))), [step], "en")
        assert clean(once, [step], "en") == once


@needs_libraries
@pytest.mark.parametrize("language", ["en", "zh"])
def test_only_words_and_spaces_go_with_stop_words(language):
    text = "Hello, “the world”! (is) 1,000 + 2 = 1002; 我们，你们……《的》？\n- the\n- of"
    cleaned = clean(text, ["remove_stop_words"], language)
    assert [c for c in cleaned if not c.isalpha() and c != " "] == [c for c in text if not c.isalpha() and c != " "]


@pytest.mark.parametrize(
    ("steps", "language", "messages"),
    [
        (["stem"], "zh", ["data.clean: stem: Chinese words have no endings", "data.clean_language=zh", "no effect", "Leave it out, or set data.clean_language=en."]),
        (["strip_htm"], "en", ["data.clean: strip_htm: must be one of strip_html, nfkc,", "Did you mean 'strip_html'?"]),
        (["nfkc", "lowercase", "nfkc"], "en", ["data.clean: nfkc: named twice", "Name it once."]),
        (["nfkc"], "fr", ["data.clean_language=fr: must be one of en, zh."]),
        (["stem", "nope"], "zh", ["2 problems", "data.clean: stem:", "data.clean: nope:"]),
    ],
)  # fmt: skip
def test_refusals(steps, language, messages):
    with pytest.raises(ConfigError) as refused:
        require(steps, language)
    for message in messages:
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("steps", "language", "packages"),
    [
        (["remove_stop_words"], "en", ["stopwordsiso"]),
        (["remove_stop_words"], "zh", ["stopwordsiso", "rjieba"]),
        (["stem", "nfkc"], "en", ["snowballstemmer"]),
        (["stem", "remove_stop_words"], "en", ["snowballstemmer", "stopwordsiso"]),
        (["mask_pii"], "en", [*PACKAGES]),
        (["mask_pii"], "zh", [*PACKAGES]),
    ],
)
def test_missing_packages(monkeypatch, steps, language, packages):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    require(
        [step for step in STEPS if step not in ("remove_stop_words", "stem", "mask_pii")], language
    )  # these need none
    with pytest.raises(ConfigError) as refused:
        require(steps, language)
    assert [problem.split("the package ")[1].split(",")[0] for problem in refused.value.problems] == packages
    for problem in refused.value.problems:
        assert problem.startswith(tuple(f"data.clean: {step}: with" for step in steps))
        assert f"data.clean_language={language}" in problem
        assert problem.endswith('not installed. pip install "lora-lab[text]", or leave the step out.')


@pytest.mark.parametrize(("module", "more"), [("clean", LIBRARIES), ("augment", ("rjieba", "numpy"))])
def test_importing_what_changes_rows_is_light(module, more):
    heavy = ["torch", "transformers", "hydra", *more]
    code = f"import sys, lora_lab.data.{module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
