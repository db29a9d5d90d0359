"""`lora-lab VERB [key=value ...]`: the command line. Importing this module, and `--help`, load neither torch nor Hydra."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from lora_lab import __version__
from lora_lab.config import forms
from lora_lab.errors import ConfigError, DataError, Interrupted, LoraLabError
from lora_lab.runtime import signals
from lora_lab.verbs import EXAMPLES, TAKES, VERBS

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig
    from lora_lab.sweep.jobs import Nodes, Outcome

_PRINTING = ("config", "data", "plan", "chat")  # their output is all that they are for
_COMMON = """
exit codes: 0 done; 1 lora-lab data found errors (elsewhere: a bug in lora-lab); 2 something to mend (the message says what); 3 training stopped before a
non-finite update; 4 a merge or an export refused; 130 Ctrl-C, 143 SIGTERM
and 129 a closed terminal, after saving. A reader that closes its pipe (| head) changes nothing;
where stdout cannot be written (disk full) a run still goes on to its end, and config, data, plan and chat end with 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-sc" in argv or "--shell-completion" in argv:
        return _written(_complete(argv), needed=True)
    odd = next((text for text in argv if not _is_text(text)), None)
    if odd is not None:
        _complain(
            f"lora-lab: {odd}: not text in the encoding of this terminal ({sys.getfilesystemencoding()}), so no file could hold it. "
            "Set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or give the file another name."
        )
        return 2
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    problem = forms.verb(argv)
    if problem:
        _complain(f"lora-lab: {problem}")
        return 2
    try:
        args = _parse(argv)
    except SystemExit as done:  # help, version, or a wrong option: argparse has printed it
        raise SystemExit(_written(done.code or 0, needed=True)) from None
    signals.install()
    return _written(_run(args), needed=args.verb in _PRINTING)


def _is_text(argument: str) -> bool:
    """Whether no byte of an argument is beyond the encoding that Python read it with; such bytes are lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _run(args: argparse.Namespace) -> int:
    """The verb's exit code, after saying what went wrong."""
    try:
        _refuse_several_processes()
        problem = forms.words(args.overrides, args.verb)
        if problem:
            raise ConfigError(problem)
        _tell_repeated(args.overrides)
        return {"train": _train, "data": _data, "plan": _plan, "config": _config}.get(args.verb, _on_run)(args)
    except LoraLabError as error:
        return _failed(args, str(error), error.exit_code)
    except Interrupted as error:
        what = f"sweep={error.sweep}" if error.sweep else f"run={error.run}"
        hint = f"; finished work is saved. Resume with: lora-lab resume {what}" if error.sweep or error.run else ""
        place = " at step {} of {}".format(*error.steps) if error.steps else ""
        _complain(f"lora-lab: stopped{place}{hint}")
        return error.exit_code
    except Exception as error:
        sentence = _of_machine(error)
        if sentence is not None:
            return _failed(args, f"{sentence} --debug shows where.", 2)
        _complain(traceback.format_exc().rstrip())
        _complain("lora-lab: this is a bug in lora-lab, not a mistake of yours. Please report it with the lines above.")
        return 1


def _tell_repeated(overrides: Sequence[str]) -> None:
    """Say which of two values of one key holds: the last one."""
    last = {text.partition("=")[0].lstrip("+"): text for text in overrides}
    for text in overrides:
        holds = last[text.partition("=")[0].lstrip("+")]
        if holds != text:
            from lora_lab.runtime import console

            console.say("twice", f"{text} has no effect, because {holds} comes after it")


def _failed(args: argparse.Namespace, sentence: str, code: int) -> int:
    if args.debug:
        _complain(traceback.format_exc().rstrip())
    _complain(f"lora-lab: {sentence}{forms.full_width_hint(args.overrides, sentence)}")
    return code


def _of_machine(error: Exception) -> str | None:
    """A sentence for what a file, a disk or too little memory can cause anywhere; None for anything else."""
    if isinstance(error, OSError) and error.errno is not None:
        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{where or 'the system'}: {error.strerror or error}."
    if isinstance(error, RecursionError):
        return "a value or a file is nested too deep to be read. Make it flatter."
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return (
            f"memory ran out ({str(error).partition(chr(10))[0] or 'no room'}). Set a smaller data.max_tokens or "
            "train.micro_batch_size, or quant=nf4; lora-lab plan shows what needs how much."
        )
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from lora_lab.train import oom

    return oom.is_out_of_memory(error)


def _complain(text: str) -> None:
    from lora_lab.runtime import console

    console.complain(text)


def _written(code: int, needed: bool) -> int:
    """The exit code, now that all output is where it can go.

    Args:
        needed: whether the output is what the command is for, so that losing it is a failure.
    """
    from lora_lab.runtime import console

    console.stdout.flush()
    console.stderr.flush()
    lost = console.stdout.lost
    console.stdout.lost = None
    if lost is None or isinstance(lost, BrokenPipeError):  # whoever read it has read enough
        return code
    console.complain(
        f"lora-lab: stdout: {lost.strerror}, so what was said is lost there; a run's log.txt has all of it."
    )
    return code or (2 if needed else 0)


