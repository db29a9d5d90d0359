"""A base with eight adapters behind the application, without a network."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("prometheus_client", reason="the extra 'serve' is not installed")

from starlette.testclient import TestClient

from lora_lab import cli
from lora_lab.run import takes
from lora_lab.run.trained import open_trained
from lora_lab.serve import server
from lora_lab.serve.app import Service, build
from tests.conftest import make_tokenizer

NAMES = [str(number) for number in range(8)]


@pytest.fixture(scope="session")
def sweep(base, rows_file, tmp_path_factory) -> Path:
    """Eight runs on one base, of unlike ranks."""
    folder = tmp_path_factory.mktemp("served") / "sweep"
    told = [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={rows_file}", "train.batch_size=4", "train.max_steps=2", "task.max_new_tokens=12",
        "adapter.r=2,4", "optim.lr=0.03,0.06", "seed=0,1", f"hydra.sweep.dir={folder}",
    ]  # fmt: skip
    assert cli.main(["train", "-m", *told]) == 0
    return folder


def serving(paths: list[Path], *overrides: str) -> Service:
    """Loaded, with its thread at work."""
    config = open_trained(str(paths[0]), takes.SERVE, overrides)[1]
    return server.prepared([str(path) for path in paths], config, overrides, server.settings(config, overrides))


def stop(service: Service) -> None:
    service.engine.stop(0)
    service.engine.join(30)
    assert not service.engine.alive


@pytest.fixture(scope="session")
def service(sweep) -> Iterator[Service]:
    found = serving([sweep / name for name in NAMES], f"serve.root={sweep}")
    yield found
    stop(found)


@pytest.fixture(scope="session")
def vectors(tmp_path_factory) -> Iterator[tuple[Service, list[list[float]]]]:
    """A base that was published for vectors, and what transformers makes of two texts."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "vectors"
    (folder / "1_Pooling").mkdir(parents=True)
    tokenizer = make_tokenizer(
        folder, chat_template=None, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[MASK]")
    )
    tokenizer.mask_token = "[MASK]"  # noqa: S105
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)).eval()
    model.save_pretrained(folder)
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    expected = []
    for text in ("red cat", "three blue birds"):
        with torch.no_grad():
            pooled = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)
        expected.append((pooled / pooled.norm()).tolist())
    overrides = ["model.dtype=float32", "hardware=cpu"]
    config = server.base_config(str(folder), overrides)
    service = server.prepared([], config, overrides, server.settings(config, overrides))
    yield service, expected
    stop(service)


def client_of(service: Service, keys=None) -> TestClient:
    return TestClient(build(service, keys), base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture
def client(service) -> Iterator[TestClient]:
    with client_of(service) as found:
        yield found


@contextlib.contextmanager
def halted(service: Service) -> Iterator[threading.Event]:
    """The thread that answers stands still until the event is set, or the block ends."""
    entered, gate = threading.Event(), threading.Event()
    done = service.engine.do(lambda: (entered.set(), gate.wait()))
    assert entered.wait(60)  # what comes earlier may still be taken in the turn before
    try:
        yield gate
    finally:
        gate.set()
        done.result()


@contextlib.contextmanager
def held(service: Service, count: int) -> Iterator[None]:
    """Requests that are made in the block wait for each other: the thread goes on when `count` are there."""
    with halted(service) as gate:
        waiter = threading.Thread(target=lambda: (until(lambda: service.engine.waiting >= count), gate.set()))
        waiter.start()
        yield
        waiter.join()


def until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "never"
        threading.Event().wait(0.002)


def at_once_but(service: Service, calls: list[Callable[[], object]], quick: int) -> list:
    """As `at_once`, while the thread that answers waits until so many have come back without it."""
    back: list = []
    with halted(service) as gate:
        waiter = threading.Thread(target=lambda: (until(lambda: len(back) >= quick), gate.set()))
        waiter.start()
        found = at_once([lambda call=call: (back.append(one := call()), one)[1] for call in calls])
        waiter.join()
    return found


def at_once(calls: list[Callable[[], object]]) -> list:
    """What each gives, called from a thread of its own."""
    found: list = [None] * len(calls)

    def run(place: int) -> None:
        found[place] = calls[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
