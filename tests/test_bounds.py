"""What a peer that is no halfpass, or a hostile one, can make either side do: little, and it is said which and why."""

import dataclasses
import json
import math
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from small import config, shards
from test_admission import CONFIG, join

from halfpass.algorithm.handover import client_weights
from halfpass.config import ClientsConfig
from halfpass.cut import CutBatch
from halfpass.errors import InputError, RunError
from halfpass.run import setup
from halfpass.run.admission import Admission
from halfpass.run.client_process import ClientRun
from halfpass.run.epoch import HandedOver, Tally, handed_over
from halfpass.run.network import build_network
from halfpass.run.server_process import ServerRun, _Place
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import hub as hub_side
from halfpass.wire.messages import (
    MOST_PARTS,
    check_weights,
    few_parts,
    read_weights,
    write_batch,
    write_tensor,
    write_weights,
)


class Silent:
    """A connection to nobody; what is sent is kept."""

    def __init__(self):
        self.sent = []

    def send_in_turn(self, make):
        self.sent += make()


def client_run(data, **changes):
    settings = config(clients=2, **changes)
    network = build_network(settings, data.train.sample_shape, data.classes)
    shard = shards(data, [32, 32])[0]
    return ClientRun(settings, Silent(), setup.build_client(settings, network, 0), data, shard, network.task)


# --- a server, towards a client ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    {"epoch": 1}, {"first_step": 1}, {"total_steps": 58}, {"total_steps": 2**63}, {"until": 3}, {"until": 2**40},
])  # fmt: skip
def test_a_client_trains_what_its_settings_say_and_nothing_else(data, change):
    run = client_run(data)
    good = {"epoch": 0, "first_step": 0, "total_steps": 4, "until": 2}
    before = client_weights(run.client)
    with pytest.raises(RunError, match="the server: expected an epoch as the settings have it: 2 epochs of 2 steps, found epoch"):
        run._train(pb.Begin(**good | change))
    assert all(torch.equal(value, before[name]) for name, value in client_weights(run.client).items())
    run._train(pb.Begin(**good))
    with pytest.raises(RunError, match="expected an epoch as the settings have it"):
        run._train(pb.Begin(**good))  # again
    run._train(pb.Begin(**good | {"epoch": 1, "first_step": 2}))
    with pytest.raises(RunError, match="expected an epoch"):
        run._train(pb.Begin(**good | {"epoch": 2, "first_step": 4}))  # one more than agreed on


def test_rounds_of_an_epoch_follow_each_other(data):
    run = client_run(data)
    for since, until in ((0, 0), (0, 1), (1, 1), (1, 2)):  # of a client with fewer steps than there are rounds
        run._train(pb.Begin(epoch=0, first_step=0, total_steps=4, since=since, until=until))
    with pytest.raises(RunError, match="expected an epoch"):
        run._train(pb.Begin(epoch=0, first_step=0, total_steps=4, until=1))


def test_a_client_ends_and_tests_when_its_settings_say(data):
    run = client_run(data)
    with pytest.raises(RunError, match=r"the server: expected a test as the settings have it: .* found one after epoch 0, 0 are done"):
        run._test(pb.Test(epoch=0))
    run.connection.receive = lambda *kinds: pb.ServerMessage(finish=pb.Finish())
    with pytest.raises(RunError, match="the server: expected the end as the settings have it: 2 epochs of 2 steps, found after 0 epochs; do not trust it"):
        run.follow()


@pytest.mark.parametrize("topology", ["splitfed", "relay", "independent"])
def test_a_client_loads_its_own_shapes_and_finite_ones_alone(data, topology):
    run = client_run(data, topology=topology)
    good = handed_over(run.config, run.client)
    before = client_weights(run.client)
    first = next(iter(good))

    def offer(weights):
        run._take_over(write_weights(weights))

    if topology == "independent":
        with pytest.raises(RunError, match="the server: expected one of 0 weights, of its shape and dtype, found 'half"):
            offer(good)
    else:
        for bad, said in (
            ({**good, first: torch.zeros(2)}, r"expected one of \d+ weights, of its shape and dtype, found '.*', \(2,\) of float32 in none"),
            ({**good, "half.other": torch.zeros(2)}, "found 'half.other'"),
            ({name: value for name, value in good.items() if name != first}, r"expected the \d+ weights, each once"),
            ({**good, first: good[first] * math.nan}, "the server, .*: expected finite weights, found NaN or infinity"),
        ):
            with pytest.raises(RunError, match=said):
                offer(bad)
        offer({name: value + 1 if value.is_floating_point() else value for name, value in good.items()})
        assert not torch.equal(client_weights(run.client)[first], before[first])
    offer({})


