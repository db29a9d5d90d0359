"""Who may ask, how much, and what nobody learns: keys, limits, sizes, logs."""

from __future__ import annotations

import asyncio
import json

import pytest

from lora_lab import cli
from lora_lab.config import compose
from lora_lab.errors import ConfigError
from lora_lab.serve import server
from lora_lab.serve.app import Service
from lora_lab.serve.config import ServeConfig
from lora_lab.serve.guard import OPEN
from lora_lab.serve.keys import Allowance, Keys, add
from tests.conftest import fails
from tests.serve.conftest import at_once_but, client_of, said

CHAT = {"model": "0", "messages": said("red cat"), "max_tokens": 3}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A file of two keys, and their texts."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    texts = {
        "alice": add(file, "alice", ["use"]),
        "root": add(file, "root", ["use", "admin"]),
        "ops": add(file, "ops", ["admin"]),
    }
    return file, texts


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def limited(service: Service, **limits) -> Service:
    """The same model behind other limits."""
    config = ServeConfig(**{"root": service.config.root, **limits})
    return Service(service.shelf, service.engine, config, service.metrics)


def every_request(service: Service):
    """Each route of the application by each of its methods, and what is no route."""
    for route in service.routes():
        for method in route.methods:
            yield method, route.path.replace("{name}", "0")
    yield "GET", "/nothing"
    yield "GET", "/docs"
    yield "OPTIONS", "/v1/chat/completions"


def test_every_route_needs_a_key_but_one(service, keys):
    file, texts = keys
    with client_of(service, Keys.read(file)) as client:
        seen = 0
        for method, path in every_request(service):
            wrong = texts["root"][:-1] + ("a" if texts["root"][-1] != "a" else "b")
            for headers in (
                {},
                bearer(""),
                bearer(wrong),
                {"x-api-key": wrong},
                {"authorization": f"Basic {texts['root']}"},
            ):
                found = client.request(method, path, headers=headers, content=b"{}" if method == "POST" else None)
                if path in OPEN:
                    assert found.status_code == 200
                    continue
                assert found.status_code == 401, (method, path)
                assert "lora-lab-base" not in str(found.headers)
                if method != "HEAD":
                    assert found.json()["error"]["code"] == "invalid_api_key"
                seen += 1
        assert seen > 50
        assert client.get("/nothing", headers=bearer(texts["alice"])).status_code == 404
        assert client.get("/v1/chat/completions", headers=bearer(texts["alice"])).status_code == 405
        assert "lora-lab-base" in str(client.get("/nothing", headers=bearer(texts["alice"])).headers)


def test_a_key_comes_either_way_and_has_its_scopes(service, keys):
    file, texts = keys
    with client_of(service, Keys.read(file)) as client:
        for headers in (
            bearer(texts["alice"]),
            {"x-api-key": texts["alice"]},
            {"authorization": f"bearer {texts['root']}"},
        ):
            assert client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
        for method, path in (("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/0")):
            found = client.request(method, path, headers=bearer(texts["alice"]))
            assert (found.status_code, "scope 'admin'" in found.text) == (403, True)
        assert client.get("/v1/models", headers=bearer(texts["ops"])).status_code == 403
        assert client.delete("/v1/adapters/nobody", headers=bearer(texts["ops"])).status_code == 404


def test_keys_are_kept_as_hashes_alone(keys, tmp_path):
    file, texts = keys
    text = file.read_text()
    assert not any(key in text for key in texts.values())
    assert file.stat().st_mode & 0o777 == 0o600
    again = add(file, "alice", ["use"])
    known = Keys.read(file)
    assert known.find(texts["alice"]) is None
    assert known.find(again).name == "alice"
    assert [one.name for one in known.known] == ["root", "ops", "alice"]
    texts["alice"] = again
    for content in ("{}", '{"keys": []}', '{"keys": [{"name": "a", "scopes": ["all"], "sha256": "00"}]}', "nonsense"):
        (tmp_path / "k.json").write_text(content)
        with pytest.raises(ConfigError, match=r"k\.json"):
            Keys.read(tmp_path / "k.json")


