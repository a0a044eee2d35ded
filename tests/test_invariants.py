"""What must always hold (the invariants of the design), each against the plain way, each with a case that differs."""

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
from plain import HalfFrozen, HandCut, equal, train_decoupled, train_end_to_end
from small import SGD, close, config, joined, one_cycle, plain_batches, plain_start, run, shards
from torch import nn

from halfpass.algorithm import client as client_side
from halfpass.algorithm import server as server_side
from halfpass.algorithm.whole import whole_step
from halfpass.arithmetic import fused
from halfpass.config import ModelConfig
from halfpass.data.batches import test_batches, train_batches
from halfpass.errors import InputError
from halfpass.run import setup
from halfpass.run.local import LocalRun
from halfpass.run.network import build_network
from halfpass.run.rounds import Course, place_in_epoch, turns

# ------------------------------------------------------------------------------------------- 1. split equals whole


def test_decoupled_is_one_module_with_detach_at_the_cut(data):
    settings = config(schedule="constant")
    local = run(settings, data)
    model, head = plain_start(settings, data)
    train_decoupled(model, head, plain_batches(data), lambda step: 0.05, SGD)
    assert equal(joined(local), model.state_dict())
    assert equal(local.clients[0].head.state_dict(), head.state_dict())


def test_conventional_is_plain_end_to_end_training(data):
    settings = config("conventional", schedule="constant")
    local = run(settings, data)
    model, _ = plain_start(settings, data)
    train_end_to_end(model, plain_batches(data), lambda step: 0.05, SGD)
    assert equal(joined(local), model.state_dict())


def test_a_value_without_a_graph_crosses_before_one_with_it(data):
    settings = config("conventional", model="plain:half_frozen", cut="frozen", schedule="constant")
    local = run(settings, data)
    model, _ = plain_start(settings, data, HalfFrozen)
    train_end_to_end(model, plain_batches(data), lambda step: 0.05, SGD)
    assert equal(joined(local), model.state_dict())


def test_modules_that_do_not_fit_a_step_are_refused(data):
    """A half that returns one tensor would have its first sample taken for the first value that crosses."""
    half, head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), nn.Linear(8, 10)
    optimizer = torch.optim.SGD([*half.parameters(), *head.parameters()], lr=0.1)
    x, y = data.train.inputs[:10].float(), data.train.labels[:10]
    with pytest.raises(InputError, match=r"client.half: expected a tuple of the tensors that cross, found one tensor; return"):
        client_side.decoupled_step(client_side.Client(half, head, optimizer), x, y, epoch=0, step=0)
    with pytest.raises(InputError, match=r"client.head: expected an auxiliary head to learn from, found none; build one"):
        client_side.decoupled_step(client_side.Client(half, None, optimizer), x, y, epoch=0, step=0)


def test_smoothed_labels_in_every_loss(data):
    smoothed = functools.partial(nn.functional.cross_entropy, label_smoothing=0.3)
    for method in ("decoupled", "conventional"):
        settings = config(method, schedule="constant", label_smoothing=0.3)
        model, head = plain_start(settings, data)
        if method == "decoupled":
            train_decoupled(model, head, plain_batches(data), lambda step: 0.05, SGD, smoothed)
        else:
            train_end_to_end(model, plain_batches(data), lambda step: 0.05, SGD, smoothed)
        local = run(settings, data)
        assert equal(joined(local), model.state_dict())
        assert not equal(joined(local), joined(run(config(method, schedule="constant"), data)))
    whole = setup.build_whole(settings, data, data.classes)
    for x, y in plain_batches(data):
        whole_step(whole, x, y, epoch=0, step=0)
    assert equal(whole.model.state_dict(), model.state_dict())  # the end-to-end one


def test_server_and_head_answer_together(data):
    local = run(config(), data)
    score, _ = local.test(1)
    client, server = local.clients[0], local.server.half.eval()
    x, y = next(iter(test_batches(data, data.test, 32)))
    with torch.no_grad():
        crossing = client.half.eval()(x)
        both = server(*crossing).softmax(1) + client.head.eval()(crossing[0]).softmax(1).half()
    assert score.joint_values()["accuracy"] == int((both.argmax(1) == y).sum()) / 32
    assert score.values()["accuracy"] == int((server(*crossing).argmax(1) == y).sum()) / 32
    assert not torch.equal(both.argmax(1), server(*crossing).argmax(1))
    assert run(config("conventional"), data).test(1)[0].joint_values() is None


