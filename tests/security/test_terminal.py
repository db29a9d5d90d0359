"""Text from elsewhere cannot steer the terminal, the log, a page or a spreadsheet; and no terminal can stop lora_lab."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab import cli
from lora_lab.errors import ConfigError, LoraLabError
from lora_lab.report import pages
from lora_lab.runtime import console
from lora_lab.verbs.base import Verb
from tests.conftest import write_jsonl

HOSTILE = "\x1b]0;owned\x07\x1b]52;c;cm0=\x07\x1b[2J\r\x9b31m\u202etxt.exe\u2066\u2028\x08\x7f[/red] :smile: <script>alert(1)</script>"
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028-\u202e\u2066-\u2069]")


def assert_safe(text: str) -> None:
    found = ACTS.search(text)
    assert found is None, f"{found[0]!r} in {text[max(0, found.start() - 60) : found.start() + 60]!r}"


def assert_told(text: str) -> None:
    """Safe, and what was hidden can be seen."""
    assert_safe(text)
    assert r"\x1b]0;owned\x07" in text
    assert r"\u202etxt.exe" in text


# -- what acts is shown ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b2J", r"\x9b2J"),
        ("a\x00b\x07\x7f", r"a\x00b\x07\x7f"),
        ("\u202efdp.exe\u202c", r"\u202efdp.exe\u202c"),
        ("\u2066a\u2069", r"\u2066a\u2069"),
        ("half \ud83d", r"half \ud83d"),
        ("\U000e0041", r"\U000e0041"),
        ("two\nlines\tand 你好 é 😀 \\x1b", "two\nlines\tand 你好 é 😀 \\x1b"),
    ],
)
def test_what_acts_is_written_out_and_all_else_stays(text, expected):
    assert console.shown(text) == expected
    assert console.shown(expected) == expected


def test_every_way_to_the_terminal_and_the_log_is_safe(tmp_path, capsys):
    with console.logged_to(tmp_path / "log.txt"):
        console.say("topic", HOSTILE)
        console.show_table(HOSTILE, ["", HOSTILE], [[HOSTILE, 1.0], ["[/b]", None]])
        console.metrics_table(HOSTILE, {HOSTILE: {HOSTILE: 1.0}})
        with console.steps(HOSTILE, 1) as progress:
            progress.advance(loss=HOSTILE)
        console.out.print(HOSTILE, markup=False)  # whoever forgets the gate before
    console.setting(HOSTILE, HOSTILE, HOSTILE)
    console.stream(HOSTILE)
    console.complain(HOSTILE)
    captured = capsys.readouterr()
    for text in (captured.out, captured.err, (tmp_path / "log.txt").read_text(encoding="utf-8")):
        assert_told(text)
    assert "[/red] :smile: <script>" in captured.out  # neither markup nor a picture


def test_a_table_of_hostile_texts_keeps_its_lines(capsys):
    console.show_table("title", ["", "b"], [["\x1b[2J" * 3, 1], ["\u202e", 2], ["plain", 3]])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_progress_in_a_terminal_is_safe(monkeypatch):
    import rich.console

    screen = io.StringIO()
    monkeypatch.setattr(console, "out", console.Console(file=screen, force_terminal=True, width=120, _environ={}))
    with console.steps(HOSTILE, 2) as progress:
        progress.advance(loss="\x1b]0;owned\x07")
        progress.advance(loss="[/b]")
    assert isinstance(console.out, rich.console.Console)
    assert "\x1b]" not in screen.getvalue()  # rich's own sequences move the cursor and set colours
    assert r"\x1b]0;owned\x07" in screen.getvalue()


def test_answers_that_stream_are_safe(base, capsys):
    import torch
    from transformers import AutoTokenizer

    from lora_lab.run.chat import _Shown

    tokenizer = AutoTokenizer.from_pretrained(base)
    streamer = _Shown(tokenizer, skip_special_tokens=True)
    for token in tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert_told(capsys.readouterr().out)


# -- whole commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile_rows(tmp_path) -> list[str]:
    """Overrides of a classification of hostile texts with hostile labels, in a file of a hostile name."""
    folder = tmp_path / "\x1b[2J\u202e名"
    folder.mkdir()
    rows = [{"text": f"red {HOSTILE} {i}", "label": HOSTILE + "ab"[i % 2], "\x1b[3Jmore": 1} for i in range(8)]
    file = write_jsonl(folder / "rows.jsonl", rows)
    return ["task=classification", f"data.train='{file}'", "data.max_tokens=512"]


def test_rows_labels_columns_and_file_names_are_safe(overrides, hostile_rows, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["data", *overrides, *hostile_rows, "--html", str(page)]) in (0, 1)
    captured = capsys.readouterr()
    assert_told(captured.out)
    assert_safe(captured.err)
    text = page.read_text(encoding="utf-8")
    assert_told(text)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_errors_are_safe(overrides, tmp_path, capsys, debug):
    file = write_jsonl(tmp_path / "rows.jsonl", [{HOSTILE: 1}])
    assert cli.main(["data", *overrides, f"data.train={file}", *debug]) == 2
    assert_told(capsys.readouterr().err)


def test_a_page_of_a_sweep_is_safe(tmp_path):
    from lora_lab.report import sweep_report

    place = {"metrics": [1.0], "memory": 1.0, "seconds": 1.0, "steps": 1, "note": HOSTILE}
    places = [
        {
            "name": f"{HOSTILE}{name}",
            "metric": metric,
            "parameters": metric,
            "values": {"task.prefix": f"{HOSTILE}{name}$x^$", "optim.lr": metric, HOSTILE: metric},
            **place,
        }
        for name, metric in (("0", 1.0), ("1", 2.0))
    ]
    curves = [sweep_report.Curve("0", HOSTILE, [{1: 1.0, 2: 0.5}], [{2: 0.5}], [HOSTILE])]
    result = {
        "folder": HOSTILE,
        "metric": "loss",
        "lower_is_better": True,
        "take": "0",
        "judgement": HOSTILE,
        "ranking": places,
    }
    sweep_report.write(tmp_path / "report.html", result, curves)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert_told(text)
    assert "<script" not in text
    assert text.count("<svg") == 4  # heat map, parallel coordinates, losses, and against the parameters
    assert_told(pages.render("data.html.jinja", name=HOSTILE, overviews=[], findings=[HOSTILE], config=None))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_takes_no_text_for_a_formula(text):
    from lora_lab.sweep import ranking

    place = ranking.Place("0", {"task.prefix": text, "optim.lr": -1.0}, -2.0, [-2.0], 1, 1.0, 1.0, 1, text)
    row = next(csv.DictReader(io.StringIO(ranking._csv([place], "loss"))))
    assert row["task.prefix"][0] in "'\\"
    assert row["note"] == row["task.prefix"]
    assert (row["optim.lr"], row["loss"]) == ("-1.0", "-2.0")  # numbers stay numbers
    assert_safe(ranking._csv([place], "loss"))


# -- encodings -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def screen_of(encoding: str):
    """Inside the block, a stdout of an encoding that refuses what it lacks; what was written, afterwards."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="")
    found: list[str] = []
    with contextlib.redirect_stdout(file):
        yield found
    file.flush()
    found.append(file.buffer.getvalue().decode(encoding))


