"""A base that was published in few bits: trained on as it is and merged by dequantizing it, or refused before anything is loaded."""

from __future__ import annotations

import json

import pytest
import torch

from lora_lab import cli
from lora_lab.run import pipeline
from tests.conftest import make_base, write_jsonl

_FORMS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["lm_head", "layers.0"]},
    "int8": {"load_in_8bit": True},
}


def publish(source, folder, how, kind="AutoModelForCausalLM"):
    """Save a base as people publish it in few bits."""
    import transformers

    own = transformers.BitsAndBytesConfig(**how)
    model = getattr(transformers, kind).from_pretrained(source, quantization_config=own, device_map={"": "cpu"})
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("form", ["nf4", *(pytest.param(f, marks=pytest.mark.long) for f in _FORMS if f != "nf4")])
def test_it_is_trained_on_as_it_is_and_merged(form, base, config_of, tmp_path, eval_file, capsys):
    """As a base that is quantized while loading: the same losses, and a merge of what training saw."""
    method = form.partition(" ")[0]
    folder = publish(base, tmp_path / "published", _FORMS[form])
    told = [f"data.eval={eval_file}", "train.max_steps=3", "export=merged", "export.dtype=float32"]
    done = pipeline.train(config_of(*told, f"model.path={folder}"))
    assert f"quant {method} as published" in capsys.readouterr().out
    result = json.loads(done.result.read_text())
    assert result["merge"]["refused"] == []
    assert result["merge"]["base"] == "dequantized"
    assert result["merge"]["trained_on"] == method
    if method != "int8":  # which multiplies in integers what the merge multiplies in float32
        assert result["merge"]["merged_vs_model_as_trained"]["max_logit_diff"] < 1e-3
    recorded = json.loads((done.adapter / "lora_lab.json").read_text())["base"]
    assert (recorded["method"], recorded["published_in"]) == (method, method)
    assert json.loads((done.path / "manifest.json").read_text())["base"]["published_in"] == method
    assert cli.main(["evaluate", f"run={done.path}"]) == 0
    evaluated = json.loads((done.path / "evaluation.json").read_text())["tuned"]["loss"]
    assert evaluated == pytest.approx(result["tuned"]["loss"], rel=1e-6)
    if form == "nf4":
        here = pipeline.train(config_of(*told, "quant=nf4", "quant.double_quant=false", f"run_dir={tmp_path}/here"))
        own = json.loads(here.result.read_text())
        assert own["tuned"]["loss"] == pytest.approx(result["tuned"]["loss"], rel=1e-6)


@pytest.mark.usefixtures("reload_here")
def test_a_head_of_its_own_is_trained_whole(base, config_of, tmp_path):
    folder = publish(base, tmp_path / "published", _FORMS["nf4"])
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": f"cat {i}", "label": ["red", "blue"][i % 2]} for i in range(12)]
    )
    told = ["task=classification", f"data.train={rows}", "data.eval_ratio=0.3", "train.max_steps=2", "export=merged"]
    done = pipeline.train(config_of(*told, f"model.path={folder}", "export.dtype=float32"))
    assert json.loads(done.result.read_text())["merge"]["refused"] == []


@pytest.mark.long
def test_the_adapter_alone_is_proved_on_it(config_of, tmp_path, eval_file):
    """Plain peft puts it on the published base, which some CPUs compute in bfloat16."""
    base = make_base(tmp_path / "base", initializer_range=0.05)
    folder = publish(base, tmp_path / "published", _FORMS["nf4"])
    told = [f"data.eval={eval_file}", "train.max_steps=1", "export.targets=[adapter]", "export.dtype=float32"]
    done = pipeline.train(config_of(*told, f"model.path={folder}"))
    assert json.loads((done.path / "export_report.json").read_text())["adapter"]["kl"] < 1e-3


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("quant=int8", "quant.method=int8: "),
        ("quant=fp4", "quant.method=fp4: "),
        ("merge.base=full_precision", "its unquantized weights are not there"),
        ("merge.base=corrected", "its unquantized weights are not there"),
    ],
)
def test_what_it_cannot_follow_is_refused_before_training(told, says, base, overrides, tmp_path, capsys):
    folder = publish(base, tmp_path / "published", _FORMS["nf4"])
    given = [*overrides, f"model.path={folder}", told, *(["quant=nf4"] if told.startswith("merge") else [])]
    assert cli.main(["train", *given]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "repository of the unquantized model" in said
    assert not (tmp_path / "run").exists()


def test_gguf_lora_is_refused_on_it(base, overrides, tmp_path, capsys):
    folder = publish(base, tmp_path / "published", _FORMS["nf4"])
    assert cli.main(["train", *overrides, f"model.path={folder}", "export.targets=[gguf_lora]"]) == 2
    assert "gguf_lora: the base was published in nf4" in capsys.readouterr().err


_OTHERS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": []},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "hqq": {"quant_config": {"weight_quant_params": {"nbits": 4}}, "quant_method": "hqq"},
    "an unnamed method": {"bits": 4},
}


@pytest.mark.parametrize("method", _OTHERS)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_other_methods_are_refused_by_name(method, verb, overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lora_lab.base.load.load_model", lambda *_: pytest.fail("weights were loaded"))
    folder = make_base(tmp_path / "base", num_hidden_layers=1)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": _OTHERS[method]}))
    assert cli.main([verb, *overrides, f"model.path={folder}"]) == 2
    said = capsys.readouterr().err
    assert f"({method})" in said
    assert "repository of the unquantized model" in said
    assert not (tmp_path / "run").exists()


def packed(folder, method):
    """Give a folder weights as such a method packs them."""
    from safetensors.torch import load_file, save_file

    found = {}
    for name, one in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            found[name] = one
        elif method == "fp8":
            found |= {name: one.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
        else:
            rows, columns, stem = *one.shape, name.removesuffix("weight")
            integers = torch.zeros(columns // 8, rows, dtype=torch.int32)
            found |= {
                f"{stem}qweight": integers,
                f"{stem}qzeros": integers[:1].clone(),
                f"{stem}scales": torch.ones(1, rows).half(),
            }
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "torchao", "hqq"])
def test_the_reason_and_the_nearest_way_are_told(method, overrides, tmp_path, capsys):
    folder = make_base(tmp_path / "base", num_hidden_layers=1)
    packed(folder, method)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": _OTHERS[method]}))
    assert cli.main(["plan", *overrides, f"model.path={folder}"]) == 2
    said = capsys.readouterr().err
    assert "nor merges, because " in said
    assert ("quant=torchao_int8" if method == "torchao" else "quant=nf4") in said


@pytest.mark.parametrize(
    ("file", "tree", "says"),
    [
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "(fp8)"),
        ("config.json", {"compression_config": {"format": "int-quantized"}}, "(compressed-tensors)"),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "names no kind"),
        ("config.json", {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "x"}}, "names no kind"),
        ("config.json", {"quantization_config": [4]}, "must be an object"),
        ("quantize_config.json", {"bits": 4}, "(gptq)"),
        ("quant_config.json", {"w_bit": 4}, "(awq)"),
    ],
)
def test_wherever_it_stands(file, tree, says, tmp_path):
    from lora_lab.base import published
    from lora_lab.errors import BaseModelError

    own = json.dumps({"model_type": "llama"} | (tree if file == "config.json" else {}))
    (tmp_path / "config.json").write_text(own)
    if file != "config.json":
        (tmp_path / file).write_text(json.dumps(tree))
    with pytest.raises(BaseModelError) as error:
        published.read(tmp_path)
    assert says in str(error.value)