def test_the_methods_differ_from_each_other(data):
    assert not equal(joined(run(config(), data)), joined(run(config("conventional"), data)))


def test_a_lossy_codec_differs(data):
    exact, lossy = run(config(), data), run(config(codec="bf16"), data)
    assert equal(exact.clients[0].half.state_dict(), lossy.clients[0].half.state_dict())  # nothing comes back to it
    assert not equal(exact.server.half.state_dict(), lossy.server.half.state_dict())


@pytest.mark.parametrize(("schedule", "oracle"), [
    ("one-cycle", one_cycle),
    ("cosine", lambda step: 0.05 * (1 + math.cos(math.pi * step / 8)) / 2),
])  # fmt: skip
def test_schedules_are_those_of_the_whole(data, schedule, oracle):
    settings = config("conventional", schedule=schedule)
    local = run(settings, data)
    model, _ = plain_start(settings, data)
    train_end_to_end(model, plain_batches(data), oracle, SGD)
    assert close(joined(local), model.state_dict())
    assert not close(joined(run(config("conventional", schedule="constant"), data)), model.state_dict())


def test_adamw_is_the_whole_s(data):
    settings = config("conventional", schedule="constant", optimizer="adamw", lr=0.01)
    local = run(settings, data)
    model, _ = plain_start(settings, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=5e-4, fused=True)
    for x, y in plain_batches(data):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert equal(joined(local), model.state_dict())


# ------------------------------------------------------------------------- 2. and 3. who learns from what, and how often


def built(settings, data):
    network = build_network(settings, data.train.sample_shape, data.classes)
    return setup.build_client(settings, network, 0), setup.build_server(settings, network)


def snapshot(*modules):
    return [copy.deepcopy(module.state_dict()) for module in modules]


def changed(before, *modules):
    return [not equal(old, module.state_dict()) for old, module in zip(before, modules, strict=True)]


def test_each_side_s_step_leaves_the_other_side_untouched(data):
    client, server = built(config(), data)
    modules = client.half, client.head, server.half
    before = snapshot(*modules)
    batch, _ = client_side.decoupled_step(client, data.train.inputs[:16], data.train.labels[:16], 0, 0)
    assert changed(before, *modules) == [True, True, False]
    before = snapshot(*modules)
    server_side.decoupled_step(server, batch)
    assert changed(before, *modules) == [False, False, True]
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in batch.tensors)


def test_conventional_halves_learn_only_when_their_gradient_is_there(data):
    client, server = built(config("conventional"), data)
    before = {name: p.detach().clone() for name, p in client.half.named_parameters()}
    pending = client_side.conventional_forward(client, data.train.inputs[:16], data.train.labels[:16], 0, 0)
    gradients, _ = server_side.conventional_step(server, pending.batch)
    assert all(torch.equal(before[name], p) for name, p in client.half.named_parameters())
    client_side.conventional_backward(client, pending, gradients)
    assert not any(torch.equal(before[name], p) for name, p in client.half.named_parameters())


def test_client_half_is_stepped_once_per_batch_and_every_parameter_moves(data):
    """The authors' scripts stepped it twice, the second time with a stale gradient (paper notes)."""
    client, _ = built(config(schedule="constant"), data)
    steps = []
    client.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    before = [p.detach().clone() for group in client.optimizer.param_groups for p in group["params"]]
    for batch in range(2):  # the head starts at zero, so that the client half's gradients begin with the second
        client_side.decoupled_step(client, data.train.inputs[:16], data.train.labels[:16], 0, batch)
        assert len(steps) == batch + 1
    after = [p for group in client.optimizer.param_groups for p in group["params"]]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("head", ["linear", "pooled-linear", "mlp", "conv"])
