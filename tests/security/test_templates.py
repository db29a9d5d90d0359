"""Chat templates are programs of others: what does not end, or fills the memory, stops the run with a sentence."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from lora_lab.data import limits
from lora_lab.data.formats import Record, RowError
from lora_lab.data.template import ChatTemplate
from lora_lab.errors import ConfigError, DataError
from tests.conftest import CHATML, make_tokenizer, write_jsonl

CHAT = [{"role": "user", "content": "red cat"}, {"role": "assistant", "content": "blue"}]
_GROW = "{% set ns = namespace(a=START) %}{% for i in range(100) %}{% set ns.a = STEP %}{% endfor %}{{ ns.a }}"


def grow(start: str, step: str) -> str:
    return _GROW.replace("START", start).replace("STEP", step)


# Each would run for hours or take all memory. Most of the work is done in C code, where Python interrupts nothing.
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text doubled by ~": grow("'aaaaaaaa'", "ns.a ~ ns.a"),
    "text doubled by +": grow("'aaaaaaaa'", "ns.a + ns.a"),
    "text doubled by *": grow("'aaaaaaaa'", "ns.a * 2"),
    "text doubled by format": grow("'aaaaaaaa'", "'{0}{0}'.format(ns.a)"),
    "text doubled by %": grow("'aaaaaaaa'", "'%s%s' % (ns.a, ns.a)"),
    "text doubled by join": grow("'aaaaaaaa'", "[ns.a, ns.a]|join(ns.a)"),
    "list doubled": grow("[1]", "ns.a + ns.a"),
    "list in list": grow("[1]", "[ns.a, ns.a]"),
    "number squared": grow("3 ** 1000", "ns.a * ns.a"),
    "power": "{{ 10 ** (10 ** 9) }}",
    "long text": "{{ 'a' * 10 ** 11 }}",
    "folded": "{% if false %}{{ 'a' * 10 ** 11 }}{% endif %}{{ 'a' * 2 ** 40 }}",
    "format width": "{{ '{:>9999999999}'.format(1) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "center": "{{ 'a'|center(10 ** 10) }}",
    "replace": "{{ ('x' * 1000000).replace('', 'y' * 100000) }}",
    "join": "{{ range(99999)|join('x' * 100000) }}",
    "indent": "{{ ('a\n' * 100000)|indent(100000) }}",
    "sort": "{{ (range(99999)|list * 500)|sort|length }}",
    "macros": "{% macro f(x) %}{% if x < 100 %}{{ f(x + 1) }}{{ f(x + 1) }}{% endif %}{% endmacro %}{{ f(1) }}",
    "tojson": "{% set ns = namespace(a=[1]) %}{% for i in range(50) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a|tojson }}",
    "much text": "{{ 'a' * 20000000 }}",
}  # fmt: skip
QUICK = ("loops", "text doubled by +", "power", "long text", "join", "much text")
FAILING = {
    "range": "{{ range(10 ** 9)|list|length }}",
    "macro without end": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "deep expression": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for a in [1] %}" * 100 + "{% endfor %}" * 100,
    "date of a number": "{{ strftime_now(5) }}",
    "date that does not exist": "{{ strftime_now('\\ud83d') }}",
    "division": "{{ 1 // 0 }}",
    "number too long": "{{ (45 ** 2601) }}",
    "attributes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ messages.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "syntax": "{% for %}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def template(tokenizer, text: str) -> ChatTemplate:
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.faults) for name in ENDLESS]
)
def test_a_template_without_end_stops_the_run_in_bounded_time_and_memory(name, tokenizer):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(
        DataError, match=r"was stopped after 1 s|cannot render it \(it takes more than|characters of one conversation"
    ):
        template(tokenizer, ENDLESS[name]).text(CHAT)
    assert time.process_time() - started < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5 * 2**20  # KiB
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
    assert signal.getitimer(signal.ITIMER_PROF) == signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_the_row_s_problem_with_a_sentence(name, tokenizer):
    with pytest.raises(RowError, match="the model's chat template cannot render it"):
        template(tokenizer, FAILING[name]).text(CHAT)
    chat = template(tokenizer, FAILING[name])
    chat.kwargs = {"any": 1}
    with contextlib.suppress(ConfigError):
        chat.check_variables()


def test_all_renderings_of_a_row_are_bounded_together(tokenizer, monkeypatch):
    from lora_lab.data import template as module

    monkeypatch.setattr(module, "_ROW_SECONDS", 0.3)
    slow = "{% for i in range(2000) %}{% if i == 5 %}{% endif %}{% endfor %}" + CHATML
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 500
    with pytest.raises(DataError, match="was stopped after 0.3 s with one conversation"):
        template(tokenizer, slow).examples(Record(messages=turns), "answers")
    quick = template(tokenizer, CHATML)
    assert all(quick.text(CHAT) == quick.text(CHAT) for _ in range(3))  # each row begins anew


def test_beginnings_of_a_conversation_are_bounded_together(tokenizer):
    turns = [{"role": "user", "content": "a" * 4000}, {"role": "assistant", "content": "b" * 4000}] * 200
    with pytest.raises(RowError, match="Split the conversation"):
        template(tokenizer, CHATML).examples(Record(messages=turns), "answers")


def test_bounds_end_with_the_block_and_bring_back_what_was_there(tokenizer):
    handler, limit = signal.getsignal(signal.SIGPROF), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(RowError):
        template(tokenizer, "{{ 1 // 0 }}").text(CHAT)
    assert signal.getsignal(signal.SIGPROF) == handler
    with pytest.raises(ZeroDivisionError), limits.Bounds(2**20, 1.0):
        raise ZeroDivisionError
    assert bytearray(2**26)
    assert resource.getrlimit(resource.RLIMIT_AS) == limit


def test_the_first_row_ends_the_run(base, overrides, tmp_path, capsys):
    """Not each row anew, and not as rows to be left out."""
    import shutil

    from lora_lab import cli

    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(CHATML + ENDLESS["loops"])
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 50)
    started = time.process_time()
    assert cli.main(["train", *overrides, f"model.path={folder}", f"data.train={rows}", "data.unusable=drop"]) == 2
    assert "was stopped after 1 s: it does not end" in capsys.readouterr().err
    assert time.process_time() - started < 10


def test_a_date_that_cannot_be_written_is_a_sentence(base, overrides, tmp_path, capsys):
    import shutil

    from lora_lab import cli

    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ strftime_now(5) }}" + CHATML)
    assert cli.main(["train", *overrides, f"model.path={folder}"]) == 2
    assert "the model's chat template cannot render it (strftime() argument" in capsys.readouterr().err


@pytest.mark.faults
def test_what_never_returns_from_c_code_ends_the_process():
    """Comparing lists that share their parts takes C code 2 ** 60 steps; no exception can be raised there."""
    code = (
        "from lora_lab.data.limits import Bounds; import lora_lab.data.limits as limits; limits._LAST_SECONDS = 2.0\n"
        "a, b = [1], [1]\n"
        "for _ in range(60): a, b = [a, a], [b, b]\n"
        "with Bounds(2**30, 9.0) as bounds, bounds.slice(1.0, ValueError()): a == b"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGVTALRM
