"""Every verb, and any that is added: help, a light start, what it refuses, and examples that can be typed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest

from lora_lab import cli
from lora_lab.config import compose
from lora_lab.config.run import all_keys
from lora_lab.run import takes
from lora_lab.run.takes import Takes
from lora_lab.run.trained import keys_of, open_trained
from lora_lab.verbs import VERBS
from lora_lab.verbs.base import RUN, Option, Told, Verb, Word, run_folder
from tests.conftest import fails

ON_RUN = [name for name, verb in VERBS.items() if verb.takes is not None]
COMPOSING = [name for name, verb in VERBS.items() if verb.composes]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> str:
    """A run folder as far as a verb looks before torch is loaded."""
    folder = tmp_path_factory.mktemp("verbs") / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(compose.to_yaml(compose.compose(["recipe=demo"])))
    return str(folder)


def help_of(name: str, capsys) -> str:
    with pytest.raises(SystemExit) as done:
        cli.main([name, "--help"])
    assert done.value.code == 0
    return capsys.readouterr().out


# -- help ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERBS)
def test_help_shows_summary_examples_and_what_is_taken(name, capsys):
    text, verb = help_of(name, capsys), VERBS[name]
    assert verb.summary in text
    assert not verb.summary.endswith(".")
    assert verb.examples in text
    assert "exit codes" in text
    for option in verb.options:
        assert option.flags[-1] in text
    words = set(re.split(r"[\s,]+", text))
    assert set(verb.takes.keys if verb.takes else ()) <= words
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert re.search(rf"^ +{name} +{re.escape(verb.summary[:20])}", capsys.readouterr().out, re.MULTILINE)


def test_what_is_taken_exists():
    for name in ON_RUN:
        for taken in VERBS[name].takes.keys:
            assert any(f"{key}.".startswith(f"{taken}.") for key in all_keys()), (name, taken)
    own = (
        "tracker.",
        "hardware.processes",
        "hardware.shard",
        "hardware.timeout",
    )  # what the run's bytes do not depend on
    assert keys_of(VERBS["resume"].takes) == [key for key in all_keys() if key.startswith(own)]


# -- a light start ------------------------------------------------------------------------------------------------------

_EACH = """
import contextlib, io, json, sys
from lora_lab import cli
heavy = {'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'hydra'}
found = {}
for line in json.loads(sys.argv[1]):
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(line)
        except SystemExit as done:
            code = done.code
    found[' '.join(line)] = code, told.getvalue(), sorted(heavy & set(sys.modules))
print(json.dumps(found))
"""


def test_a_mistake_is_told_before_torch_is_loaded(begun):
    """Hydra is loaded where something is composed or read, and not before."""
    light = [[name, "--help"] for name in VERBS] + [[name, "nonsense"] for name in VERBS]
    light += [[name, "--nonsense"] for name in VERBS]
    mistakes = [[name, "run=/nowhere"] for name in ON_RUN] + [[name, f"run={begun}", "optim.lr=9"] for name in ON_RUN]
    mistakes += [[name, "recipe=nonsense"] for name in COMPOSING]
    lines = json.dumps(light + mistakes)
    done = subprocess.run([sys.executable, "-c", _EACH, lines], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for line in light:
        code, told, heavy = found[" ".join(line)]
        assert (code, heavy) == (0 if line[1] == "--help" else 2, []), line
        assert "Traceback" not in told
    for line in mistakes:
        code, told, heavy = found[" ".join(line)]
        assert (code, [name for name in heavy if name != "hydra"]) == (2, []), line
        assert line[-1] in told


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_RUN)
def test_no_section_that_is_not_taken_has_an_effect(name, begun, capsys):
    taken = {key.partition(".")[0] for key in keys_of(VERBS[name].takes)}
    others = {key.partition(".")[0]: key for key in all_keys() if key.partition(".")[0] not in taken}
    assert {"train", "optim", "adapter"} <= set(others)
    for key in others.values():
        message = fails([name, f"run={begun}", f"{key}=1"], capsys)
        assert f"{key}=1: " in message
        assert VERBS[name].takes.because or "no effect on a trained run" in message
    assert "run: must be set once" in fails([name], capsys)
    assert "run: must be set once" in fails([name, "run=a", "run=b"], capsys)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["resume", "sweep=a", "run=b"], "run=b: sweep names the runs already"),
        (["resume", "sweep=a", "seed=1"], "seed=1: resume takes no overrides"),
        (["merge", "sweep=a", "run=b"], "run=b: sweep names the run already"),
        (["merge", "sweep=a", "merge.adapters=[b,c]"], "merge.adapters=[b,c]: sweep names the run already"),
        (["merge", "merge.adapters=b"], "name two or more run folders in a list"),
        (["evaluate", "sweep=a"], "run: must be set once"),
        (["plan", "recipe=demo", "probe=yes"], "probe=yes: must be true or false"),
        (["chat", "--prompt", "hello"], "settings are written without dashes: prompt=hello"),
        (["merge", "--member", "3"], "settings are written without dashes: member=3"),
    ],
)
def test_words_that_are_no_keys(line, said, capsys):
    if line[1].startswith("--"):
        with pytest.raises(SystemExit):
            cli.main(line)
        assert said in capsys.readouterr().err
    else:
        assert said in fails(line, capsys)


@pytest.mark.parametrize(("name", "word"), [("resume", "members"), ("merge", "member")])
def test_a_member_has_no_effect_without_its_sweep(name, word, begun, capsys):
    assert f"{word}" in fails([name, f"run={begun}", f"{word}=0"], capsys)


# -- examples -----------------------------------------------------------------------------------------------------------


def example_lines(text: str) -> list[list[str]]:
    """The command lines among examples, without what is said behind them."""
    found, lines = [], iter(text.splitlines())
    for line in lines:
        if not line.startswith("  lora-lab "):
            continue
        if line.count('"') % 2:  # a value of several lines
            for more in lines:
                line += f"\n{more}"
                if more.count('"') % 2:
                    break
        else:
            line = re.split(r"\s{2,}", line.strip())[0]
        found.append(shlex.split(line)[1:])
    return found


@pytest.mark.parametrize("name", VERBS)
def test_examples_can_be_typed(name, begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/recipe").mkdir(parents=True)
    (tmp_path / "mine/recipe/own.yaml").write_text("# @package _global_\ndefaults:\n  - override /data: orders\n")
    verb, lines = VERBS[name], example_lines(VERBS[name].examples)
    assert lines
    for line in lines:
        assert line[0] == name
        args = cli._parse(line)
        told = Told.of(name, verb, args.overrides, args)
        if verb.filters:
            [compose.parse_override(text) for text in told.overrides]
        elif verb.takes is None:
            if told.overrides:
                compose.compose(told.overrides, args.config_dir, multirun=getattr(args, "multirun", False))
        elif told.words.get("merge.adapters"):
            assert told.word("run") is None
            open_trained(begun, takes.COMBINE, [*told.overrides, f"merge.adapters={told.word('merge.adapters')}"])
        else:
            assert sum(len(told.words.get(word, [])) for word in ("run", "runs", "sweep", "base", "add_key")) == 1
            open_trained(begun, verb.takes, told.overrides)


# -- a verb that is added -----------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch) -> list[Told]:
    """`lora-lab toy`, which works on a run; what it was told."""
    said: list[Told] = []

    def run(told: Told) -> int:
        run_folder(told)
        said.append(told)
        return told.options.twice

    verb = Verb(
        summary="play with a trained run",
        examples="  lora-lab toy run=DIR --twice 2\n",
        run=run,
        takes=Takes("toy", ("task.max_new_tokens", "shrink")),
        arguments=(RUN, Word("ball", each=True), Option("--twice", type=int, default=0, metavar="N", help="how often")),
        output_is_all=True,
        exit_1="lost the ball",
        others=("amuse",),
    )
    monkeypatch.setitem(VERBS, "toy", verb)
    return said


def test_a_new_verb_is_a_line_in_the_dict(toy, begun, capsys, monkeypatch):
    text = help_of("toy", capsys)
    assert "lora-lab toy run=DIR --twice 2" in text
    assert "keys, beside run: task.max_new_tokens, shrink" in text
    assert "toy lost the ball" in text
    assert re.search(r"--twice N\s+how often", text)
    assert "--config-dir" not in text
    assert cli.main(["toy", f"run={begun}", "ball=red", "--twice", "3", "ball=blue", "shrink.ranks=[2]"]) == 3
    assert "twice" not in capsys.readouterr().out  # both balls count
    [told] = toy
    assert (told.words["ball"], told.word("ball"), told.overrides) == (["red", "blue"], "blue", ["shrink.ranks=[2]"])
    for line, said in (
        (["toy", f"run={begun}", "optim.lr=1"], "What lora-lab toy takes: lora-lab toy --help"),
        (["toy", begun], f"Write lora-lab toy run={begun}"),
        (["toyy", "run=a"], "Write lora-lab toy run=a"),
        (["amuse"], "Did you mean 'toy'?"),
        (["nonsense"], ", config, toy."),
    ):
        assert said in fails(line, capsys)
    monkeypatch.setenv("COMP_LINE", "lora-lab to")
    assert cli.main(["-sc", "query=bash"]) == 0
    assert "toy" in capsys.readouterr().out.split()


def test_a_new_verb_that_composes_has_a_folder_of_recipes(capsys, monkeypatch):
    seen = []
    verb = Verb("count keys", "  lora-lab count recipe=demo\n", lambda told: seen.append(told.options.config_dir) or 0)
    monkeypatch.setitem(VERBS, "count", verb)
    assert "--config-dir DIR" in help_of("count", capsys)
    assert cli.main(["count", "recipe=demo", "--config-dir", "mine"]) == 0
    assert seen == ["mine"]
    assert "Write lora-lab count recipe=demo" in fails(["count", "demo"], capsys)