def test_the_optimizer_holds_every_parameter_of_client_half_and_head_once(data, head):
    """The authors replaced the head's first layer after building the optimizer, so it was never trained."""
    settings = dataclasses.replace(config(), model=ModelConfig("plain:hand_cut", "below", head))
    client, _ = built(settings, data)
    held = [id(p) for group in client.optimizer.param_groups for p in group["params"]]
    owned = [id(p) for module in (client.half, client.head) for p in module.parameters()]
    assert sorted(held) == sorted(owned)
    before = {id(p): p.detach().clone() for module in (client.half, client.head) for p in module.parameters()}
    for batch in range(2):
        client_side.decoupled_step(client, data.train.inputs[:16], data.train.labels[:16], 0, batch)
    for module in (client.half, client.head):
        still = [name for name, p in module.named_parameters() if torch.equal(before[id(p)], p)]
        assert still == []


def test_a_client_half_that_the_head_s_loss_does_not_reach_is_refused(data):
    """The head sees the layer's output alone, and `trained` has no part in that of `frozen`."""
    with pytest.raises(InputError, match=r"loss reaches, found no gradient for trained\.1\.weight, trained\.1\.bias; cut, or return first, where"):
        built(config(model="plain:half_frozen", cut="frozen"), data)
    built(config("conventional", model="plain:half_frozen", cut="frozen"), data)


# ------------------------------------------------------------------------------------------------- 4. what crosses


def test_decoupled_sends_no_tensor_down_and_conventional_does(data):
    decoupled, conventional = run(config(), data).wires[0].meter, run(config("conventional"), data).wires[0].meter
    assert decoupled.down["gradients"] == decoupled.down["weights"] == 0
    assert conventional.down["gradients"] >= 2 * 64 * 6 * 8 * 8 * 4  # epochs, samples, the cut, float32
    assert conventional.down["gradients"] < 1.01 * 2 * 64 * 6 * 8 * 8 * 4
    assert decoupled.up["activations"] == conventional.up["activations"] == conventional.down["gradients"]


def test_in_bf16_half_as_many_bytes_cross(data):
    for method in ("decoupled", "conventional"):
        full, half = (run(config(method, epochs=1, precision=precision), data).wires[0].meter for precision in ("fp32", "bf16"))
        assert half.up["activations"] == pytest.approx(full.up["activations"] / 2, rel=0.01)
        assert half.down["gradients"] == pytest.approx(full.down["gradients"] / 2, rel=0.01)


def test_labels_and_hand_overs_are_counted(data):
    """The authors left labels out, and handing the module from client to client cost nothing."""
    alone, relay = run(config(), data), run(config(clients=2, topology="relay"), data, (32, 32))
    assert 64 * 2 <= alone.wires[0].meter.up["labels"] <= 64 * 2 * 1.5
    assert alone.wires[0].meter.up["weights"] == 0
    size = sum(t.numel() * t.element_size() for m in (relay.clients[0].half, relay.clients[0].head)
               for t in m.state_dict().values())  # fmt: skip
    for wire in relay.wires:
        assert wire.meter.up["weights"] >= 2 * size
        assert wire.meter.down["weights"] >= size


# ---------------------------------------------------------------------------------------------------- topologies


def relay_batches(data):
    return [
        batch for epoch in range(2) for k, shard in enumerate(shards(data, [40, 24]))
        for batch in train_batches(data, shard, 16, seed=0, client=k, epoch=epoch)
    ]  # fmt: skip


def test_relay_is_one_client_that_sees_the_shards_in_turn(data):
    """The client half travels with its optimizer's momentum: two in relay are one module trained in that order."""
    settings = config(clients=2, topology="relay", schedule="constant")
    local = run(settings, data, (40, 24))
    model, head = plain_start(settings, data)
    train_decoupled(model, head, relay_batches(data), lambda step: 0.05, SGD)
    for client in range(2):
        assert equal(joined(local, client), model.state_dict())


def test_the_schedule_goes_on_from_client_to_client_in_a_relay(data):
    settings = config(clients=2, topology="relay")
    local = run(settings, data, (40, 24))
    model, head = plain_start(settings, data)
    train_decoupled(model, head, relay_batches(data), lambda step: one_cycle(step, total=10), SGD)
    assert close(joined(local), model.state_dict())


