"""What a server believes of a newcomer, and of what clients give back: nothing that it has not checked, and what is
refused leaves no trace."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from halfpass.algorithm.handover import client_weights
from halfpass.config import ClientsConfig, Config
from halfpass.errors import InputError, RunError
from halfpass.run import setup
from halfpass.run.admission import Admission
from halfpass.run.epoch import Tally
from halfpass.run.network import build_network
from halfpass.run.server_process import ServerRun, _Place
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import PROTOCOL, write_weights

CONFIG = Config(clients=ClientsConfig(count=2))


def join(**changes):
    network = build_network(CONFIG, (1, 8, 8), 10)
    good = {
        "protocol": PROTOCOL, "client": 0, "settings": json.dumps(setup.agreed_settings(CONFIG)), "inputs": json.dumps({"": ["float32", [1, 8, 8]]}),
        "outputs": 10, "samples": 300, "steps": 3, "parameters": network.parameters, "fingerprint": network.fingerprint,
    }  # fmt: skip
    return pb.Join(**(good | changes))


@pytest.mark.parametrize(("changes", "text"), [
    ({"protocol": PROTOCOL + 1}, rf"protocol {PROTOCOL} \(the server's\), found {PROTOCOL + 1}"),
    ({"settings": "nope"}, "settings as a JSON object, found 'nope'"),
    ({"settings": "[]"}, r"settings as a JSON object, found '\[\]'"),
    ({"settings": "{}"}, r"clients.alpha 0.5 \(the server's\), found None"),
    ({"outputs": 11}, r"parameters of the network \d+ \(the server's\), found"),
    ({"inputs": '{"": ["float32", []]}'}, r"samples of 1 to \d+ values in 1 to \d+ classes, found shape \(\) in 10 classes"),
    ({"inputs": '{"": ["float32", [2147483648, 2147483648]]}'}, "samples of 1 to"),
    ({"outputs": 2**31}, "samples of 1 to"),
    ({"targets": '{"spec": {"": ["int64", [0.5]]}, "names": []}'}, "targets as a JSON object of names, dtypes and shapes, found"),
    ({"plan": "[" * 100_000}, "the plan of the cut: expected JSON as halfpass writes it, found ValueError: more than 32 levels"),
    ({"plan": '{"cut": {"inputs": {"": [[1e999], "float32"]}}}'}, "the plan of the cut: expected one as halfpass makes it, found OverflowError"),
    ({"steps": 4_000_000_000}, "3 steps per epoch for 300 samples, found 4000000000"),
    ({"steps": 4}, "3 steps per epoch for 300 samples, found 4"),
    ({"samples": 0, "steps": 0}, "expected training samples, found none"),
    ({"fingerprint": "x"}, r"network \(fingerprint of names and shapes\) '.*' \(the server's\), found 'x'"),
])  # fmt: skip
def test_a_wrong_newcomer_is_refused_and_the_next_good_one_admitted(changes, text):
    admission = Admission(CONFIG)
    with pytest.raises(InputError, match=text) as refused:
        admission.admit(join(**changes))
    assert "\n" not in str(refused.value)
    admission.admit(join())
    admission.admit(join(client=1, samples=200, steps=2))
    assert sorted(admission.joins) == [0, 1]


def test_an_edge_s_steps_are_those_of_all_its_clients():
    for steps in (1, 300):  # 1: of 200 clients with a batch and a single sample each, for instance
        Admission(CONFIG, of_edge=True).admit(join(steps=steps))
    for steps in (0, 301):
        with pytest.raises(InputError, match=f"1 to 300 steps per epoch for 300 samples, found {steps}"):
            Admission(CONFIG, of_edge=True).admit(join(steps=steps))


@pytest.mark.parametrize(("change", "text"), [
    (lambda w: w.pop("half.block_1.0.weight"), r"client 1: expected the (\d+) weights, each once, found \d+, of \d+ names"),
    (lambda w: w.update({"half.block_1.0.weight": torch.zeros(3, 3)}), r"client 1: expected one of \d+ weights, of its shape and dtype, found 'half.block_1.0.weight', \(3, 3\) of float32 in none"),
    (lambda w: w.update({"half.block_1.0.weight": w["half.block_1.0.weight"].half()}), r"found 'half.block_1.0.weight', .* of float16 in none; both sides must run the same network"),
    (lambda w: w.update({"half.another": torch.zeros(3)}), r"found 'half.another', \(3,\) of float32 in none"),
    (lambda w: w.update({"optimizer.0.momentum_buffer": torch.zeros(2)}), r"found 'optimizer.0.momentum_buffer', \(2,\) of float32"),
    (lambda w: w["half.block_1.0.weight"].view(-1)[3].fill_(math.nan), "client 1, half.block_1.0.weight: expected finite weights, found NaN or infinity; lower train.lr"),
])  # fmt: skip
def test_what_is_no_client_half_is_not_handed_on(change, text):
    admission = Admission(CONFIG)
    for k in range(2):
        admission.admit(join(client=k))
    run = ServerRun(CONFIG, SimpleNamespace(enough_without=lambda client: False, ahead=False), admission, None, None)
    good = [client_weights(setup.build_client(CONFIG, admission.network, k)) for k in range(2)]
    bad = {name: value.clone() for name, value in good[1].items()}
    change(bad)
    for weights in ([good[0], bad], good):
        ends = {k: pb.EpochEnd(samples=300, weights=write_weights(state)) for k, state in enumerate(weights)}
        with nullcontext() if weights is good else pytest.raises(RunError, match=text):
            run._hand_over(_Place(0, Tally(torch.device("cpu"))), ends)
        assert run.handover.give(0).keys() == (good[0].keys() if weights is good else set())
