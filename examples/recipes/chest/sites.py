"""Generates pictures that stand for chest radiographs, at three sites of 120, 60 and 30: data/chest/site-0 … site-2.

    python examples/recipes/chest/sites.py [FOLDER] [--largest N]

Nothing in them comes from a person. Each is gray, 224×224, JPEG: a body with two dark fields between ribs, and on it
up to four findings, of which several may overlap: an effusion (bright from below), nodules (small bright discs), a
device (a bright line) and an enlarged heart (a wide bright ellipse). They are as uneven as such labels are, differ from
site to site, and some entries of the tables are empty, because nobody had looked.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 224
FINDINGS = {"effusion": 0.35, "nodules": 0.2, "device": 0.3, "heart": 0.25}  # share of the pictures that have it
SIZES = (1.0, 0.5, 0.25)  # of each site, relative to the largest
UNLABELLED = 0.1
TESTED = 0.4  # test pictures, relative to training pictures


def write(folder: Path, largest: int) -> None:
    for site, size in enumerate(SIZES):
        for part, count in (("train", largest * size), ("test", largest * size * TESTED)):
            _write_part(folder / f"site-{site}", part, site, round(count))


def _write_part(folder: Path, part: str, site: int, count: int) -> None:
    (folder / part).mkdir(parents=True, exist_ok=True)
    rows: list[list[object]] = [["picture", *FINDINGS]]
    for number in range(count):
        draws = np.random.default_rng([site, part == "test", number])
        found = {name: draws.random() < share * (1 + 0.3 * site) for name, share in FINDINGS.items()}
        file = f"{part}/{number:04}.jpg"
        Image.fromarray(_picture(found, draws)).save(folder / file, quality=90)
        rows.append([file, *("" if draws.random() < UNLABELLED else int(there) for there in found.values())])
    with (folder / f"{part}.csv").open("w", newline="") as content:
        csv.writer(content).writerows(rows)


def _picture(found: dict[str, bool], draws: np.random.Generator) -> np.ndarray:
    """(224, 224) uint8"""
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE  # from 0 to 1
    shift = draws.uniform(-0.03, 0.03)
    levels = np.full((SIDE, SIDE), 150.0)
    for middle in (0.3, 0.7):
        field = _ellipse(rows, columns, 0.48 + shift, middle + shift, 0.33, 0.16)
        levels = np.where(field, 70 + 15 * np.cos(2 * np.pi * 9 * (rows + 0.2 * abs(columns - 0.5))), levels)
    heart = draws.uniform(0.2, 0.26) if found["heart"] else draws.uniform(0.09, 0.13)
    levels = np.where(_ellipse(rows, columns, 0.6 + shift, 0.53 + shift, 0.17, heart), 165, levels)
    if found["effusion"]:
        side = draws.choice([0.3, 0.7])
        levels = np.where((rows > draws.uniform(0.55, 0.66)) & (abs(columns - side) < 0.2), 190, levels)
    if found["nodules"]:
        for _ in range(draws.integers(3, 7)):
            row, column = draws.uniform(0.25, 0.6), draws.choice([0.3, 0.7]) + draws.uniform(-0.1, 0.1)
            levels = np.where(_ellipse(rows, columns, row, column, 0.03, 0.03), 175, levels)
    if found["device"]:
        begin, slope = draws.uniform(0.3, 0.7), draws.uniform(-0.4, 0.4)
        levels = np.where((abs(columns - begin - slope * rows) < 0.012) & (rows < 0.7), 240, levels)
    noisy = levels * draws.uniform(0.9, 1.1) + draws.normal(0, 12, levels.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def _ellipse(rows: np.ndarray, columns: np.ndarray, row: float, column: float, a: float, b: float) -> np.ndarray:
    inside: np.ndarray = ((rows - row) / a) ** 2 + ((columns - column) / b) ** 2 < 1
    return inside


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Generate the pictures of the recipe chest.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/chest"))
    parser.add_argument("--largest", type=int, default=120, help="training pictures of the largest site")
    options = parser.parse_args()
    write(options.folder, options.largest)
