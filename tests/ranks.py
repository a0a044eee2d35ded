"""What one process of several does: ten steps of a server half by all of them, and the same steps by this one alone.

Started by torchrun; rank 0 prints the largest difference of their weights, by case, as JSON.
"""

import copy
import json

import torch
import torch.distributed as dist
from torch import nn

from halfpass.algorithm.ranks import learn_together, load_sharded_state, parts_of, shard, sharded_state
from halfpass.algorithm.server import Server, decoupled_step
from halfpass.arithmetic.optimizers import build_optimizer
from halfpass.cut import CutBatch


def half(normalize):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)]
    if normalize:
        layers.insert(1, nn.BatchNorm2d(8))
    whole = nn.Sequential(*layers)
    whole.register_parameter("spare", nn.Parameter(torch.ones(6)))  # which nothing uses
    return whole


def network(sample_shape, outputs):
    """Of digits, for a run of `test_ranks.py`."""
    parts = {"flat": nn.Flatten(), "first": nn.Linear(64, 32), "below": nn.ReLU(), "second": nn.Linear(32, 32), "last": nn.Linear(32, outputs)}
    whole = nn.Sequential()
    for name, part in parts.items():
        whole.add_module(name, part)
    return whole


def server(module, optimizer, fused=True):
    recipe = {"lr": 0.1 if optimizer == "sgd" else 0.001, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    return Server(module, build_optimizer(optimizer, module.parameters(), **recipe, fused=fused))


def batches(sizes):
    """Of a few classes each, so that the parts of one are not alike."""
    draws = torch.Generator().manual_seed(1)
    for step, size in enumerate(sizes):
        pictures = torch.randn(size, 2, 4, 4, generator=draws)
        yield CutBatch(0, 0, step, (pictures,), torch.randint(0, 5, (size,), generator=draws).sort().values)


def micro(batch, size):
    """Its micro-batches."""
    for begin in range(0, len(batch), size):
        end = min(begin + size, len(batch))
        yield CutBatch(0, 0, batch.step, (batch.tensors[0][begin:end],), batch.targets[begin:end], begin, len(batch) - end)


def differences(sizes, *, normalize=False, size=None, optimizer="sgd", sharded=False):
    """(of the weights, of the losses)"""
    module = half(normalize)
    alone = server(copy.deepcopy(module), optimizer)
    if sharded:
        shard(module)
        assert 0 < sum(p.to_local().numel() for p in module.parameters()) < 0.6 * sum(p.numel() for p in module.parameters())
    together = server(module, optimizer, fused=not sharded)
    if not sharded:
        learn_together(together)
    losses = 0.0
    for whole in batches(sizes):
        for batch in [whole] if size is None else micro(whole, size):
            part = parts_of(batch, dist.get_world_size())[dist.get_rank()]
            losses = max(losses, abs(decoupled_step(alone, batch) - decoupled_step(together, part.batch, 0, part)))
        if sharded and whole.step % 4 == 2:  # all of it is taken out, and put into another
            state = [sharded_state(together)]
            dist.broadcast_object_list(state)
            module = half(normalize)
            shard(module)
            together = server(module, optimizer, fused=False)
            load_sharded_state(together, state[0])
    ours, theirs = alone.weights(), sharded_state(together)["modules"][0] if sharded else together.weights()
    return max([float((value - ours[name]).abs().max()) for name, value in theirs.items()], default=0.0), losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        "equal parts": differences([32] * 10), "unequal parts": differences([5, 31, 7, 32, 13] * 2),
        "too few samples": differences([1, 2, 3, 1, 2] * 2), "micro-batches": differences([16] * 10, size=6),
        "BatchNorm": differences([32] * 10, normalize=True), "shards": differences([32, 31] * 5, sharded=True),
        "shards, adamw": differences([8] * 10, optimizer="adamw", sharded=True),
        "shards, micro-batches": differences([16] * 10, size=6, sharded=True),
    }  # fmt: skip
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
