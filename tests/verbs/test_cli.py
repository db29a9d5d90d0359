"""The command line: light to start, clear when something is wrong, documented exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab import cli
from lora_lab.adapters.methods.lora import LoraAdapter
from lora_lab.base import load
from lora_lab.errors import AdapterError
from tests.conftest import fails, make_base, make_rows, write_jsonl


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in cli.VERBS), ["train", "recipe=nope"]])
def test_starts_without_torch(arguments):
    code = f"""
import sys
from lora_lab.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
heavy = sorted({{'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'numpy'}} & set(sys.modules))
print('heavy:', heavy)
"""
    assert "heavy: []" in run_python(code)


def test_every_verb_helps_with_examples(capsys):
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as done:
            cli.main([verb, "--help"])
        text = capsys.readouterr().out
        assert done.value.code == 0
        assert f"lora-lab {verb}" in text
        assert "exit codes" in text


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("lora-lab ", "train"),
        ("lora-lab ev", "evaluate"),
        ("lora-lab train recipe=de", "recipe=demo"),
        ("lora-lab train quant=", "quant=nf4"),
        ("lora-lab train adapter.lora_al", "adapter.lora_alpha="),
        ("lora-lab config optim.sch", "optim.schedule="),
    ],
)
def test_tab_completion(line, offers, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    assert cli.main(["-sc", "query=bash"]) == 0
    assert offers in capsys.readouterr().out.split()


def test_config_shows_values_and_origins(capsys):
    assert cli.main(["config", "recipe=demo", "adapter.r=4"]) == 0
    text = capsys.readouterr().out
    assert "# override adapter.r=4" in text
    assert cli.main(["config", "--keys"]) == 0
    assert "train.batch_size=8" in capsys.readouterr().out


def test_debug_shows_the_stack_trace(capsys):
    assert cli.main(["train", "recipe=nope", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unknown_option_and_missing_run(capsys):
    assert "run: must be set" in fails(["merge"], capsys)
    assert "no run there" in fails(["evaluate", "run=/nowhere"], capsys)
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "--rank", "3"])
    assert done.value.code == 2


def test_missing_files_suggest_what_is_there(overrides, rows_file, capsys):
    message = fails(["train", *overrides, f"data.train={rows_file.with_name('trian.jsonl')}"], capsys)
    assert f"Did you mean '{rows_file}'?" in message
    assert "package 'no_such_package' is not installed" in fails(
        ["train", *overrides, "data.train=package:no_such_package/x.jsonl"], capsys
    )
    assert "no 'x.jsonl' in the package 'lora_lab'" in fails(
        ["train", *overrides, "data.train=package:lora_lab/x.jsonl"], capsys
    )
    assert "the hub request failed" in fails(["train", *overrides, "model.path=nobody/nothing"], capsys)


def test_named_format_with_missing_column(overrides, capsys):
    message = fails(["train", *overrides, "data.format=alpaca"], capsys)
    assert "needs column 'instruction', and the file has prompt, completion" in message


def test_target_modules_as_one_text(base):
    """A plain name is a name ending, as in a list; anything else is a regular expression for whole names, as in peft."""
    model = load.skeleton(base, load.ModelKind())

    def found(names):
        return LoraAdapter(target_modules=names).targets(model)

    ending = [f"model.layers.{number}.self_attn.q_proj" for number in range(4)]
    for names in ("q_proj", "self_attn.q_proj", ["self_attn.q_proj"], r".*\.q_proj", "model.layers...self_attn.q_proj"):
        assert found(names) == ending
    assert found(ending[1]) == found("1.self_attn.q_proj") == [ending[1]]
    with pytest.raises(AdapterError, match=r"self_attn.qproj matches no linear layer\."):
        found("self_attn.qproj")
    with pytest.raises(
        AdapterError, match=r"regular expression for whole names, such as 'model.layers.0.*a list, such as"
    ):
        found("q_proj|v_proj")


def test_target_modules_that_match_nothing(overrides, capsys):
    message = fails(["train", *overrides, "adapter.target_modules=[q_proj,kproj]"], capsys)
    assert "kproj matches no linear layer. Did you mean 'k_proj'?" in message
    assert "no layer is left" in fails(["train", *overrides, "adapter.layers_to_transform=[]"], capsys)
    assert "the model's layers are 0 to 3" in fails(["train", *overrides, "adapter.layers_to_transform=[9]"], capsys)
    for setting in (
        "adapter.rank_pattern={v_proj: 8}",
        "adapter.alpha_pattern={v_proj: 8}",
        "adapter.exclude_modules=[v_proj]",
    ):
        message = fails(["train", *overrides, "adapter.target_modules=[q_proj]", setting], capsys)
        assert "v_proj matches no linear layer" in message  # it exists, but is not adapted: no effect
        assert "Adapted are: q_proj" in message


@pytest.mark.long
def test_a_rank_above_a_layer_is_said_with_numbers(overrides, capsys):
    assert cli.main(["plan", *overrides, "adapter.r=64"]) == 0
    assert (
        "adapter.r=64 is above the smaller side of 8 layers (model.layers.0.self_attn.k_proj: 32)"
        in capsys.readouterr().out
    )
    assert cli.main(["plan", *overrides, "adapter.r=32"]) == 0
    assert "is above the smaller side" not in capsys.readouterr().out


def test_tied_head_is_refused(overrides, tied_base, capsys):
    message = fails(["train", *overrides, f"model.path={tied_base}", "adapter.target_modules=[lm_head]"], capsys)
    assert "shares its weights with the input embeddings" in message


def test_existing_run_folder_is_untouched(overrides, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/precious.txt").write_text("mine")
    assert "exists and is not empty" in fails(["train", *overrides], capsys)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_a_run_that_is_there_says_how_far_it_is(overrides, tmp_path, capsys):
    for step in (9, 10):
        (tmp_path / f"run/checkpoints/step-{step}").mkdir(parents=True)
    message = fails(["train", *overrides], capsys)
    assert f"resume it (step 10 is saved): lora-lab resume run={tmp_path}/run" in message
    (tmp_path / "run/result.json").touch()
    assert "resume it (it is finished)" in fails(["train", *overrides], capsys)


def test_folders_that_cannot_be_written(overrides, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "a file of that name exists" in fails(["train", *overrides, f"run_dir={tmp_path}/file"], capsys)
    assert "cannot be made" in fails(["train", *overrides, "train.max_steps=1", "run_dir=/proc/lora_lab"], capsys)


def test_damaged_base_is_refused(overrides, base, tmp_path, capsys):
    import shutil

    def copy(name: str) -> Path:
        return Path(shutil.copytree(base, tmp_path / name))

    cut = copy("cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in fails(["train", *overrides, f"model.path={cut}"], capsys)

    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "a pickle" in fails(["train", *overrides, f"model.path={pickled}"], capsys)

    code = copy("code")
    config = json.loads((code / "config.json").read_text())
    (code / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    assert "names code to run" in fails(["train", *overrides, f"model.path={code}"], capsys)

    outside = copy("outside")
    (outside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert "outside the folder" in fails(["train", *overrides, f"model.path={outside}"], capsys)

    partial = copy("partial")
    config = json.loads((partial / "config.json").read_text())
    (partial / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    assert "would fill them with random numbers" in fails(["train", *overrides, f"model.path={partial}"], capsys)

    (partial / "config.json").write_text(json.dumps({**config, "model_type": "tomorrows_model"}))
    assert "cannot build a causal language model" in fails(["train", *overrides, f"model.path={partial}"], capsys)

    assert "no config.json" in fails(["train", *overrides, f"model.path={tmp_path}"], capsys)


def test_a_base_with_numbers_that_are_none_is_refused_before_training(overrides, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    weights = make_base(tmp_path / "broken") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    capsys.readouterr()
    message = fails(["train", *overrides, f"model.path={tmp_path}/broken"], capsys)
    assert "The model's outputs are not finite" in message
    assert "Copy the base again" in message
    assert not (tmp_path / "run").exists()


def test_adapter_on_another_base_is_refused(overrides, tmp_path, capsys, eval_file):
    assert cli.main(["train", *overrides, "train.max_steps=1"]) == 0
    other = make_base(tmp_path / "other", seed=5)
    capsys.readouterr()
    for verb in ("evaluate", "merge", "chat"):
        rows = [] if verb == "chat" else [f"data.eval={eval_file}"]
        message = fails([verb, f"run={tmp_path}/run", f"model.path={other}", *rows], capsys)
        assert "Name the base that it was trained on" in message


def test_damaged_adapter_is_refused(overrides, tmp_path, capsys):
    assert cli.main(["train", *overrides, "train.max_steps=1"]) == 0
    weights = tmp_path / "run/adapter/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert "SHA-256 differs" in fails(["merge", f"run={tmp_path}/run"], capsys)


def test_sweep_runs_each_point_and_lists_failures(overrides, tmp_path, capsys):
    points = [text for text in overrides if not text.startswith("run_dir=")]
    long_row = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "red " * 400, "completion": "b"}, *make_rows(3)])
    sweep = [
        f"hydra.sweep.dir={tmp_path}/sweep",
        "train.max_steps=1",
        "data.max_tokens=64,1024",
        f"data.train={long_row}",
    ]
    assert cli.main(["train", "-m", *points, *sweep]) == 2
    captured = capsys.readouterr()
    assert "long.jsonl row 1" in captured.err
    assert "1 of its runs failed" in captured.out
    assert (tmp_path / "sweep/1/result.json").exists()
    assert not (tmp_path / "sweep/0/result.json").exists()
