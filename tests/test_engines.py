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

from lora_lab import compose, run
from lora_lab.data.dataset import first_examples
from lora_lab.export import text
from lora_lab.prepared import prepare
from lora_lab.trained import open_trained

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
    return run.train(compose.compose(told)).path


@pytest.fixture(scope="module")
def own(done) -> tuple[list[text.Prompt], list[str]]:
    """Conversations, and what the run answers: plain transformers on `merged`, given the run's ids."""
    from transformers import AutoModelForCausalLM

    opened, config = open_trained(str(done), "evaluate", [])
    ready = prepare(config, need_train=config.data.eval is None, trained=opened)
    rows = first_examples(ready.held_out or ready.train, CONVERSATIONS)
    every = text.prompts(ready.encoder, rows)
    hard = [one for one in every if not one.held_out]
    asked = hard + [one for one in every if one.held_out]
    asked = (asked + [_several(ready.encoder, one) for one in asked[len(hard) :]])[:CONVERSATIONS]
    model = AutoModelForCausalLM.from_pretrained(done / "merged", dtype=torch.float32).eval()
    answers = []
    for one in asked:
        ids = torch.tensor([one.ids])
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": text.ends_of(ready.encoder)}
        with torch.no_grad():
            told = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
        answers.append(ready.encoder.tokenizer.decode(told, skip_special_tokens=True))
    return asked, answers


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


def check(own, answers: list[str]) -> None:
    asked, expected = own
    assert len(asked) == CONVERSATIONS
    unequal = [
        (prompt.name, ours, theirs)
        for prompt, ours, theirs in zip(asked, expected, answers, strict=True)
        if ours.strip() != theirs.strip()
    ]
    assert not unequal, f"{len(unequal)} of {len(asked)}: {unequal[:3]}"


def test_llama_cpp_python_answers_as_the_run(done, own, tmp_path):
    [file] = (done / "export/gguf").glob("*.gguf")
    check(own, ask("llama_cpp", tmp_path, own[0], model=str(file)))


def test_vllm_answers_as_the_run(done, own, tmp_path):
    check(own, ask("vllm", tmp_path, own[0], model=str(done / "merged")))


def test_vllm_answers_as_the_run_with_the_adapter(done, own, tmp_path):
    adapter = done / "export/vllm"
    config = json.loads((adapter / "adapter_config.json").read_text())
    tokenizer = str(adapter) if (adapter / "tokenizer.json").exists() else ""
    answers = ask(
        "vllm", tmp_path, own[0], model=config["base_model_name_or_path"], adapter=str(adapter), tokenizer=tokenizer
    )
    check(own, answers)