class _Parser(argparse.ArgumentParser):
    """argparse's parser, which would drop what it cannot write without a word."""

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        from lora_lab.runtime import console

        (console.stdout if file is sys.stdout else console.stderr).write(console.shown(message or ""))


def _refuse_several_processes() -> None:
    """Each process of a launcher would train the whole run by itself, in one folder."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise ConfigError(
            f"WORLD_SIZE={size}: lora-lab works in one process. Start it without torchrun or accelerate launch; several runs at once: "
            "lora-lab train -m."
        )


def _parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="lora-lab",
        formatter_class=text,
        description="Fine-tune a frozen, quantized base model with small adapters, and merge them back with proof.",
        epilog="start here: lora-lab train recipe=demo\n"
        'tab completion: eval "$(lora-lab -sc install=bash)" (also zsh, fish)\n' + _COMMON,
    )
    parser.add_argument("--version", action="version", version=f"lora-lab {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        takes = (
            f"\nkeys, beside run: {textwrap.fill(', '.join(TAKES[name]), 110, subsequent_indent='  ')}\n"
            if name in TAKES
            else ""
        )
        verb = verbs.add_parser(
            name, help=summary, description=summary + ".", epilog=EXAMPLES[name] + takes + _COMMON, formatter_class=text
        )
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from the defaults")
        verb.add_argument("--debug", action="store_true", help="show stack traces")
        if name in ("train", "data", "plan", "config"):
            verb.add_argument("--config-dir", metavar="DIR", help="a folder with your own groups and recipes")
        if name == "train":
            verb.add_argument("-m", "--multirun", action="store_true", help="one run for each combination of values")
        if name == "data":
            verb.add_argument("--rows", type=int, default=3, metavar="N", help="rows to print of each data set")
            verb.add_argument("--html", metavar="FILE", help="where the page goes (default: data.html beside the runs)")
        if name == "config":
            verb.add_argument("--keys", action="store_true", help="list every key with its meaning")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options may stand anywhere among the overrides."""
    if len(argv) == 2 and argv[1] == "help":
        argv = [argv[0], "--help"]
    args, rest = _parser().parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        _parser().error(forms.option(unknown[0], argv, args.verb))
    args.overrides += rest
    return args


# -- verbs ------------------------------------------------------------------------------------------------------------


