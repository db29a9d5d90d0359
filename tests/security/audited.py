"""Open every folder of a corpus as a base under an audit hook, and say what each tried: `python audited.py CORPUS ALLOWED...`.

Run as a script, because an audit hook stays for the life of a process.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path

_STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)
_CALLS = (
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "urllib.Request",
    "http.client.connect",
)
_CHANGES = ("os.remove", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.rmdir", "os.mkdir", "shutil.rmtree")  # fmt: skip


class Watch:
    """What happened since the last `take`."""

    def __init__(self, corpus: Path, allowed: list[Path]):
        places = [
            *sys.path,
            *sysconfig.get_paths().values(),
            sys.prefix,
            sys.base_prefix,
            "/proc",
            "/sys",
            "/dev",
            "/usr",
            "/lib",
        ]
        self.corpus = corpus
        self.written = [path.resolve() for path in allowed]
        self.read = [*self.written, *(Path(place).resolve() for place in places if place)]
        self.folder = corpus / "good"
        self.seen: list[str] = []
        self.on = True

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.on or not (
            event in _STARTS
            or event in _CALLS
            or event in _CHANGES
            or event in ("open", "exec", "pickle.find_class", "ctypes.dlopen")
        ):
            return
        self.on = False  # looking at paths opens none, but might one day
        try:
            if event == "open":
                self._opened(*arguments)
            elif event == "exec":
                name = getattr(arguments[0], "co_filename", "")
                self._note(event, name, str(name).startswith(str(self.corpus)))
            elif event == "ctypes.dlopen":
                self._note(
                    event, arguments[0], arguments[0] is not None and str(arguments[0]).startswith(str(self.corpus))
                )
            elif event in _CHANGES:
                changed = arguments[1 if event in ("os.symlink", "os.link", "os.rename") else 0]
                relative = isinstance(changed, str) and not os.path.isabs(changed)  # in a folder whose removal was seen
                self._note(event, changed, not relative and not self._inside(changed, self.written))
            else:
                self._note(event, arguments, True)
        finally:
            self.on = True

    def _opened(self, path: object, mode: object, flags: int) -> None:
        if isinstance(path, int):
            return
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        places = self.written if writes else [self.folder.resolve(), *self.read]
        self._note("open", path, not self._inside(path, places))

    def _inside(self, path: object, places: list[Path]) -> bool:
        if isinstance(path, int):
            return True
        path = Path(os.fsdecode(path))
        return str(path) == os.devnull or any(path.resolve().is_relative_to(place) for place in places)

    def _note(self, event: str, what: object, wrong: bool) -> None:
        if wrong:
            self.seen.append(f"{event}: {str(what)[:300]}")

    def take(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen


def main() -> None:
    """Print a JSON object: folder -> {outcome, seen}."""
    corpus, allowed = Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]]
    import torch

    from lora_lab.base import load
    from lora_lab.base.tokenizer import load_tokenizer, save_tokenizer
    from lora_lab.config.data import DataConfig
    from lora_lab.config.model import ModelConfig, QuantConfig
    from lora_lab.data.chat import ChatEncoder
    from lora_lab.data.sources import Row
    from lora_lab.errors import LoraLabError
    from lora_lab.tasks.causal_lm.config import CausalLMConfig

    def use(folder: Path) -> None:
        file = folder / "x.gguf"
        files = load.find(ModelConfig(path=str(file if file.exists() else folder)))
        load.skeleton(files.folder, load.ModelKind())
        tokenizer = load_tokenizer(files.folder)
        save_tokenizer(tokenizer, allowed[0])
        load.load_model(files, load.ModelKind(), "float32", QuantConfig(), torch.device("cpu"), 0)
        encoder = ChatEncoder(DataConfig(train="-"), CausalLMConfig(), tokenizer)
        outcome = encoder.encode([Row(1, {"prompt": "red cat", "completion": "blue"})], "rows", "prompt_completion")[0]
        if outcome.problem:
            raise LoraLabError(outcome.sentence)

    use(corpus / "good")  # whatever is imported or looked up once
    watch = Watch(corpus.resolve(), allowed)
    sys.addaudithook(watch)
    (corpus / "canary/secret").read_text()  # so that it is known that the hook sees
    control, found = watch.take(), {}
    for folder in sorted(path for path in corpus.iterdir() if path.name != "canary"):
        watch.folder = folder
        try:
            use(folder)
            outcome = "used"
        except LoraLabError as error:
            outcome = f"refused: {error}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        found[folder.name] = {"outcome": outcome, "seen": watch.take()}
    watch.on = False
    foreign = [
        name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(str(corpus))
    ]
    print(json.dumps({"folders": found, "modules": foreign, "control": control}))


if __name__ == "__main__":
    main()
