"""`lora-lab VERB [key=value ...]`: the command line. Importing this module, and `--help`, load neither torch nor Hydra."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_lab import __version__
from lora_lab.config import forms
from lora_lab.errors import ConfigError, Interrupted, LoraLabError
from lora_lab.runtime import busy, environment, launch, ranks, signals
from lora_lab.verbs import VERBS
from lora_lab.verbs.base import Told, Verb

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

_EXIT_CODES = """
exit codes:
  0              done
  1              {found}
                 elsewhere: a bug in lora-lab
  2              a user error; the message says how to mend it
  3              training stopped before a non-finite update, or for lack of memory
  4              a merge or an export was refused
  130, 143, 129  Ctrl-C, SIGTERM, a closed terminal: the state is saved
A reader that closes its pipe (| head) changes nothing. Where stdout cannot be
written (disk full) a run goes on to its end; these verbs end with 2:
{printing}."""


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
    problem = forms.verb(argv, VERBS)
    if problem:
        _complain(f"lora-lab: {problem}")
        return 2
    try:
        args = _parse(argv)
    except SystemExit as done:  # help, version, or a wrong option: argparse has printed it
        raise SystemExit(_written(int(done.code or 0), needed=True)) from None
    signals.install()
    environment.before_torch()
    busy.begin()
    return _written(_run(args), needed=VERBS[args.verb].output_is_all)


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
        verb = VERBS[args.verb]
        if not verb.together:
            launch.refuse_several(args.verb)
        problem = forms.words(args.overrides, args.verb, composes=verb.composes)
        if problem:
            raise ConfigError(problem)
        _tell_repeated(args.overrides, verb)
        told = Told.of(args.verb, verb, args.overrides, args)
        told.refuse_foreign()
        return verb.run(told)
    except LoraLabError as error:
        return _failed(args, str(error), error.exit_code)
    except Interrupted as error:
        if not ranks.main():
            return error.exit_code
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


def _tell_repeated(overrides: Sequence[str], verb: Verb) -> None:
    """Say which of two values of one key holds: the last one."""
    each = {word.name for word in verb.words if word.each}
    last = {text.partition("=")[0].lstrip("+"): text for text in overrides}
    for text in overrides:
        key = text.partition("=")[0].lstrip("+")
        if last[key] != text and key not in each:
            from lora_lab.runtime import console

            console.say("twice", f"{text} has no effect, because {last[key]} comes after it")


def _failed(args: argparse.Namespace, sentence: str, code: int) -> int:
    if ranks.said_by_main():
        return code
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
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error):
        return (
            f"CUDA cannot compute this in a way that repeats exactly ({str(error).partition(',')[0]}). Set hardware.deterministic=false; "
            "what is resumed is then equal up to rounding."
        )
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return (
            f"memory ran out ({str(error).partition(chr(10))[0] or 'no room'}). Set a smaller data.max_tokens or "
            "train.micro_batch_size, or quant=nf4; lora-lab plan shows what needs how much."
        )
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from lora_lab.runtime.memory import is_out_of_memory

    return is_out_of_memory(error)


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

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        from lora_lab.runtime import console

        (console.stdout if file is sys.stdout else console.stderr).write(console.shown(message or ""))


def _parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    codes = _exit_codes()
    parser = _Parser(
        prog="lora-lab",
        formatter_class=text,
        description="Fine-tune a frozen, quantized base model with small adapters, and merge them into a verified checkpoint.",
        epilog="start here: lora-lab train recipe=demo\n"
        'tab completion: eval "$(lora-lab -sc install=bash)" (also zsh, fish)\n' + codes,
    )
    parser.add_argument("--version", action="version", version=f"lora-lab {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        one = verbs.add_parser(
            name,
            help=verb.summary,
            description=verb.summary + ".",
            epilog=verb.examples + _keys(verb) + codes,
            formatter_class=text,
        )
        one.add_argument("overrides", nargs="*", metavar="key=value", help="overrides")
        one.add_argument("--debug", action="store_true", help="show stack traces")
        for option in verb.options:
            one.add_argument(*option.flags, **option.settings)
    return parser


def _keys(verb: Verb) -> str:
    """The line of a verb's help that lists what it may be told about a trained run."""
    if verb.takes is None:
        return ""
    return f"\nkeys, beside run: {textwrap.fill(', '.join(verb.takes.keys), 110, subsequent_indent='  ')}\n"


def _exit_codes() -> str:
    *others, last = sorted(name for name, verb in VERBS.items() if verb.output_is_all)
    found = [f"{name} {verb.exit_1}" for name, verb in VERBS.items() if verb.exit_1]
    return _EXIT_CODES.format(found="\n                 ".join(found), printing=f"{', '.join(others)} and {last}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options may stand anywhere among the overrides."""
    if len(argv) == 2 and argv[1] == "help":
        argv = [argv[0], "--help"]
    args, rest = _parser().parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        own = [word.name for verb in VERBS.values() for word in verb.words]
        _parser().error(forms.option(unknown[0], argv, args.verb, own))
    args.overrides += rest
    if bare := VERBS[args.verb].bare:
        args.overrides = [text if "=" in text else f"{bare}={text}" for text in args.overrides]
    return args


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
