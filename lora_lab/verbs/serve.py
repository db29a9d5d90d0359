"""`lora-lab serve`: one base and many adapters over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.errors import ConfigError
from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, Word, before_libraries

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig

_EXAMPLES = """\
  lora-lab serve run=DIR                              one adapter and its base, for this machine: http://127.0.0.1:8000
  lora-lab serve 'runs=[DIR,DIR]' serve.port=9000     several on one base; clients name the folder as the model
  lora-lab serve sweep=DIR                            every run of a sweep
  lora-lab serve base=HuggingFaceTB/SmolLM2-135M      a base alone
  lora-lab serve add_key=alice serve.keys=keys.json   makes a key, which is shown once; scopes=use,admin: adapters come and go by it
  lora-lab serve run=DIR serve=network serve.keys=keys.json
  lora-lab serve run=DIR serve.engine=llama           llama.cpp answers, with the run's export=gguf_lora, once it says what the run says

Routes as OpenAI has them, and /v1/classify, /v1/tokens, /v1/answer, /v1/rewards, /v1/rerank, /v1/adapters, /metrics, /healthz: docs/serving.md
"""
_WHAT = "Name a run folder (run=DIR), several ('runs=[DIR,DIR]'), a sweep (sweep=DIR) or a base alone (base=MODEL)."
_BASE_KEYS = ("model.", "quant", "hardware", "speed", "serve")


def _run(told: Told) -> int:
    name = told.word("add_key")
    if name is not None:
        return _add_key(told, name)
    told.refuse("scopes", "no effect without add_key=NAME. Drop it.")
    said = [word for word in ("run", "runs", "sweep", "base") if told.words[word]]
    if len(said) != 1 or len(told.words[said[0]]) != 1:
        raise ConfigError(f"run: must be set once. {_WHAT}")
    from lora_lab.serve import server

    value = told.words[said[0]][0]
    if not value:
        raise ConfigError(f"{said[0]}=: names nothing. {_WHAT}")
    if said[0] == "base":
        paths: list[str] = []
        config = _of_base(value, told.overrides)
    else:
        paths = _folders(said[0], value)
        config = _of_runs(paths, told.overrides)
    server.check_extra()
    serve = server.settings(config, told.overrides)
    server.check(serve)
    if serve.engine is not None:
        _check_engine(serve.engine, said[0], told.overrides)
    server.serve(paths, config, told.overrides, before_libraries)
    return 0


def _check_engine(engine: str, word: str, overrides: list[str]) -> None:
    """
    Raises:
        ConfigError: another program answers, and this says something of how lora_lab would.
    """
    if word == "base":
        raise ConfigError(
            f"serve.engine={engine}: needs runs, whose probe rows the program is compared with. A base alone is served by that program "
            "itself, or by lora_lab (drop serve.engine)."
        )
    lost = [text for text in overrides if text.lstrip("+").startswith(("hardware.", "speed.", "hardware=", "speed="))]
    if lost:
        raise ConfigError(
            *(
                f"{text}: no effect beside serve.engine={engine}, which computes by its own options (serve.engine_command). Drop it."
                for text in lost
            )
        )


def _folders(word: str, value: str) -> list[str]:
    if word == "run":
        return [value]
    if word == "sweep":
        from lora_lab.sweep.jobs import run_folders

        found = [str(path) for path in run_folders(Path(value).expanduser()) if (path / "adapter").is_dir()]
        if not found:
            raise ConfigError(f"sweep={value}: no trained run there. Name a folder that lora-lab train -m made.")
        return found
    from lora_lab.config.compose import parse_override

    named = parse_override(f"runs={value}").value()
    if not isinstance(named, list) or not named:
        raise ConfigError(
            f"runs={value}: not a list of run folders. Write 'runs=[DIR,DIR]', paths with odd signs in quotes."
        )
    paths = [str(one) for one in named]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ConfigError(f"runs: {twice} is named twice. Drop one.")
    return paths


def _of_runs(paths: list[str], overrides: list[str]) -> RunConfig:
    """The first run's configuration, once all are known to be there; each is looked at closely when it is loaded."""
    from lora_lab.run import run_dir
    from lora_lab.run.trained import open_trained

    for path in paths:
        run_dir.open_existing(path)
    return open_trained(paths[0], takes.SERVE, overrides)[1]


def _of_base(base: str, overrides: list[str]) -> RunConfig:
    from lora_lab.serve import server

    foreign = next((text for text in overrides if not text.lstrip("+").startswith(_BASE_KEYS)), None)
    if foreign is not None:
        raise ConfigError(f"{foreign}: no effect on a base alone. It takes {', '.join(_BASE_KEYS)}.")
    return server.base_config(base, overrides)


def _add_key(told: Told, name: str) -> int:
    from lora_lab.config.compose import parse_override
    from lora_lab.runtime import console
    from lora_lab.serve import keys

    for word in ("run", "runs", "sweep", "base"):
        told.refuse(word, "no effect beside add_key=NAME, which only makes a key. Drop one of them.")
    file = [str(parse_override(text).value()) for text in told.overrides if text.startswith("serve.keys=")]
    others = [text for text in told.overrides if not text.startswith("serve.keys=")]
    if len(file) != 1 or others:
        raise ConfigError(
            "serve.keys: must be set, and nothing else, beside add_key=NAME: the file that holds the keys."
        )
    text = keys.add(Path(file[0]).expanduser(), name, (told.word("scopes") or "use").split(","))
    console.stream(text, "\n")
    return 0


VERB = Verb(
    summary="serve a base and its adapters over HTTP",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.SERVE,
    arguments=(RUN, Word("runs"), Word("sweep"), Word("base"), Word("add_key"), Word("scopes")),
    others=("server", "api", "deploy"),
)
