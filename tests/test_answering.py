"""Client half here, server half there: the answers are the joined network's, and whoever asks something else is refused
with both values. Servers run in this process, by TLS as by loopback."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import numpy as np
import pytest
import torch
from test_predict import trained

import halfpass
from halfpass.commands.certs import make_certificates
from halfpass.commands.cli import main
from halfpass.config import DataConfig, ModelConfig, TlsConfig, WireConfig
from halfpass.data.datasets import load as load_data
from halfpass.errors import HalfpassError, InputError, RunError
from halfpass.run import answer_process
from halfpass.run.predictor import predictor
from halfpass.run.saved import SavedRun
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import hub as hub_module
from halfpass.wire.answering import Agreed, Asker, Expected, read_question, write_question
from halfpass.wire.messages import PROTOCOL

AGREED = Agreed("it", "below", "f00", "none")
EXPECTED = Expected(AGREED, [((3,), "float32")], [], False, 4, (2,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, one with a lossy codec, and each owner's own files alone."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    for name, codec in (("run", "none"), ("int8", "int8+zstd")):
        trained(folder / name, wire=WireConfig(codec))
    for place, name in (("site", "client-0"), ("server", "server")):
        (folder / place).mkdir()
        shutil.copy(folder / "run" / f"{name}.safetensors", folder / place)
    make_certificates(folder / "keys", clients=2, hosts=["127.0.0.1"], edge=False, days=1, tokens=False)
    make_certificates(folder / "others", clients=1, hosts=["127.0.0.1"], edge=False, days=1, tokens=False)
    return folder


@contextmanager
def answering(folder, monkeypatch, tls=None):
    """The address of a server of it, in this process."""
    stop, ports, failed = threading.Event(), [], []
    there = threading.Event()
    monkeypatch.setattr(answer_process, "leaving", stop.is_set)

    def announce(port):
        ports.append(port)
        there.set()

    def work():
        try:
            answer_process.answer(SavedRun([folder]), "127.0.0.1:0", announce, tls or TlsConfig())
        except BaseException as error:
            failed.append(error)
            there.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert there.wait(60)
        if failed:
            raise failed[0]
        yield f"127.0.0.1:{ports[0]}"
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def asking(folder, address, tls=None, **options):
    saved = SavedRun([folder])
    ways = []

    def above(signature, network):
        ways.append(answer_process.asker(saved, address, tls or TlsConfig(), signature, network))
        return answer_process.above_at(ways[0], network.halves.client)

    made = predictor(saved, above=above, **options)
    with ways[0]:
        made.way = ways[0]
        yield made


def pixels(count=48):
    return load_data("digits", limit=48).test.inputs[:count]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_the_joined_networks_by_tls_with_each_owners_files_alone(runs, monkeypatch):
    tls = TlsConfig(folder=str(runs / "keys"))
    expected = halfpass.load(runs / "run").predict(pixels())
    with answering(runs / "server", monkeypatch, tls) as address, asking(runs / "site", address, tls) as made:
        assert torch.equal(made.predict(pixels()).answers, expected.answers)
        for count in (1, 5):
            assert torch.allclose(made.predict(pixels(count)).answers, expected.answers[:count], atol=1e-6)
        before, exits = made.way.bytes_up, float(expected.answers.amax(1).median())
        made.predict(pixels())
        every = made.way.bytes_up - before
        with asking(runs / "site", address, tls, exit_above=exits) as early:
            some = early.predict(pixels())
            assert 0 < int(some.by_head.sum()) < 48
            assert torch.allclose(some.answers[~some.by_head], expected.answers[~some.by_head], atol=1e-6)
            share = float((~some.by_head).sum()) / 48
            assert early.way.bytes_up == pytest.approx(share * every, rel=0.05)  # what is sure is not sent
            assert early.way.bytes_up < every


def test_a_lossy_codec_is_the_runs(runs, monkeypatch):
    expected = halfpass.load(runs / "int8").predict(pixels()).answers
    with answering(runs / "int8", monkeypatch) as address, asking(runs / "int8", address) as made:
        found = made.predict(pixels()).answers
        assert torch.allclose(found, expected, atol=0.02)
        assert not torch.equal(found, expected)
        with asking(runs / "int8", address) as other:
            other.way._agreed = Agreed(other.signature.run, other.way._agreed.cut, other.way._agreed.fingerprint, "none")
            with pytest.raises(HalfpassError, match=r"expected codec int8\+zstd \(the server's\), found none; give both sides"):
                other.predict(pixels())
        assert torch.equal(made.predict(pixels()).answers, found)  # and a good one behind it


def test_many_clients_at_a_time(runs, monkeypatch):
    expected = halfpass.load(runs / "run").predict(pixels()).answers

    with answering(runs / "run", monkeypatch) as address, ExitStack() as stack:
        made = [stack.enter_context(asking(runs / "run", address)) for _ in range(8)]  # a network is built by one at a time
        with ThreadPoolExecutor(8) as clients:
            for _ in range(2):
                assert all(torch.equal(found.answers, expected) for found in clients.map(lambda each: each.predict(pixels()), made))


# --- who is refused --------------------------------------------------------------------------------------------------


def test_strangers_and_other_trainings_are_refused(runs, monkeypatch, tmp_path):
    tls = TlsConfig(folder=str(runs / "keys"))
    trained(tmp_path / "other")
    with answering(runs / "server", monkeypatch, tls) as address:
        with pytest.raises(HalfpassError, match=r"the half of run [0-9a-f]{16} .*, found [0-9a-f]{16}; give both sides"), asking(tmp_path / "other", address, tls) as made:
            made.predict(pixels())
        for keys in (None, TlsConfig(folder=str(runs / "others"))):
            with pytest.raises(InputError, match=rf"server at {address}: expected"), asking(runs / "site", address, keys):
                pass
        with asking(runs / "site", address, tls) as made:
            assert made.predict(pixels(3)).answers.shape == (3, 10)
    monkeypatch.setattr("halfpass.wire.answering.REACH_SECONDS", 0.3)
    with pytest.raises(InputError, match="server address: expected a halfpass server within"), asking(runs / "site", address, tls):
        pass


def test_a_server_that_trains_says_that_it_does_not_answer(runs):
    server = hub_module.Hub("127.0.0.1:0", clients=1, window_bytes=2**20, timeout=10, admit=lambda join: None, check=lambda client, batch: None)
    try:
        with pytest.raises(InputError, match="expected a server that answers after training, found one that does not"), asking(runs / "site", f"127.0.0.1:{server.port}") as made:
            made.predict(pixels(2))
    finally:
        server.stop()


def test_one_that_answers_takes_no_session(runs, monkeypatch):
    with answering(runs / "server", monkeypatch) as address, grpc.insecure_channel(address) as channel:
        to, of = pb.ClientMessage.SerializeToString, pb.ServerMessage.FromString
        stream = channel.stream_stream("/halfpass.SplitLearning/Session", request_serializer=to, response_deserializer=of)
        replies = list(stream(iter([pb.ClientMessage(join=pb.Join(protocol=PROTOCOL, first=1))]), timeout=20))
        assert "expected a server that trains, found one that answers after training" in replies[-1].failed.reason


def question(tensor=None, agreed=AGREED, **changes):
    made = write_question(agreed, (torch.ones(2, 3) if tensor is None else tensor,))
    for key, value in changes.items():
        setattr(made, key, value)
    return made.SerializeToString()


@pytest.mark.parametrize(("data", "text"), [
    (b"", "expected a Question, found 0 bytes that are none"),
    (b"\xff" * 9, "expected a Question, found 9 bytes"),
    (b"\x32\x00" * 70_000, "expected a Question"),
    (question(protocol=PROTOCOL + 1), rf"expected protocol {PROTOCOL} \(the server's\), found {PROTOCOL + 1}"),
    (question(cut="other"), r"expected cut below \(the server's\), found other"),
    (question(fingerprint="0"), r"expected network \(fingerprint\) f00 \(the server's\), found 0"),
    (question(run="that"), r"expected the half of run it \(the server's\), found that"),
    (question(run=""), r"expected the half of run it \(the server's\), found none"),
    (question(codec="int8"), r"expected codec none \(the server's\), found int8"),
    (question(torch.ones(5, 3)), "expected 1 to 4 samples, found 5"),
    (question(torch.ones(0, 3)), "expected 1 to 4 samples, found 0"),
    (question(torch.ones(2, 4)), r"expected tensors of \[\(2, 3\)\], found \[\(2, 4\)\]"),
    (question(torch.ones(2, 3, dtype=torch.int64)), "expected float32 or bfloat16 or float16, found int64"),
    (question(torch.full((2, 3), float("nan"))), "tensor 0: expected finite values, found NaN or infinity"),
    (write_question(AGREED, (torch.ones(2, 3), torch.ones(2, 3))).SerializeToString(), "expected tensors of"),
    (write_question(AGREED, ()).SerializeToString(), "expected 1 to 4 samples, found 0"),
])  # fmt: skip
def test_questions_are_checked_at_the_door(data, text):
    with pytest.raises(InputError, match=text):
        read_question(data, EXPECTED)


def test_sizes_are_checked_before_anything_is_decoded():
    made = write_question(AGREED, (torch.ones(2, 3),))
    made.tensors[0].shape[:] = [2, 2**31]
    with pytest.raises(InputError, match="expected tensors of"):
        read_question(made.SerializeToString(), EXPECTED)
    made = write_question(AGREED, (torch.ones(2, 3),))
    made.tensors[0].data = b"1"
    with pytest.raises(InputError, match=r"the values of shape \(2, 3\), float32, found 1 bytes"):
        read_question(made.SerializeToString(), EXPECTED)
    assert torch.equal(read_question(question(), EXPECTED)[0], torch.ones(2, 3))
    assert EXPECTED.most_bytes < 2**20 + 1000


def test_a_server_whose_answer_is_not_one_is_not_believed(runs):
    asker = Asker.__new__(Asker)
    asker._place, asker._shape = "server at x", (2,)
    for outputs in (torch.ones(3, 2), torch.ones(2, 3), torch.ones(2, 2, dtype=torch.float64), torch.full((2, 2), float("inf"))):
        answers = pb.Answers(outputs=write_question(AGREED, (outputs,)).tensors[0])
        with pytest.raises(RunError, match=r"server at x.*: expected"):
            asker._checked(answers, 2)
    assert asker._checked(pb.Answers(outputs=write_question(AGREED, (torch.ones(2, 2),)).tensors[0]), 2).shape == (2, 2)


def test_what_cannot_answer_is_refused(runs, tmp_path, monkeypatch):
    for name, settings, text in (
        ("whole", {"method": "centralized"}, "expected a run with one cut, found method centralized"),
        ("chain", {"model": ModelConfig(edge_cut="block_3")}, "expected a run with one cut, found model.edge_cut"),
    ):
        trained(tmp_path / name, data=DataConfig("digits", limit=32), **settings)
        with pytest.raises(InputError, match=text), answering(tmp_path / name, monkeypatch):
            pass
    with pytest.raises(InputError, match=r"server.safetensors: expected weights that the run saved, found none"), answering(runs / "site", monkeypatch):
        pass


def test_the_commands(runs, monkeypatch, capsys, tmp_path):
    np.save(tmp_path / "x.npy", pixels(4).numpy())
    with answering(runs / "server", monkeypatch) as address:
        assert main(["predict", str(runs / "site"), str(tmp_path / "x.npy"), "--server", address, "--json"]) == 0
        said = capsys.readouterr()
        expected = halfpass.load(runs / "run").predict(pixels(4)).rows()
        assert [row["class"] for row in json.loads(said.out)["predictions"]] == [row["class"] for row in expected]
        assert " bytes up, " in said.err
        assert main(["status", address, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["phase"] == "answering"
    assert main(["answer", str(runs / "server"), "--bind", "0.0.0.0:0"]) == 2
    assert "server address: expected a loopback host" in capsys.readouterr().err