def test_what_a_few_bytes_state_is_looked_at_before_room_is_made_for_it(data):
    run = client_run(data)
    weights = write_weights(client_weights(run.client))
    large = write_tensor(torch.zeros(2**20), "none+zstd", name=weights[0].name)
    del large.shape[:]
    large.shape.extend([2**20, 2**10])  # 4 GB
    tracemalloc.start()
    with pytest.raises(RunError, match=r"found '.*', \(1048576, 1024\) of float32 in none\+zstd; both sides"):
        run._take_over([large, *weights[1:]])
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


# --- a client, towards the server -------------------------------------------------------------------------------------


def server_run(settings=CONFIG):
    admission = Admission(settings)
    for k in range(2):
        admission.admit(join(client=k, settings=json.dumps(setup.agreed_settings(settings))))
    hub = SimpleNamespace(enough_without=lambda client: False, ahead=False)
    return ServerRun(settings, hub, admission, None, None), admission


@pytest.mark.parametrize("change", [
    {"samples": 301}, {"samples": 2**63}, {"busy_seconds": -1.0}, {"busy_seconds": 1e300}, {"learning_rate": math.inf}, {"uploads": 4},
    {"uploads": 2, "withheld": 2}, {"epoch": 1},
])  # fmt: skip
def test_what_a_client_says_of_its_epoch_is_possible(change):
    run, admission = server_run()
    weights = write_weights(client_weights(setup.build_client(CONFIG, admission.network, 0)))
    good = pb.EpochEnd(samples=300, uploads=3, busy_seconds=1.0, weights=weights)
    bad = pb.EpochEnd()
    bad.CopyFrom(good)
    for name, value in change.items():
        setattr(bad, name, value)
    with pytest.raises(RunError, match="client 1: expected a sound end of epoch 0, found one of epoch"):
        run._hand_over(_Place(0, Tally(torch.device("cpu"))), {0: good, 1: bad})
    assert run._hand_over(_Place(0, Tally(torch.device("cpu"))), {0: good, 1: good})[1].samples == 300


def test_weights_that_nobody_asked_for_are_refused():
    settings = dataclasses.replace(CONFIG, clients=ClientsConfig(2, "independent"))
    run, admission = server_run(settings)
    weights = write_weights(client_weights(setup.build_client(settings, admission.network, 0)))
    with pytest.raises(RunError, match="client 0: expected one of 0 weights"):
        run._hand_over(_Place(0, Tally(torch.device("cpu"))), {0: pb.EpochEnd(samples=300, weights=weights), 1: pb.EpochEnd(samples=300)})


def test_a_batch_comes_in_the_codec_that_was_agreed_on():
    settings = dataclasses.replace(CONFIG, wire=dataclasses.replace(CONFIG.wire, codec="int8"))
    _, admission = server_run(settings)
    shape = admission.network.cut_shapes[0]
    batch = CutBatch(0, 0, 0, (torch.ones(4, *shape),), torch.zeros(4, dtype=torch.int64))
    admission.check(0, write_batch(batch, "int8").batch)
    for codec in ("none", "int4", "int8+zstd"):
        with pytest.raises(InputError, match=f"batch of client 0, epoch 0, step 0, tensor 0: expected codec int8, found '{codec.replace('+', '.')}'"):
            admission.check(0, write_batch(batch, codec).batch)


def test_a_message_of_very_many_parts_is_not_even_read():
    few = pb.ClientMessage(batch=pb.Batch(tensors=[pb.Tensor() for _ in range(1000)])).SerializeToString()
    many = b"\x12" + _varint(2 * (MOST_PARTS + 1)) + b"\x2a\x00" * (MOST_PARTS + 1)  # a batch of empty tensors
    assert few_parts(few)
    assert not few_parts(many)
    assert not few_parts(b"\x32\x00" * (MOST_PARTS + 1))  # signs of life, one behind the other
    assert hub_side.parsed(few) is not None
    tracemalloc.start()
    assert hub_side.parsed(many) is None
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    for broken in (b"", b"\x12", b"\x12\xff", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x0b", b"\x12\x05a"):
        assert few_parts(broken)  # that it is no message, the parser says


def _varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def test_real_messages_have_few_parts(data):
    run = client_run(data, topology="relay")
    state = handed_over(run.config, run.client)
    message = pb.ClientMessage(epoch_end=pb.EpochEnd(weights=write_weights(state))).SerializeToString()
    assert few_parts(message)
    assert not few_parts(message, len(state))


def test_all_that_a_relay_hands_on_is_known_by_name_and_shape(data):
    """With momentum, and with AdamW's two moments and count."""
    for optimizer, beside in (("sgd", 1), ("adamw", 3)):
        run = client_run(data, topology="relay", optimizer=optimizer)
        run._train(pb.Begin(epoch=0, first_step=0, total_steps=8, until=2))
        known = HandedOver(run.config, run.client)
        state = handed_over(run.config, run.client)
        assert len(state) == len(known.weights) + beside * len(list(run.client.half.parameters()) + list(run.client.head.parameters()))
        check_weights("here", write_weights(state), known.weights, known.memory)
        assert read_weights(write_weights(state)).keys() == state.keys()