ENCODINGS = ("ascii", "cp1252", "gbk", "utf-8")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_encoding_shows_any_text(encoding):
    with screen_of(encoding) as found:
        console.say("topic", "你好 é 😀 → ⟦x⟧ ⏎ ··· █")
        console.show_table("表", ["", "列 é"], [["红 😀", 1.0], ["blau ü", 2.0]])
        console.setting("数据", "é", "说明")
    [text] = found
    lines = [line for line in text.splitlines() if line.startswith(("|", "+", "│", "┃", "┏", "└", "┡"))]
    assert len(lines) >= 6
    if encoding in ("ascii", "cp1252"):
        assert r"\u4f60\u597d" in text
        assert "-> [x] |" in text
        assert {len(line) for line in lines} == {len(lines[0])}
        assert text.isascii() == (encoding == "ascii")
    else:
        assert "你好" in text
    if encoding != "utf-8":
        assert lines[0].startswith("+--")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_chinese_rows_on_a_plain_terminal(encoding, overrides, tmp_path):
    rows = [{"prompt": "你好 世界 😀", "completion": f"红色 {i}"} for i in range(4)]
    file = write_jsonl(tmp_path / "数据.jsonl", rows)
    with screen_of(encoding) as found:
        assert cli.main(["data", *overrides, f"data.train={file}", "--html", str(tmp_path / "page.html")]) == 0
    assert "prompt_completion" in found[0]


