"""Writes scikit-learn's breast cancer table as two sites would have it: data/table/site-0 and site-1.

    python examples/recipes/table/sites.py [FOLDER]

569 rows of 30 measurements (Wolberg, Mangasarian, Street and Street 1995, in scikit-learn). The second site has a third
of them, and more of the malignant ones. Each site's train.csv and test.csv are its own.
"""

import csv
import random
import sys
from pathlib import Path

from sklearn.datasets import load_breast_cancer

SHARES = {"malignant": 0.5, "benign": 0.75}  # that the first site has
TESTED = 0.3


def write(folder: Path) -> None:
    table = load_breast_cancer()
    draws = random.Random(0)
    sites: list[list[list[object]]] = [[], []]
    for values, target in zip(table.data.tolist(), table.target_names[table.target], strict=True):
        sites[draws.random() >= SHARES[target]].append([*values, target])
    for number, rows in enumerate(sites):
        draws.shuffle(rows)
        tested = round(TESTED * len(rows))
        for part, chosen in (("test", rows[:tested]), ("train", rows[tested:])):
            file = folder / f"site-{number}" / f"{part}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", newline="") as content:
                csv.writer(content).writerows([[*table.feature_names, "diagnosis"], *chosen])


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "data/table"))