_OF_SWEEPS = ("sweep=", "sweep.", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")


def _train(args: argparse.Namespace) -> int:
    from lora_lab.config import compose

    if args.multirun:
        return _multirun(args)
    alone = [text for text in args.overrides if text.lstrip("+").startswith(_OF_SWEEPS)]
    if alone:
        raise ConfigError(f"{alone[0]}: no effect on a single run. Add -m and several values, such as adapter.r=4,8.")
    config = compose.compose(args.overrides, args.config_dir)
    _refuse_upload(config.export.push_to_hub, args.overrides)
    _quiet_libraries()
    from lora_lab.run import pipeline

    pipeline.train(config)
    return 0


def _refuse_upload(repository: str | None, overrides: Sequence[str]) -> None:
    """A recipe does not choose where weights go."""
    if repository is not None and not any(text.startswith("export.push_to_hub=") for text in overrides):
        raise ConfigError(
            f"export.push_to_hub={repository}: a recipe starts no upload. Say it on the command line: export.push_to_hub={repository}"
        )


def _data(args: argparse.Namespace) -> int:
    from lora_lab.config import compose

    config = compose.compose(args.overrides, args.config_dir)
    _quiet_libraries()
    from lora_lab.verbs import data as look

    return 0 if look.data(config, args.rows, args.html) else 1


def _plan(args: argparse.Namespace) -> int:
    from lora_lab.config import compose

    probe = [text.partition("=")[2] for text in args.overrides if text.startswith("probe=")]
    if probe and probe[-1] not in ("true", "false"):
        raise ConfigError(f"probe={probe[-1]}: must be true or false.")
    config = compose.compose([text for text in args.overrides if not text.startswith("probe=")], args.config_dir)
    _quiet_libraries()
    from lora_lab.plan import plan

    plan.plan(config, probe=probe[-1:] == ["true"])
    return 0


def _multirun(args: argparse.Namespace) -> int:
    """Ordinary Hydra multirun. A run that fails leaves the others alone; all failures are listed at the end."""
    from lora_lab.config import hydra_app

    _quiet_libraries()
    made = []

    def launch(configs: list[RunConfig], nodes: Nodes | None = None) -> list[Outcome]:
        return made[0].launch(configs, nodes)

    def check(configs: list[RunConfig]) -> None:
        from lora_lab.data import sources

        sources.check_there(configs)
        from lora_lab.sweep import check, sweep  # with torch

        check.check(configs)
        made.append(sweep.Sweep())

    try:
        failures = hydra_app.multirun(args.overrides, args.config_dir, launch, check)
    except (ConfigError, DataError) as error:
        raise LoraLabError(f"{error}{forms.commas(args.overrides, str(error))}") from error
    return made[0].end(failures)


def _on_run(args: argparse.Namespace) -> int:
    """The verbs that work on an existing run folder, or on a sweep's."""
    sweeps = [text.partition("=")[2] for text in args.overrides if text.startswith("sweep=")]
    if sweeps and args.verb in ("resume", "merge"):
        return _on_sweep(args, sweeps[-1])
    if args.verb == "merge" and any(text.startswith("merge.adapters=") for text in args.overrides):
        return _combine(args)
    named = [text.partition("=")[2] for text in args.overrides if text.startswith("run=")]
    if len(named) != 1 or not named[0]:
        raise ConfigError(f"run: must be set once. Name a run folder: lora-lab {args.verb} run=runs/demo/...")
    rest = [text for text in args.overrides if not text.startswith("run=")]
    from lora_lab.run.trained import open_trained

    # a mistake is told before torch is loaded
    open_trained(
        named[0], args.verb, [text for text in rest if not (args.verb == "chat" and text.startswith("prompt="))]
    )
    _quiet_libraries()
    from lora_lab.merge import shrink
    from lora_lab.run import pipeline
    from lora_lab.verbs import chat

    verbs = {
        "resume": pipeline.resume,
        "evaluate": pipeline.evaluate,
        "merge": pipeline.merge,
        "shrink": shrink.shrink,
        "export": pipeline.export,
        "chat": chat.chat,
    }
    verbs[args.verb](named[0], rest)
    return 0


def _combine(args: argparse.Namespace) -> int:
    """`merge merge.adapters=[A,B]`."""
    from lora_lab.config.compose import parse_override

    text = [text for text in args.overrides if text.startswith("merge.adapters=")][-1]
    named = parse_override(text).value()
    if not isinstance(named, list):
        folders = text.partition("=")[2].strip("[] ").split(",")
        if len(folders) > 1:  # a path holds a bracket, a quote or the like
            line = ",".join(f'"{folder.strip()}"' for folder in folders)
            raise ConfigError(
                f"{text}: not a list that can be read. Put each path in quotes, and the whole: 'merge.adapters=[{line}]'"
            )
        raise ConfigError(f"{text}: name two or more run folders in a list: 'merge.adapters=[runs/a,runs/b]'")
    if len(named) < 2:
        raise ConfigError(f"{text}: this is one; name two or more run folders: 'merge.adapters=[runs/a,runs/b]'")
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{text}: {twice} is named twice. Name two or more different run folders.")
    missing = [name for name in named if not os.path.isdir(os.path.expanduser(str(name)))]
    if missing:
        raise ConfigError(f"{text}: {missing[0]}: no run there (looked from {os.getcwd()}). Name run folders.")
    given = [text for text in args.overrides if text.startswith("run=")]
    if given:
        raise ConfigError(
            f"{given[0]}: merge.adapters names the runs already. Drop it; run_dir=DIR is where the new run goes."
        )
    _quiet_libraries()
    from lora_lab.run import pipeline

    pipeline.combine([str(name) for name in named], args.overrides)
    return 0


def _on_sweep(args: argparse.Namespace, folder: str) -> int:
    """`resume` and `merge` with `sweep=DIR`."""
    _quiet_libraries()
    from lora_lab.sweep import sweep

    rest = [text for text in args.overrides if not text.startswith("sweep=")]
    if args.verb == "resume":
        return sweep.resume(folder, rest)
    sweep.merge(folder, rest)
    return 0


def _config(args: argparse.Namespace) -> int:
    import dataclasses

    from lora_lab.config.compose import leaves
    from lora_lab.config.origins import as_override, explain, key_rows
    from lora_lab.runtime import console

    if args.keys:
        for key, kind, default, meaning in key_rows():
            console.setting(key, default, f"{kind}. {meaning}")
        return 0
    config, origins = explain(args.overrides, args.config_dir)
    values = dict(leaves(dataclasses.asdict(config)))
    for key, origin in origins.items():
        console.setting(key, as_override(values[key]), origin)
    return 0


def _quiet_libraries() -> None:
    """Keep other libraries' advice to their developers off the user's terminal. Errors still come through."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # rows are tokenized on all cores
    for name in ("bitsandbytes", "transformers", "datasets", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _complete(argv: Sequence[str]) -> int:
    """Tab completion by Hydra's own plugins; verbs are completed here."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if any("query" in word for word in argv) and (len(words) < 2 or words[1] not in VERBS or line.endswith(words[1])):
        print(" ".join(VERBS))
        return 0
    from lora_lab.config import hydra_app

    hydra_app.complete(argv, verb=words[1] if len(words) > 1 else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
