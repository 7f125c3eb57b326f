"""Label files of YOLO, VOC and VisDrone: what they say, and what is said of bad ones."""

from __future__ import annotations

import re

import pytest

from scalenet_ray.core.errors import UserError
from scalenet_ray.data.label_files import LabelledObject, parse_visdrone, parse_voc, parse_yolo

VOC = """<annotation>
  <size><width>200</width><height>100</height><depth>3</depth></size>
  <object>
    <name>kite</name><difficult>{difficult}</difficult>
    <part><name>tail</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
    <bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>60</ymax></bndbox>
  </object>
</annotation>
"""


def test_a_yolo_line_is_a_box_relative_to_the_image():
    assert parse_yolo("1 0.5 0.25 0.1 0.5\n\n", (100, 200), 2, "a.txt") == [LabelledObject(1, (90.0, 0.0, 20.0, 50.0))]


@pytest.mark.parametrize("points", ["0.1 0.2 0.3 0.2 0.2 0.6", "0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6"])
def test_a_yolo_polygon_counts_by_its_box(points: str):
    ((category, box, is_crowd),) = parse_yolo(f"0 {points}", (100, 200), 1, "a.txt")
    assert (category, is_crowd) == (0, False)
    assert box == pytest.approx((20, 20, 40, 40))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1 0.1 0.9", "must have 5 columns .* or 1 \\+ 2n .*, got 6: remove the score"),
        ("0 0.5 0.5 0.1", "must have 5 columns .*, got 4: correct it"),
        ("0 320 240 32 32", "coordinates from 0 to 1, relative to the image, got '0 320 240 32 32': divide pixels"),
        ("0 -0.1 0.5 0.1 0.1", "coordinates from 0 to 1"),
        ("2 0.5 0.5 0.1 0.1", "must have a class from 0 to 1, got 2"),
        ("0.5 0.5 0.5 0.1 0.1", "must have a class from 0 to 1, got 0.5"),
        ("kite 0.5 0.5 0.1 0.1", "must have numbers only, got 'kite 0.5 0.5 0.1 0.1'"),
        ("0 nan 0.5 0.1 0.1", "must have numbers only"),
    ],
)
def test_a_bad_yolo_line_is_named(line: str, message: str):
    with pytest.raises(UserError, match=rf"^labels/a\.txt line 3 .*{message}"):
        parse_yolo(f"0 0.5 0.5 0.1 0.1\n\n{line}\n", (100, 200), 2, "labels/a.txt")


def test_voc_counts_pixels_from_1_and_its_boxes_hold_their_last_pixel():
    image = parse_voc(VOC.format(difficult=0).encode(), "a.xml")
    assert image == ((100, 200), [LabelledObject("kite", (10.0, 20.0, 20.0, 40.0))])


def test_a_difficult_object_of_voc_is_ignored_as_a_crowd_is():
    assert parse_voc(VOC.format(difficult=1).encode(), "a.xml").objects[0].is_crowd


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<width>200</width>", "", "size must have width, got none"),
        ("<width>200</width>", "<width>2.5</width>", "size must have whole numbers, got .* leave it out"),
        ("<name>kite</name>", "", "object must have name, got none"),
        ("kite", " ", "name of an object must not be empty"),
        ("<xmin>11</xmin>", "<xmin>left</xmin>", "xmin must have numbers only, got 'left'"),
        ("<xmin>11</xmin>", "<xmin>31</xmin>", "bndbox must have xmin <= xmax"),
        ("</object>", "", "must be XML, got something else"),
    ],
)
def test_a_bad_voc_file_is_named(old: str, new: str, message: str):
    text = re.sub(old, new, VOC.format(difficult=0))
    with pytest.raises(UserError, match=rf"^voc/a\.xml:? {message}"):
        parse_voc(text.encode(), "voc/a.xml")


@pytest.mark.parametrize(("old", "new"), [("<size>.*</size>", ""), ("<(width|height)>.00<", r"<\1>0<")])
def test_a_voc_file_need_not_have_a_size(old: str, new: str):
    text = VOC.format(difficult=0)
    assert parse_voc(re.sub(old, new, text).encode(), "a.xml") == (None, parse_voc(text.encode(), "a.xml").objects)


def test_a_file_that_declares_entities_is_refused():
    text = "<!DOCTYPE x [\n<!ENTITY a 'aaa'>]><annotation>&a;</annotation>"
    with pytest.raises(UserError, match=r"^a\.xml must declare no entity, got one: remove it"):
        parse_voc(text.encode(), "a.xml")


def test_visdrones_ignored_regions_are_crowds_of_every_category():
    found = parse_visdrone("1,2,30,40,1,4,0,0\n5,6,7,8,0,0,0,0,\n9,9,9,9,0,1,0,0\n1,1,1,1,1,11,0,0\n", "a.txt")
    regions = [LabelledObject(i, (5.0, 6.0, 7.0, 8.0), True) for i in range(1, 11)]
    car, pedestrian = LabelledObject(4, (1.0, 2.0, 30.0, 40.0)), LabelledObject(1, (9.0, 9.0, 9.0, 9.0), True)
    assert found == [car, *regions, pedestrian]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1 0.1", "for YOLO's labels give their data.yaml"),
        ("1,2,3,4,1,4,0", "must have VisDrone's 8 columns"),
        ("1,2,-3,4,1,4,0,0", "a width and height of 0 or more"),
        ("1,2,3,4,1,12,0,0", "a category up to 11"),
        ("1,2,three,4,1,4,0,0", "must have numbers only"),
    ],
)
def test_a_bad_visdrone_line_is_named(line: str, message: str):
    with pytest.raises(UserError, match=rf"^a\.txt line 2 .*{message}"):
        parse_visdrone(f"1,2,30,40,1,4,0,0\n{line}\n", "a.txt")
