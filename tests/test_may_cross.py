"""model.may_cross: an input that the server may see as it is, from the command line to the trained halves."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from halfpass.commands.cli import main

GRAPHS = """
import torch
from torch import nn


class Graphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, nodes, adjacency):
        h = (adjacency @ self.below(nodes)).relu()
        return self.above((adjacency @ h).mean(1))


def network(sample_shape, outputs):
    return Graphs()


def data():
    draws = torch.Generator().manual_seed(0)
    nodes, adjacency = torch.randn(80, 4, 6, generator=draws), torch.rand(80, 4, 4, generator=draws)
    items = [({"nodes": n, "adjacency": a}, int(n.mean() > 0)) for n, a in zip(nodes, adjacency)]
    return items[:60], items[60:]
"""


@pytest.fixture
def graphs(tmp_path, monkeypatch):
    (tmp_path / "some_graphs.py").write_text(GRAPHS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield ["--model.name", "some_graphs:network", "--data.name", "some_graphs:data"]
    sys.modules.pop("some_graphs", None)


def train(arguments, *more):
    short = ["--model.cut", "below", "--train.epochs", "1", "--train.batch_size", "20"]
    return main(["train", *arguments, *short, *more])


def test_edges_cross_where_they_may(graphs, capsys):
    assert train(graphs, "--out", "refused") == 2
    assert "the raw input 'adjacency', (4, 4, 4), used above the cut" in capsys.readouterr().err
    assert train(graphs, "--out", "unknown", "--model.may_cross", "edges") == 2
    assert "model.may_cross: expected names of inputs: nodes, adjacency, found 'edges'" in capsys.readouterr().err
    for runtime in ("local", "processes"):
        assert train(graphs, "--out", runtime, "--model.may_cross", "adjacency", "--runtime", runtime) == 0
    one, other = (load_file(f"{runtime}/server.safetensors") for runtime in ("local", "processes"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_table_of_cuts_knows_what_may_cross(graphs, capsys):
    assert main(["cuts", *graphs]) == 0
    assert "no layer can be cut" in capsys.readouterr().out
    assert main(["cuts", *graphs, "--model.may_cross", "adjacency"]) == 0
    assert "4×6 + 4×4" in capsys.readouterr().out
