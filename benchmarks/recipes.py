"""Trains the recipes of examples/recipes, each at its own size, into results/recipes.json.

    python benchmarks/recipes.py [NAME ...]     # about ten minutes in all on one core
    python benchmarks/tables.py                 # the table of docs/how-to/recipes.md, made from that file

A recipe whose run is in runs/recipes/NAME already is not trained again.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from halfpass.files import write_json
from halfpass.run.records import command_line, environment, read_result

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("chest", "segmentation", "text", "table")
OUT = Path("runs/recipes")


def train(name: str) -> dict[str, Any]:
    recipe, out = ROOT / "examples/recipes" / name, OUT / name
    if not (out / "result.json").is_file():
        if (recipe / "sites.py").is_file() and not Path("data", name).is_dir():
            subprocess.run([sys.executable, str(recipe / "sites.py")], check=True)
        words = ["train", "--config", str(recipe / f"{name}.yaml"), "--out", str(out)]
        subprocess.run([sys.executable, "-m", "halfpass", *words], check=True)
    return read_result(out)


def row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    metric = result["metric"]
    sites = [site["test"][metric] for site in result["sites"]]
    return {
        "recipe": name, "model": result["model"].rpartition(".")[2], "cut": result["cut"], "epochs": result["epochs"],
        "clients": result["clients"], "metric": metric, "test_%": 100 * result["test"][metric],
        "aux_test_%": 100 * result["aux_test"][metric],
        "each_site_%": ", ".join(f"{100 * value:.1f}" for value in sites) or None,
        "bytes_up_MB": sum(result["bytes"]["up"].values()) / 1e6,
        "bytes_down_MB": sum(result["bytes"]["down"].values()) / 1e6, "training_s": result["train_seconds"],
        "environment": result["environment"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.argv[0] = "benchmarks/recipes.py"
    chosen = sys.argv[1:] or NAMES
    rows = [row(name, train(name)) for name in chosen]
    made = {"environment": environment(), "command": command_line("python benchmarks/recipes.py"), "rows": rows}
    write_json(ROOT / "results/recipes.json", made)
