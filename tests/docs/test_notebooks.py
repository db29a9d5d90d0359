"""The notebooks run from top to bottom. Needs `pip install nbclient ipykernel`, and for two of them the data of the recipes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")

BOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
DATA = Path(os.environ.get("LORA_LAB_DATA", "data"))


def test_there_are_three():
    assert [book.stem for book in BOOKS] == ["chat", "classify", "sweep_and_merge"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_a_notebook_runs(book, tmp_path, monkeypatch):
    """In an empty folder, by a kernel of this interpreter; cells assert what they show."""
    monkeypatch.undo()  # a kernel is talked to over sockets of this machine
    notebook = nbformat.read(book, as_version=4)
    if "recipe=spam" in book.read_text(encoding="utf-8") and not (DATA / "sms_spam").is_dir():
        pytest.skip("LORA_LAB_DATA holds no sms_spam")
    assert all(not cell.get("outputs") for cell in notebook.cells)  # kept without outputs
    client = nbclient.NotebookClient(
        notebook, timeout=1500, startup_timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = [out["data"] for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    drawn = [one["text/html"] for one in shown if "text/html" in one]
    assert any("<table>" in text and "<svg" in text for text in drawn)
