"""How llama.cpp's server and vLLM are started with exported adapters, and how they are asked."""

from __future__ import annotations

import abc
import csv
import dataclasses
import importlib.util
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lab.errors import ConfigError, ExportError
from lora_lab.export import adapter as peft_export
from lora_lab.export import gguf
from lora_lab.runtime.reading import check_file, read_json
from lora_lab.serve.external.program import HOST
from lora_lab.serve.words import Wish

if TYPE_CHECKING:
    from lora_lab.run.setup import Setup
    from lora_lab.serve.external.program import Program

_FORCED = 1e4  # added to the logit of a token that is to be drawn


@dataclasses.dataclass(frozen=True)
class Told:
    """What a piece of an answer says."""

    text: str
    reason: str | None = None  # stop or length, at the end
    tokens: int | None = None  # of the whole answer, where they are told


class Dialect(abc.ABC):
    """One kind of program. An adapter is named by its place among those that it was started with; None is the base."""

    target: ClassVar[str]  # of `export.targets`: what it loads
    key_variable: ClassVar[str]  # of the environment: the key that requests need
    likeliest: ClassVar[int]  # tokens whose probability it tells in one place

    @abc.abstractmethod
    def default_command(self) -> list[str]:
        """Program and first arguments, where nothing is said of them.

        Raises:
            ConfigError: there is none.
        """

    @abc.abstractmethod
    def base(self, setup: Setup, named: str | None) -> Path:
        """The base as it loads it.

        Args:
            named: `serve.engine_base`.

        Raises:
            LoraLabError: it cannot be had.
        """

    @abc.abstractmethod
    def words(self, command: Sequence[str], base: Path, adapters: Sequence[Path], port: int) -> list[str]:
        """The whole command.

        Args:
            command: the program and options of the user's.
            adapters: folders of `target`.
        """

    @abc.abstractmethod
    def question(
        self, prompt: Sequence[int], wish: Wish, adapter: int | None, ends: Sequence[int], penalty: float
    ) -> tuple[str, dict[str, Any]]:
        """Path and body of a request for an answer.

        Args:
            ends: tokens that end it.
            penalty: of tokens that were there before, as transformers divides by it; 1: none.
        """

    @abc.abstractmethod
    def probabilities(
        self, program: Program, prompt: Sequence[int], adapter: int | None, letter: int
    ) -> dict[int, float]:
        """Log-probabilities of the likeliest tokens after a prompt, by token.

        Args:
            letter: a token that is a whole character or more, and ends nothing.
        """

    @abc.abstractmethod
    def told(self, event: dict[str, Any]) -> Told:
        """What an event of a stream says."""

    @abc.abstractmethod
    def positions(self, program: Program) -> int:
        """Tokens that a prompt and its answer may have."""

    @abc.abstractmethod
    def against_ends(self, program: Program, ends: Sequence[int], letter: int) -> str:
        """Why an answer would not end where it should; '': it would.

        Args:
            letter: as for `probabilities`.
        """


class Llama(Dialect):
    """llama.cpp's server."""

    target, key_variable, likeliest = "gguf_lora", "LLAMA_API_KEY", 100

    def __init__(self) -> None:
        self._count = 0  # adapters

    def default_command(self) -> list[str]:
        if found := shutil.which("llama-server"):
            return [found]
        if importlib.util.find_spec("xllamacpp") is not None:
            return [sys.executable, "-P", str(Path(__file__).with_name("llama_server.py"))]
        raise ConfigError(
            "serve.engine=llama: there is no llama-server on the PATH. Name it, as in 'serve.engine_command=[/opt/llama-server]', or "
            "pip install 'lora-lab[gguf]', which brings llama.cpp."
        )

    def base(self, setup: Setup, named: str | None) -> Path:
        if named is None:
            return gguf.base_file(setup)
        file = Path(named).expanduser()
        check_file(file, ConfigError, None)
        return file

    def words(self, command: Sequence[str], base: Path, adapters: Sequence[Path], port: int) -> list[str]:
        self._count = len(adapters)
        files = [word for folder in adapters for word in ("--lora", _field(_only(folder, "*.gguf")))]
        return [*command, "--model", str(base), *files, "--host", HOST, "--port", str(port)]

    def question(
        self, prompt: Sequence[int], wish: Wish, adapter: int | None, ends: Sequence[int], penalty: float
    ) -> tuple[str, dict[str, Any]]:
        # an empty list would not mean the base but the scales of the start, and those are 1 of all adapters
        scales = [{"id": place, "scale": float(place == adapter)} for place in range(self._count)]
        body: dict[str, Any] = {
            "prompt": list(prompt), "lora": scales, "n_predict": wish.max_tokens, "stream": wish.top_logprobs is None,
            "temperature": wish.temperature, "top_p": wish.top_p, "top_k": 0, "min_p": 0.0, "stop": list(wish.stops),
            "samplers": ["penalties", "temperature", "top_p"], "repeat_penalty": penalty, "repeat_last_n": len(prompt) + wish.max_tokens,
            "n_probs": wish.top_logprobs or 0,
        }  # fmt: skip
        if wish.seed is not None:  # read anew, or rounding would depend on what was asked before
            body |= {"seed": wish.seed, "cache_prompt": False}
        return "/completion", body

    def probabilities(
        self, program: Program, prompt: Sequence[int], adapter: int | None, letter: int
    ) -> dict[int, float]:
        path, body = self.question(prompt, Wish(1, top_logprobs=self.likeliest), adapter, [], 1.0)
        # of a token that ends the answer, or that is part of a character, nothing is told, so the letter is drawn
        said = program.ask(path, body | {"logit_bias": [[letter, _FORCED]]})
        [first] = said["completion_probabilities"][:1]
        return {int(one["id"]): float(one["logprob"]) for one in first["top_logprobs"]}

    def told(self, event: dict[str, Any]) -> Told:
        if not event.get("stop"):
            return Told(event.get("content", ""))
        reason = "length" if event.get("stop_type") == "limit" else "stop"
        return Told(event.get("content", ""), reason, event.get("tokens_predicted"))

    def positions(self, program: Program) -> int:
        return int(program.ask("/props")["default_generation_settings"]["n_ctx"])

    def against_ends(self, program: Program, ends: Sequence[int], letter: int) -> str:
        for end in ends:
            body = {"prompt": [letter], "n_predict": 2, "logit_bias": [[end, _FORCED]], "temperature": 0}
            if program.ask("/completion", body).get("stop_type") != "eos":
                return f"token {end} ends the run's answers, and nothing in its GGUF file of the base says that it is an end"
        return ""