def test_no_key_and_no_text_is_logged(service, keys, capsys):
    file, texts = keys
    with client_of(service, Keys.read(file)) as client:
        body = {**CHAT, "messages": said("call me at 0151-2345678")}
        found = client.post("/v1/chat/completions", json=body, headers=bearer(texts["alice"]))
        client.get(f"/v1/{texts['root']}", headers=bearer("a-wrong-key"))
        client.post("/v1/chat/completions", content=b'{"0151-2345678": 1}', headers=bearer(texts["alice"]))
    log = capsys.readouterr()
    lines = [
        json.loads(line.partition("{")[1] + line.partition("{")[2])
        for line in log.out.splitlines()
        if "request" in line
    ]
    assert lines[0]["key"] == "alice"
    assert (lines[0]["model"], lines[0]["answer_tokens"]) == ("0", found.json()["usage"]["completion_tokens"])
    assert lines[1]["refused"] == "wrong key"
    for secret in (*texts.values(), "a-wrong-key", "2345678", "red cat"):
        assert secret not in log.out + log.err


# -- how much -----------------------------------------------------------------------------------------------------------


def passed(app, headers, receive) -> tuple[int, list[dict]]:
    """Status and messages of a request whose body is asked for by `receive`."""
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "", "scheme": "http", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80), "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), *headers],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], sent


def test_a_body_of_a_gigabyte_is_refused_without_being_read(service):
    async def never():
        raise AssertionError("something of the body was read")

    app = client_of(service).app
    for length in (b"1073741824", b"9" * 40, b"-1", b"1e3"):
        status, sent = passed(app, [(b"content-length", length)], never)
        assert status == 413
        assert (b"connection", b"close") in sent[0]["headers"]


def test_a_body_without_a_length_is_read_to_the_limit_alone(service):
    given = [0]

    async def receive():
        given[0] += 1
        return {"type": "http.request", "body": b" " * 2**16, "more_body": True}

    status, _ = passed(client_of(limited(service, max_body_bytes=2**18)).app, [], receive)
    assert (status, given[0]) == (413, 5)


def test_limits_of_a_key(service, keys):
    file, texts = keys
    alice, root = bearer(texts["alice"]), bearer(texts["root"])
    with client_of(limited(service, requests_per_minute=2), Keys.read(file)) as client:
        assert [client.get("/v1/models", headers=alice).status_code for _ in range(3)] == [200, 200, 429]
        refused = client.get("/v1/models", headers=alice)
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.get("/v1/models", headers=root).status_code == 200
    with client_of(limited(service, tokens_per_minute=20), Keys.read(file)) as client:
        codes = [client.post("/v1/chat/completions", json=CHAT, headers=alice).status_code for _ in range(2)]
        assert codes == [200, 429]
    one = limited(service, concurrent_requests=1)
    with client_of(one, Keys.read(file)) as client:
        ask = lambda: client.post("/v1/chat/completions", json=CHAT, headers=alice).status_code  # noqa: E731
        codes = at_once_but(service, [ask] * 3, 2)
        assert sorted(codes) == [200, 429, 429]
        assert client.post("/v1/chat/completions", json=CHAT, headers=alice).status_code == 200
    text = service.metrics.text().decode()
    assert 'lora_lab_refusals_total{key="alice",reason="concurrency"}' in text


def test_too_many_that_wait_are_refused(service):
    before, service.engine._max_waiting = service.engine._max_waiting, 2
    try:
        with client_of(service) as client:
            codes = at_once_but(service, [lambda: client.post("/v1/chat/completions", json=CHAT).status_code] * 5, 3)
        assert sorted(codes) == [200, 200, 503, 503, 503]
    finally:
        service.engine._max_waiting = before


def test_an_allowance_fills_up_again():
    now = [0.0]
    own = Allowance(60, lambda: now[0])
    own.take(60)
    assert own.wait() == pytest.approx(1)
    now[0] += 1
    assert own.wait() == 0
    own.take(1000)  # what an answer took is known at its end
    assert own.wait() > 900
    now[0] += 10_000
    assert own.wait(10**6) == 0