def test_adamw_s_memory_travels_too(data):
    settings = config(clients=2, topology="relay", schedule="constant", optimizer="adamw", lr=0.01)
    local = run(settings, data, (40, 24))
    model, head = plain_start(settings, data)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=0.01, weight_decay=5e-4, fused=True)
    for x, y in relay_batches(data):
        z = model.below(x)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy
        (loss(head(z), y) + loss(model.classifier(model.above(z.detach())), y)).backward()
        optimizer.step()
    assert equal(joined(local), model.state_dict())


def test_splitfed_averages_weights_and_buffers_of_unequal_clients_alike(data):
    settings = config(clients=2, schedule="constant", epochs=1)
    network = build_network(settings, data.train.sample_shape, data.classes)
    local = LocalRun(settings, data, shards(data, [32, 16]), network)  # two batches and one: 1.5 are counted as 2
    seen = {}
    take = local.handover.take
    local.handover.take = lambda states: (seen.update(states), take(states))
    local.train(0, lambda: None)
    local.finish()
    assert not equal(seen[0], seen[1])
    for name in seen[0]:
        expected = (seen[0][name].double() + seen[1][name].double()) / 2
        part, key = name.split(".", 1)
        for client in local.clients:
            value = (client.half if part == "half" else client.head).state_dict()[key]
            wanted = expected if value.is_floating_point() else expected.round()
            assert torch.allclose(value.double(), wanted, rtol=1e-6, atol=1e-8), name


def in_rounds(settings, **options):
    return dataclasses.replace(settings, clients=dataclasses.replace(settings.clients, **options))


@pytest.mark.parametrize(("lr_scale", "rounds"), [
    (1, [[(0, 0), (1, 0)], [(0, 1), (1, 1), (0, 2)]]), (3, [[(0, 0)], [(0, 1), (1, 0)], [(0, 2), (1, 1)]]),
])  # fmt: skip
@pytest.mark.parametrize("method", ["decoupled", "conventional"])
def test_rounds_average_within_the_epoch(data, method, lr_scale, rounds):
    """Against two ordinary client halves, of three batches and two, averaged by hand after each round: (client, step)
    of each. Of three rounds the smaller client sits one out."""
    settings, counts = config(method, clients=2, schedule="constant"), (40, 24)
    server, head = plain_start(settings, data)
    clients = [copy.deepcopy(nn.ModuleDict({"below": server.below, **({} if head is None else {"head": head})})) for _ in counts]
    server = nn.Sequential(server.above, server.classifier)
    optimizers = [
        torch.optim.SGD(part.parameters(), lr=0.05 if part is server else lr_scale * 0.05, fused=True, **SGD)
        for part in (*clients, server)
    ]
    for epoch in range(2):
        batches = [
            list(train_batches(data, shard, 16, seed=0, client=k, epoch=epoch)) for k, shard in enumerate(shards(data, counts))
        ]  # 3 and 2
        for places in rounds:
            for k, step in places:
                x, y = batches[k][step]
                for optimizer in (optimizers[k], optimizers[-1]):
                    optimizer.zero_grad()
                z = clients[k]["below"](x)
                loss = nn.functional.cross_entropy
                if head is not None:
                    loss(clients[k]["head"](z), y).backward()
                    z = z.detach()
                loss(server(z), y).backward()
                for optimizer in (optimizers[k], optimizers[-1]):
                    optimizer.step()
            states = [client.state_dict() for client in clients]
            mean = {name: (states[0][name].double() + states[1][name].double()) / 2 for name in states[0]}
            for client in clients:
                client.load_state_dict({name: value.round() if "tracked" in name else value for name, value in mean.items()})
    local = run(in_rounds(settings, rounds=len(rounds), lr_scale=lr_scale), data, counts)
    halves = [(client.half, clients[0]["below"]) for client in local.clients] + [(local.server.half, server)]
    for ours, plain in halves:
        assert all(torch.equal(*pair) for pair in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True))
    assert not equal(joined(local), joined(run(settings, data, counts)))


def test_places_in_an_epoch_count_it_off_in_the_order_of_its_rounds():
    for steps, count in itertools.product([(5,), (7, 7), (9, 4, 6), (20, 3)], (1, 2, 3, 5)):
        places, slots = [], []
        done = [0] * len(steps)
        course = Course()
        for turn in turns("splitfed", steps, count):
            course.begin(turn, 0, 0)
            while any(done[k] < part.stop for k, part in turn.items()):
                for k, part in turn.items():
                    if done[k] < part.stop:
                        assert done[k] in part
                        places.append(place_in_epoch("splitfed", steps, count, k, done[k]))
                        slots.append(course.slot(k, done[k]))
                        done[k] += 1
            course.end()
        assert places == slots == list(range(sum(steps)))
        assert done == list(steps)


