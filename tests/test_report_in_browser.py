"""The report in a browser: images, mouse and keyboard, no network requests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from scalenet_ray.commands.tune import SPACE
from scalenet_ray.data.policy_files import Choice, read_space
from scalenet_ray.report.page import render_report
from scalenet_ray.report.sweep import render_sweep
from tests.browser import CHROMIUM, browser
from tests.report_fakes import big_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: install chromium (Debian: apt install chromium)"),
]

HOSTILE = "<img src=x onerror=document.title='broken'><script>document.title='broken'</script>"


@cache
def page_of(images: int, pictures: int) -> str:
    return render_report(*big_page(images, pictures))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def visit(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a page from a file; what it says in the console, and what it asks of the network, fails the test."""
    contexts, complaints = [], []

    def open_page(text: str, **options: Any) -> Any:
        (tmp_path / "report.html").write_text(text)
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        allowed = ("file:", "data:", "blob:")
        page.on("request", lambda asked: asked.url.startswith(allowed) or complaints.append(asked.url))
        page.goto((tmp_path / "report.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def shown_names(page: Any) -> list[str]:
    return page.locator(".shot > header > b").all_inner_texts()


def test_all_pictures_load(visit: Any) -> None:
    page = visit(page_of(9, 9))
    page.wait_for_function("[...document.images].every(image => image.complete)")
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    # Before, seen with its map, after: of six pictures.
    assert len(widths) == 24
    assert min(widths) > 0
    assert page.evaluate("[...document.images].every(image => image.hasAttribute('alt'))")


def test_500_images_are_listed_and_filtered_by_class_a_page_at_a_time(visit: Any) -> None:
    page = visit(page_of(500, 24))
    assert "Every image (500)" in page.content()
    assert len(shown_names(page)) == 6
    page.select_option("#class", label="dog")
    assert shown_names(page) == ["1.jpg", "4.jpg", "7.jpg", "10.jpg", "13.jpg", "16.jpg"]
    assert page.locator("#gallery > .pager span").inner_text() == "1 of 2"
    page.locator("#gallery > .pager button").last.click()
    assert shown_names(page) == ["19.jpg", "22.jpg"]
    page.locator(".list summary").click()
    assert page.locator(".list tbody tr").count() == 50
    assert page.locator(".list .pager span").inner_text() == "1 of 4"
    page.select_option("#class", value="")
    assert page.locator(".list .pager span").inner_text() == "1 of 10"


def test_boxes_of_the_chosen_class_and_policy_are_drawn(visit: Any) -> None:
    page = visit(page_of(9, 9))
    first = page.locator(".shot").first
    assert [first.locator(f"rect.{name}").count() for name in ("known", "new", "wrong", "w1", "w2")] == [2, 1, 1, 1, 1]
    page.select_option("#policy", "whole")
    assert [first.locator(f"rect.{name}").count() for name in ("known", "new", "missed", "w1")] == [2, 0, 1, 0]


def test_groups_of_pictures_are_chosen(visit: Any) -> None:
    page = visit(page_of(9, 9))
    page.get_by_role("button", name="Lost most").click()
    assert shown_names(page) == ["1.jpg", "4.jpg", "7.jpg"]
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"


def test_keys_open_turn_and_close_a_picture(visit: Any) -> None:
    page = visit(page_of(9, 9))
    opener = page.locator(".open").first
    opener.focus()
    page.keyboard.press("Enter")
    title = page.locator("dialog[open] header b")
    assert title.inner_text() == "0.jpg"
    page.keyboard.press("ArrowRight")
    assert title.inner_text() == "1.jpg"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert title.inner_text() == "8.jpg"
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert opener.evaluate("element => element === document.activeElement")


def test_focus_is_seen(visit: Any) -> None:
    page = visit(page_of(9, 9))
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_it_follows_the_system_into_the_dark_and_has_a_switch(visit: Any) -> None:
    text = page_of(9, 9)
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = (visit(text, color_scheme=scheme) for scheme in ("light", "dark"))
    bright, dim = light.evaluate(background), dark.evaluate(background)
    assert bright != dim
    light.click("#theme")
    assert light.evaluate(background) == dim
    dark.click("#theme")
    assert dark.evaluate(background) == bright


def test_a_narrow_screen_need_not_be_scrolled_sideways(visit: Any) -> None:
    document, details = big_page(9, 9)
    long = "/".join(["a-folder-with-a-long-name"] * 8)
    details |= {
        "run": {"command": long, "settings": {"data": long, "networks": {"detector": f"tiny:{long}"}}},
        "failures": {
            "total": 1,
            "listed": 1,
            "reasons": [{"stage": "read", "reason": long, "count": 1}],
            "rows": [{"file": long, "stage": "read", "reason": long, "policies": ["whole"]}],
        },
    }
    page = visit(render_report(document, details), viewport={"width": 360, "height": 700})
    page.locator("#failures summary").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", [360, 1000, 1280, 1800])
def test_a_wide_table_of_policies_is_cut_by_no_edge_but_its_own(visit: Any, width: int) -> None:
    document, details = big_page(3, 0)
    figures = ("AP_medium", "AR_small", "detector_megapixels_per_image", "tiles_per_image", "images_per_second")
    for row in document["policies"].values():
        row.update(dict.fromkeys(figures, 1234.5))
    interval = {"difference": 10.0, "low": 4.0, "high": 16.0}
    document |= {"compared_with": "whole", "differences": {"scalenet": {"AP_small": interval}}}
    page = visit(render_report(document, details), viewport={"width": width, "height": 700})
    holder = "document.querySelector('#policies .scroll')"
    left, right = page.evaluate(f"(({{left, right}}) => [left, right])({holder}.getBoundingClientRect())")
    assert 0 <= left < right <= width
    # All of it can be reached: it fits, or scrolls.
    page.evaluate(f"{holder}.scrollTo(10000, 0)")
    last = page.evaluate("document.querySelector('#policies thead th:last-child').getBoundingClientRect().right")
    assert last <= right + 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_trials_of_the_default_space_fit_a_screen_of_1000_pixels(visit: Any) -> None:
    values: dict[str, Any] = {"policy": "regions"}
    for path, field in read_space(SPACE).fields.items():
        values[path] = field.options[-1] if isinstance(field, Choice) else 2 if field.whole else 0.0123456
    row = {"passes": 2.34567, "AP_small": 28.5, "AP": 40.1, "complete": True, "error": None, "values": values}
    page = visit(render_sweep([row | {"trial": "99c8abaf"}], 2.5), viewport={"width": 1000, "height": 700})
    hidden = "(holder => holder.scrollWidth - holder.clientWidth)(document.querySelector('#trials .scroll'))"
    assert page.evaluate(hidden) <= 0


def test_boxes_carry_their_class_and_score(visit: Any) -> None:
    page = visit(page_of(9, 9))
    assert page.locator(".shot").first.locator("rect.new title").all_text_contents() == ["cat 0.80, correct"]
    # The middle of a box answers too, not its line alone.
    box = page.locator(".shot").first.locator("rect.new")
    box.scroll_into_view_if_needed()
    answers = "box => { const r = box.getBoundingClientRect(); const at = [r.x + r.width / 2, r.y + r.height / 2]; "
    answers += "return document.elementFromPoint(...at) === box; }"
    assert box.evaluate(answers)
    page.locator(".open").first.click()
    tags = page.locator("dialog .tag").all_inner_texts()
    assert {"cat 0.80", "cat 0.50, background", "cat 0.90"} <= set(tags)


def test_an_opened_picture_zooms_pans_and_slides_from_before_to_after(visit: Any) -> None:
    page = visit(page_of(3, 3), viewport={"width": 1000, "height": 700})
    page.locator(".open").first.click()
    place = "(({x, y, width}) => [x, y, width])(document.querySelector('.stage .frame').getBoundingClientRect())"
    x, y, width = page.evaluate(place)
    page.get_by_label("Zoom in").click()
    assert page.evaluate(place)[2] == pytest.approx(2 * width, abs=1)
    box = page.locator(".stage").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    before = page.evaluate(place)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1] + 20)
    page.mouse.up()
    after = page.evaluate(place)
    assert (after[0] - before[0], after[1] - before[1]) == pytest.approx((30, 20), abs=1)
    page.mouse.wheel(0, -400)
    assert page.evaluate(place)[2] > 2 * width
    page.keyboard.press("-")
    page.mouse.dblclick(*middle)
    assert page.evaluate(place) == pytest.approx([x, y, width], abs=1)
    # All of the new box is shown when the slider is at the left, nothing of it at the right.
    clip = "getComputedStyle(document.querySelector('.stage .after')).clipPath"
    slider = page.get_by_label("Before on the left, after on the right")
    slider.fill("100")
    at_right = page.evaluate(clip)
    slider.press("ArrowLeft")
    assert page.evaluate(clip) != at_right
    assert page.locator("dialog header b").inner_text() == "0.jpg"


