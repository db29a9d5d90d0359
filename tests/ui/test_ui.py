"""`lora-lab ui`: who is let in, what is shown, and what no request and no folder can do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from urllib.parse import quote, urlsplit

import pytest
from starlette.testclient import TestClient

from lora_lab.serve import server
from lora_lab.ui import app, views
from lora_lab.ui.door import ENTER, HEADERS
from lora_lab.ui.folder import Folder
from lora_lab.ui.talk import Talk
from tests.conftest import fails

HIDDEN = "a secret elsewhere"  # in a file beside the folder


PAGES = [
    "/",
    "/?only=adapter.r%3D2&sort=loss",
    "/run?name=sweep/0",
    "/run?name=begun",
    "/run?name=damaged",
    "/run?name=received",
    "/compare?run=sweep/0&run=sweep/1",
    "/compare?run=sweep/0&run=received&run=damaged",
    "/sweep?name=sweep",
    "/predictions?name=sweep/0",
    "/predictions?name=received&page=2",
    "/predictions?name=damaged",
    "/chat?run=sweep/0&run=sweep/1",
]
_VOID = {"meta", "input", "img"}


class Reader(HTMLParser):
    """Checks that a page is well-formed, and keeps what browsers would follow or load."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.asked: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.asked += [value or "" for name, value in attrs if name in ("href", "src", "action", "srcset")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def door(place):
    """The pages, and the paths to enter by that the terminal was told."""
    told: list[str] = []
    return app.build(place, told.append), told


@pytest.fixture(scope="module")
def client(place):
    """A browser that is in."""
    pages = app.build(place, lambda path: None)
    found = TestClient(pages, base_url="http://127.0.0.1:8765")
    assert found.get(ENTER, params={"token": pages.token}).status_code == 200
    return found


# -- who is let in ------------------------------------------------------------------------------------------------------


def test_a_link_counts_once_and_the_terminal_has_the_next(door):
    pages, told = door
    first, second = (TestClient(pages, base_url="http://127.0.0.1:8765") for _ in range(2))
    used = pages.token
    assert first.get("/").status_code == 401
    assert first.get(f"{ENTER}?token=wrong").status_code == 403
    assert first.head(f"{ENTER}?token={used}").status_code == 401  # a preview does not use it up
    entered = first.get(f"{ENTER}?token={used}")
    assert (entered.status_code, entered.url.path, len(entered.history)) == (200, "/", 1)
    cookie = entered.history[0].headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    assert second.get(f"{ENTER}?token={used}").status_code == 403
    assert second.get("/").status_code == 401
    assert told == [f"{ENTER}?token={pages.token}"]
    assert second.get(told[0]).status_code == 200


@pytest.mark.parametrize("path", [*PAGES, "/page?name=received&file=evaluation.html", "/nothing"])
def test_nothing_is_shown_without_the_cookie(door, path):
    found = TestClient(door[0], base_url="http://127.0.0.1:8765").get(path)
    assert found.status_code == 401
    assert "Open the link" in found.text


def test_other_names_of_this_machine_and_other_methods_are_refused(client):
    assert client.get("/", headers={"host": "evil.example:8765"}).status_code == 403
    assert client.get("/", headers={"host": "localhost:8765"}).status_code == 200
    assert {client.request(method, "/").status_code for method in ("POST", "PUT", "DELETE", "OPTIONS")} == {405}


def test_every_answer_says_what_a_browser_may_do(client):
    for path in (*PAGES, "/nothing", "/run?name=absent"):
        headers = client.get(path).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS
    own = client.get("/page?name=received&file=evaluation.html")
    assert own.text.startswith("<script>")  # as it is, and powerless
    assert own.headers["content-security-policy"].endswith("sandbox")
    assert "script-src" not in own.headers["content-security-policy"]


# -- what is shown ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_whole_and_need_nothing(client, path):
    """Nothing runs and nothing comes from elsewhere, whatever folders say."""
    found = client.get(path)
    assert found.status_code == 200, found.text
    page = Reader(found.text)
    assert not {"script", "iframe", "object", "link", "base", "style"} & set(page.tags[page.tags.index("body") :])
    assert not any(name.startswith("on") for name in page.attributes)
    assert "img" not in page.tags
    assert all(
        urlsplit(one).path in ("/", "/run", "/compare", "/sweep", "/predictions", "/page", "/chat", "")
        for one in page.asked
    )
    assert not any(urlsplit(one).netloc for one in page.asked)
    assert "\u202e" not in found.text
    assert "url(" not in found.text


