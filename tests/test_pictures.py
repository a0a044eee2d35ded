"""The documentation's pictures are what their script draws, and can be read on a telephone, in the dark, and heard."""

import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs/concepts"
SVG = "{http://www.w3.org/2000/svg}"
TELEPHONE = 343  # pixels that a picture has on a screen of 375
DRAWN = runpy.run_path(str(FOLDER / "pictures.py"))["drawn"]()


@pytest.mark.parametrize("name", DRAWN)
def test_the_file_is_what_the_script_draws(name):
    assert (FOLDER / name).read_text(encoding="utf-8") == DRAWN[name], "run python docs/concepts/pictures.py"
    assert len(DRAWN[name].encode()) <= 20_000


@pytest.mark.parametrize("name", DRAWN)
def test_letters_are_large_enough_inside_the_picture_and_named_for_who_hears_it(name):
    root = ElementTree.fromstring(DRAWN[name])
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    texts = list(root.iter(f"{SVG}text"))
    assert len(texts) > 10
    assert min(float(text.attrib["font-size"]) for text in texts) * TELEPHONE / width >= 11
    assert all(0 < float(text.attrib["x"]) < width and 0 < float(text.attrib["y"]) <= height - 6 for text in texts)
    title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.attrib["aria-labelledby"].split() == [title.attrib["id"], desc.attrib["id"]]
    assert len(title.text) < len(desc.text)


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_from_outside_and_every_colour_has_its_dark_one(name):
    svg = DRAWN[name]
    assert not re.search(r"href|url\((?!#)|@import|<script|<image", svg)
    light, dark = re.search(r"<style>(.*)@media\(prefers-color-scheme:dark\)\{(.*?\})\}", svg, re.DOTALL).groups()
    coloured = set(re.findall(r"\.([\w-]+)\{(?:fill|stroke)", light))
    assert coloured == set(re.findall(r"\.([\w-]+)\{(?:fill|stroke)", dark))
    used = {each for words in re.findall(r'class="([^"]+)"', svg) for each in words.split()}
    assert used <= coloured | {"mono"}