def test_independent_clients_keep_their_own_halves_and_send_no_weights(data):
    local = run(config(clients=2, topology="independent"), data, (32, 32))
    assert not equal(local.clients[0].half.state_dict(), local.clients[1].half.state_dict())
    assert all(wire.meter.up["weights"] == wire.meter.down["weights"] == 0 for wire in local.wires)


def test_independent_client_learns_as_if_it_were_alone(data):
    """Decoupled and not averaged, another client's data cannot reach this one's half."""
    both = run(config(clients=2, topology="independent"), data, (32, 32))
    alone = run(config(), data, (32, 32)[:1])
    assert equal(both.clients[0].half.state_dict(), alone.clients[0].half.state_dict())


# ------------------------------------------------------------------------------------------------- seeds and modes


def test_same_seed_same_weights_other_seed_other_weights(data):
    first, again, other = run(config(), data), run(config(), data), run(config(seed=1), data)
    assert equal(joined(first), joined(again))
    assert not equal(joined(first), joined(other))


class Dropping(HandCut):
    def __init__(self):
        super().__init__()
        self.below[2], self.above[2] = nn.Dropout(0.5), nn.Dropout(0.5)


def dropping(sample_shape, classes):
    return Dropping()


def test_dropout_is_drawn_anew_in_every_step_and_alike_in_the_same_one(data):
    client, server = built(config(model="test_invariants:dropping", lr=0.0), data)  # nothing else changes
    x, y = data.train.inputs[:16], data.train.labels[:16]
    start, _ = client_side.decoupled_step(client, x, y, 0, 0)

    def drawn(seed=0, index=0, epoch=0, step=0):
        client.seed = server.seed = seed
        client.index = index
        batch, _ = client_side.decoupled_step(client, x, y, epoch, step)
        return float(batch.tensors[0].sum()), server_side.decoupled_step(server, dataclasses.replace(start, client=index, epoch=epoch, step=step))

    steps = [drawn(), drawn(seed=1), drawn(index=1), drawn(epoch=1), drawn(step=1)]
    assert [len(set(draws)) for draws in zip(*steps, strict=True)] == [5, 5]
    assert drawn() == steps[0]


def test_evaluation_changes_nothing(data):
    local = run(config(), data)
    before = snapshot(local.clients[0].half, local.clients[0].head, local.server.half)
    values = local.test(0)[0].values()
    assert changed(before, local.clients[0].half, local.clients[0].head, local.server.half) == [False] * 3
    assert local.test(0)[0].values() == values
    assert local.clients[0].half.training
    assert local.server.half.training


def test_evaluation_passes_through_the_codec(data, monkeypatch):
    seen, evaluate = [], server_side.evaluate
    monkeypatch.setattr(server_side, "evaluate", lambda server, batch: (seen.append(batch.tensors[0]), evaluate(server, batch))[1])
    run(config(), data)
    assert not torch.equal(seen[0], seen[0].bfloat16().float())
    seen.clear()
    run(config(codec="bf16"), data)
    assert torch.equal(seen[0], seen[0].bfloat16().float())


def test_weights_are_in_channels_last_order(data):
    client, server = built(config(), data)
    weights = [p for half in (client.half, server.half) for p in half.parameters() if p.ndim == 4]
    assert len(weights) == 2
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("method", ["decoupled", "conventional"])
def test_compiled_halves_learn_the_same(method, data, monkeypatch):
    """With the formulas of the kernels; test_fused.py has the kernels themselves."""
    monkeypatch.setattr(fused, "_kernel", lambda function: function)
    compiled, plain = (joined(run(config(compile=on, method=method), data)) for on in (True, False))
    assert any(not torch.equal(compiled[name], value) for name, value in plain.items())  # or nothing was replaced
    for name, value in plain.items():
        assert torch.allclose(compiled[name], value, rtol=1e-3, atol=1e-4), name
