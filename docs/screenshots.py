"""Take docs/images/report-*.png: a report of the embedded sample, light, dark, narrow, and one image of it opened.

    .venv/bin/scalenet-ray eval --limit 40 --output RUN
    .venv/bin/python docs/screenshots.py RUN

Needs Chromium, such as Debian's package `chromium`.
"""

from __future__ import annotations

import sys
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


def _keep(name: str, taken: bytes) -> None:
    path = _IMAGES / f"report-{name}.png"
    path.write_bytes(taken)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128)
    small.save(path, optimize=True)
    print(path.name, path.stat().st_size)


def main(run: str) -> None:
    """Take all screenshots of a run's report."""
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
