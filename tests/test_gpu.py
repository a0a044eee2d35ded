"""On a GPU, where there is one: its recorded and compiled steps against its plain ones, and against a CPU's."""

import dataclasses

import pytest
import torch

from halfpass.arithmetic.graphs import Graphs
from halfpass.config import Config, DataConfig, ModelConfig, TrainConfig
from halfpass.data.datasets import Dataset, Samples
from halfpass.run.local import LocalRun
from halfpass.run.network import build_network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def dataset():
    """104 pictures of 10 classes, each class lighter than the last; the last batch of 16 has 8."""
    draws = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 10, (104,), generator=draws)
    pixels = torch.randint(0, 100, (104, 32, 32, 3), generator=draws) + labels.view(-1, 1, 1, 1) * 15
    samples = Samples(pixels.to(torch.uint8).permute(0, 3, 1, 2), labels)
    return Dataset("made", samples, samples.take(torch.arange(40)), 10, MEAN, STD, crop_padding=2)


def trained(device, compile, method="decoupled", epochs=4, precision="fp32", model=None, **recipe):
    """State of client half and server half, the mean losses of the last epoch, and the sides."""
    settings = Config(
        method=method, data=DataConfig("made"), model=model or ModelConfig("resnet20", "stage_2.1", "tail"),
        train=TrainConfig(
            epochs=epochs, batch_size=16, lr=0.002, device=device, compile=compile, precision=precision, **recipe
        ),
    )  # fmt: skip
    data = dataset()
    network = build_network(settings, (3, 32, 32), 10)
    local = LocalRun(settings, data, [data.train], network)
    for epoch in range(epochs):
        clients, server = local.train(epoch, lambda: None)
        local.test(epoch)
    state = local.clients[0].half.state_dict() | local.server.half.state_dict()
    return {name: value.cpu() for name, value in state.items()}, (clients[0].mean_loss, server.mean_loss), local


def difference(one, other):
    """Of all weights and statistics together, relative."""
    one, other = (torch.cat([value.flatten() for value in state.values() if value.is_floating_point()]) for state in (one, other))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("recipe", [{}, {"method": "conventional"}, {"feedback_every": 2}, {"micro_batch": 8}])
def test_recorded_steps_learn_what_plain_ones_do(recipe, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain, plain_losses, _ = trained("cuda:0", False, **recipe)
    recorded, losses, local = trained("cuda:0", True, **recipe)
    if "micro_batch" not in recipe:
        assert local.server.arithmetic.graphs._graphs
        assert local.clients[0].arithmetic.graphs._graphs
    assert losses == pytest.approx(plain_losses, rel=2e-2, nan_ok=True)
    one_epoch_less, _, _ = trained("cuda:0", False, epochs=3, **recipe)
    assert difference(recorded, plain) < 0.2 * difference(one_epoch_less, plain)


def test_a_gpu_learns_what_a_cpu_does(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    here, losses, _ = trained("cpu", False, epochs=2)
    there, losses_there, _ = trained("cuda:0", False, epochs=2)
    assert losses_there == pytest.approx(losses, rel=2e-2)
    one_epoch_less, _, _ = trained("cpu", False, epochs=1)
    assert difference(there, here) < 0.2 * difference(one_epoch_less, here)


def test_dropout_draws_the_same_when_recorded():
    """No built-in network has any; a recorded pass must draw anew in each step, from the step's seed."""
    device = torch.device("cuda", 0)
    side = dataclasses.make_dataclass("Side", ["optimizer"])(torch.optim.SGD([torch.nn.Parameter(torch.ones(1, device=device))]))
    graphs, x = Graphs(device), torch.ones(1000, device=device)

    def drop(side, x):
        return (torch.nn.functional.dropout(x, 0.5),)

    seen = []
    for seed in (1, 2, 3, 4, 5, 3):
        torch.manual_seed(seed)
        (out,), _ = graphs.run(drop, side, (x,))
        torch.manual_seed(seed)
        assert torch.equal(out, drop(side, x)[0])
        seen.append(out)
    assert torch.equal(seen[2], seen[5])
    assert not torch.equal(seen[2], seen[3])
