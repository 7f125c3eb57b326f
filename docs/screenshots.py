"""Take docs/images/report-*.png and terminal.svg: a report and a run of the embedded sample.

The report is taken light, dark, narrow, and with one of its images opened; the terminal is that of `scalenet-ray
detect`, which this script runs.

    .venv/bin/scalenet-ray eval --limit 40 --output RUN
    .venv/bin/python docs/screenshots.py RUN

Needs Chromium, such as Debian's package `chromium`.
"""

from __future__ import annotations

import html
import os
import pty
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.browser import CHROMIUM, browser

_IMAGES = Path(__file__).parent / "images"
_SHOTS = {
    "light": ({"width": 1280, "height": 1500}, "light"),
    "dark": ({"width": 1280, "height": 1500}, "dark"),
    "narrow": ({"width": 390, "height": 1200}, "light"),
}
_COMMAND = "detect --engine local --output runs/first"
_COLUMNS = 80
_CELL = (8.43, 20)
"""Width and height of a character of 14 pixels."""
_PADDING = 14


def _terminal(arguments: str) -> list[str]:
    """The lines that `scalenet-ray` leaves on a terminal of `_COLUMNS` columns, run in an empty folder."""
    screen, program = pty.openpty()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "scalenet_ray", *arguments.split()],
            cwd=folder,
            env={**os.environ, "TERM": "xterm", "COLUMNS": str(_COLUMNS)},
            stdin=subprocess.DEVNULL,
            stdout=program,
            stderr=program,
        )
        os.close(program)
        written = b""
        # Linux reports the end of a terminal's program as an error.
        with suppress(OSError):
            while read := os.read(screen, 2**16):
                written += read
        os.close(screen)
        if process.wait():
            sys.exit(written.decode())
    # Of a line that was written over, what came last stays.
    lines = [line.rpartition("\r\x1b[K")[2] for line in written.decode().rstrip().split("\r\n")]
    return [line[i : i + _COLUMNS] for line in lines for i in range(0, max(1, len(line)), _COLUMNS)]


def _draw_terminal(command: str, lines: list[str]) -> None:
    """Draw a command and the lines that it printed as terminal.svg."""
    width, height = _CELL
    texts = []
    for i, line in enumerate([f"$ {command}", *lines], start=1):
        place = f'x="{_PADDING}" y="{_PADDING + height * i - 5}" textLength="{width * len(line):.1f}"'
        texts.append(f"<text {place}>{html.escape(line)}</text>\n")
    size = f"{width * _COLUMNS + 2 * _PADDING:.0f} {height * len(texts) + 2 * _PADDING}"
    path = _IMAGES / "terminal.svg"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">\n<style>\n'
        'text { font: 14px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre }\n'
        "text { fill: #d6dde4 }\ntext:first-of-type { fill: #7ee787 }\n</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#101418"/>\n{"".join(texts)}</svg>\n'
    )
    print(path.name, path.stat().st_size)


def _keep(name: str, taken: bytes) -> None:
    path = _IMAGES / f"report-{name}.png"
    path.write_bytes(taken)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128)
    small.save(path, optimize=True)
    print(path.name, path.stat().st_size)


def main(run: str) -> None:
    """Take all screenshots: of the terminal, and of a run's report."""
    _draw_terminal(f"scalenet-ray {_COMMAND}", _terminal(_COMMAND))
    if CHROMIUM is None:
        sys.exit("no browser: install chromium")
    page_of_run = (Path(run) / "report.html").resolve().as_uri()
    with browser() as chromium:
        for name, (size, scheme) in _SHOTS.items():
            page = chromium.new_page(viewport=size, color_scheme=scheme)
            page.goto(page_of_run)
            _keep(name, page.screenshot())
            if name != "narrow":
                page.locator("#pictures").scroll_into_view_if_needed()
                page.evaluate("document.getElementById('pictures').scrollIntoView()")
                page.wait_for_function("[...document.images].every(image => image.complete)")
                _keep(f"pictures-{name}", page.screenshot())
            page.close()
        page = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
        page.goto(page_of_run)
        page.locator(".open").first.click()
        page.wait_for_function("[...document.images].every(image => image.complete)")
        _keep("opened", page.screenshot())


if __name__ == "__main__":
    main(sys.argv[1])
