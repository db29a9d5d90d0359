"""Small real modules to test on: a tiny Llama with a real tokenizer, made once, offline."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import submitit  # noqa: F401  (configures logging, which closes the stream that absl's handler found: while a test captures that is pytest's own)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and `make test` runs two processes
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "red green blue one two three cat dog bird table lamp Graz Oslo 你好 世界 é ñ".split()


def pytest_runtest_setup(item):
    """A test of what a card computes needs one."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA card here")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Nothing in the tests may leave the machine."""

    def refuse(self, address):
        raise AssertionError(f"a test tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def _signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


_frozen = []


@pytest.fixture(autouse=True)
def _libraries_stay():
    """Whenever a model is let go, Python looks through all objects for circles, most of which are the libraries': a third of a second, a
    thousand times. After the first test that loaded them they are left out of that."""
    yield
    if not _frozen and "lora_lab.run.pipeline" in sys.modules:
        gc.collect()
        gc.freeze()
        _frozen.append(True)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A cache of the tests' own, so that nothing depends on what the user has."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LORA_LAB_CACHE"] = str(folder)
    return folder


def make_tokenizer(
    folder: Path,
    chat_template: str | None = CHATML,
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    added: tuple[str, ...] = (),
    bos_token: str | None = "<|im_start|>",
    eos_token: str = "<|im_end|>",
    corpus: str = " ".join(WORDS),
):
    """A byte-level BPE tokenizer of about 300 tokens, saved in `folder`; `added` tokens are whole but not special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([corpus] * 20, trainer)
    core.add_tokens(list(added))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos_token, eos_token=eos_token, unk_token=special[0]
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_base(folder: Path, seed: int = 0, tied: bool = False, chat_template: str | None = CHATML, **config) -> Path:
    """A random Llama of 4 layers in float32 with the tokenizer above."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder, chat_template)
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tied", tied=True)


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and completions of unequal length."""
    import random

    draw = random.Random(seed)
    return [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(2, 14))),
            "completion": " ".join(draw.choices(WORDS, k=draw.randint(1, 8))),
        }
        for _ in range(count)
    ]


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", make_rows(20))


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "eval.jsonl", make_rows(6, seed=1))


def fails(arguments: list[str], capsys, code: int = 2) -> str:
    """The message of a command that must fail as a user mistake: one paragraph, no stack trace."""
    from lora_lab import cli

    assert cli.main(arguments) == code
    message = capsys.readouterr().err
    assert message.startswith("lora-lab: ")
    assert "Traceback" not in message
    return message


@pytest.fixture
def overrides(base, rows_file, tmp_path) -> list[str]:
    """A small float32 run on the CPU; later overrides of the same key win."""
    return [
        "model=hub",
        f"model.path={base}",
        "model.dtype=float32",
        "quant=none",
        "tracker=none",
        "hardware=cpu",
        f"data.train={rows_file}",
        "optim.lr=0.01",
        "adapter.r=4",
        "train.batch_size=4",
        f"run_dir={tmp_path}/run",
    ]


@pytest.fixture
def config_of(overrides):
    """Compose a RunConfig: `config_of('adapter.r=2', ...)`."""
    from lora_lab.config import compose

    return lambda *more: compose.compose([*overrides, *more])


@pytest.fixture
def reload_here(monkeypatch):
    """Checkpoints are reloaded in this process, to be quick; other scripts still get their own."""
    from lora_lab.runtime import children
    from lora_lab.verify import reload, reload_sentences

    run = children.run

    def here(command, **options):
        script = Path(command[2]).name if command[2:3] else ""
        if script not in ("reload.py", "reload_sentences.py"):
            return run(command, **options)
        (reload if script == "reload.py" else reload_sentences).main(*command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(children, "run", here)