def test_a_search_leaves_the_files_and_rows_with_its_text(visit: Any) -> None:
    document, details = big_page(5000, 9)
    for row in details["images"]:
        row["cost"] = {"scalenet": [1.5, 2.0], "whole": None}
    counts = {"boxes": 5, "images": 3, "after": 5, "before": 0, "new": 0, "lost": 0, "median_side": 30.0}
    details["found"] = {**counts, "compared": 0, "by_class": [{"label": i, **counts} for i in range(40)], "most": []}
    page = visit(render_report(document, details))
    page.get_by_label("Search: boxes by class").fill("category 3")
    assert page.locator("#found tbody tr:visible").count() == 10
    page.get_by_label("File").fill("4321")
    page.locator(".list summary").click()
    assert page.locator(".list tbody tr").all_inner_texts() == ["4321.jpg\t9\t3\t2\t1\t1.50\t2.00"]


def test_files_are_called_by_their_own_name_with_the_path_at_hand(visit: Any) -> None:
    document, details = big_page(3, 3)
    details["files"] = {0: "s3://bucket/a/one.jpg", 1: "s3://bucket/a/two.jpg", 2: "s3://bucket/b/two.jpg"}
    page = visit(render_report(document, details))
    # Of two files of one name the whole path tells which.
    assert shown_names(page) == ["one.jpg", "s3://bucket/a/two.jpg", "s3://bucket/b/two.jpg"]
    assert page.locator(".shot header b").first.get_attribute("title") == "s3://bucket/a/one.jpg"


