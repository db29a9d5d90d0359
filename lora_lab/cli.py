"""`lora-lab VERB [key=value ...]`: the command line. Importing this module, and `--help`, load neither torch nor Hydra."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO

from lora_lab import __version__, signals
from lora_lab.errors import ConfigError, Interrupted, LoraLabError

_PRINTING = ("config", "data", "plan", "chat")  # their output is all that they are for
_COMMON = """
exit codes: 0 done; 1 lora-lab data found errors (elsewhere: a bug in lora-lab); 2 something to mend (the message says what); 3 training stopped before a
non-finite update; 4 a merge or an export refused; 130 Ctrl-C and 143 SIGTERM, after saving. A reader that closes its pipe (| head) changes nothing;
where stdout cannot be written (disk full) a run still goes on to its end, and config, data, plan and chat end with 2."""

_TRAIN = """\
A run is composed from groups (GROUP=CHOICE) and single values (SECTION.KEY=VALUE):

  lora-lab train recipe=demo                              a shipped recipe, as it stands
  lora-lab train recipe=demo adapter.r=4 optim.lr=1e-4    the same with other values
  lora-lab train recipe=demo data.train=my.jsonl          on your rows (JSONL, JSON, CSV, Parquet)
  lora-lab train model=hub model.path=Qwen/Qwen3-8B data.train=my.jsonl quant=nf4
  lora-lab train -m recipe=demo adapter.r=4,8,16          one run for each value, together on one base; sweep=halving,
                                                          sweep.seeds=3, sweep.budget=30minutes: docs/sweeps.md
  lora-lab train --config-dir mine recipe=own             a recipe of yours: mine/recipe/own.yaml

groups:  model quant adapter task data optim train hardware tracker export recipe
keys:    lora-lab config --keys lists every key with its meaning; lora-lab config recipe=demo shows values and origins
"""

_EXAMPLES = {
    "train": _TRAIN,
    "config": """\
  lora-lab config recipe=demo adapter.r=4     resolved values, each with the file or override that set it
  lora-lab config --keys                      every key: type and limits, default, meaning
""",
    "data": """\
  lora-lab data recipe=demo                       rows as the model sees them, lengths, labels, checks; and as a page
  lora-lab data recipe=demo data.train=my.jsonl   the same for your rows
  lora-lab data recipe=demo --rows 10 --html look.html

Trained-on text is green (between brackets when piped). Exit code 1 if a check finds an error: rows that cannot be used,
answers that do not end, prompts that differ between training and inference. lora-lab train makes the same checks first
(data.check=error, warn or off).
""",
    "plan": """\
  lora-lab plan recipe=demo                             modules, steps, memory, disk: nothing is loaded
  lora-lab plan recipe=demo train.batch_size=32 quant=none
  lora-lab plan recipe=demo probe=true                  also loads the model, trains six steps, and says how long it takes
""",
    "resume": """\
  lora-lab resume run=runs/demo/2026-01-31_12-00-00
  lora-lab resume sweep=runs/demo/sweep_2026-01-31_12-00-00

Goes on from the newest valid checkpoint and ends with the same bytes as a run that was never interrupted. The run's own
configuration holds; base and data must be unchanged.
""",
    "evaluate": """\
  lora-lab evaluate run=DIR
  lora-lab evaluate run=DIR data.eval=other.jsonl task.generate_rows=100
""",
    "merge": """\
  lora-lab merge run=DIR
  lora-lab merge run=DIR export.dtype=float32
  lora-lab merge sweep=DIR                                the run that the ranking says to take; or member=3
  lora-lab merge 'merge.adapters=[A,B,C]'                   one adapter of several, in a run folder of its own, and that merged
  lora-lab merge 'merge.adapters=[A,B]' 'merge.weights=[0.7,0.3]' merge.method=ties run_dir=DIR

Adds the adapter to the base, saves DIR/merged, loads that in a fresh process with plain transformers, compares it with the
trained model on held-out rows, and keeps it only if it agrees (limits: the merge section). After training on a quantized
base, what to merge into is measured (merge.base).
""",
    "shrink": """\
  lora-lab shrink run=DIR                                  ranks 1, 2, 4, ... below the adapter's, each measured
  lora-lab shrink run=DIR 'shrink.ranks=[8,4]' shrink.tolerance=0.02 run_dir=OUT

The lowest rank whose held-out loss rises by no more than shrink.tolerance is saved as a run folder (DIR/shrunk), which can be
evaluated, merged and exported like any other.
""",
    "export": """\
  lora-lab export run=DIR export=gguf                      DIR/export/gguf: for llama.cpp, LM Studio and the like
  lora-lab export run=DIR 'export.targets=[ollama]' export.gguf_type=q8_0
  lora-lab export run=DIR 'export.targets=[vllm,gguf_lora]'  the adapter alone
  lora-lab export run=DIR export=quantized export.quantization=int8

Each is loaded where it is meant to be loaded and compared on held-out rows with what it was made of; what disagrees is not
kept. The same keys with lora-lab train are checked before training.
""",
    "chat": """\
  lora-lab chat run=DIR
  lora-lab chat run=DIR prompt="Extract the order as JSON with the keys customer, city, item, quantity, reference.

  Order R-2041 for Graz: two oak tables. Name on the invoice is Maria Keller."

