"""Batches and steps on another device than the CPU, where there is none: PyTorch's fake tensors have a device, shapes
and no values, and refuse an operation on tensors of two devices. What a GPU computes is not tested by this.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from halfpass.algorithm import client as client_side
from halfpass.algorithm import server as server_side
from halfpass.arithmetic.precision import Arithmetic
from halfpass.config import Config, ModelConfig
from halfpass.data.batches import crop_and_flip, test_batches, train_batches
from halfpass.data.datasets import Dataset, Samples
from halfpass.run.network import build_network


def steps_on_a_pretended_device() -> list[str]:
    """To be run in a process of its own, which has another device from then on; returns where everything was."""
    backend_registration._setup_privateuseone_for_python_backend("pretended")
    backend = type(torch.get_device_module("pretended"))
    backend.manual_seed_all, backend._is_in_bad_fork = (lambda self, seed: None), (lambda self: False)
    backend.get_amp_supported_dtype = lambda self: [torch.bfloat16]
    Tensor.item, Tensor.__int__ = (lambda self: 0.0), (lambda self: 0)  # of a loss; there are no values
    Tensor.tolist = lambda self: [0.0] * len(self)
    device = torch.device("pretended", 0)
    network = build_network(Config(model=ModelConfig("resnet20", "stage_2.1", "tail")), (3, 32, 32), 10)
    pixels, labels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8)
    samples = Samples(pixels.contiguous(memory_format=torch.channels_last), labels)
    data = Dataset("made", samples, samples, 10, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), crop_padding=4)
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(RuntimeError, match="same device"):  # or this test would see nothing
            crop_and_flip(torch.zeros(8, 32, 32, 3, device=device), labels, labels, labels > 3)
        half, head, top = (moved(module, device) for module in (network.halves.client, network.head, network.halves.server))
        client = client_side.Client(half, head, torch.optim.SGD([*half.parameters(), *head.parameters()]), Arithmetic(device))
        server = server_side.Server(top, torch.optim.SGD(top.parameters()), Arithmetic(device))
        there = Samples(mode.from_tensor(samples.inputs), mode.from_tensor(samples.labels)).to(device)
        for x, y in [*train_batches(data, there, 4, seed=0, client=0, epoch=0), *test_batches(data, there, 4)]:
            found += [x.device, y.device]
            batch, _ = client_side.decoupled_step(client, x, y, 0, 0)
            server_side.decoupled_step(server, batch)
            pending = client_side.conventional_forward(client, x, y, 0, 1)
            gradients, _ = server_side.conventional_step(server, pending.batch)
            client_side.conventional_backward(client, pending, gradients)
            server_side.evaluate(server, client_side.evaluate(client, x, y, 0, 0)[0])
            found += [tensor.device for tensor in (*batch.tensors, *gradients, next(half.parameters()).grad)]
    return [str(each) for each in found]


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """`module.to(device)` cannot swap the parameters of a fake device in."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty_like(parameter, device=device)))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device=device))
    return module


def test_all_that_a_step_needs_is_on_its_device():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        found = alone.submit(steps_on_a_pretended_device).result(timeout=120)
    assert len(found) == 4 * 5
    assert set(found) == {"pretended:0"}
