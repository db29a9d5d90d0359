"""A process that listens: it starts, answers clients of other processes, and ends cleanly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from lora_lab.serve import server
from tests.serve.conftest import said, until

pytestmark = pytest.mark.long

ASK = """
import http.client, json, sys, time
port, body, slow = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
answer = connection.getresponse()
if slow:
    answer.read(100)
    print("begun", flush=True)
    time.sleep(slow)
print(answer.status, answer.read().decode(), flush=True)
"""


class Process:
    """`lora-lab serve` in a process of its own."""

    def __init__(self, *words: str, **options):
        self.lines: list[str] = []
        command = [sys.executable, "-m", "lora_lab", "serve", "serve.port=0", *words]
        self.own = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        until(lambda: self.said("http://") or self.own.poll() is not None, 120)
        assert self.own.poll() is None, self.lines
        self.port = re.search(r"http://\S+:(\d+)", self.said("http://"))[1]

    def _read(self) -> None:
        for line in self.own.stdout:
            self.lines.append(line)

    def said(self, text: str) -> str:
        return next((line for line in self.lines if text in line), "")

    def ask(self, body: dict, slow: float = 0) -> subprocess.Popen:
        command = [sys.executable, "-c", ASK, self.port, json.dumps(body), str(slow)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def tell(self, script: str, *words: object) -> subprocess.Popen:
        """A client of its own, whose last line is JSON."""
        command = [sys.executable, "-c", script, self.port, *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    @property
    def megabytes(self) -> float:
        return psutil.Process(self.own.pid).memory_info().rss / 2**20

    def end(self, number: int = signal.SIGTERM) -> int:
        self.own.send_signal(number)
        code = self.own.wait(60)
        self._reader.join()
        self.own.stdout.close()
        return code


def body(name: str = "0", **more) -> dict:
    return {"model": name, "messages": said("red cat"), **more}


def answered(client: subprocess.Popen) -> tuple[int, dict]:
    status, _, text = client.communicate(timeout=120)[0].splitlines()[-1].partition(" ")
    return int(status), json.loads(text)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_answers_and_ends_by_a_signal(sweep, number, code):
    process = Process(f"sweep={sweep}")
    try:
        status, found = answered(process.ask(body("5", max_tokens=4)))
        assert (status, found["lora_lab"]["model"]) == (200, "5")
        client = process.ask(body("3", stream=True, max_tokens=300, temperature=1.5, seed=1), slow=0.01)
        assert client.stdout.readline() == "begun\n"
    finally:
        ended = process.end(number)
    assert client.communicate(timeout=60)[0].rstrip().endswith("[DONE]")  # an open answer goes on to its end
    assert ended == code, process.lines
    assert not process.said("Traceback"), process.lines
    assert "red cat" not in "".join(process.lines)


def test_an_open_answer_is_told_when_time_is_up(sweep):
    process = Process(f"run={sweep}/0", "serve.stop_seconds=0")
    try:
        client = process.ask(body(stream=True, max_tokens=2000, temperature=1.5, seed=1), slow=0.01)
        assert client.stdout.readline() == "begun\n"
    finally:
        code = process.end()
    rest = client.communicate(timeout=60)[0]
    assert code == 143
    assert "The server is stopping." in rest or "[DONE]" in rest


def test_a_slow_reader_keeps_nobody_waiting(sweep):
    process = Process(f"run={sweep}/0")
    try:
        slow = process.ask(body(stream=True, max_tokens=1500, temperature=1.5, seed=1), slow=600)
        assert slow.stdout.readline() == "begun\n"
        for _ in range(3):
            assert answered(process.ask(body(max_tokens=4)))[0] == 200
        slow.kill()
        slow.communicate()
    finally:
        assert process.end() == 143


def test_a_port_that_is_taken_is_told(sweep):
    process = Process(f"run={sweep}/0")
    try:
        words = [sys.executable, "-m", "lora_lab", "serve", f"run={sweep}/0", f"serve.port={process.port}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=dict(os.environ))
        assert done.returncode == 2
        assert "cannot be listened on" in done.stderr
    finally:
        process.end()


def test_names_of_runs():
    assert server.names(["a/x", "b/y"]) == ["x", "y"]
    assert server.names(["a/x", "b/x", "c/base"]) == ["a-x", "b-x", "c-base"]


# -- loads and faults -----------------------------------------------------------------------------------------------------

LOAD = """
import http.client, json, sys, threading
port, calls, at_once = int(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
found, places, lock = [None] * len(calls), iter(range(len(calls))), threading.Lock()
def work():
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    while True:
        with lock:
            place = next(places, None)
        if place is None:
            return
        method, path, body = calls[place]
        connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        found[place] = [answer.status, json.loads(answer.read())]
threads = [threading.Thread(target=work) for _ in range(at_once)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(found), flush=True)
"""


def told(client: subprocess.Popen, seconds: float = 300) -> list:
    return json.loads(client.communicate(timeout=seconds)[0].splitlines()[-1])


def test_two_hundred_callers_while_adapters_come_and_go(sweep):
    process = Process(*[f"runs=[{','.join(str(sweep / name) for name in '0123')}]"], f"serve.root={sweep}")
    try:
        ask = [["POST", "/v1/chat/completions", body(name, max_tokens=6)] for name in ("0", "1", "2", "3", "base")]
        alone = [text["choices"][0]["message"]["content"] for _, text in told(process.tell(LOAD, json.dumps(ask), 1))]
        load = process.tell(LOAD, json.dumps(ask * 80), 200)
        turns = [["POST", "/v1/adapters", {"path": "5", "name": "new"}], ["POST", "/v1/chat/completions", body("new", max_tokens=6)],
                 ["DELETE", "/v1/adapters/new", None]] * 4  # fmt: skip
        comes = told(process.tell(LOAD, json.dumps(turns), 1))
        found = told(load)
        assert [status for status, _ in comes] == [201, 200, 200] * 4, comes
        assert len({text["choices"][0]["message"]["content"] for _, text in comes[1::3]}) == 1
        assert {status for status, _ in found} == {200}
        texts = [text["choices"][0]["message"]["content"] for _, text in found]
        assert texts == alone * 80
    finally:
        assert process.end() == 143


def test_killed_and_started_again(sweep):
    files = {path: path.read_bytes() for path in sweep.rglob("*") if path.is_file()}
    process = Process(f"sweep={sweep}", f"serve.root={sweep}")
    before = answered(process.ask(body("4", max_tokens=8)))[1]["choices"]
    clients = [
        process.ask(body(name, stream=True, max_tokens=900, temperature=1.0, seed=1), slow=0.01) for name in "012"
    ]
    for client in clients:
        assert client.stdout.readline() == "begun\n"
    assert process.end(signal.SIGKILL) == -signal.SIGKILL
    for client in clients:
        client.communicate(timeout=60)  # each is told by its connection
    again = Process(f"sweep={sweep}", f"serve.root={sweep}", f"serve.port={process.port}")
    try:
        assert again.port == process.port
        assert answered(again.ask(body("4", max_tokens=8)))[1]["choices"] == before
    finally:
        assert again.end() == 143
    assert {path: path.read_bytes() for path in sweep.rglob("*") if path.is_file()} == files


FLOOD = """
import json, socket, sys
port, chunked = int(sys.argv[1]), sys.argv[2] == "chunked"
sent, piece = 0, b" " * 2**20
with socket.create_connection(("127.0.0.1", port), timeout=60) as own:
    kind = b"transfer-encoding: chunked" if chunked else b"content-length: 1073741824"
    own.sendall(b"POST /v1/chat/completions HTTP/1.1\\r\\nhost: localhost\\r\\ncontent-type: application/json\\r\\n" + kind + b"\\r\\n\\r\\n")
    try:
        while sent < 2**30:
            own.sendall((b"100000\\r\\n" if chunked else b"") + piece + (b"\\r\\n" if chunked else b""))
            sent += len(piece)
    except OSError:
        pass
    try:
        head = own.recv(100).decode("latin-1")
    except OSError:
        head = ""
print(json.dumps([sent, head]), flush=True)
"""


@pytest.mark.parametrize("kind", ["length", "chunked"])
def test_a_gigabyte_is_not_kept(sweep, kind):
    process = Process(f"run={sweep}/0")
    try:
        answered(process.ask(body(max_tokens=4)))
        before = process.megabytes
        clients = [process.tell(FLOOD, kind) for _ in range(4)]
        for client in clients:
            sent, head = told(client)
            assert sent < 2**30
            assert head == "" or " 413 " in head
        assert process.megabytes < before + 100
        assert answered(process.ask(body(max_tokens=4)))[0] == 200
        until(lambda: process.said('"status": 413'))
    finally:
        assert process.end() == 143


def test_a_full_disk_takes_no_answer_and_no_key(sweep, tmp_path):
    """Where its log goes there is no room, and none where a key would be kept."""
    from lora_lab.serve.keys import Keys, add

    file = tmp_path / "keys.json"
    text = add(file, "alice", ["use"])
    kept = file.read_bytes()
    full = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)); from lora_lab import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", full, "serve", "add_key=bob", f"serve.keys={file}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "ll-" not in done.stdout  # no key that nothing knows
    assert file.read_bytes() == kept
    assert Keys.read(file).find(text).name == "alice"
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]
    port = free_port()
    with open("/dev/full", "w") as nowhere:
        command = [sys.executable, "-m", "lora_lab", "serve", f"run={sweep}/0", f"serve.port={port}"]
        server = subprocess.Popen(command, stdout=nowhere, stderr=nowhere)
        try:
            wait = f"import socket, time\nwhile socket.socket().connect_ex(('127.0.0.1', {port})): time.sleep(0.1)"
            subprocess.run([sys.executable, "-c", wait], timeout=120, check=True)
            for _ in range(3):
                client = subprocess.Popen(
                    [sys.executable, "-c", ASK, str(port), json.dumps(body(max_tokens=4)), "0"],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                assert answered(client)[0] == 200
        finally:
            server.terminate()
            assert server.wait(60) == 143


def free_port() -> int:
    code = "import socket; own = socket.socket(); own.bind(('127.0.0.1', 0)); print(own.getsockname()[1])"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_it_writes_nothing_but_its_cache(sweep, tmp_path):
    places = {name: tmp_path / name for name in ("home", "here", "scratch", "cache")}
    for one in places.values():
        one.mkdir()
    own = {"HOME": "home", "TMPDIR": "scratch", "LORA_LAB_CACHE": "cache"}
    environment = {**os.environ, **{name: str(places[place]) for name, place in own.items()}}
    process = Process(f"run={sweep}/0", cwd=places["here"], env=environment)
    try:
        assert answered(process.ask(body(max_tokens=4)))[0] == 200
    finally:
        assert process.end() == 143
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {"cache"}, sorted(map(str, Path(tmp_path).rglob("*")))