def test_figures_are_those_of_the_files(client, place):
    result = json.loads((place / "sweep/0/result.json").read_text())
    page = client.get("/run?name=sweep/0").text
    for name, value in result["tuned"].items():
        assert re.search(rf"{re.escape(name)}</th>.*?{re.escape(f'{value:.4g}')}", page), name
    assert "verified" in page  # the merge
    assert page.count("<polyline") >= 3
    assert "0.000123" in page
    assert re.search(r"optim\.lr</td>.*?0\.01<.*?0\.0002<", page)
    assert client.get("/run?name=sweep/1").text.count("verified") == 0


def test_a_sweep_leads_to_its_runs_and_two_are_compared(client, place):
    ranking = json.loads((place / "sweep/ranking.json").read_text())
    page = client.get("/sweep?name=sweep").text
    assert ranking["judgement"].partition(" ")[0] in page
    assert [name in page for name in ("/run?name=sweep/0", "/run?name=sweep/1")] == [True, True]
    assert "file=report.html" in page
    compared = client.get("/compare?run=sweep/0&run=sweep/1").text
    assert re.search(r"adapter\.r</td>.*?>2<.*?>4<", compared)
    assert "optim.lr" not in compared
    assert ">best<" in compared
    assert "at least two" in client.get("/compare?run=sweep/0").text


def test_runs_are_filtered_sorted_and_counted(client):
    def links(page):
        return re.findall(r'<a href="/run\?name=([^"]+)"', page)

    assert set(links(client.get("/").text)) == {"sweep/0", "sweep/1", "begun", "damaged", "received"}
    assert links(client.get("/", params={"only": "adapter.r=4"}).text) == ["sweep/1"]
    best = client.get("/", params={"sort": "loss"}).text
    assert set(links(best)[:3]) == {"sweep/0", "sweep/1", "received"}  # the others have none
    for wrong, said in (("adapter.rr=4", "Did you mean"), ("x", "not an override"), ("'x", "a quote is not closed")):
        page = client.get("/", params={"only": wrong})
        assert (page.status_code, said in page.text) == (200, True)
    assert "no run has this metric" in client.get("/?sort=f9").text


def test_rows_are_paged_searched_and_split_by_right_and_wrong(client, place):
    rows = [json.loads(line) for line in (place / "sweep/0/predictions.jsonl").read_text().splitlines()]
    off = [row for row in rows if row["predicted_off"]]
    assert f"{len(rows)} held-out rows, {len(off)} of them off" in client.get("/predictions?name=sweep/0").text
    for only, count in (("off", len(off)), ("right", len(rows) - len(off))):
        assert client.get(f"/predictions?name=sweep/0&only={only}").text.count("<article") == count
    found = client.get("/predictions", params={"name": "sweep/0", "text": rows[0]["question"].upper()}).text
    assert rows[0]["question"] in found
    assert client.get("/predictions?name=received").text.count("<article") == 50
    assert client.get("/predictions?name=received&page=2").text.count("<article") == 10
    assert client.get("/predictions?name=received&page=99999").text.count("<article") == 10
    assert client.get("/predictions?name=received&text=no+such").text.count("<article") == 0


@pytest.mark.parametrize(
    ("count", "number", "rows"), [(0, 1, 0), (5, 1, 2), (5, 3, 1), (5, 9, 1), (4, 2, 2), (5, -1, 2)]
)
def test_parts_of_many(count, number, rows):
    assert len(views.part(range(count), number, 2).rows) == rows


