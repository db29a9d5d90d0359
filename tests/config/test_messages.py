"""Common mistakes, and the sentence that each one gets; values in any language, quoted or not."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab import cli
from lora_lab.config import compose
from lora_lab.errors import ConfigError

_DEMO = ["train", "recipe=demo"]
# command line -> what is said; each is told before torch is loaded
TOLD: list[tuple[list[str], str]] = [
    (["train", "demo"], "recipe=demo"),
    (["train", "--recipe", "demo"], "recipe=demo"),
    (["train", "--adapter.r", "4"], "adapter.r=4"),
    (["train", "--learning_rate", "1e-4"], "Write optim.lr=1e-4"),
    ([*_DEMO, "adapter.r", "=", "4"], "no blanks around =. Write adapter.r=4"),
    ([*_DEMO, "adapter.r=", "4"], "no blanks around =. Write adapter.r=4"),
    ([*_DEMO, "adapter.r", "=4"], "no blanks around =. Write adapter.r=4"),
    (["evaluate", "runs/demo"], "run=runs/demo"),
    (["trian", "recipe=demo"], "Did you mean 'train'?"),
    (["recipe=demo"], "the verb is missing. Write lora-lab train recipe=demo"),
    (["train", "my.jsonl"], "data.train=my.jsonl"),
    ([*_DEMO, "learning_rate=2e-4"], "Write optim.lr=0.0002"),
    ([*_DEMO, "train.learning_rate=2e-4"], "Write optim.lr=0.0002"),
    ([*_DEMO, "adapter.rank=8"], "Write adapter.r=8"),
    ([*_DEMO, "lora_r=8"], "Write adapter.r=8"),
    ([*_DEMO, "data.max_seq_length=512"], "Write data.max_tokens=512"),
    ([*_DEMO, "num_train_epochs=3"], "Write train.epochs=3"),
    ([*_DEMO, "per_device_train_batch_size=4"], "Write train.micro_batch_size=4"),
    ([*_DEMO, "quant=4bit"], "Write quant=nf4"),
    ([*_DEMO, "quant=8bit"], "Write quant=int8"),
    ([*_DEMO, "quant.load_in_4bit=true"], "Write quant=nf4"),
    ([*_DEMO, "quant=torchao"], "Write quant=torchao_int8"),
    ([*_DEMO, "quant=torchao_int4"], "no such quant. torchao's int4 needs a GPU"),
    ([*_DEMO, "quant=hqq"], "no such quant. transformers has no code at present that loads HQQ. Set quant=nf4"),
    ([*_DEMO, "quant=GPTQ"], "Name the unquantized model, and set quant=nf4. There are"),
    ([*_DEMO, "quant=gguf"], "set model.path to it"),
    ([*_DEMO, "modle=minilm"], "Did you mean 'model=minilm'?"),
    ([*_DEMO, "logging_steps=5"], "every step is in metrics.jsonl"),
    ([*_DEMO, "task=dpo"], "Write task=preference task.loss=dpo"),
    ([*_DEMO, "model=Qwen/Qwen3-8B"], "model=hub model.path=Qwen/Qwen3-8B"),
    ([*_DEMO, "++optim.lr=0,001"], "a decimal point: optim.lr=0.001"),
    ([*_DEMO, "adapter.r=4,8"], "lora-lab train -m adapter.r=4,8"),
    ([*_DEMO, "~adapter.r=3"], "a key is set, not deleted"),
    ([*_DEMO, "hydra.sweep.dir=x"], "no effect on a single run"),
    ([*_DEMO, "-m", "adapter.r=4"], "no key has several values"),
    ([*_DEMO, "-m", "adapter.rr=4,8"], "Did you mean 'adapter.r'?"),
    ([*_DEMO, "-m", "optim.lr=1e-3,abc"], "1 of 2 runs; none was begun"),
    ([*_DEMO, "-m", "adapter.r=4,8", "data.train=a,b.jsonl"], "put a name that has one in quotes"),
    ([*_DEMO, "data.label_names=[好，坏]"], "Write data.label_names=[好,坏]"),
    ([*_DEMO, "adapter.r＝8"], "Write adapter.r=8"),
    (["merge", "merge.adapters=[A b(1),B"], "Put each path in quotes"),
    (["merge", "merge.adapters=[A,A]"], "A is named twice"),
]
_ALL = """
import contextlib, io, json, sys
from lora_lab import cli
found = []
for line in json.loads(sys.argv[1]):
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            code = cli.main(line)
        except SystemExit as done:
            code = done.code
    found.append((code, told.getvalue()))
