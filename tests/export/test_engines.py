"""What engines that are not ours answer, asked in messages: make test-engines.

Each lives in an environment of its own in the folder that LORA_LAB_ENGINES names (`llama` and `vllm`, see the Makefile). The run that is
asked about is the demo's, or LORA_LAB_ENGINES_RUN, a run folder with `merged`, `export/gguf` and `export/vllm`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from lora_lab.config import compose
from lora_lab.data.dataset import first_examples
from lora_lab.export import text
from lora_lab.run import pipeline, takes
from lora_lab.run.prepared import Trained
from lora_lab.run.setup import Setup

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

CONVERSATIONS, NEW_TOKENS = 20, 48
_LATIN, _CHINESE = "New York City, 3 August", "上海，八月三日"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A trained run with its exports."""
    if named := os.environ.get("LORA_LAB_ENGINES_RUN"):
        return Path(named)
    folder = tmp_path_factory.mktemp("engines") / "run"
    told = [
        "recipe=demo",
        "export.targets=[hf,gguf,vllm]",
        "export.dtype=float32",
        "task.generate_rows=0",
        f"run_dir={folder}",
    ]
    return pipeline.train(compose.compose(told)).path


@pytest.fixture(scope="module")
def asked(done) -> list[text.Prompt]:
    """Conversations, and the run's ids of them."""
    ready = _ready(done)
    rows = first_examples(ready.held_out or ready.train, CONVERSATIONS)
    every = text.prompts(ready.encoder, rows)
    hard = [one for one in every if not one.held_out]
    found = hard + [one for one in every if one.held_out]
    return (found + [_several(ready.encoder, one) for one in found[len(hard) :]])[:CONVERSATIONS]


def _ready(done: Path) -> Setup:
    return Trained.open(str(done), takes.EVALUATE, need_train=True).setup


def transformers_answers(done: Path, asked: list[text.Prompt], adapter: Path | None = None) -> list[str]:
    """What plain transformers answers, given the run's ids: on `merged`, or by plain peft with an adapter on the base as published."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    encoder = _ready(done).encoder
    folder = done / "merged" if adapter is None else _base_of(adapter)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
    answers = []
    for one in asked:
        ids = torch.tensor([one.ids])
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": text.ends_of(encoder)}
        with torch.no_grad():
            told = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
        answers.append(encoder.tokenizer.decode(told, skip_special_tokens=True))
    return answers


def _base_of(adapter: Path) -> str:
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def _several(encoder, one: text.Prompt) -> text.Prompt:
    """A held-out question as the second of two, in another language."""
    before = [{"role": "user", "content": _CHINESE}, {"role": "assistant", "content": _LATIN}]
    messages = [m for m in one.messages if m["role"] == "system"] + before
    messages += [m for m in one.messages if m["role"] != "system"]
    shown = encoder.template.text(messages, one.tools, add_generation_prompt=True)
    ids = encoder.tokenizer(shown, add_special_tokens=False)["input_ids"]
    return text.Prompt(f"{one.name}, after another", messages, one.tools, shown, ids, True)


def ask(engine: str, tmp_path: Path, asked: list[text.Prompt], **where: str) -> list[str]:
    """What an engine answers."""
    python = Path(os.environ.get("LORA_LAB_ENGINES", ".engines")) / engine.partition("_")[0] / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is not there; make test-engines")
    told = {"adapter": "", "tokenizer": "", **where, "new_tokens": NEW_TOKENS, "threads": torch.get_num_threads()}
    told["conversations"] = [{"messages": one.messages, "tools": one.tools} for one in asked]
    (tmp_path / "asked.json").write_text(json.dumps(told))
    words = [python, Path(__file__).with_name("engines.py"), engine, tmp_path / "asked.json", tmp_path / "told.json"]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answered = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=own, check=False)
    assert answered.returncode == 0, (answered.stdout + answered.stderr)[-3000:]
    return json.loads((tmp_path / "told.json").read_text())


def check(asked: list[text.Prompt], expected: list[str], answers: list[str]) -> None:
    assert len(asked) == CONVERSATIONS
    unequal = [
        (prompt.name, ours, theirs)
        for prompt, ours, theirs in zip(asked, expected, answers, strict=True)
        if ours.strip() != theirs.strip()
    ]
    assert not unequal, f"{len(unequal)} of {len(asked)}: {unequal[:3]}"


@pytest.fixture(scope="module")
def merged_answers(done, asked) -> list[str]:
    return transformers_answers(done, asked)


def test_llama_cpp_python_answers_as_the_run(done, asked, merged_answers, tmp_path):
    [file] = (done / "export/gguf").glob("*.gguf")
    check(asked, merged_answers, ask("llama_cpp", tmp_path, asked, model=str(file)))


def test_vllm_answers_as_the_run(done, asked, merged_answers, tmp_path):
    check(asked, merged_answers, ask("vllm", tmp_path, asked, model=str(done / "merged")))


def test_vllm_answers_as_the_run_with_the_adapter(done, asked, tmp_path):
    adapter = done / "export/vllm"
    tokenizer = str(adapter) if (adapter / "tokenizer.json").exists() else ""
    answers = ask("vllm", tmp_path, asked, model=_base_of(adapter), adapter=str(adapter), tokenizer=tokenizer)
    check(asked, transformers_answers(done, asked, adapter), answers)
