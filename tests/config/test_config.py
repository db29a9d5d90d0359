"""The schema refuses what is wrong, all of it at once, and says what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lora_lab.config import compose
from lora_lab.config.origins import explain
from lora_lab.config.run import RunConfig, all_keys, parse
from lora_lab.errors import ConfigError
from lora_lab.schema.sections import only_for
from lora_lab.tasks import TASKS

GOOD = {"run_dir": "x", "model": {"path": "m"}, "data": {"train": "t"}}

# override -> what the message must say
REFUSED = [
    ("adapter.rnak=8", ["adapter.rnak=8: unknown key", "Did you mean 'adapter.r'"]),
    ("learning_rate=1e-4", ["learning_rate=0.0001: unknown key"]),
    ("lr=1e-4", ["Did you mean 'optim.lr'"]),
    ("adapter.r=0", ["adapter.r=0: must be an integer, at least 1"]),
    ("adapter.r=-4", ["adapter.r=-4", "at least 1"]),
    ("adapter.r=1.5", ["adapter.r=1.5", "an integer"]),
    ("adapter.r=true", ["adapter.r=true", "an integer"]),
    ("optim.lr=0", ["optim.lr=0", "greater than 0"]),
    ("optim.lr=5.0", ["optim.lr=5.0", "at most 0.1"]),
    ("optim.lr=nan", ["optim.lr"]),
    ("optim.lr=1e-4x", ['optim.lr="1e-4x"', "a number"]),
    ("adapter.lora_alpha=0", ["adapter.lora_alpha=0", "greater than 0"]),
    ("adapter.lora_dropout=1.0", ["adapter.lora_dropout=1.0", "less than 1"]),
    ("data.format=alpacca", ["'alpaca'", "Did you mean 'alpaca'"]),
    ("data.too_long=truncate", ["truncate_prompt"]),
    ("quant.method=nf5", ["Did you mean 'nf4'"]),
    ("model.dtype=bf16", ["Did you mean 'bfloat16'"]),
    ("hardware.device=gpu", ["hardware.device"]),
    ("export.max_shard_size=5gb", ["export.max_shard_size"]),
    ("train._target_=os.system", ["train._target_=os.system", "never names code"]),
    ("name=${nope}", ["nope"]),
    ("name=${oc.env:HF_TOKEN}", ["secret"]),
    ("train.micro_batch_size=16", ["train.micro_batch_size=16", "at most train.batch_size=8"]),
    ("train.early_stopping_patience=2", ["needs held-out rows", "data.eval"]),
    ("task.generate_rows=4", ["needs held-out rows"]),
]


@pytest.mark.parametrize(("override", "says"), REFUSED, ids=[override for override, _ in REFUSED])
def test_refuses(override, says):
    with pytest.raises(ConfigError) as caught:
        compose.compose(["data.train=t.jsonl", override])
    for text in says:
        assert text in str(caught.value)


@pytest.mark.parametrize("setting", ["quant.cache=false", "speed.dequantize=once"])
def test_settings_of_4_bit_weights_alone(setting):
    with pytest.raises(ConfigError, match=rf"{setting}: no effect with quant\.method=none"):
        compose.compose(["data.train=t.jsonl", "quant=none", setting])
    compose.compose(["data.train=t.jsonl", "quant=nf4", setting])


def test_contradictory_quantization():
    with pytest.raises(ConfigError, match=r"quant\.double_quant=true: no effect with quant\.method=int8"):
        compose.compose(["data.train=t.jsonl", "quant=int8", "quant.double_quant=true"])


@pytest.mark.parametrize(("gib", "tokens"), [(8, 2048), (12, 4096), (16, 8192), (24, 16384)])
def test_a_card_has_its_settings(gib, tokens):
    config = compose.compose(["data.train=t.jsonl", f"hardware=gpu_{gib}gb"])
    assert config.hardware.device == "cuda"
    assert config.train.gradient_checkpointing
    assert config.train.micro_batch_tokens == tokens
    assert config.optim.name == ("adamw_8bit" if gib == 8 else "adamw")
    mine = compose.compose(["data.train=t.jsonl", f"hardware=gpu_{gib}gb", "train.micro_batch_tokens=300"])
    assert mine.train.micro_batch_tokens == 300


def test_all_problems_in_one_message():
    with pytest.raises(ConfigError) as caught:
        compose.compose(["adapter.rnak=3", "optim.lr=-1", "train.batch_size=2", "train.micro_batch_size=4"])
    message = str(caught.value)
    assert "4 problems" in message
    for key in ("data.train: must be set", "adapter.rnak", "optim.lr", "train.micro_batch_size"):
        assert key in message


def test_unknown_choice_lists_the_choices():
    with pytest.raises(ConfigError, match=r"recipe=dmeo: no such recipe\. Did you mean 'demo'\? There are: .*demo"):
        compose.compose(["recipe=dmeo"])


@pytest.mark.parametrize("text", ["adapter.r", "=3", "a b=3"])
def test_refuses_what_is_not_an_override(text):
    with pytest.raises(ConfigError, match="not an override"):
        compose.compose(["recipe=demo", text])


@pytest.mark.parametrize(
    "path",
    [
        "/数据/订单.jsonl",
        "été.jsonl",
        "~/x.jsonl",
        "my file (1).jsonl",
        "a=b.jsonl",
        "it's.jsonl",
        "a#b{1}.jsonl",
        r"a\b.jsonl",
    ],
)
def test_paths_of_any_language(path, tmp_path):
    config = compose.compose(["recipe=demo", f"data.train={path}", f"run_dir={path}"])
    assert (config.data.train, config.run_dir) == (path, path)
    (tmp_path / "config.yaml").write_text(compose.to_yaml(config), encoding="utf-8")
    assert compose.load(tmp_path / "config.yaml", [f"data.eval={path}"]).data.eval == path


def test_recipe_overrides_base_and_command_line_overrides_recipe():
    plain, changed = compose.compose(["recipe=demo"]), compose.compose(["recipe=demo", "adapter.r=4", "name=mine"])
    assert (plain.name, plain.adapter.r, plain.quant.method) == ("demo", 16, "nf4")
    assert (changed.name, changed.adapter.r, changed.optim.lr) == ("mine", 4, plain.optim.lr)


def test_every_shipped_choice_composes():
    for group in compose.GROUPS:
        for choice in compose.choices(group):
            extra = {"model": ["model.path=m"], "distillation": ["task.teacher=base"]}.get(
                choice if group == "task" else group, []
            )
            config = compose.compose(["data.train=t.jsonl", f"{group}={choice}", *extra])
            assert config.data.train


def test_user_folder(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/own.yaml").write_text(
        "# @package _global_\nname: own\nadapter: {r: 3}\ndata: {train: a.jsonl}\n"
    )
    config = compose.compose(["recipe=own"], str(tmp_path))
    assert (config.name, config.adapter.r) == ("own", 3)
    with pytest.raises(ConfigError, match="no such folder"):
        compose.compose(["recipe=own"], str(tmp_path / "nowhere"))


def test_a_recipe_cannot_run_code(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/evil.yaml").write_text(
        "# @package _global_\ndata: {train: a.jsonl}\nhydra:\n  callbacks:\n    x: {_target_: os.system, command: id}\n"
    )
    for multirun in (False, True):
        with pytest.raises(
            ConfigError, match=r"hydra\.callbacks\.x\._target_=os\.system: a configuration never names code"
        ):
            compose.compose(["recipe=evil"], str(tmp_path), multirun=multirun)


def test_origins_name_the_file_or_override():
    _, origins = explain(["recipe=demo", "adapter.r=4"])
    assert origins["adapter.r"] == "override adapter.r=4"
    assert origins["adapter.lora_alpha"].endswith("recipe/demo.yaml")
    assert origins["quant.method"].endswith("quant/nf4.yaml")
    assert origins["optim.eps"] == "default"
    others = {key for key, knowing in only_for(RunConfig).items() if not {"causal_lm", "lora"} & {*knowing}}
    assert set(all_keys()) == set(origins) | others


def test_a_key_of_another_variant_has_no_effect():
    with pytest.raises(ConfigError) as error:
        compose.compose(["recipe=demo", "task.stride=32", "task.whole_words=false"])
    assert error.value.problems == [
        "task.stride=32: no effect with task=causal_lm; it is for question_answering. Drop it.",
        "task.whole_words=false: no effect with task=causal_lm; it is for masked_lm. Drop it.",
    ]


def test_what_a_recipe_says_for_another_variant_goes_with_its_choice(capsys):
    config = compose.compose(["recipe=demo", "task=completion"])
    assert config.task == TASKS["completion"]()
    told = capsys.readouterr().out
    assert "task.generate_rows" in told
    assert "without effect" in told


def test_a_configuration_of_version_1_is_read(tmp_path):
    config = compose.compose(["recipe=spam"])
    tree = yaml.safe_load(compose.to_yaml(config))
    tree["schema_version"] = 1
    tree["task"] |= {"stride": 64, "generate_rows": 0, "prefix": ""}  # it wrote the options of all tasks
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert compose.load(tmp_path / "config.yaml") == config
    with pytest.raises(ConfigError, match="task.stride=8: no effect with task=classification"):
        compose.load(tmp_path / "config.yaml", ["task.stride=8"])


def test_an_unknown_variant_is_told_alone():
    with pytest.raises(ConfigError) as error:
        compose.compose(["recipe=demo", "task.name=clasification"])
    assert len(error.value.problems) == 1
    assert "Did you mean 'classification'?" in error.value.problems[0]


def test_saved_configuration_reads_back_equal(tmp_path):
    config = compose.compose(["recipe=demo", "adapter.rank_pattern={q_proj: 8}", "optim.lr=3e-4"])
    (tmp_path / "config.yaml").write_text(compose.to_yaml(config))
    assert compose.load(tmp_path / "config.yaml") == config
    assert compose.load(tmp_path / "config.yaml", ["adapter.r=2"]).adapter.r == 2


def test_newer_configuration_is_refused(tmp_path):
    text = compose.to_yaml(compose.compose(["recipe=demo"])).replace("schema_version: 2", "schema_version: 99")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="schema_version=99"):
        compose.load(tmp_path / "config.yaml")


def test_every_key_has_a_meaning_and_good_values_pass():
    assert all(info.description for info in all_keys().values())
    assert parse(GOOD).adapter.r == 16


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[{pth: a.jsonl}]", "data.train[0].pth: unknown key. Did you mean 'path'?"),
        ("[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: -1}]", "data.train[1].weight=-1: must be a number, greater than 0"),
        ("[{path: a.jsonl, format: alpca}]", "data.train[0].format="),
        ("[{path: a.jsonl, weight: 1}, b.jsonl]", "some sources have a weight and others none"),
    ],
)  # fmt: skip
def test_mistakes_inside_a_list_of_sources(value, says, overrides):
    with pytest.raises(ConfigError) as error:
        compose.compose([*overrides, f"data.train={value}"])
    assert says in str(error.value)


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_every_recipe_is_valid_and_says_what_was_measured(name, tmp_path):
    config = compose.compose([f"recipe={name}", f"run_dir={tmp_path}"])
    assert config.name == name
    assert "hf" in config.export.targets
    header = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("defaults:")[0]
    assert f"lora-lab train recipe={name}" in header
    assert "minutes" in header
    assert "GiB" in header


def test_there_is_a_recipe_for_every_task(tmp_path):
    tasks = {
        compose.compose([f"recipe={file.stem}", f"run_dir={tmp_path}"]).task.name for file in RECIPES.glob("*.yaml")
    }
    assert tasks == set(TASKS)


def test_a_value_of_the_version_before_works_and_is_told(capsys, tmp_path):
    config = compose.compose(["recipe=demo", "sweep.execution=turns"])
    assert config.sweep.execution == "interleaved"
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("sweep.execution=turns is called interleaved now") == 1
    (tmp_path / "config.yaml").write_text(compose.to_yaml(config).replace("interleaved", "joint"))
    assert compose.load(tmp_path / "config.yaml").sweep.execution == "batched"


def test_sources_that_are_written_in_short_stay(config_of, capsys):
    """A source by its path and weight is more than what was typed, and no default."""
    config = config_of("data.train=[{path: a.jsonl, weight: 3}, {path: b.csv, weight: 1}]")
    assert [(one.path, one.weight) for one in config.data.train] == [("a.jsonl", 3), ("b.csv", 1)]
    assert "dropped" not in capsys.readouterr().out