print(json.dumps([found, 'torch' in sys.modules]))
"""


def test_each_mistake_is_told_with_the_form_that_works_before_torch_is_loaded(tmp_path):
    lines = json.dumps([line for line, _ in TOLD])
    done = subprocess.run([sys.executable, "-c", _ALL, lines], capture_output=True, text=True, check=True, cwd=tmp_path)
    found, torch = json.loads(done.stdout.splitlines()[-1])
    assert not torch
    assert [
        (line, said) for (line, says), (code, said) in zip(TOLD, found, strict=True) if code != 2 or says not in said
    ] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["help"], ["help", "train"], ["train", "help"]], ids=str)
def test_help_in_words(words, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(words)
    assert done.value.code == 0
    assert "usage: lora-lab" in capsys.readouterr().out


_TEXTS = st.text("甲乙 é#=;!&^~<>。，a1_-/.@", min_size=1, max_size=12).map(lambda text: f"文{text.strip()}")


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(_TEXTS)
def test_names_are_the_same_with_and_without_quotes(text):
    read = [compose.parse_override(f"name={form}").value() for form in (text, f"'{text}'")]
    assert [str(one if isinstance(one, str) else one.text) for one in read] == [text, text]
    inside = text.replace("，", "").strip()  # a full-width comma in a list is refused
    assert compose.parse_override(f"x=[{inside},b]").value() == compose.parse_override(f"x=['{inside}',b]").value()


def test_lists_mappings_and_sweeps_in_chinese():
    config = compose.compose(["data.train=t", "data.columns={'text': 评论, label: 标 签}", "data.label_names=[好,坏]"])
    assert (config.data.columns, config.data.label_names) == ({"text": "评论", "label": "标 签"}, ["好", "坏"])
    assert compose.compose(["data.train=t", "data.columns={评论: text}"]).data.columns == {"评论": "text"}
    for value in ("甲.jsonl,乙.jsonl", "choice(甲.jsonl,'乙.jsonl')"):
        _, prepared = compose.compose_prepared([f"data.train={value}"], None, multirun=True)
        assert prepared == ["++data.train='甲.jsonl','乙.jsonl'"]


@pytest.mark.parametrize(("names", "says"), [
    ("[好,坏,好]", "data.label_names: '好' is there twice"),
    ("[好,'坏 ']", "data.label_names: '坏 ' has blanks around it, which no label of a row has. Write '坏'"),
    ("[1,2]", "data.label_names=1: must be text; in quotes it is: '1'"),
    ("[true,好]", "data.label_names=true: must be text; in quotes it is: 'true'"),
])  # fmt: skip
def test_names_of_classes_that_no_row_could_have(names, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        compose.compose(["data.train=t", f"data.label_names={names}"])


def test_a_file_with_a_comma_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "甲,b.jsonl").touch()
    assert compose.compose(["data.train=甲,b.jsonl"]).data.train == "甲,b.jsonl"


def test_what_an_override_makes_void_goes_with_it(capsys):
    assert compose.compose(["recipe=demo", "data.eval_ratio=0.1"]).data.eval is None
    assert compose.compose(["recipe=demo", "quant.method=int8"]).quant.double_quant is False
    assert "quant.double_quant" in capsys.readouterr().out


def test_the_last_of_two_values_is_said_to_hold(capsys):
    assert cli.main(["config", "recipe=demo", "optim.lr=1e-3", "optim.lr=1e-4"]) == 0
    assert "optim.lr=1e-3 has no effect, because optim.lr=1e-4 comes after it" in capsys.readouterr().out
