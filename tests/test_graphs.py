"""CUDA graphs without a GPU: a stand-in records every operation of a pass with its tensors, and replays it on these.

Like a CUDA graph, a replay reads and writes the memory of the recording alone, and runs no Python of the pass. What a
GPU does is in test_gpu.py.
"""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from small import config, joined, plain_batches, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from halfpass.algorithm.whole import whole_step
from halfpass.arithmetic import precision
from halfpass.arithmetic.graphs import RECORDED, WARM_UP, Graphs
from halfpass.errors import InputError
from halfpass.run import setup


class Recorded(TorchDispatchMode):
    """The operations below autograd. What they changed of memory from before is taken back: recording runs nothing."""

    def __init__(self):
        super().__init__()
        self.operations, self.undo, self.replays = [], [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.undo += [(t, t.clone()) for t in tensors]  # all: BatchNorm's schema does not say what it changes
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, recorded in self.operations:
                out = function(*args, **kwargs)
                tree_map(lambda old, new: old.copy_(new) if isinstance(old, torch.Tensor) and old is not new else None, recorded, out)

    def pool(self):
        return "pool"


@pytest.fixture
def recorded(monkeypatch):
    """All recordings; sides that are built with compile=True record."""
    made = []

    @contextlib.contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        made.append(graph)
        with graph:
            yield
        for tensor, value in reversed(graph.undo):
            tensor.data.copy_(value)  # autograd does not count it as a change

    stream = SimpleNamespace(device=torch.device("cpu"), wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Recorded, "graph": recording, "Stream": lambda device: stream, "synchronize": lambda: None,
        "current_stream": lambda device: stream, "stream": lambda stream: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def with_graphs(config):
        place = precision.Arithmetic(bf16=config.train.precision == "bf16")
        return dataclasses.replace(place, graphs=Graphs(place.device)) if config.train.compile else place

    monkeypatch.setattr(setup, "arithmetic_of", with_graphs)
    return made


@pytest.mark.parametrize(
    ("settings", "recordings"),
    [({}, 4), ({"method": "conventional"}, 6), ({"feedback_every": 2}, 7), ({"method": "centralized"}, 2), ({"micro_batch": 5}, 0),
     ({"clients": 2, "topology": "splitfed"}, 5), ({"clients": 2, "topology": "relay"}, 5),
     ({"method": "conventional", "model": "plain:half_frozen", "cut": "frozen"}, 6)],
)
def test_recorded_passes_learn_the_same(settings, recordings, recorded, data):
    """Bit for bit, of batches of two sizes: of 16, and an epoch's last of 12. A conventional client has two for each,
    forward and backward, and where both kinds of steps take turns, the last batch of 12 is always of one kind. Client
    halves that are averaged or relayed take others' weights in between."""
    few = dataclasses.replace(data, train=data.train.take(torch.arange(60)))

    def trained(on):
        chosen = config(epochs=6, compile=on, **settings)
        if chosen.method != "centralized":
            return joined(run(chosen, few, (60,) if chosen.clients.count == 1 else (32, 28)))
        whole = setup.build_whole(chosen, data, data.classes)
        for x, y in plain_batches(few, 6):
            whole_step(whole, x, y, epoch=0, step=0)
        return whole.model.state_dict()

    plain = trained(False)
    assert not recorded
    found = trained(True)
    assert len(recorded) == recordings
    assert all(graph.replays >= 2 for graph in recorded)
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_few_shapes_are_recorded(recorded, data):
    """And what is not recorded is right too."""
    whole = setup.build_whole(config(method="centralized", compile=True), data, data.classes)
    plain = setup.build_whole(config(method="centralized"), data, data.classes)
    for step in range(WARM_UP + 2):
        for count in range(8, 8 + RECORDED + 2):
            x, y = data.train.inputs[:count], data.train.labels[:count]
            assert whole_step(whole, x, y, 0, step) == whole_step(plain, x, y, 0, step)
    assert [graph.replays for graph in recorded] == [2] * RECORDED


@pytest.mark.parametrize(("error", "raised", "said"), [
    (RuntimeError("not permitted when stream is capturing"), InputError, r"train\.compile.*record.*not permitted when.*leave it out"),
    (torch.OutOfMemoryError("tried to allocate"), torch.OutOfMemoryError, "tried to allocate"),
])  # fmt: skip
def test_what_cannot_be_recorded_is_an_input_error(error, raised, said, recorded, data, monkeypatch):
    """Its cause is said, not that of the end of the recording, which fails then too; running out of memory is no
    wrong setting."""

    @contextlib.contextmanager
    def refusing(*arguments, **settings):
        try:
            yield
            raise error
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904  # as PyTorch

    monkeypatch.setattr(torch.cuda, "graph", refusing)
    with pytest.raises(raised, match=said):
        run(config(compile=True), data)
