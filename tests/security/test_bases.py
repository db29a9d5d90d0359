"""Base folders that somebody else made with ill intent: each is refused or harmless. Watched by an audit hook."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CHATML
from tests.faults.test_base_files import make_gguf

CODE = "open({!r}, 'w').write('run')\nclass X: pass\n"


class Evil:
    """A pickle that runs something."""

    def __reduce__(self):
        return (os.system, ("touch /tmp/lora_lab_was_here",))


def config(**changes) -> Callable[[Path, Path], None]:
    """An entry of the corpus: `config.json` with changes, and a module beside it that they might name."""
    return lambda folder, canary: merged(folder / "config.json", folder, canary, changes)


def tokenizer_config(**changes) -> Callable[[Path, Path], None]:
    return lambda folder, canary: merged(folder / "tokenizer_config.json", folder, canary, changes)


def merged(file: Path, folder: Path, canary: Path, changes: dict) -> None:
    text = json.dumps(changes).replace("CANARY", str(canary))
    file.write_text(json.dumps({**json.loads(file.read_text()), **json.loads(text)}))
    for name in ("modeling_x.py", "x.py", "tokenization_x.py"):
        (folder / name).write_text(CODE.format(str(canary / "was_run")))


def template(text: str) -> Callable[[Path, Path], None]:
    return lambda folder, canary: (
        (folder / "chat_template.jinja").write_text(text.replace("CANARY", str(canary))) and None
    )


def linked(name: str, target: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(canary / target)

    return make


def index(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        (folder / "model.safetensors").unlink()
        tree = {"weight_map": {"lm_head.weight": name.replace("CANARY", str(canary))}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(tree))

    return make


def pickled(*names: str, without: str = "model.safetensors") -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        (folder / without).unlink(missing_ok=True)
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Evil()))

    return make


def adapter(folder: Path, canary: Path) -> None:
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(canary),
        "auto_mapping": {"parent_library": "os", "base_model_class": "system"},
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))


def no_tokenizer_file(**changes) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        (folder / "tokenizer.json").unlink()
        tokenizer_config(**changes)(folder, canary)

    return make


def gguf(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        make_gguf(folder / "x.gguf", folder)
        (folder / "x.gguf").write_bytes(change((folder / "x.gguf").read_bytes()))

    return make


NAMED = [{"name": "default", "template": CHATML}, {"name": "../../canary/written", "template": "x"}]
CORPUS: dict[str, Callable[[Path, Path], object]] = {
    "config auto_map": config(auto_map={"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"}),
    "config auto_map in a list": config(parts=[{"auto_map": {"AutoConfig": "x.X"}}]),
    "config auto_map in a part": config(text_config={"auto_map": {"AutoConfig": "x.X"}}),
    "config remote": config(auto_map={"AutoConfig": "owner/name--x.X"}),
    "config custom type": config(model_type="x", architectures=["X"], auto_map={"AutoConfig": "x.X"}),
    "config architectures": config(architectures=["os.system", "modeling_x.X"]),
    "config attention internal": config(_attn_implementation_internal="owner/name"),
    "config attention kernel": config(attn_implementation="kernels-community/flash-attn"),
    "config attention private": config(_attn_implementation="owner/name@main:f"),
    "config attention native": config(_attn_implementation="flash_attention_2"),
    "config experts kernel": config(experts_implementation="owner/name"),
    "config model type": config(model_type="llama\nimport os"),
    "config nested type": config(vision_config={"model_type": "x\nimport os"}),
    "config trust": config(trust_remote_code=True, auto_map={"AutoConfig": "x.X"}),
    "config other weights": config(transformers_weights="../canary/model.safetensors"),
    "config dtype": config(dtype="load"),
    "config name": config(_name_or_path="CANARY", name_or_path="CANARY"),
    **{f"config quant {name}": config(quantization_config={"quant_method": name, "bits": 4, "modules_to_not_convert": ["x"]}) for name in ("gptq", "awq", "hqq", "torchao", "quanto", "aqlm", "compressed-tensors", "fp8", "mxfp4", "higgs", "bitsandbytes")},
    "index outside": index("../canary/model.safetensors"),
    "index absolute": index("CANARY/model.safetensors"),
    "index pickle": index("pytorch_model.bin"),
    "link weights": linked("model.safetensors", "model.safetensors"),
    "link tokenizer": linked("tokenizer.json", "tokenizer.json"),
    "link config": linked("config.json", "config.json"),
    "link template": linked("chat_template.jinja", "secret"),
    "link generation": linked("generation_config.json", "config.json"),
    "link vocabulary": linked("vocab.txt", "secret"),
    "adapter": adapter,
    "pickled weights": pickled("pytorch_model.bin"),
    "pickle called safetensors": pickled("model.safetensors"),
    "pickles beside": pickled("training_args.bin", "optimizer.pt", "pytorch_model.bin", "tokenizer.pkl", without="nothing"),
    "pickled tokenizer": pickled("tokenizer.json", without="tokenizer.json"),
    "tokenizer auto_map": tokenizer_config(auto_map={"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X"),
    "tokenizer auto_map list": tokenizer_config(auto_map=["tokenization_x.X", None]),
    "tokenizer class": tokenizer_config(tokenizer_class="os.system"),
    "tokenizer class dunder": tokenizer_config(tokenizer_class="__builtins__"),
    "tokenizer vocab_file": tokenizer_config(vocab_file="CANARY/secret", merges_file="CANARY/secret"),
    "tokenizer tokenizer_file": tokenizer_config(tokenizer_file="CANARY/tokenizer.json"),
    "tokenizer map file": tokenizer_config(special_tokens_map_file="CANARY/secret", added_tokens_file="CANARY/secret"),
    "tokenizer versions": tokenizer_config(fast_tokenizer_files=["tokenizer.1.0.0.json/../../canary/tokenizer.json"]),
    "tokenizer gguf": tokenizer_config(gguf_file="../canary/x.gguf"),
    "tokenizer inputs": tokenizer_config(init_inputs=["CANARY/secret"]),
    "tokenizer object": tokenizer_config(tokenizer_object="CANARY/secret", slow_tokenizer="CANARY/secret", from_slow=True),
    "tokenizer name": tokenizer_config(name_or_path="CANARY", _commit_hash="x"),
    "tokenizer only vocab_file": no_tokenizer_file(vocab_file="CANARY/secret", tokenizer_class="LlamaTokenizer"),
    "tokenizer only sentencepiece": no_tokenizer_file(vocab_file="CANARY/tokenizer.model", tokenizer_class="T5Tokenizer"),
    "tokenizer only bert": no_tokenizer_file(vocab_file="CANARY/secret", tokenizer_class="BertTokenizer"),
    "tokenizer only tiktoken": no_tokenizer_file(vocab_file="CANARY/tekken.json", tokenizer_class="PreTrainedTokenizerFast"),
    "tokenizer only japanese": no_tokenizer_file(vocab_file="CANARY/secret", tokenizer_class="BertJapaneseTokenizer", mecab_kwargs={"mecab_dic": "CANARY"}),
    "tokenizer only tapex": no_tokenizer_file(vocab_file="CANARY/secret", tokenizer_class="BartphoTokenizer", monolingual_vocab_file="CANARY/secret"),
    "templates with paths": tokenizer_config(chat_template=NAMED),
    "template attributes": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template globals": template("{{ raise_exception.__globals__['json'].__loader__ }}"),
    "template environment": template("{{ self.__init__.__globals__ }}{{ cycler.__init__.__globals__.os.system('touch CANARY/written') }}"),
    "template namespace": template("{{ lipsum.__globals__['os'].popen('id').read() }}"),
    "template format": template("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}"),
    "template include": template("{% include 'CANARY/secret' %}"),
    "template import": template("{% import 'CANARY/secret' as x %}"),
    "template extends": template("{% extends '../canary/secret' %}"),
    "template dict": template("{{ dict.__base__ }}{{ namespace(__class__=1) }}"),
    "gguf": gguf(lambda content: content),
    "gguf template": gguf(lambda content: content.replace(b"{% for message in messages %}", b"{% include '/etc/passwd' %}  ")),
    "gguf cut": gguf(lambda content: content[:9000]),
}  # fmt: skip


@pytest.fixture(scope="module")
def watched(base, tmp_path_factory) -> dict:
    """What one process did that opened every folder of the corpus."""
    root = tmp_path_factory.mktemp("hostile").resolve()
    corpus, canary = root / "corpus", root / "corpus/canary"
    shutil.copytree(base, canary)
    shutil.copytree(base, corpus / "good")
    for name in ("secret", "tokenizer.model", "tekken.json"):
        (canary / name).write_text("secret\n")
    make_gguf(canary / "x.gguf", base)
    before = {file.name: file.read_bytes() for file in canary.iterdir()}
    for name, make in CORPUS.items():
        folder = shutil.copytree(base, corpus / name)
        make(folder, canary)
    for name in ("out", "cache", "tmp"):
        (root / name).mkdir()
    places = [str(root / name) for name in ("out", "cache", "tmp")]
    environment = {
        **os.environ,
        "LORA_LAB_CACHE": places[1],
        "TMPDIR": places[2],
        "HF_HOME": places[1],
        "HOME": places[1],
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    script = Path(__file__).with_name("audited.py")
    done = subprocess.run(
        [sys.executable, str(script), str(corpus), *places],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    report["canary"] = str(canary)
    report["canary untouched"] = before == {file.name: file.read_bytes() for file in canary.iterdir()}
    return report


def test_nothing_of_a_hostile_folder_is_run_sent_or_written(watched):
    assert {name: one["seen"] for name, one in watched["folders"].items() if one["seen"]} == {}
    assert watched["modules"] == []
    assert watched["control"] == [f"open: {watched['canary']}/secret"]
    assert watched["canary untouched"]
    assert not Path("/tmp/lora_lab_was_here").exists()  # noqa: S108


def test_every_hostile_folder_is_refused_in_a_sentence_or_used_without_harm(watched):
    assert set(watched["folders"]) == {"good", *CORPUS}
    outcomes = {name: one["outcome"] for name, one in watched["folders"].items()}
    assert {name: text for name, text in outcomes.items() if text != "used" and not text.startswith("refused: ")} == {}
    assert outcomes["good"] == outcomes["gguf"] == outcomes["config attention native"] == "used"
    used = {name for name, text in outcomes.items() if text == "used"}
    harmless = ("config name", "config architectures", "config quant", "pickles beside", "tokenizer ", "templates with paths", "template format", "template dict")  # fmt: skip
    assert not [name for name in used - {"good", "gguf", "config attention native"} if not name.startswith(harmless)]