def test_a_run_that_goes_on_is_read_again(place, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes((place / "sweep/0/config.yaml").read_bytes())
    folder = Folder(tmp_path)
    first = folder.look().runs["run"]
    assert (first.state, folder.look().runs["run"] is first) == ("begun", True)
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    assert folder.look().runs["run"].steps == 3


# -- chat ---------------------------------------------------------------------------------------------------------------


def say(client, runs: list[str], **fields: str):
    """Fill in the form of the chat page and send it, as its browser does."""
    page = client.get("/chat", params={"run": runs}).text
    held = {name: unescape(value) for name, value in re.findall(r'name="(form|turns)" value="([^"]*)"', page)}
    told = held | {"said": "hello"} | fields
    origin = fields.pop("origin", "http://127.0.0.1:8765")
    return client.post("/chat", data={**told, "run": runs}, headers={"origin": origin})


def turns_in(page: str) -> list:
    return json.loads(unescape(re.search(r'name="turns" value="([^"]*)"', page)[1]))


def test_base_and_runs_answer_side_by_side_as_the_server_does(place):
    from lora_lab.run.answering import Answering

    talk = Talk()
    pages = app.build(place, lambda path: None, talk)
    with TestClient(pages, base_url="http://127.0.0.1:8765") as client:
        client.get(ENTER, params={"token": pages.token})
        runs = ["sweep/0", "sweep/1"]
        first = say(client, runs, said="red <b>cat")
        assert first.status_code == 200
        Reader(first.text)
        [[said, answers]] = turns_in(first.text)
        assert (said, len(answers)) == ("red <b>cat", 3)
        messages = [{"role": "user", "content": said}]
        for name, answer in zip(runs, answers[1:], strict=True):
            with Answering.open(str(place / name), chat=True) as model:
                assert model.answers([messages]) == [answer]
        second = say(client, runs, said="and now?", turns=json.dumps([[said, answers]]))
        assert 'role="alert"' not in second.text, second.text
        assert [turn[0] for turn in turns_in(second.text)] == [said, "and now?"]
        with Answering.open(str(place / "sweep/1"), chat=True) as model:
            own = [*messages, {"role": "assistant", "content": answers[2]}, {"role": "user", "content": "and now?"}]
            assert model.answers([own]) == [turns_in(second.text)[1][1][2]]
        assert turns_in(say(client, runs, said="  ").text) == []
        talk.close()


def test_a_chat_takes_forms_of_its_own_pages_alone(client, door):
    runs = ["sweep/0"]
    assert say(client, runs, form="wrong").status_code == 403
    assert say(client, runs, origin="http://127.0.0.1:9000").status_code == 403
    assert client.post("/chat", data={"said": "x"}).status_code == 403  # no origin at all
    stranger = TestClient(door[0], base_url="http://127.0.0.1:8765")
    assert stranger.post("/chat", headers={"origin": "http://127.0.0.1:8765"}).status_code == 401
    for turns in ("[", "[1]", '[["a", ["b"]]]', json.dumps([["a", ["b", "c"]]] * 51), "[" * 100_000):
        assert say(client, runs, turns=turns).status_code == 409, turns[:30]
    assert say(client, runs, said="x" * 2**20).status_code == 409
    for wrong in ([], ["absent"], ["sweep/0"] * 2, ["sweep/0", "sweep/1", "begun", "received"], ["linked"]):
        assert client.get("/chat", params={"run": wrong}).status_code in (404, 409), wrong
    found = say(client, ["begun"])  # it has no adapter
    assert (found.status_code, "hello" in found.text, 'role="alert"' in found.text) == (200, True, True)


# -- what cannot be read, and what is not to be read ----------------------------------------------------------------------


def test_what_is_damaged_is_shown_as_such(client):
    page = client.get("/").text
    assert "other: " in page or "other/config.yaml" in page
    assert "leaves the run folder" in page  # the link, whose run is not opened
    assert ">damaged<" in page
    run = client.get("/run?name=damaged").text
    assert "1 of 3 lines are damaged" in run
    assert "must hold a JSON object" in run
    assert "2 lines of predictions.jsonl are damaged" in client.get("/predictions?name=damaged").text
    assert "one of whose" not in run
    for name in ("other", "linked"):
        assert client.get(f"/run?name={name}").status_code == 409
    assert client.get("/predictions?name=begun").status_code == 404


def test_a_ranking_that_is_none_is_told(place, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/config.yaml").write_bytes((place / "sweep/0/config.yaml").read_bytes())
    for text in ("{}", '{"ranking": 3}', '{"ranking": [{"name": "0"}]}', "{"):
        (tmp_path / "ranking.json").write_text(text)
        pages = app.build(tmp_path, lambda path: None)
        found = TestClient(pages, base_url="http://127.0.0.1")
        found.get(ENTER, params={"token": pages.token})
        assert found.get("/sweep?name=.").status_code == 409
        assert found.get("/").status_code == 200


@pytest.mark.parametrize(
    "name", ["..", "../secret.txt", "sweep/../..", "/etc", "linked", "sweep/0/..", "", "a\0b", "\ud800"]
)
def test_names_are_looked_up_and_never_become_paths(client, place, name):
    asked = quote(name, errors="surrogatepass")
    for path in (
        f"/run?name={asked}",
        f"/predictions?name={asked}",
        f"/sweep?name={asked}",
        f"/compare?run=begun&run={asked}",
    ):
        found = client.get(path)
        assert found.status_code in (404, 409), path
        assert HIDDEN not in found.text
    for file in ("evaluation.html", "../secret.txt", "config.yaml", "data.html"):
        assert client.get(f"/page?name={asked}&file={quote(file)}").status_code in (404, 409)


def test_links_that_leave_the_folder_are_not_followed(client, place):
    assert (place / "sweep/data.html").read_text() == HIDDEN
    found = client.get("/page?name=sweep&file=data.html")
    assert (found.status_code, HIDDEN in found.text) == (409, False)
    assert "was not followed" in found.text


def test_a_failure_of_a_page_is_told_without_its_insides(client, monkeypatch, capsys):
    def fails(*_):
        raise ZeroDivisionError(HIDDEN)

    monkeypatch.setattr(views, "run", fails)
    found = client.get("/run?name=begun")
    assert (found.status_code, HIDDEN in found.text) == (500, False)
    assert "ZeroDivisionError in" in capsys.readouterr().out


# -- the command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (["{place}/absent"], "{place}/absent: no folder"),
        (["{place}", "port=99999"], "port=99999: must be a number from 0 to 65535"),
        (["{place}", "port=http"], "port=http: must be a number"),
        (["{place}", "adapter.r=4"], "adapter.r=4: no effect on ui"),
    ],
)
def test_mistakes_are_sentences(told, sentence, place, capsys):
    assert sentence.format(place=place) in fails(["ui", *(text.format(place=place) for text in told)], capsys)