# -- what a server may be told ------------------------------------------------------------------------------------------


def test_without_keys_it_is_for_its_own_machine(service):
    with client_of(service) as client:
        assert client.get("/v1/models").status_code == 200
        for host, status in (
            ("evil.example", 403),
            ("127.0.0.1:8000", 200),
            ("[::1]:80", 200),
            ("localhost.evil", 403),
        ):
            assert client.get("/v1/models", headers={"host": host}).status_code == status, host
        found = client.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": "text/plain"})
        assert found.status_code == 415
        found = client.options("/v1/models", headers={"origin": "https://evil.example"})
        assert not any("access-control" in name for name in found.headers)


def test_for_others_it_needs_keys(sweep, capsys, keys, tmp_path):
    run = f"run={sweep}/0"
    for more in (["serve.host=0.0.0.0"], ["serve=network"], ["serve.host=192.168.1.5"]):
        assert "nobody would need a key" in fails(["serve", run, *more], capsys)
    assert "no such file" in fails(
        ["serve", run, "serve=network", f"serve.keys={keys[0]}", "serve.certificate=/no", "serve.certificate_key=/no"],
        capsys,
    )
    assert "belong together" in fails(["serve", run, "serve.certificate=/no"], capsys)
    assert "none.json" in fails(["serve", run, f"serve.keys={tmp_path}/none.json"], capsys)


def test_a_folder_that_was_received_opens_no_ports(sweep, tmp_path):
    config = compose.load(sweep / "0" / "config.yaml", ["serve.host=0.0.0.0", "serve.port=1"])
    assert server.settings(config, ["serve.port=1"]) == ServeConfig(port=1)
    assert server.settings(config, ["serve=network"]).host == "0.0.0.0"  # noqa: S104


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "run: must be set once"),
        (["runs=[]"], "not a list of run folders"),
        (["runs=x"], "not a list of run folders"),
        (["run=a", "sweep=b"], "run: must be set once"),
        (["runs=[/nowhere/a,/nowhere/a]"], "named twice"),
        (["sweep=/nowhere"], "cannot be read"),
        (["base=/nowhere", "optim.lr=1"], "no effect on a base alone"),
        (["scopes=use", "run=a"], "no effect without add_key"),
        (["add_key=a"], "serve.keys: must be set"),
        (["add_key=a b", "serve.keys=/tmp/x"], "letters, digits"),
        (["add_key=a", "scopes=all", "serve.keys=/tmp/x"], "must be of use, train, admin"),
    ],
)
def test_words_that_do_not_fit(words, told, capsys):
    assert told in fails(["serve", *words], capsys)


def test_a_key_is_made_and_shown_once(tmp_path, capsys):
    file = tmp_path / "keys.json"
    assert cli.main(["serve", "add_key=alice", "scopes=use,admin", f"serve.keys={file}"]) == 0
    text = capsys.readouterr().out.strip()
    assert Keys.read(file).find(text).scopes == {"use", "admin"}


def test_without_the_extra_it_says_what_to_install(sweep, capsys, monkeypatch):
    monkeypatch.setattr(server, "_NEEDED", ("starlette", "no_such_library"))
    message = fails(["serve", f"run={sweep}/0"], capsys)
    assert message == "lora-lab: lora-lab serve needs no_such_library. pip install 'lora-lab[serve]'\n"


@pytest.mark.parametrize("verb", ["train", "data", "plan", "evaluate", "merge", "chat"])
@pytest.mark.parametrize("override", ["serve.port=9000", "serve=network", "+serve.host=0.0.0.0"])
def test_other_verbs_take_nothing_of_serve(verb, override, sweep, base, rows_file, capsys):
    composes = ["model=hub", f"model.path={base}", f"data.train={rows_file}"]
    words = composes if verb in ("train", "data", "plan") else [f"run={sweep}/0"]
    message = fails([verb, *words, override], capsys)
    assert "no effect" in message
    assert override.lstrip("+") in message or override in message