def test_without_a_whole_pass_no_picture_claims_a_new_box(visit: Any) -> None:
    document, details = big_page(3, 3)
    document["policies"] = {"scalenet": {"kind": "scalenet", "detector_passes_per_image": 2.0}}
    for name in ("compared_with", "changes", "curves", "errors"):
        details.pop(name)
    for row in details["images"]:
        row["by"] = {"scalenet": [5, None, None]}
    for picture in details["pictures"]:
        picture["before"] = {"scalenet": None}
        picture["boxes"]["scalenet"] = [[*box[:7], "", 0] for box in picture["boxes"]["scalenet"]]
    row = {"boxes": 5, "images": 3, "before": 0, "new": 0, "lost": 0}
    details["found"] = {**row, "compared": 0, "by_class": [{"label": 1, **row, "median_side": 30.0}], "most": []}
    page = visit(render_report(document, details))
    words = page.locator("#pictures").inner_text()
    assert "Before: no pass over the whole image alone" in words
    assert "new" not in words.replace("Most new boxes", "")
    assert page.locator(".shot rect.new").count() == 0


def test_names_are_never_read_as_html(visit: Any) -> None:
    document, details = big_page(3, 3)
    document["policies"] = {"whole": document["policies"]["whole"], HOSTILE: document["policies"]["scalenet"]}
    details["files"] = dict.fromkeys(range(3), HOSTILE)
    details["categories"] = {1: HOSTILE, 2: "</script>", 3: "$x_{"}
    details["changes"] = {HOSTILE: details["changes"]["scalenet"]}
    for row in details["changes"][HOSTILE]["by_class"]:
        row["name"] = HOSTILE
    for picture in details["pictures"]:
        picture["boxes"] = {HOSTILE: picture["boxes"]["scalenet"], "whole": picture["boxes"]["whole"]}
        picture["before"] = {HOSTILE: picture["before"]["whole"], "whole": picture["before"]["whole"]}
        picture["looks"] = {HOSTILE: picture["looks"]["scalenet"], "whole": picture["looks"]["whole"]}
    for row in details["images"]:
        row["by"] = {"whole": row["by"]["whole"], HOSTILE: row["by"]["scalenet"]}
    page = visit(render_report(document, details))
    page.locator(".open").first.click()
    assert page.locator("dialog header b").inner_text() == HOSTILE
    assert page.title() == "What a closer look found"
    assert page.locator("#class option").all_inner_texts()[1:] != []


def test_a_page_without_pictures_says_so(visit: Any) -> None:
    page = visit(page_of(5, 0))
    assert "This page holds no pictures." in page.content()
