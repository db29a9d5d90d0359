"""What the documents say is there, is there: links, commands, keys, the generated reference."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from benchmarks import reference
from lora_lab.config.run import all_keys
from lora_lab.schema.groups import GROUPS, choices
from lora_lab.verbs import VERBS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PARTS = ("$", "<", "...", "DIR", "FILE")  # of a value that stands for another


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, by GitHub's rule."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[list[str]]:
    """The `lora-lab` lines of a page's shell blocks, in words."""
    found = []
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(r"\s*(\w+=\S+ )*lora-lab ", line) and line.count('"') % 2 == 0 and line.count("'") % 2 == 0:
                words = shlex.split(line, comments=True)
                found.append(words[words.index("lora-lab") + 1 :])
    return found


def test_the_reference_is_current():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "make it: python -m benchmarks.reference"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in _LINK.findall(_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_name_verbs_keys_and_choices_that_there_are(page):
    for words in commands(page):
        verb, *rest = [word for word in words if word not in ("|", "&")]
        if verb.startswith("-") or "VERB" in words:
            continue
        assert verb in VERBS, words
        own = {word.name for word in VERBS[verb].words}
        for word in rest:
            key, equals, value = word.lstrip("+~").partition("=")
            if not equals or word.startswith("-") or key in own or key.startswith("hydra"):
                continue
            if key in GROUPS:
                known = set(choices(key))
                mine = key == "recipe" and "--config-dir" in words  # a recipe of the reader's own
                assert mine or any(part in value for part in _PARTS) or set(value.split(",")) <= known, words
            else:
                assert key in all_keys() or any(one.startswith(f"{key}.") for one in all_keys()), (key, words)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_can_be_read(page):
    for text in blocks(page, "python"):
        ast.parse(text)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name)
def test_yaml_can_be_read(page):
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text)


def test_every_block_says_what_it_is():
    """So that each is checked by the test of its kind; what nobody types is `text`."""
    kinds = {
        kind
        for page in PAGES
        for kind in re.findall(r"^```(\w*)\n(?:.*\n)*?```$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert kinds <= {"bash", "python", "yaml", "text"}, kinds


def test_the_index_and_the_site_name_every_page():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [page for group in site["nav"] for part in group.values() for one in part for page in one.values()]
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md"))
    assert [
        page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"]({page.name})" not in index
    ] == []


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_lists_every_verb(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [verb for verb in VERBS if not re.search(rf"^\| `(lora-lab )?{verb}\b", text, re.MULTILINE)] == []
