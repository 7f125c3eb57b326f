"""How long a report of 500 images takes until it can be used, in a headless Chromium, opened from a file."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from scalenet_ray.report.page import render_report
from tests.browser import browser
from tests.report_fakes import big_page

_REPEATS = 5
_PHOTO_HW = (600, 800)


def main() -> None:
    """Print it for the default number of pictures, and with a picture of every image."""
    for pictures in (24, 500):
        text = render_report(*big_page(500, pictures, _PHOTO_HW))
        with tempfile.TemporaryDirectory() as folder, browser() as chromium:
            path = Path(folder) / "report.html"
            path.write_text(text)
            seconds = []
            for _ in range(_REPEATS):
                page = chromium.new_page()
                begun = time.monotonic()
                page.goto(path.as_uri())
                page.wait_for_function("[...document.images].length > 0 && [...document.images].every(i => i.complete)")
                seconds.append(time.monotonic() - begun)
                page.close()
        middle = sorted(seconds)[_REPEATS // 2]
        print(f"500 images, {pictures} pictures, {len(text) / 1e6:.1f} MB: {middle:.2f} s until all shown are loaded")


if __name__ == "__main__":
    main()