class VLLM(Dialect):
    """vLLM's server, which speaks OpenAI's API."""

    target, key_variable, likeliest = "vllm", "VLLM_API_KEY", 20

    def default_command(self) -> list[str]:
        if found := shutil.which("vllm"):
            return [found, "serve"]
        raise ConfigError(
            "serve.engine=vllm: there is no vllm on the PATH. It needs an environment of its own; name its program, as in "
            "'serve.engine_command=[/opt/vllm/bin/vllm,serve]'."
        )

    def base(self, setup: Setup, named: str | None) -> Path:
        if setup.base.published is not None:
            raise ConfigError(
                f"serve.engine=vllm: the base was published in {setup.base.published.method}, and probe rows of it are compared with its "
                "unquantized weights. Serve it by lora_lab."
            )
        return setup.base.folder

    def words(self, command: Sequence[str], base: Path, adapters: Sequence[Path], port: int) -> list[str]:
        if "serve" not in command:
            raise ConfigError(
                f"serve.engine_command={list(command)}: vLLM's begins with its program and 'serve', as in [vllm,serve]."
            )
        head = command.index("serve") + 1  # the base comes behind it
        ranks = [int(read_json(folder / "adapter_config.json", ExportError)["r"]) for folder in adapters]
        names = [f"{_name(place)}={folder}" for place, folder in enumerate(adapters)]
        words = [
            *command[:head],
            str(base),
            *command[head:],
            "--host",
            HOST,
            "--port",
            str(port),
            "--served-model-name",
            _name(None),
            "--enable-lora",
        ]
        words += ["--max-loras", str(len(adapters)), "--max-lora-rank", str(peft_export.vllm_rank(max(ranks)))]
        words += ["--generation-config", "vllm", "--lora-modules", *names]
        own = [
            folder for folder in adapters if (folder / "tokenizer.json").is_file()
        ]  # where the base's is read otherwise
        return [*words, "--tokenizer", str(own[0])] if own else words

    def question(
        self, prompt: Sequence[int], wish: Wish, adapter: int | None, ends: Sequence[int], penalty: float
    ) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": _name(adapter), "prompt": list(prompt), "max_tokens": wish.max_tokens, "temperature": wish.temperature,
            "top_p": wish.top_p, "top_k": 0, "min_p": 0.0, "stop": list(wish.stops), "stop_token_ids": list(ends),
            "repetition_penalty": penalty,
        }  # fmt: skip
        if wish.seed is not None:
            body["seed"] = wish.seed
        if wish.top_logprobs is None:
            return "/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}
        return "/v1/completions", body | {"logprobs": wish.top_logprobs, "return_tokens_as_token_ids": True}

    def probabilities(
        self, program: Program, prompt: Sequence[int], adapter: int | None, letter: int
    ) -> dict[int, float]:
        said = program.ask(*self.question(prompt, Wish(1, top_logprobs=self.likeliest), adapter, [], 1.0))
        [first] = said["choices"][0]["logprobs"]["top_logprobs"][:1]
        return {int(name.removeprefix("token_id:")): float(value) for name, value in first.items()}

    def told(self, event: dict[str, Any]) -> Told:
        usage = event.get("usage") or {}
        [choice] = event.get("choices") or [{}]
        return Told(choice.get("text", ""), choice.get("finish_reason"), usage.get("completion_tokens"))

    def positions(self, program: Program) -> int:
        return int(program.ask("/v1/models")["data"][0]["max_model_len"])

    def against_ends(self, program: Program, ends: Sequence[int], letter: int) -> str:
        return ""  # each request names them


DIALECTS: dict[str, type[Dialect]] = {"llama": Llama, "vllm": VLLM}


def _name(adapter: int | None) -> str:
    return "base" if adapter is None else f"adapter{adapter}"


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ExportError(f"{folder}: holds {len(found)} files {pattern}, and must hold one. Export it anew.")
    return found[0]


def _field(file: Path) -> str:
    """A path as one of a list that is divided by commas."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([str(file)])
    return line.getvalue()
