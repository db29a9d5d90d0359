"""A recipe that somebody else wrote is data: it calls nothing, opens nothing, and takes no secret along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab import cli
from lora_lab.config import allowed, compose, hydra_app
from lora_lab.errors import ConfigError
from lora_lab.runtime import environment
from lora_lab.sweep.jobs import Outcome

_HEAD = "# @package _global_\ndata: {train: a.jsonl}\n"
_CALL = "[{_target_: pathlib.Path.write_text, _args_: [{_target_: pathlib.Path, _args_: [CANARY]}, payload]}]"
_HANDLER = "{version: 1, handlers: {f: {class: logging.FileHandler, filename: CANARY, mode: w}}, root: {handlers: [f]}}"
_DOUBLING = "".join(f"a{i}: '${{a{i - 1}}}${{a{i - 1}}}${{a{i - 1}}}'\n" for i in range(1, 40))
_LISTS = "".join(f"a{i}: ['${{a{i - 1}}}', '${{a{i - 1}}}']\n" for i in range(1, 60))

# name of a recipe -> its text, and what the refusal says
HOSTILE = {
    "call": (_HEAD + "hydra: {callbacks: {x: {_target_: os.system, command: id}}}", "callbacks.x._target_=os.system"),
    "call_in_list": (_HEAD + f"hydra: {{launcher: {{parameters: {{x: {_CALL}}}}}}}", "parameters.x[0]._target_"),
    "call_in_kwargs": (
        f"# @package _global_\ndata: {{train: a, chat_template_kwargs: {{a: {_CALL}}}}}\n",
        "chat_template_kwargs.a[0]._target_",
    ),
    "call_by_reference": (
        "# @package _global_\ndata: {train: a, chat_template_kwargs: {a: 1}}\n"
        "hydra: {launcher: {parameters: {timeout_min: '${data.chat_template_kwargs}'}}}",
        "hydra.launcher.parameters.timeout_min",
    ),
    "launcher_by_reference": (_HEAD + "hydra: {launcher: '${data}'}", "hydra.launcher=${data}"),
    "hydra_by_reference": (_HEAD + "hydra: ${data}", "hydra=${data}: must be a mapping"),
    "other_class": (_HEAD + "hydra: {launcher: {_target_: os.system}}", "names code"),
    "job_logging": (_HEAD + f"hydra: {{job_logging: {_HANDLER}}}", "hydra.job_logging.version"),
    "hydra_logging": (_HEAD + f"hydra: {{hydra_logging: {_HANDLER}}}", "hydra.hydra_logging.version"),
    "logging_group": ("# @package _global_\ndefaults: [override /hydra/job_logging: stdout]", "hydra/job_logging"),
    "shadow": ("# @package _global_\ndefaults: [override /hydra/sweeper: mine]", "no such hydra/sweeper"),
    "env_set": (_HEAD + "hydra: {job: {env_set: {LD_PRELOAD: /tmp/x.so}}}", "hydra.job.env_set.LD_PRELOAD"),
    "env_copy": (_HEAD + "hydra: {job: {env_copy: [HF_TOKEN]}}", "hydra.job.env_copy"),
    "chdir": (_HEAD + "hydra: {job: {chdir: true}}", "hydra.job.chdir"),
    "searchpath": (_HEAD + "hydra: {searchpath: ['pkg://os']}", "hydra.searchpath"),
    "subdir": (_HEAD + "hydra: {output_subdir: ../..}", "hydra.output_subdir"),
    "params": (_HEAD + "hydra: {sweeper: {params: {hydra.job.chdir: 'true'}}}", "hydra.sweeper.params"),
    "package": ("# @package hydra.job\nenv_set: {A: b}", "'# @package hydra.job'"),
    "package_of_root": ("# @package _global_.hydra\njob: {env_set: {A: b}}", "among Hydra's own keys"),
    "package_of_default": ("# @package _global_\ndefaults: [{/sub@hydra.job: other}]", "among Hydra's own keys"),
    "outside": ("# @package _global_\ndefaults: ['../../../../OUTSIDE']", "leads out of the folder"),
    "outside_absolute": ("# @package _global_\ndefaults: ['//OUTSIDE@_global_']", "leads out of the folder"),
    "outside_choice": ("# @package _global_\ndefaults: [override /quant: ../../OUTSIDE]", "leads out of the folder"),
    "outside_list": ("# @package _global_\ndefaults: [{/quant: [../../OUTSIDE]}]", "leads out of the folder"),
    "shell": (_HEAD + "hydra: {launcher: {parameters: {slurm_setup: ['rm -rf ~']}}}", "not a parameter that a file"),
    "python": (_HEAD + "hydra: {launcher: {parameters: {slurm_python: sh -c id}}}", "not a parameter that a file"),
    "batch_line": (_HEAD + 'hydra: {launcher: {parameters: {slurm_account: "a\\nid"}}}', "one plain word"),
    "tag": (_HEAD + "name: !!python/object/apply:os.system [id]", "line 3, column 7"),
    "path_tag": (_HEAD + "name: !!python/object/apply:pathlib.Path [id]", "line 3, column 7"),
    "decode": (_HEAD + "name: ${oc.decode:'[1]'}", "oc.decode"),
    "create": (_HEAD + "name: '${oc.create:{a: 1}}'", "oc.create"),
    "made_resolver": (_HEAD + "name: ${oc.${tracker.project}:a}", "not a resolver"),
    "doubling": (_HEAD + "a0: xxxxxxxx\n" + _DOUBLING, "grow too large"),
    "doubling_lists": (_HEAD + "a0: [x]\n" + _LISTS, "grow too large"),
    "circle": (_HEAD + "name: ${tracker.project}\ntracker: {project: '${name}'}", "Recursive interpolation"),
    "itself": ("# @package _global_\ndefaults: [/recipe/itself]", "name that file again"),
}  # fmt: skip


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """A folder for --config-dir with every hostile recipe."""
    folder = tmp_path_factory.mktemp("mine")
    for group in ("recipe", "sub"):
        (folder / group).mkdir()
    (folder / "sub/other.yaml").write_text("env_set: {A: b}\n")
    (folder / "outside.yaml").write_text("hydra: {job: {env_set: {A: b}}}\n")
    (folder / "canary").write_text("untouched")
    (folder / "recipe/harmless.yaml").write_text(_HEAD)
    for name, (text, _) in HOSTILE.items():
        told = text.replace("CANARY", str(folder / "canary")).replace("OUTSIDE", str(folder / "outside"))
        (folder / f"recipe/{name}.yaml").write_text(told)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused_with_file_and_key(name, mine):
    for multirun in (False, True):
        with pytest.raises(ConfigError) as caught:
            compose.compose([f"recipe={name}"], str(mine), multirun=multirun)
        assert HOSTILE[name][1] in str(caught.value)
    assert (mine / "canary").read_text() == "untouched"


_UNDER_AUDIT = """
import json, sys
from lora_lab.config import compose, hydra_app
from lora_lab.config.origins import explain
from lora_lab.errors import LoraLabError
from lora_lab.sweep.jobs import Outcome

