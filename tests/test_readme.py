"""What the README says a newcomer can type: the demo, the library example, the tables."""

import json
import re
from pathlib import Path

import torch

from halfpass.commands.cli import main

ROOT = Path(__file__).parent.parent


def test_the_library_example_runs_and_trains_both_halves():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert len(names["batch"]) == 32
    assert dict(names["wire"].meter.up)["activations"] > 256 * 32 * 4  # 256 samples of 32 values, in float32
    assert torch.isfinite(torch.tensor([names["local_loss"], names["loss"]])).all()
    for side in ("client", "server"):
        assert all(p.grad is not None for group in names[side].optimizer.param_groups for p in group["params"])


def test_make_demo_compares_three_methods(tmp_path, monkeypatch, capsys):
    """The command of `make demo`, as the Makefile has it, but for its folder, and in fewer epochs."""
    command = re.search(r"\$\(BIN\)/halfpass (compare .*)", (ROOT / "Makefile").read_text())[1].split()
    monkeypatch.chdir(ROOT)
    assert main([*command, "--train.epochs", "5", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "demo" / "compare.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["decoupled", "conventional", "centralized"]
    decoupled, conventional, _ = rows
    assert all(row["test_accuracy"] >= 0.97 for row in rows), [row["test_accuracy"] for row in rows]
    assert decoupled["clients"] == 2
    assert decoupled["bytes"]["down"]["gradients"] == 0
    assert conventional["bytes"]["down"]["gradients"] == conventional["bytes"]["up"]["activations"]
    for method in ("decoupled", "conventional", "centralized"):
        assert method in said
    assert (tmp_path / "demo" / "report.html").stat().st_size > 50_000