def test_without_the_extra_the_way_to_it_is_said(place, capsys, monkeypatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    assert "lora-lab ui needs starlette, uvicorn. pip install 'lora-lab[serve]'" in fails(["ui", str(place)], capsys)


LOADING = """
import http.client, os, re, signal, sys, threading
from urllib.parse import urlencode, urlsplit
from lora_lab import cli
from lora_lab.ui.talk import Talk

loads = threading.Event()

def never_ends(self, paths):
    loads.set()
    threading.Event().wait()

def browse():
    link = urlsplit(re.search(r"http://\\S+", sys.stdin.readline())[0])
    connection = http.client.HTTPConnection(link.netloc)
    connection.request("GET", f"{link.path}?{link.query}")
    answer = connection.getresponse()
    answer.read()
    cookie = {"Cookie": answer.headers["set-cookie"].partition(";")[0], "Origin": f"http://{link.netloc}"}
    connection.request("GET", "/chat?run=sweep/0", headers=cookie)
    form = re.search(r'name="form" value="([^"]*)"', connection.getresponse().read().decode())[1]
    said = urlencode({"form": form, "run": "sweep/0", "turns": "[]", "said": "hello"})
    connection.request("POST", "/chat", said, {**cookie, "Content-Type": "application/x-www-form-urlencoded"})
    loads.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    print(connection.getresponse().read().decode(), flush=True)

Talk._load = never_ends
threading.Thread(target=browse).start()
sys.exit(cli.main(["ui", sys.argv[1], "port=0"]))
"""


def test_a_base_that_is_being_loaded_does_not_hold_up_the_end(place):
    """However long it takes: here it never ends."""
    line = [sys.executable, "-c", LOADING, str(place)]
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        try:
            said, complained = program.communicate(program.stdout.readline(), timeout=120)
        finally:
            program.kill()
    assert program.returncode == 143, complained
    assert "ended while the base was being loaded" in said
    assert "Traceback" not in complained
