"""A trained run is what its folder says: nothing else can be said of it, and what was edited or exchanged is noticed."""

from __future__ import annotations

import json
import shutil

import pytest

from lora_lab import cli
from lora_lab.adapters import files
from lora_lab.base import fingerprint
from lora_lab.config import compose
from lora_lab.config.origins import as_override
from lora_lab.config.run import RunConfig, all_keys
from lora_lab.errors import AdapterError, ConfigError, RunError
from lora_lab.run import pipeline, run_dir, takes, trained
from lora_lab.run.prepared import prepare
from lora_lab.run.run_dir import RunDir
from lora_lab.runtime import storage
from lora_lab.schema.sections import only_for
from lora_lab.verbs import VERBS
from tests.conftest import fails, make_base, make_rows, write_jsonl

TAKES = {name: verb.takes for name, verb in VERBS.items() if verb.takes is not None}  # verbs on a trained run


@pytest.fixture(scope="module")
def own_base(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("models") / "own", seed=3)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "transformers_version": "5"}')
    return folder


@pytest.fixture(scope="module")
def done(own_base, rows_file, eval_file, tmp_path_factory) -> RunDir:
    """A finished run on a base of its own."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    told = [
        "model=hub", f"model.path={own_base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={rows_file}", f"data.eval={eval_file}", "optim.lr=0.01", "adapter.r=4", "train.batch_size=4",
        "train.max_steps=3", "train.save_steps=2", "train.eval_steps=3", f"run_dir={folder}",
    ]  # fmt: skip
    return pipeline.train(compose.compose(told))


@pytest.fixture
def copied(done, tmp_path) -> RunDir:
    shutil.copytree(done.path, tmp_path / "copied")
    return RunDir(tmp_path / "copied")


def reseal(folder, name, change) -> None:
    """Edit a JSON file in a sealed folder as somebody would who also mends its checksums."""
    tree = json.loads((folder / name).read_text())
    change(tree)
    with storage.new_folder(folder) as temporary:
        for file in folder.iterdir():
            if file.name not in (name, storage.MANIFEST):
                shutil.copy(file, temporary)
        (temporary / name).write_text(json.dumps(tree))


# -- what may be said ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb", [one if one == "evaluate" else pytest.param(one, marks=pytest.mark.long) for one in TAKES]
)
def test_each_key_belongs_to_the_verb_or_is_refused_by_name(done, verb):
    """Of each key its own value is said again, so that nothing contradicts it."""
    own, belongs = dict(compose.leaves(_tree(done))), trained.keys_of(TAKES[verb])
    assert len(all_keys()) >= 138
    for key in all_keys():
        override = f"{key}={as_override(own[key])}" if key in own else f"{key}=null"
        foreign = key in only_for(RunConfig) and key not in own  # another task's
        if key in belongs and not foreign:
            trained.open_trained(str(done.path), TAKES[verb], [override])
            continue
        with pytest.raises(ConfigError) as refused:
            trained.open_trained(str(done.path), TAKES[verb], [override])
        assert str(refused.value).startswith(f"{key}="), key
        assert f"no effect {'with' if foreign and key in belongs else 'on a trained run'}" in str(
            refused.value
        ) or "resume takes no overrides" in str(refused.value)


def _tree(done):
    import dataclasses

    return dataclasses.asdict(compose.load(done.config))


@pytest.mark.parametrize(
    ("verb", "override"),
    [
        ("evaluate", "adapter.lora_alpha=1"),
        ("evaluate", "adapter.use_rslora=true"),
        ("evaluate", "adapter=dora"),
        ("evaluate", "optim.lr=0.09"),
        ("evaluate", "run_dir=/nowhere"),
        ("evaluate", "quant=nf4"),
        ("evaluate", "data.supervise=all"),
        ("evaluate", "++adapter.lora_alpha=1"),
        ("evaluate", "adapter={r: 2}"),
        ("chat", "adapter.lora_alpha=1"),
        ("merge", "adapter.lora_alpha=1"),
        ("export", "adapter.r=2"),
        ("shrink", "task=completion"),
        ("resume", "adapter.lora_alpha=1"),
    ],
)
def test_another_model_cannot_be_said(done, verb, override, capsys):
    before = sorted(file.name for file in done.path.iterdir())
    assert cli.main([verb, f"run={done.path}", override]) == 2
    assert override.partition("=")[0] in capsys.readouterr().err
    assert sorted(file.name for file in done.path.iterdir()) == before


def test_groups_count_by_what_they_change(done):
    run_, config = trained.open_trained(str(done.path), takes.EVALUATE, ["hardware=cpu", "speed=plain", "adapter=lora"])
    assert not config.speed.fused_mlp
    with pytest.raises(ConfigError, match="export=gguf: no effect on a trained run"):
        trained.open_trained(str(run_.path), takes.EVALUATE, ["export=gguf"])


def test_an_unknown_key_is_told_with_the_nearest_one(done):
    with pytest.raises(ConfigError, match=r"data\.evl.*unknown key.*Did you mean 'data\.eval'"):
        trained.open_trained(str(done.path), takes.EVALUATE, ["data.evl=x"])


def test_named_rows_take_the_place_of_the_share_that_was_held_out(config_of, eval_file, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{**row, "kind": "ab"[n % 2]} for n, row in enumerate(make_rows(20))])
    done = pipeline.train(
        config_of(f"data.train={rows}", "data.eval_ratio=0.2", "data.stratify=kind", "train.max_steps=1")
    )
    for more in ([], ["data.eval_ratio=null"], ["data.eval_ratio=null", "data.stratify=null"]):
        _, config = trained.open_trained(str(done.path), takes.EVALUATE, [f"data.eval={eval_file}", *more])
        assert (config.data.eval, config.data.eval_ratio, config.data.stratify) == (str(eval_file), None, None)
    for more in ([f"data.eval={eval_file}", "data.eval_ratio=0.5"], ["data.eval_ratio=null"]):
        with pytest.raises(ConfigError, match=r"data.eval_ratio=.*no effect on a trained run"):
            trained.open_trained(str(done.path), takes.EVALUATE, more)


# -- what was recorded --------------------------------------------------------------------------------------------------


def test_an_edited_configuration_is_refused_with_both_values(copied):
    text = copied.config.read_text()
    copied.config.write_text(text.replace("lora_dropout: 0.0", "lora_dropout: 0.8").replace("lr: 0.01", "lr: 0.02"))
    for taken in (*TAKES.values(), takes.COMBINE):
        with pytest.raises(RunError, match=r"adapter\.lora_dropout is 0\.8 and was 0\.0; optim\.lr is 0\.02 and was"):
            trained.open_trained(str(copied.path), taken, [])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("adapter_config.json", lambda tree: tree.update(lora_alpha=1), "lora_alpha=1, and the run says 32"),
        (
            "lora_lab.json",
            lambda tree: tree["base"].update(method="nf4"),
            "trained with quant.method=nf4, and the run says none",
        ),
    ],
    ids=["settings", "quantization"],
)
def test_an_edited_adapter_is_refused_even_with_new_checksums(name, change, said, copied, capsys):
    reseal(copied.adapter, name, change)
    for verb in ("evaluate", "merge", "shrink", "chat"):
        assert said in fails([verb, f"run={copied.path}"], capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"made_up": 1}, "'made_up' is nothing that peft"),
        ({"auto_mapping": {"parent_library": "os"}}, "'auto_mapping' is nothing"),
        ({"peft_type": "NONE"}, "peft_type=NONE: lora_lab does not train it. There are: .*LORA"),
    ],
)
def test_adapter_settings_name_nothing_to_import(copied, change, said):
    reseal(copied.adapter, "adapter_config.json", lambda tree: tree.update(change))
    with pytest.raises(AdapterError, match=said):
        files.settings(copied.adapter)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("chat_template.jinja", lambda text: text.replace("<|im_end|>", "<|im_end|> "), "chat template"),
        ("tokenizer.json", lambda text: text.replace('"ignore_merges": false', '"ignore_merges": true'), "tokenizer"),
        ("generation_config.json", lambda text: text.replace("2", "1"), "generation config"),
    ],
)
def test_what_goes_with_the_weights_is_compared(done, own_base, copied, file, change, named, capsys):
    path = own_base / file
    text = path.read_text(encoding="utf-8")
    assert change(text) != text
    copied.result.unlink()
    shutil.rmtree(copied.adapter)
    path.write_text(change(text), encoding="utf-8")
    try:
        for verb in ("evaluate", "merge", "shrink"):
            assert cli.main([verb, f"run={done.path}"]) == 2
            assert f"the {named} in {own_base} changed since" in capsys.readouterr().err
        assert cli.main(["resume", f"run={copied.path}"]) == 2
        assert f"has another {named} than at the start" in capsys.readouterr().err
    finally:
        path.write_text(text, encoding="utf-8")


def test_notes_about_copies_do_not_count(own_base, done):
    file = own_base / "generation_config.json"
    text = file.read_text()
    file.write_text(text.replace('"5"', '"6"'))
    try:
        assert prepare(compose.load(done.config), trained=done).base.folder == own_base
    finally:
        file.write_text(text)


def test_other_versions_are_told(copied, capsys):
    manifest = json.loads(copied.manifest.read_text())
    manifest["versions"]["torch"] = "1.0"
    copied.manifest.write_text(json.dumps(manifest))
    prepare(compose.load(copied.config), trained=copied)
    assert "torch 1.0 then, " in capsys.readouterr().out


def test_without_its_manifest_a_begun_run_is_refused(copied):
    copied.manifest.unlink()
    with pytest.raises(RunError, match=r"manifest\.json: missing, so it is unknown what the run was made of"):
        run_dir.read_manifest(copied)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"base": 3}', '{"base": {}, "data": {"x": 1}, "versions": {}}'])
def test_a_damaged_manifest_is_a_sentence(copied, content):
    copied.manifest.write_text(content)
    with pytest.raises(RunError, match=r"manifest\.json"):
        run_dir.read_manifest(copied)


def test_runs_of_earlier_versions_go_on(copied, capsys):
    """Those recorded neither the configuration nor what goes with the weights."""
    manifest = json.loads(copied.manifest.read_text())
    del manifest["config"], manifest["base"]["companions"]
    copied.manifest.write_text(json.dumps(manifest))
    reseal(copied.adapter, "lora_lab.json", lambda tree: tree["base"].pop("companions"))
    assert cli.main(["evaluate", f"run={copied.path}"]) == 0


def test_a_damaged_note_of_a_checksum_is_made_again(own_base):
    file = own_base / "model.safetensors"
    right = fingerprint.remembered_sha256(file)
    notes = list((fingerprint.cache_dir() / "sha256").iterdir())
    before = {note: note.read_text() for note in notes}
    for note in notes:
        note.write_text(note.read_text().replace(right[:8], "00000000"))
    assert fingerprint.remembered_sha256(file) == right == storage.sha256(file)
    assert {note: note.read_text() for note in notes if right in before[note]} == {
        note: text for note, text in before.items() if right in text
    }


# -- what a folder cannot start -----------------------------------------------------------------------------------------


def test_no_upload_starts_because_a_folder_says_so(done, tmp_path, capsys):
    config = compose.load(done.config, ["export.push_to_hub=somebody/model", "tracker.name=wandb"])
    quiet = trained.without_uploads(config)
    assert (quiet.export.push_to_hub, quiet.tracker.name) == (None, "none")
    said = trained.without_uploads(config, ["export.push_to_hub", "tracker"])
    assert (said.export.push_to_hub, said.tracker.name) == ("somebody/model", "wandb")
    (tmp_path / "config.yaml").write_text(compose.to_yaml(config))
    trained.tell_uploads(RunDir(tmp_path), quiet)
    told = capsys.readouterr().out
    assert "export.push_to_hub=somebody/model" in told
    assert f"lora-lab resume run={tmp_path} tracker=wandb" in told


def test_a_recipe_starts_no_upload(overrides, tmp_path, capsys):
    (tmp_path / "mine/recipe").mkdir(parents=True)
    (tmp_path / "mine/recipe/own.yaml").write_text("# @package _global_\nexport:\n  push_to_hub: somebody/model\n")
    assert cli.main(["train", "--config-dir", f"{tmp_path}/mine", "recipe=own", *overrides]) == 2
    assert "export.push_to_hub=somebody/model: a recipe starts no upload" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["evaluate", "merge", "data"])
def test_several_processes_are_refused(verb, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main([verb, "recipe=demo"]) == 2
    assert f"WORLD_SIZE=2: lora-lab {verb} works in one process" in capsys.readouterr().err


# -- runs that are not whole ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", '{"steps": "three"}'])
def test_a_damaged_result_is_made_again(copied, content, capsys):
    before = json.loads(copied.result.read_text())
    copied.result.write_text(content)
    assert cli.main(["resume", f"run={copied.path}"]) == 0
    assert "result.json" in capsys.readouterr().out
    again = json.loads(copied.result.read_text())
    assert again["tuned"] == before["tuned"]
    assert again["steps"] == before["steps"]


def test_a_run_that_was_to_be_made_of_others_is_not_trained(copied, capsys):
    manifest = json.loads(copied.manifest.read_text())
    copied.manifest.write_text(json.dumps({**manifest, "made_of": {"method": "cat", "adapters": []}}))
    copied.result.unlink()
    assert cli.main(["resume", f"run={copied.path}"]) == 2
    assert "was to be made of other runs' adapters" in capsys.readouterr().err


def test_an_edited_member_of_a_sweep_is_left_out(overrides, eval_file, tmp_path, capsys):
    told = [text for text in overrides if not text.startswith("run_dir=")]
    folder = tmp_path / "sweep"
    command = [
        "train",
        "-m",
        *told,
        f"data.eval={eval_file}",
        "train.max_steps=1",
        "seed=1,2",
        f"hydra.sweep.dir={folder}",
    ]
    assert cli.main(command) == 0
    file = folder / "1" / "config.yaml"
    file.write_text(file.read_text().replace("seed: 2", "seed: 3"))
    assert cli.main(["resume", f"sweep={folder}"]) == 2
    assert "seed is 3 and was 2" in capsys.readouterr().err
