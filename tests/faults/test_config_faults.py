"""Whatever is wrong with a recipe or an override is one sentence that names key or file, and nothing is left behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from lora_lab.config import compose, hydra_app
from lora_lab.config.origins import explain
from lora_lab.config.run import RunConfig, all_keys
from lora_lab.errors import ConfigError, LoraLabError
from lora_lab.schema.sections import only_for

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
_HEAD = "# @package _global_\ndata: {train: a.jsonl}\n"
_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))

# kind of a file -> its bytes, and what the refusal says after the file's name
BROKEN = {
    "indent": (b"name: a\n b: 2\n", ", line 2, column 3: not valid YAML"),
    "tab": (b"name:\ta: b\n", ", line 1, column"),
    "colons": (b"a: b: c\n", ", line 1, column 5"),
    "percent": (b"name: %x\n", ", line 1, column 7"),
    "twice": (b"name: a\nname: b\n", ", line 2, column 1: the key 'name' appears twice"),
    "twice_inside": (b"optim: {lr: 0.1, lr: 0.2}\n", ", line 1, column 18: the key 'lr' appears twice"),
    "latin1": ("name: é\n".encode("latin-1"), ": byte 6 is not UTF-8"),
    "utf16": ("name: a\n".encode("utf-16"), ": byte 0 is not UTF-8"),
    "nul": (b"name: a\0\n", ": not valid YAML"),
    "deep": (b"[" * 1200 + b"]" * 1200, ": nested deeper than 100 levels"),
    "deep_mapping": (b"{a: " * 200 + b"1" + b"}" * 200, ", line 1, column"),
    "tag": (b"name: !!python/name:os.system\n", ", line 1, column 7"),
    "bomb": (_BOMB.encode(), "more than 100,000 values"),
    "self": (b"a: &a [*a]\n", "an alias of something that contains it"),
    "many": (b"a: [" + b"1," * 11_000 + b"]\n", ": more than 10,000 values"),
    "large": (b"#" * (2**17 + 1), ": larger than 128 KiB"),
    "list": (b"[name]\n", ": must hold key: value lines, not a list"),
    "text": (b"name\n", ": must hold key: value lines, not text"),
    "empty": (b"", ": holds nothing"),
    "comment": (b"# name: a\n", ": holds nothing"),
    "two": (b"name: a\n---\nname: b\n", ", line 2, column 1"),
    "binary": (b"name: !!binary aGVsbG8=\n", ": name: must be text, a number"),
    "set": (b"name: !!set {a}\n", ": name: must be text, a number"),
    "date": (b"name: 2026-01-31\n", ": name: must be text, a number"),
    "null_key": (b"? \n: 2\n", ": "),
    "digits": (b"seed: " + b"9" * 5000 + b"\n", ": not valid YAML"),
    "interpolation": (b"name: ${\n", ": cannot be read"),
    "brackets": (b"name: " + b"${oc.env:" * 300 + b"x" + b"}" * 300, ": cannot be read"),
    "header": (b"# @package a b\nname: a\n", ": cannot be read"),
    "defaults": (b"defaults: 5\n", ": defaults=5: must be a list"),
    "default": (b"defaults: [{a: b, c: d}]\n", ": defaults: "),
    "default_kind": (b"defaults: [{a: {b: c}}]\n", ": defaults: a: "),
    "default_made": (b"defaults: ['${name}']\n", ": defaults: ${name}"),
}  # fmt: skip


@pytest.fixture
def mine(tmp_path) -> Path:
    (tmp_path / "recipe").mkdir()
    return tmp_path


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_recipe_is_told_with_file_and_place(kind, mine):
    file = mine / "recipe/own.yaml"
    content, said = BROKEN[kind]
    file.write_bytes(content)
    for use in (compose.compose, explain) if kind == "indent" else (compose.compose,):
        with pytest.raises(ConfigError) as caught:
            use(["recipe=own", "data.train=a.jsonl"], str(mine))
        assert f"{file}{said}" in str(caught.value) or (f"{file}" in str(caught.value) and said in str(caught.value))
        assert len(str(caught.value)) < 1000
    assert sorted(path.name for path in mine.rglob("*")) == ["own.yaml", "recipe"]


def test_the_files_that_a_recipe_names_are_read_in_the_same_way(mine):
    (mine / "quant").mkdir()
    (mine / "recipe/own.yaml").write_text("# @package _global_\ndefaults: [override /quant: mine]\nname: a\n")
    (mine / "quant/mine.yaml").write_text("method: nf4\n double_quant: true\n")
    with pytest.raises(ConfigError, match=r"quant/mine\.yaml, line 2, column 14: not valid YAML"):
        compose.compose(["recipe=own", "data.train=a"], str(mine))
    (mine / "quant/mine.yaml").write_text("{}\n")
    assert compose.compose(["recipe=own", "data.train=a"], str(mine)).quant.method == "none"


def test_a_recipe_that_is_no_file_is_refused_at_once(mine):
    os.mkfifo(mine / "recipe/pipe.yaml")
    (mine / "recipe/lost.yaml").symlink_to(mine / "nowhere")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: not a regular file"):
        compose.compose(["recipe=pipe", "data.train=a"], str(mine))
    with pytest.raises(ConfigError, match=r"lost\.yaml: cannot be read"):
        compose.compose(["recipe=lost", "data.train=a"], str(mine))


def test_every_recipe_of_a_sweep_is_read_before_it_starts(mine):
    (mine / "recipe/good.yaml").write_text(_HEAD)
    (mine / "recipe/bad.yaml").write_text(_HEAD + "name: a: b\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml, line 3, column 8"):
        hydra_app.multirun(["recipe=good,bad", f"hydra.sweep.dir={mine}/out"], str(mine), lambda *points: [])
    assert not (mine / "out").exists()


def test_a_folder_of_recipes_may_have_any_name(tmp_path):
    folder = tmp_path / "it's (1) 数据"
    (folder / "recipe").mkdir(parents=True)
    (folder / "recipe/own.yaml").write_text(_HEAD + "name: own\noptim: {lr: 5e-4}\n")
    config, origins = explain(["recipe=own"], str(folder))
    assert (config.name, config.optim.lr) == ("own", 5e-4)
    assert origins["optim.lr"].endswith("recipe/own.yaml")


# override -> what the message must say
SAID = {
    "lora.rnak=4": "lora.rnak=4: unknown key. Did you mean 'adapter.r'?",
    "lora.lora_alpah=4": "Did you mean 'adapter.lora_alpha'?",
    "adamw.lr=1e-4": "Did you mean 'optim.lr'?",
    "nf4.cache=false": "Did you mean 'quant.cache'?",
    "trian.epochs=3": "Did you mean 'train.epochs'?",
    "adapter.lora_alpha=inf": "adapter.lora_alpha=inf: must be a finite number, greater than 0",
    "adapter.lora_alpha=nan": "adapter.lora_alpha=nan: must be a finite number",
    "adapter.lora_alpha=1e400": "adapter.lora_alpha=inf: must be a finite number",
    "adapter.lora_alpha=1e300": "adapter.lora_alpha=1e+300: must be at most 1e+09",
    "adapter.alpha_pattern={a: nan}": "adapter.alpha_pattern=nan: must be a finite number",
    "merge.weights=[inf]": "merge.weights=inf: must be a finite number",
    f"train.max_steps={10**30}": "train.max_steps=a number of more than 20 digits: must be at most 4,294,967,296",
    f"seed={'9' * 6000}": "seed=",
    "hardware.threads=100000": "hardware.threads=100000: must be an integer, at least 1, at most 1024",
    "hardware.device=cuda:99999999": "hardware.device",
    "name=\udcff": "half a character",
    "data.train=a\0b": "data.train=",
    "data.chat_template_kwargs=" + "{a: " * 60 + "1" + "}" * 60: "data: nested deeper than 30 levels",
    "k" * 5000 + "=1": "no key has more than 200 characters",
    "data.train=" + "x" * 200_000: "longer than 100,000 characters",
    "recipe=glob(*)": "Name the choices",
    "quant=range(1,3)": "quant=a,b",
    "name=${": "cannot be composed",
    "adapter=5": "no such adapter",
}  # fmt: skip


@pytest.mark.parametrize("override", SAID, ids=lambda text: ascii(text)[:40])
def test_an_absurd_override_is_a_sentence(override):
    with pytest.raises(ConfigError) as caught:
        compose.compose(["data.train=t.jsonl", override])
    assert SAID[override] in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", [key for key, info in all_keys().items() if info.annotation in (float, float | None)])
def test_no_number_is_infinite(key):
    for value in ("inf", "-inf", "nan"):
        tree = {"run_dir": "x", "model": {"path": "m"}, "data": {"train": "t"}, **_nested(key, float(value))}
        if key in only_for(RunConfig):
            room = key.partition(".")[0]
            tree[room] |= {{"task": "name", "adapter": "method"}[room]: only_for(RunConfig)[key][0]}
        with pytest.raises(ConfigError, match=rf"{key}={value}: must be a finite number"):
            compose.parse(tree)


def _nested(key: str, value: object) -> dict:
    tree = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    needed = {"data": {"train": "t"}, "model": {"path": "m"}}
    return {section: {**needed.get(section, {}), **tree[section]} for section in tree}


def test_many_problems_are_not_all_told():
    with pytest.raises(ConfigError) as caught:
        compose.compose(["data.train=a", *(f"k{number}=1" for number in range(100))])
    assert "... and 80 more keys." in str(caught.value)


def test_a_sweep_of_too_many_points_is_refused():
    with pytest.raises(ConfigError, match=r"The sweep has 400,000,000 points, and at most 10,000 are made"):
        hydra_app.multirun(["data.train=a", "seed=range(0,20000)", "train.epochs=range(1,20001)"], None, lambda *_: [])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.r=range(5,5)", "adapter.r=range(5,5): a sweep without values"),
        ("adapter.r=range(1,5,0)", "arg 3 must not be zero"),
        ("adapter.r=glob(*)", "Name the values"),
        ("hydra.sweeper.max_batch_size=0", "hydra.sweeper.max_batch_size=0: must be an integer, at least 1, or null"),
        ("hydra.sweep.dir=", "hydra.sweep.dir=: must be a folder's name"),
        ("hydra.sweep.dir=/proc/x", "/proc/x: the sweep's folder cannot be made"),
        ("hydra.sweep.subdir=same", "two runs of the sweep would share"),
        ("hydra.sweep.dir=a,b", "hydra.sweep.dir=a,b: not a key"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused(override, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points = [] if override.startswith("adapter.r") else ["adapter.r=1,2"]
    with pytest.raises(LoraLabError) as caught:
        hydra_app.multirun(["data.train=a", "hydra.sweep.dir=out", *points, override], None, lambda *_: [])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("trials=x", "an integer, at least 1"),
        ("batch=0", "an integer, at least 1"),
        ("seed=-1", "an integer from 0"),
        ("sampler=grid", "one that is known; there are tpe and random"),
    ],
)
def test_a_search_has_its_settings_checked(setting, rule):
    with pytest.raises(ConfigError, match=rf"hydra\.sweeper\.{setting}: must be {rule}"):
        compose.compose(["data.train=a", "hydra/sweeper=optuna_cohort", f"hydra.sweeper.{setting}"], multirun=True)


# -- chance -----------------------------------------------------------------------------------------------------------

_quiet = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
_few, _many = settings(max_examples=25, **_quiet), settings(max_examples=600, **_quiet)
_KEYS = [*all_keys(), "recipe", "quant", "adapter", "hydra.sweep.dir", "hydra/launcher", "lora.r", "x"]
_SNIPPETS = "1 -1 1e-4 inf nan true null [] {} [a,b] {a:1} ${name} ${oc.env:HOME} ${.x} 'a' \"b\" a,b range(1,4) choice(a,b) nf4".split()
_texts = st.text(max_size=30)
_values = st.one_of(st.sampled_from(_SNIPPETS), _texts, st.integers().map(str), st.floats().map(str))
_overrides = st.one_of(
    _texts, st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), st.sampled_from(_KEYS), _values)
)
_scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _texts, st.sampled_from(_SNIPPETS))
_trees = st.recursive(
    _scalars,
    lambda inside: st.one_of(
        st.lists(inside, max_size=3), st.dictionaries(st.one_of(_texts, _scalars), inside, max_size=3)
    ),
    max_leaves=8,
)
_names = ["name", "seed", "defaults", "hydra", "_target_", *sorted({key.partition(".")[0] for key in all_keys()})]
_recipes = st.dictionaries(st.one_of(st.sampled_from(_names), _texts), _trees, max_size=5)
_GOOD = (_HEAD + "defaults: [override /quant: none]\nname: own\noptim: {lr: 5e-4}\nadapter:\n  r: 4\n").encode()


def _outcome(overrides: list[str], folder: Path | None = None) -> None:
    """A configuration, or an error of ours; and nothing written."""
    here, said = sorted(os.listdir(".")), "a configuration"
    try:
        config = compose.compose(overrides, folder and str(folder))
    except LoraLabError as error:
        config, said = None, str(error)
    assert isinstance(config, RunConfig | None)
    assert 0 < len(said) < 20_000
    assert sorted(os.listdir(".")) == here


def _any_override(text):
    _outcome(["data.train=a", text])


def _any_bytes(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe").mkdir()
        (Path(folder) / "recipe/own.yaml").write_bytes(content)
        _outcome(["recipe=own"], Path(folder))
        assert len(list(Path(folder).rglob("*"))) == 2


def _any_tree(tree):
    text = yaml.safe_dump(tree, allow_unicode=True)
    _any_bytes(b"# @package _global_\n" + text.encode("utf-8", "surrogatepass"))


@st.composite
def _damaged(draw) -> bytes:
    content = bytearray(_GOOD)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content) - 1))
        content[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(content)


test_any_override = _few(example("name=${oc.env:A,${.}}")(given(_overrides)(_any_override)))
test_any_bytes = _few(given(st.one_of(_damaged(), st.binary(max_size=60)))(_any_bytes))
test_any_tree = _few(given(_recipes)(_any_tree))
test_many_overrides = pytest.mark.faults(_many(given(_overrides)(_any_override)))
test_many_bytes = pytest.mark.faults(_many(given(st.one_of(_damaged(), st.binary(max_size=200)))(_any_bytes)))
test_many_trees = pytest.mark.faults(_many(given(_recipes)(_any_tree)))


@_few
@given(st.lists(_overrides, max_size=4))
def test_any_sweep(given_overrides):
    prepared, problems = compose.prepare(given_overrides)
    assert all(isinstance(text, str) for text in [*prepared, *problems])