The prompt is rendered by the chat template that the model was trained with; data.train shows how prompts were worded.
""",
}

VERBS = {
    "train": "train an adapter; evaluate; merge if the recipe says so",
    "data": "show rows as the model sees them, and check them",
    "plan": "what a run would train, and in how much memory, disk and time",
    "resume": "go on with an interrupted run",
    "evaluate": "measure base and adapter on held-out rows",
    "merge": "fold the adapter, or several, into the base, and prove it",
    "shrink": "lower the rank of a trained adapter as far as its quality holds",
    "export": "make what other programs load: GGUF, Ollama, vLLM, fewer bits",
    "chat": "talk to a trained model",
    "config": "show the resolved configuration and where each value comes from",
}


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
        return {"train": _train, "data": _data, "plan": _plan, "config": _config}.get(args.verb, _on_run)(args)
    except LoraLabError as error:
        return _failed(args, str(error), error.exit_code)
    except Interrupted as error:
        what = f"sweep={error.sweep}" if error.sweep else f"run={error.run}"
        hint = f"; what was finished is saved. Go on with: lora-lab resume {what}" if error.sweep or error.run else ""
        _complain(f"lora-lab: stopped{hint}")
        return error.exit_code
    except Exception as error:
        sentence = _of_machine(error)
        if sentence is not None:
            return _failed(args, f"{sentence} --debug shows where.", 2)
        _complain(traceback.format_exc().rstrip())
        _complain("lora-lab: this is a bug in lora-lab, not a mistake of yours. Please report it with the lines above.")
        return 1


def _failed(args: argparse.Namespace, sentence: str, code: int) -> int:
    if args.debug:
        _complain(traceback.format_exc().rstrip())
    _complain(f"lora-lab: {sentence}")
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
    from lora_lab import console

    console.complain(text)


def _written(code: int, needed: bool) -> int:
    """The exit code, now that all output is where it can go.

    Args:
        needed: whether the output is what the command is for, so that losing it is a failure.
    """
    from lora_lab import console

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
        from lora_lab import console

        (console.stdout if file is sys.stdout else console.stderr).write(console.shown(message or ""))


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
        verb = verbs.add_parser(
            name, help=summary, description=summary + ".", epilog=_EXAMPLES[name] + _COMMON, formatter_class=text
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
    args, rest = _parser().parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        _parser().error(f"unknown option {unknown[0]}; see lora-lab {args.verb} --help")
    args.overrides += rest
    return args


# -- verbs ------------------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    from lora_lab import compose

    if args.multirun:
        return _multirun(args)
    alone = [text for text in args.overrides if text.startswith(("sweep=", "sweep."))]
    if alone:
        raise ConfigError(f"{alone[0]}: no effect on a single run. Add -m and several values, such as adapter.r=4,8.")
    config = compose.compose(args.overrides, args.config_dir)
    _quiet_libraries()
    from lora_lab import run

    run.train(config)
    return 0


def _data(args: argparse.Namespace) -> int:
    from lora_lab import compose

    config = compose.compose(args.overrides, args.config_dir)
    _quiet_libraries()
    from lora_lab import look

    return 0 if look.data(config, args.rows, args.html) else 1


def _plan(args: argparse.Namespace) -> int:
    from lora_lab import compose

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
    _quiet_libraries()
    from lora_lab import hydra_app
    from lora_lab.sweep import ranking, sweep

    whole = sweep.Sweep()
    failures = hydra_app.multirun(args.overrides, args.config_dir, ranking.check, whole.launch)
    return whole.end(failures)


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
    _quiet_libraries()
    from lora_lab import chat, run
    from lora_lab.merge import shrink

    verbs = {
        "resume": run.resume,
        "evaluate": run.evaluate,
        "merge": run.merge,
        "shrink": shrink.shrink,
        "export": run.export,
        "chat": chat.chat,
    }
    verbs[args.verb](named[0], [text for text in args.overrides if not text.startswith("run=")])
    return 0


def _combine(args: argparse.Namespace) -> int:
    """`merge merge.adapters=[A,B]`."""
    from lora_lab.compose import parse_override

    named = parse_override([text for text in args.overrides if text.startswith("merge.adapters=")][-1]).value()
    if not isinstance(named, list) or len(named) < 2:
        raise ConfigError(f"merge.adapters={named}: name two or more run folders: merge.adapters=[runs/a,runs/b]")
    given = [text for text in args.overrides if text.startswith("run=")]
    if given:
        raise ConfigError(
            f"{given[0]}: merge.adapters names the runs already. Drop it; run_dir=DIR is where the new run goes."
        )
    _quiet_libraries()
    from lora_lab import run

    run.combine([str(name) for name in named], args.overrides)
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

    from lora_lab import console
    from lora_lab.compose import leaves
    from lora_lab.explain import as_override, explain, key_rows

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
    from lora_lab import hydra_app

    hydra_app.complete(argv, verb=words[1] if len(words) > 1 else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