def test_an_argument_that_is_no_text_is_told(capsys):
    assert cli.main(["data", "data.train=\udce6\udc95\udcb0.jsonl"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(
        r"lora-lab: data.train=\udce6\udc95\udcb0.jsonl: not text in the encoding of this terminal"
    )


def test_what_is_typed_is_whole(monkeypatch):
    from lora_lab.run import chat

    assert chat._whole("你好".encode().decode("ascii", "surrogateescape")) == "你好"
    assert chat._whole("plain é 😀") == "plain é 😀"


# -- a stdout that does not take it ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def lost_stdout(where: str):
    """Inside the block, stdout is on a full disk, or its reader has gone."""
    if where == "full":
        target: str | int = "/dev/full"
    else:
        reader, target = os.pipe()
        os.close(reader)
    with open(target, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


def test_a_full_stdout_is_told(capsys):
    with lost_stdout("full"):
        assert cli.main(["config", "recipe=demo"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("lora-lab: stdout: No space left on device")
    assert "Traceback" not in message


def test_a_closed_pipe_is_no_mistake(capsys):
    with lost_stdout("closed"):
        assert cli.main(["config", "--keys"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("where", ["full", "closed"])
def test_no_stdout_ends_a_training(where, overrides, tmp_path, capsys):
    with lost_stdout(where):
        assert cli.main(["train", *overrides, "train.max_steps=3"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("No space left on device" in captured.err) == (where == "full")
    assert "Traceback" not in captured.err
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 3
    assert "done" in (tmp_path / "run/log.txt").read_text()


def test_a_full_stderr_hides_no_exit_code():
    with open("/dev/full", "w", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        assert cli.main(["train", "recipe=nope"]) == 2


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("--help > /dev/full", 2, "stdout: No space left on device"),
        ("--help | head -1; exit ${PIPESTATUS[0]}", 0, ""),
        ("--help >&-", 0, ""),
    ],
)
def test_help_of_a_real_process(command, code, told):
    line = f"{sys.executable} -m lora_lab {command}"
    done = subprocess.run(["/bin/bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Exception" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("setting", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}])
def test_chinese_rows_in_a_real_plain_process(setting, overrides, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "你好 世界", "completion": f"红色 {i}"} for i in range(4)])
    command = [sys.executable, "-m", "lora_lab", "train", *overrides, f"data.train={file}", "train.max_steps=1"]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **setting})
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert Path(tmp_path / "run/result.json").exists()


# -- what goes wrong otherwise ----------------------------------------------------------------------------------------------


def _raising(error: Exception) -> Verb:
    def run(told):
        raise error

    return dataclasses.replace(cli.VERBS["config"], run=run)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(28, "No space left on device", "/some/file"), 2, "lora-lab: /some/file: No space left on device."),
        (PermissionError(13, "Permission denied", HOSTILE), 2, "Permission denied."),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deep"),
        (MemoryError(), 2, "memory ran out"),
        (ConfigError("a: wrong.", "b: wrong."), 2, "2 problems in the configuration:\n  a: wrong.\n  b: wrong."),
        (LoraLabError(HOSTILE), 2, "owned"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_a_machine_or_a_file_can_cause_is_a_sentence(error, code, told, monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "config", _raising(error))
    assert cli.main(["config"]) == code
    message = capsys.readouterr().err
    assert told in message
    assert "Traceback" not in message
    assert_safe(message)
    assert cli.main(["config", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_of_ours_is_told_with_a_trace(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "config", _raising(KeyError(HOSTILE)))
    assert cli.main(["config"]) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert message.endswith("Please report it with the lines above.\n")
    assert_safe(message)
