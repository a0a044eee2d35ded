"""The oracle of benchmarks/models.py: it finds each kind of difference between a network and its halves."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import architectures
import models

import halfpass
from halfpass.errors import InputError


class Lower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.drop(self.norm(self.a(x))),)


class Upper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.drop, self.c = nn.Linear(6, 6), nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        return {"scores": self.c(self.drop(self.b(h).relu()))}


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = Lower(), Upper()

    def forward(self, x: Tensor) -> Any:
        return self.upper(*self.lower(x))


class Named(nn.Module):
    """A half whose names are the network's; `fault` is called with its module around each pass."""

    def __init__(self, name: str, part: nn.Module, fault: Any) -> None:
        super().__init__()
        self.add_module(name, part)
        self.name, self.fault = name, fault

    def forward(self, *inputs: Tensor) -> Any:
        part = getattr(self, self.name)
        return self.fault(part, part(*inputs)) if self.fault else part(*inputs)


def outcome(monkeypatch: pytest.MonkeyPatch, below: Any = None, above: Any = None, given: Any = None) -> tuple[str, str]:
    """What the oracle says of halves with such faults."""

    def split(model: Whole, layer: str, inputs: Tensor, may_cross: Any = ()) -> halfpass.Halves:
        parts = copy.deepcopy((model.lower, model.upper))
        if given:
            given(model)
        return halfpass.Halves(Named("lower", parts[0], below), Named("upper", parts[1], above))

    monkeypatch.setattr(models, "split", split)
    architecture = architectures.Architecture("f", "n", Whole, architectures.floats(6))
    return models.judge(models.build(architecture), "lower", architecture)[:2]


def test_right_halves_are_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(monkeypatch) == ("ok", "")


def _draws(part: nn.Module, out: Any) -> Any:
    torch.rand(1)
    return out


def _counts_on(part: Any, out: Any) -> Any:
    part.norm.num_batches_tracked.add_(1)
    return out


def _blocks_gradient(part: Any, out: Any) -> Any:
    return (out[0].detach().requires_grad_(),)


def _only_in_evaluation(part: Any, out: Any) -> Any:
    return out if part.training else {"scores": out["scores"] * (1 + 1e-6)}


def _other_form(part: Any, out: Any) -> Any:
    return out["scores"]


def _larger_batch(part: Any, out: Any) -> Any:
    return {"scores": out["scores"] + (1e-6 if len(out["scores"]) == 3 else 0)}


@pytest.mark.parametrize(
    ("faults", "where"),
    [
        ({"below": _draws}, "training, batch 2, seed 0: output scores"),
        ({"above": _draws}, "training, batch 2, seed 0: random state of torch"),
        ({"below": _counts_on}, "training, batch 2, seed 0: state lower.norm.num_batches_tracked"),
        ({"below": _blocks_gradient}, "training, batch 2, seed 0: gradient of lower.a.weight: a tensor against None"),
        ({"above": _only_in_evaluation}, "evaluation, batch 2, seed 0: output scores"),
        ({"above": _other_form}, "training, batch 2, seed 0: output scores: neither half has it"),
        ({"above": _larger_batch}, "training, batch 3, seed 1: output scores"),
        ({"given": nn.Module.eval}, "split changed the network that it was given: its mode"),
    ],
)
def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch, faults: dict[str, Any], where: str) -> None:
    verdict, reason = outcome(monkeypatch, **faults)
    assert verdict == "wrong"
    assert reason.startswith(where)


def test_a_refusal_gives_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise InputError("layer 'lower'", "a", "b", "c")

    assert outcome(monkeypatch, given=refuse) == ("refused", "layer 'lower': expected a, found b; c")


def test_cuts_lie_at_three_shares_of_the_calls_and_blocks_come_first() -> None:
    network = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(10)])
    found = models.layers(network, torch.randn(2, 4))
    assert models.choose(found) == {"early": "1", "middle": "4", "late": "7"}
