"""The pictures of README.md, of a real run: python -m benchmarks.pictures runs/spam/a

What the run's log says becomes docs/pictures/terminal.svg, and the run's page in `lora-lab ui` docs/pictures/run.png. The run is one of `lora-lab
train recipe=spam`. Needs Chromium, and `pip install playwright`; --no-page leaves the page out.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
_WIDTH, _SIZE = 96, {"width": 1240, "height": 800}
_TOPIC = re.compile(r"^ *(\w+)(?=  )")
_LEFT_OUT = "merged checkpoint, reloaded"  # a table that takes knowing


def terminal(run: Path, file: Path) -> None:
    """What was shown while the run was trained; no font is loaded from elsewhere."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), highlight=False)
    name = "/".join(run.parts[-3:])
    console.print(Text(f"$ lora-lab train recipe=spam run_dir={name}", style="bold"))
    for line in _lines((run / "log.txt").read_text(encoding="utf-8").replace(str(run.resolve()), name)):
        text = Text(line, no_wrap=True, overflow="crop")
        topic = _TOPIC.match(line)
        if topic is not None:
            text.stylize("bold cyan", topic.start(1), topic.end(1))
        console.print(text)
    drawn = console.export_svg(title="lora-lab", theme=MONOKAI)
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    drawn = drawn.replace("Fira Code", "DejaVu Sans Mono")
    file.write_text(drawn, encoding="utf-8")


def _lines(log: str) -> list[str]:
    """As far as the training went."""
    found, leaving = [], False
    for line in log.splitlines():
        leaving = line.startswith(_LEFT_OUT) or (leaving and line[:1] in "┏┃┡│└")
        if not leaving:
            found.append(line)
        if _TOPIC.match(line) and line.split()[0] == "next":
            break
    return found


def page(run: Path, file: Path) -> None:
    """The page of the run in `lora-lab ui`, as a browser shows it."""
    from playwright.sync_api import sync_playwright

    root, name = run.resolve().parents[1], "/".join(run.parts[-2:])
    line = [sys.executable, "-m", "lora_lab", "ui", root.name, "port=0"]
    server = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=root.parent)
    try:
        assert server.stdout is not None, "it was asked for"
        link = re.search(r"http://\S+", server.stdout.readline())
        assert link is not None, "it shows its link first"
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            shown = browser.new_page(viewport=_SIZE)
            shown.goto(link[0])
            shown.goto(f"{link[0].partition('/enter')[0]}/run?name={name}")
            shown.screenshot(path=str(file))
            browser.close()
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--no-page", action="store_true")
    told = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    terminal(told.run, PICTURES / "terminal.svg")
    if not told.no_page:
        page(told.run, PICTURES / "run.png")


if __name__ == "__main__":
    main()
