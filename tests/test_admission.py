"""What a server believes of a newcomer: nothing that it has not checked, and a refused one leaves no trace."""

import json

import pytest

from halfpass.config import ClientsConfig, Config, shared_settings
from halfpass.errors import InputError
from halfpass.run import setup
from halfpass.run.server_process import Admission
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import PROTOCOL

CONFIG = Config(clients=ClientsConfig(count=2))


def join(**changes):
    network = setup.build_network(CONFIG, (1, 8, 8), 10)
    good = {
        "protocol": PROTOCOL, "client": 0, "settings": json.dumps(shared_settings(CONFIG)), "sample_shape": (1, 8, 8),
        "classes": 10, "samples": 300, "steps": 3, "parameters": network.parameters, "fingerprint": network.fingerprint,
    }  # fmt: skip
    return pb.Join(**(good | changes))


@pytest.mark.parametrize(("changes", "text"), [
    ({"protocol": 9}, rf"protocol {PROTOCOL} \(the server's\), found 9"),
    ({"settings": "nope"}, "settings as a JSON object, found 'nope'"),
    ({"settings": "[]"}, r"settings as a JSON object, found '\[\]'"),
    ({"settings": "{}"}, r"clients.alpha 0.5 \(the server's\), found None"),
    ({"classes": 11}, r"parameters of the network \d+ \(the server's\), found"),
    ({"sample_shape": ()}, r"samples of 1 to \d+ values in 1 to \d+ classes, found shape \(\) in 10 classes"),
    ({"sample_shape": (2**31, 2**31)}, "samples of 1 to"),
    ({"classes": 2**31}, "samples of 1 to"),
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
