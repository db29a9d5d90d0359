"""Adapters come and go while others answer; each is what it was when its training ended, or it does not come."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
from safetensors.torch import load_file, save_file

from lora_lab import cli
from lora_lab.runtime import storage
from lora_lab.verify import probes
from tests.conftest import make_base
from tests.serve.conftest import NAMES, client_of, halted, said, serving, stop, until


@pytest.fixture(scope="module")
def two(sweep):
    """Two of the adapters at first; the others may come."""
    found = serving([sweep / "0", sweep / "1"], f"serve.root={sweep}")
    yield found
    stop(found)


@pytest.fixture
def own(two):
    with client_of(two) as found:
        yield found


def answer(client, name: str, prompt: str = "red cat", **more) -> str:
    found = client.post("/v1/chat/completions", json={"model": name, "messages": said(prompt), **more})
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["message"]["content"]


def resealed(folder, change) -> None:
    """An adapter with other weights, and checksums that fit them."""
    with storage.new_folder(folder) as temporary:
        for file in folder.iterdir():
            if file.name != storage.MANIFEST:
                shutil.copy(file, temporary)
        tensors = load_file(temporary / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})


def test_adapters_come_and_go_while_others_answer(own, two, client):
    expected = {name: answer(client, name) for name in NAMES}
    wrong, stopping = [], threading.Event()

    def ask(name: str) -> None:
        while not stopping.is_set():
            if answer(own, name) != expected[name]:
                wrong.append(name)

    others = [threading.Thread(target=ask, args=(name,)) for name in ("0", "1", "0")]
    for thread in others:
        thread.start()
    try:
        for name in ("2", "5"):
            found = own.post("/v1/adapters", json={"path": name})
            assert found.status_code == 201, found.text
            assert found.json()["probes"].startswith("4 rows as at the end of training")
            assert answer(own, name) == expected[name]
        assert {one["id"] for one in own.get("/v1/models").json()["data"]} == {"base", "0", "1", "2", "5"}
        assert own.delete("/v1/adapters/2").json() == {"id": "2", "object": "model", "deleted": True}
        assert own.post("/v1/chat/completions", json={"model": "2", "messages": said("a")}).status_code == 404
        assert answer(own, "5") == expected["5"]
        again = own.post("/v1/adapters", json={"path": "2", "name": "other"})
        assert again.status_code == 201
        assert answer(own, "other") == expected["2"]
        assert own.post("/v1/adapters", json={"path": "3", "name": "other"}).status_code == 409
    finally:
        stopping.set()
        for thread in others:
            thread.join()
        for name in ("5", "other"):
            own.delete(f"/v1/adapters/{name}")
    assert wrong == []
    assert two.shelf.served.keys() == {"base", "0", "1"}


def test_one_that_goes_first_says_what_it_was_asked(own, two, client):
    assert own.post("/v1/adapters", json={"path": "6"}).status_code == 201
    found: list[str] = []
    with halted(two):
        asking = threading.Thread(target=lambda: found.append(answer(own, "6")))
        asking.start()
        until(lambda: two.engine.waiting == 1)
        going = threading.Thread(target=lambda: found.append(own.delete("/v1/adapters/6").text))
        going.start()
        until(lambda: two.shelf.served["6"].leaving)
        assert found == []
        assert own.post("/v1/chat/completions", json={"model": "6", "messages": said("a")}).status_code == 404
    asking.join()
    going.join()
    assert sorted(found) == sorted([answer(client, "6"), '{"id":"6","object":"model","deleted":true}'])
    assert "6" not in two.shelf.served


@pytest.mark.long
def test_the_last_one_may_go_and_others_come(sweep, client):
    alone = serving([sweep / "4"], f"serve.root={sweep}")
    try:
        with client_of(alone) as found:
            before = answer(found, "base")
            assert found.delete("/v1/adapters/4").status_code == 200
            assert answer(found, "base") == before == answer(client, "base")
            assert found.post("/v1/adapters", json={"path": "7"}).status_code == 201
            assert answer(found, "7") == answer(client, "7")
            assert answer(found, "base") == before
            assert found.delete("/v1/adapters/base").status_code == 400
    finally:
        stop(alone)


@pytest.mark.parametrize(
    "path", ["..", "/etc", "../../etc/passwd", "0/../..", "", ".", "a\0b", "x" * 5000, "0/../../sweep"]
)
def test_nothing_is_loaded_from_elsewhere(own, path):
    found = own.post("/v1/adapters", json={"path": path})
    assert found.status_code in (400, 403), found.text
    if path in ("..", "/etc", "../../etc/passwd", "0/../..", "."):
        assert found.status_code == 403


def test_no_link_leads_out(own, sweep, tmp_path):
    (sweep / "out").symlink_to(tmp_path)
    try:
        assert own.post("/v1/adapters", json={"path": "out"}).status_code == 403
    finally:
        (sweep / "out").unlink()


def test_without_a_root_none_comes(sweep, two):
    from lora_lab.serve.app import Service
    from lora_lab.serve.config import ServeConfig

    closed = Service(two.shelf, two.engine, ServeConfig(), two.metrics)
    with client_of(closed) as client:
        found = client.post("/v1/adapters", json={"path": "2"})
        assert (found.status_code, "serve.root is not set" in found.text) == (403, True)


@pytest.fixture
def copied(sweep):
    shutil.copytree(sweep / "2", sweep / "copied")
    yield sweep / "copied"
    shutil.rmtree(sweep / "copied")


def refused(own, two) -> str:
    before = answer(own, "1")
    found = own.post("/v1/adapters", json={"path": "copied"})
    assert found.status_code == 400, found.text
    assert two.shelf.served.keys() == {"base", "0", "1"}
    assert answer(own, "1") == before
    return found.json()["error"]["message"]


def test_damage_is_refused(own, two, copied):
    file = copied / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "SHA-256 differs" in refused(own, two)


def test_one_that_says_something_else_than_at_its_end_is_refused(own, two, copied):
    def change(tensors):
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name][0] += 0.5

    digest = probes.adapter_digest(copied / "adapter")
    resealed(copied / "adapter", change)
    assert "is of another adapter" in refused(own, two)
    kept = json.loads((copied / probes.FILE).read_text())
    assert kept["adapter"] == digest
    del kept["sha256"]
    kept["adapter"] = probes.adapter_digest(copied / "adapter")
    (copied / probes.FILE).write_text(storage.dump_json({**kept, "sha256": storage.digest(kept)}))
    assert "does not say what it said at the end of its training" in refused(own, two)
    (copied / probes.FILE).write_text("{}")
    assert "changed or damaged" in refused(own, two)


def test_an_older_run_keeps_no_probes_and_says_so(own, two, copied):
    (copied / probes.FILE).unlink()
    found = own.post("/v1/adapters", json={"path": "copied"})
    assert found.status_code == 201
    assert found.json()["probes"] == "none are kept with this run, so what it says was not compared"
    own.delete("/v1/adapters/copied")


@pytest.fixture(scope="module")
def elsewhere(sweep, rows_file, tmp_path_factory):
    """A run on another base of the same shape, and one on the same base in another type."""
    other = make_base(tmp_path_factory.mktemp("models") / "other", seed=5)
    told = [
        "model=hub", f"model.path={other}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={rows_file}", "adapter.r=4", "train.max_steps=1", f"run_dir={sweep}/elsewhere",
    ]  # fmt: skip
    assert cli.main(["train", *told]) == 0
    yield sweep / "elsewhere"
    shutil.rmtree(sweep / "elsewhere")


def test_an_adapter_of_another_base_is_refused(own, two, elsewhere):
    found = own.post("/v1/adapters", json={"path": "elsewhere"})
    assert found.status_code == 400
    assert "and this server's base is" in found.json()["error"]["message"]
    assert "elsewhere" not in two.shelf.served


def test_a_failure_in_a_pass_ends_those_rows_alone(own, two, monkeypatch):
    group = two.shelf.served["0"].group
    expected = answer(own, "1")

    def broken(self, rows):
        raise RuntimeError("a text that is not to be logged")

    from lora_lab.serve.batch import Batch

    with monkeypatch.context() as inside:
        inside.setattr(Batch, "_prompts", broken)
        found = own.post("/v1/chat/completions", json={"model": "0", "messages": said("a")})
    assert found.status_code == 500
    assert "not to be logged" not in found.text
    assert answer(own, "1") == expected
    assert group.shares