folder, names = sys.argv[1], json.loads(sys.argv[2])
compose.compose(["recipe=demo"])  # Hydra's modules and plugins are loaded
events, said = [], []
writing = ("w", "a", "x", "+")
started = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile",
           "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "os.remove", "os.rename", "os.mkdir",
           "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink", "shutil.rmtree", "ctypes.dlopen", "pickle.find_class")

def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and any(sign in mode for sign in writing)) or (flags or 0) & 3:
            events.append(f"open {path} {mode}")
    elif event in started:
        events.append(f"{event} {arguments}")

def launch(configs, nodes):
    said.append("launched")
    return [Outcome(None) for _ in configs]

uses = (lambda given: compose.compose(given, folder), lambda given: explain(given, folder),
        lambda given: hydra_app.multirun([*given, "adapter.r=2,4"], folder, launch))
sys.addaudithook(hook)
for name in names:
    before = [list(said), list(events)]
    for use in uses:
        try:
            use([f"recipe={name}"])
            said.append(f"{name} was accepted")
        except LoraLabError:
            pass
print(json.dumps([before, said, events]))
"""


def test_nothing_is_started_opened_or_sent_by_a_hostile_recipe(mine, tmp_path):
    done = subprocess.run(
        [sys.executable, "-B", "-c", _UNDER_AUDIT, str(mine), json.dumps([*HOSTILE, "harmless"])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    before, said, events = json.loads(done.stdout)
    assert before == [[], []]
    # the harmless one, last, is seen to be composed, launched and written of: the hook works
    assert said == ["harmless was accepted", "harmless was accepted", "launched", "harmless was accepted"]
    assert any("os.mkdir" in event for event in events)
    assert any("multirun.yaml" in event for event in events)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert (mine / "canary").read_text() == "untouched"


@pytest.mark.parametrize("file", ["launcher/cohort", "sweeper/basic", "config"])
def test_a_folder_of_the_user_s_cannot_replace_hydra_s_files(file, tmp_path):
    shadow = tmp_path / f"hydra/{file}.yaml"
    shadow.parent.mkdir(parents=True)
    shadow.write_text("_target_: os.system\n")
    with pytest.raises(ConfigError, match=r"would replace Hydra's own") as caught:
        compose.compose(["data.train=a"], str(tmp_path))
    assert str(shadow) in str(caught.value)


def test_a_choice_that_lora_lab_has_already_is_not_left_unused_in_silence(tmp_path):
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant/nf4.yaml").write_text("method: int8\n")
    with pytest.raises(ConfigError, match=r"nf4\.yaml: lora_lab has a quant of that name"):
        compose.compose(["data.train=a", "quant=nf4"], str(tmp_path))


def test_what_a_recipe_may_say_to_hydra(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/own.yaml").write_text(
        "# @package _global_\ndefaults: [override /quant: none, override /hydra/sweeper: optuna_cohort]\n"
        "data: {train: '${oc.env:LORA_LAB_ROWS,rows}/a.jsonl', eval: '${data.train}'}\n"
        "hydra:\n  sweep: {dir: 'out/${name}', subdir: 'run${hydra.job.num}'}\n"
        "  sweeper: {trials: 3, batch: 1, sampler: random, seed: 1}\n"
        "  launcher: {workers: 2, parameters: {timeout_min: 5, slurm_partition: gpu, slurm_gres: 'gpu:a100:2'}}\n"
    )
    config = compose.compose(["recipe=own", "hydra/launcher=cohort_slurm"], str(tmp_path))
    assert config.data.eval == config.data.train == "rows/a.jsonl"
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.workers: no effect with this launcher"):
        compose.compose(["recipe=own"], str(tmp_path))


@pytest.mark.parametrize(
    "override",
    [
        "hydra.job.env_set.LD_PRELOAD=x.so",
        "+hydra.job_logging.root=null",
        "~hydra.launcher=x",
        "hydra={launcher: null}",
        "hydra/job_logging=default",
        "hydra/launcher=joblib",
        "hydra.searchpath=[pkg://os]",
        "hydra.callbacks.x._target_=os.system",
        "hydra.launcher.parameters.x={_target_: os.system}",
        "hydra.launcher.parameters.x=[{_target_: os.system}]",
        "quant@hydra.job=nf4",
        "data.chat_template_kwargs={a: [{_target_: os.system}]}",
        "hydra.sweep.dirr=x",
    ],
)
def test_overrides_may_say_no_more(override):
    with pytest.raises(ConfigError) as caught:
        compose.compose(["data.train=a", override], multirun=True)
    assert "hydra" in str(caught.value) or "never names code" in str(caught.value)


def test_the_composed_tree_is_a_second_wall():
    with compose.composed(["data.train=a"]) as tree:
        compose.check(tree)
        tree.hydra.job.env_set = {"LD_PRELOAD": "x.so"}
        with pytest.raises(ConfigError, match=r"hydra\.job\.env_set"):
            compose.check(tree)
    for node in (
        {"launcher": {"_target_": allowed.TARGETS["sweeper"][0]}},
        {"launcher": {"_target_": allowed.TARGETS["launcher"][0], "executor": "local", "parameters": {"x": {"y": 1}}}},
        {"sweeper": {"_target_": allowed.TARGETS["sweeper"][1], "params": {"a": "1,2"}}},
    ):
        silent = {"version": 1, "root": None, "disable_existing_loggers": False}
        rest = {"callbacks": {}, "job": {"env_set": {}, "env_copy": []}, "verbose": False}
        with pytest.raises(ConfigError):
            allowed.check_composed({**rest, "hydra_logging": silent, "job_logging": silent, **node})


def test_completion_hands_no_other_option_to_hydra(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "lora-lab train quant=")
    pickled = tmp_path / "x.pkl"
    pickled.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert cli.main(["-sc", "query=bash", f"--experimental-rerun={pickled}"]) == 0
    assert "quant=nf4" in capsys.readouterr().out


# -- secrets ----------------------------------------------------------------------------------------------------------

_CONTENT = "ghp_0123456789abcdef"
_LEAKS = [
    "name=${oc.env:'SITE_PAT'}",
    'name="${oc.env:SITE_PAT}"',
    "'name=x-${oc.env:${tracker.project}}'",
    "name=${oc.env:NOT_THERE,${oc.env:${tracker.project}}}",
    "seed=${oc.env:${tracker.project}}",
    "adapter.target_modules=[a,${oc.env:${tracker.project}}]",
    f"data.prefix={_CONTENT}",
    f"adapter.rank_pattern={{{_CONTENT}: 4}}",
    f"quant={_CONTENT}",
]


@pytest.mark.parametrize("leak", _LEAKS)
def test_a_secret_of_the_environment_is_never_part_of_a_configuration(leak, monkeypatch):
    monkeypatch.setenv("SITE_PAT", _CONTENT)
    with pytest.raises(ConfigError) as caught:
        compose.compose(["data.train=a", "tracker.project=SITE_PAT", leak.strip("'")])
    assert _CONTENT not in str(caught.value)
    assert "SITE_PAT" in str(caught.value)
    assert leak.strip("'").partition("=")[0].partition("{")[0] in str(caught.value)


@pytest.mark.parametrize("command", [["config"], ["train"], ["train", "-m", "adapter.r=2,4"], ["data"], ["plan"]])
def test_no_verb_shows_or_saves_one(command, overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SITE_PAT", _CONTENT)
    monkeypatch.chdir(tmp_path)
    given = [text for text in overrides if not text.startswith("run_dir=")]
    leak = ["tracker.project=SITE_PAT", "name=${oc.env:${tracker.project}}"]
    assert cli.main([*command, *given, *leak]) == 2
    shown = capsys.readouterr()
    assert _CONTENT not in shown.out + shown.err
    assert "name: holds the secret of the environment variable SITE_PAT" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_member_of_a_sweep_that_holds_a_secret_begins_none(tmp_path, monkeypatch):
    monkeypatch.setenv("SITE_PAT", _CONTENT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="SITE_PAT.*1 of 2 runs; none was begun") as refused:
        hydra_app.multirun(
            [
                "data.train=a",
                "tracker.project=SITE_PAT",
                "name=fine,'${oc.env:${tracker.project}}'",
                "hydra.sweep.dir=out",
            ],
            None,
            lambda configs, nodes: [Outcome(1.0) for _ in configs],
        )
    assert _CONTENT not in str(refused.value)
    assert all(_CONTENT not in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert all(_CONTENT not in str(file) for file in tmp_path.rglob("*"))


def test_a_sweep_s_folder_is_not_named_after_one(monkeypatch):
    monkeypatch.setenv("SITE_PAT", _CONTENT)
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.dir: holds the secret"):
        compose.compose(
            ["data.train=a", "tracker.project=SITE_PAT", "hydra.sweep.dir=${oc.env:${tracker.project}}"], multirun=True
        )


@pytest.mark.parametrize(
    "name",
    "HF_TOKEN GITHUB_PAT AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY WANDB_API_KEY OPENAI_APIKEY DB_PASSWORD MYSQL_PWD "
    "my_password gitlabToken NPM_AUTH SSH_PRIVATE_KEY AZURE_CREDENTIALS PASSWD CLIENT_SECRET".split(),
)
def test_names_of_secrets(name):
    assert environment.secret_name(name)


@pytest.mark.parametrize(
    "name",
    "PATH PWD OLDPWD HOME TOKENIZERS_PARALLELISM PATTERN KEYBOARD AUTHOR SSH_AUTH_SOCK HF_TOKEN_PATH MONKEY "
    "GOOGLE_APPLICATION_CREDENTIALS_FILE LORA_LAB_DATA COMPATIBLE".split(),
)
def test_names_of_others(name):
    assert not environment.secret_name(name)


def test_short_and_absent_contents_are_no_secrets(monkeypatch):
    monkeypatch.setenv("SITE_TOKEN", "demo")
    monkeypatch.setenv("OTHER_TOKEN", "")
    assert compose.compose(["data.train=a", "name=demo"]).name == "demo"


def test_a_run_s_own_file_has_no_section_of_hydra_s(tmp_path):
    text = compose.to_yaml(compose.compose(["data.train=a"]))
    for more, said in (
        ("hydra: 5\n", "hydra=5: unknown key"),
        ("hydra: {launcher: {_target_: os.system}}\n", "never names code"),
        ("hydra: {job: {env_set: {A: b}}}\n", "hydra.job.env_set.A"),
    ):
        (tmp_path / "config.yaml").write_text(text + more)
        with pytest.raises(ConfigError) as caught:
            compose.load(tmp_path / "config.yaml")
        assert said in str(caught.value)
