"""Who may connect: certificates and tokens, with real handshakes; each refusal is told to both sides."""

import contextlib
import dataclasses
import datetime
import logging
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from plain import equal
from safetensors.torch import load_file

from halfpass.commands import certs
from halfpass.commands.certs import make_certificates
from halfpass.commands.cli import main
from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, TlsConfig, TrainConfig, WireConfig
from halfpass.errors import HalfpassError, InputError
from halfpass.run.credentials import TOKEN, trust_of
from halfpass.run.train import train
from halfpass.wire import front, reach
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import hub as hub_side
from halfpass.wire.connection import Connection, channel_to
from halfpass.wire.front import Front
from halfpass.wire.hub import Hub
from halfpass.wire.service import METHOD, SERVICE, check_address
from halfpass.wire.trust import Trust, identity_of_client, number_of


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Of two authorities, and of one with tokens."""
    base = tmp_path_factory.mktemp("certs")
    make_certificates(base / "ours", clients=2, edge=True)
    make_certificates(base / "others", clients=1)
    make_certificates(base / "tokens", clients=2, tokens=True)
    return base


def issued(folder, file, names, first=-1.0, last=1.0):
    """A certificate of the folder's authority, valid from so many days from now to so many; returns its two files."""
    authority = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    authority_key = serialization.load_pem_private_key((folder / "authority-key.pem").read_bytes(), None)
    key, now, day = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder(authority.subject, x509.Name([]), key.public_key(), x509.random_serial_number())
        .not_valid_before(now + first * day).not_valid_after(now + last * day)
        .add_extension(x509.SubjectAlternativeName(names), True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False)
        .sign(authority_key, hashes.SHA256())
    )  # fmt: skip
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    certificate, key_file = file.with_suffix(".pem"), file.with_name(f"{file.stem}-key.pem")
    certificate.write_bytes(made.public_bytes(pem))
    key_file.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    return certificate, key_file


def client(number):
    return [x509.UniformResourceIdentifier(identity_of_client(number))]


@contextlib.contextmanager
def served(trust, clients=2, **options):
    hub = Hub("127.0.0.1:0", clients=clients, window_bytes=2**20, timeout=5, admit=lambda join: None, check=lambda client, batch: None, trust=trust, **options)
    try:
        yield hub
    finally:
        hub.stop()


def joined(port, trust, number=0, host="127.0.0.1"):
    connection = Connection(f"{host}:{port}", window_bytes=2**20, timeout=5, trust=trust)
    connection.send(pb.ClientMessage(join=pb.Join(client=number)))
    connection.receive("joined")
    return connection


def of(folder, role, **tls):
    return trust_of(TlsConfig(folder=str(folder), **tls), role)


def test_a_client_of_the_authority_joins_with_its_own_number(folders):
    with served(of(folders / "ours", "server")) as hub:
        one, other = (joined(hub.port, of(folders / "ours", f"client-{k}"), k) for k in range(2))
        hub.wait_for_clients(5)
        assert sys.platform != "linux" or all(hub.socket_traffic(k)[0] > 500 for k in range(2))  # with the handshake
        for connection in (one, other):
            connection.fail("done")


def test_nothing_of_a_stranger_is_read(folders, monkeypatch):
    """Who it is comes with the call: neither parsing nor memory, nor a thread that waits, is spent on what it says."""
    monkeypatch.setattr(hub_side, "JOIN_SECONDS", 60)
    monkeypatch.setattr(front, "WAITING_CALLS", 100)
    monkeypatch.setattr(hub_side, "parsed", lambda data: pytest.fail("a stranger's message was parsed"))
    with served(of(folders / "tokens", "server")) as hub:
        stranger = Trust(authority=folders / "tokens" / "authority.pem", token="x" * 43)
        with channel_to(f"127.0.0.1:{hub.port}", stranger, 2**20) as channel:
            call, silence = channel.stream_stream(f"/{SERVICE}/{METHOD}"), threading.Event()
            for _ in range(20):  # more than there are threads
                (said,) = call(iter(silence.wait, True), metadata=stranger.metadata(), timeout=10)
                assert b"expected a token that the server knows, found another" in said
            silence.set()


def refused(port, trust, number=0, host="127.0.0.1"):
    with pytest.raises(HalfpassError) as caught:
        joined(port, trust, number, host)
    return str(caught.value)


@pytest.mark.parametrize(("what", "client_hears", "server_logs"), [
    ("no certificate", "expected this client's certificate, of its authority, found none; give --tls.folder", "it showed no certificate"),
    ("another authority", "expected this client's certificate, of its authority, found one of another authority; ask for", "its certificate: unable to get local issuer certificate"),
    ("expired", "found one that has expired; ask for a new one", "its certificate: certificate has expired"),
    ("not yet valid", "found one that it does not take; look at the server's log", "its certificate: certificate is not yet valid"),
    ("another server", "found self-signed certificate in certificate chain; copy the server's authority.pem, or give tls.server_name", "unknown ca"),
    ("another name", "found Hostname mismatch, certificate is not valid for 'hospital'.; copy the server's", None),
    ("plaintext", "expected a server without TLS, found one that wants TLS, or no halfpass server; give --tls.folder", "it does not speak TLS"),
    ("another's number", "client 1 at joining: expected the certificate or token of client 1, found those of client 0; join with", "refused a newcomer: client 1 at joining: expected the certificate"),
    ("nobody's certificate", "client 0 at joining: expected the certificate or token of client 0, found somebody; join with", "refused a newcomer"),
])  # fmt: skip
def test_a_refusal_says_why_on_both_sides(folders, tmp_path, caplog, monkeypatch, what, client_hears, server_logs):
    ours, others = folders / "ours", folders / "others"
    trust, number = of(ours, "client-0"), 0
    if what == "no certificate":
        trust = Trust(authority=ours / "authority.pem")
    elif what == "another authority":
        trust = dataclasses.replace(of(others, "client-0"), authority=ours / "authority.pem")
    elif what == "another server":
        trust = of(others, "client-0")
    elif what == "another name":
        trust = dataclasses.replace(trust, name="hospital")
    elif what == "plaintext":
        trust = None
    elif what == "another's number":
        number = 1
    else:
        days = {"expired": (-2, -1), "not yet valid": (1, 2)}.get(what, (-1, 1))
        names = [x509.DNSName("somebody")] if what == "nobody's certificate" else client(0)
        certificate, key = issued(ours, tmp_path / "made", names, *days)
        trust = Trust(certificate, key, ours / "authority.pem")
    monkeypatch.setattr(reach, "ANSWER_SECONDS", 3)
    with caplog.at_level(logging.INFO, "halfpass"), served(of(ours, "server")) as hub:
        found = refused(hub.port, trust, number)
        deadline = time.monotonic() + 5
        while server_logs is not None and server_logs not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        connection = joined(hub.port, of(ours, "client-1"), 1)  # others come in all the same
        connection.fail("done")
    assert client_hears in found
    assert server_logs is None or server_logs in caplog.text
    assert server_logs is None or "newcomer" in server_logs or "from 127.0.0.1" in caplog.text


def test_an_identity_that_has_joined_joins_no_second_time(folders):
    with served(of(folders / "ours", "server")) as hub:
        connection = joined(hub.port, of(folders / "ours", "client-0"))
        assert "expected a number that is free, found one that has joined already" in refused(hub.port, of(folders / "ours", "client-0"))
        connection.fail("done")


def test_a_server_without_tls_is_said(folders):
    with served(None) as hub:
        found = refused(hub.port, of(folders / "ours", "client-0"))
    assert found.endswith("expected a server with TLS, found one without; start it with --tls.folder, or leave that out here")


def test_no_server_is_said(monkeypatch):
    monkeypatch.setattr("halfpass.wire.connection.CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert refused(port, None) == (
        f"server address: expected a halfpass server within 0.5 s, found none at 127.0.0.1:{port}; start one with halfpass serve"
    )


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_say_who_a_client_is(folders, tmp_path, monkeypatch, caplog):
    folder = folders / "tokens"
    monkeypatch.delenv(TOKEN, raising=False)
    alone = TlsConfig(authority=str(folder / "authority.pem"))
    with served(of(folder, "server")) as hub:
        one = joined(hub.port, of(folder, "client-0"), 0)
        token = (folder / "client-1.token").read_text().strip()
        monkeypatch.setenv(TOKEN, token)
        other = joined(hub.port, trust_of(alone, "client-1"), 1)
        assert "expected the certificate or token of client 0, found those of client 1" in refused(hub.port, trust_of(alone, "client-0"), 0)
        monkeypatch.setenv(TOKEN, "x" * 43)
        assert "joining: expected a token that the server knows, found another" in refused(hub.port, trust_of(alone, "client-0"))
        monkeypatch.delenv(TOKEN)
        with pytest.raises(InputError, match=r"tls: expected a certificate or token of client-0, found none; give --tls.folder"):
            trust_of(alone, "client-0")
        assert "joining: expected a certificate of the server's authority, or a token that it knows, found none" in refused(hub.port, Trust(authority=folder / "authority.pem"))
        for connection in (one, other):
            connection.fail("done")
    assert token not in caplog.text
    assert token not in repr(of(folder, "client-1"))
    assert token not in (folder / "tokens").read_text()


def test_a_client_can_be_added_later(folders, tmp_path):
    for name, kind in (("ours", "client-2.pem"), ("tokens", "client-2.token")):
        folder = tmp_path / name
        shutil.copytree(folders / name, folder)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        made = make_certificates(folder, clients=3, tokens=name == "tokens")
        assert kind in {file.name for file in made}
        assert all((folder / file).read_bytes() == content for file, content in before.items() if file != "tokens")
        trust = of(folder, "client-2")
        with served(of(folder, "server"), clients=3) as hub:
            joined(hub.port, trust, 2).fail("done")


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_for_their_owner_alone_and_none_is_overwritten(folders):
    assert {oct(file.stat().st_mode & 0o777) for file in (folders / "ours").iterdir()} == {"0o600"}
    assert make_certificates(folders / "ours", clients=2, edge=True) == []


def test_what_cannot_be_used_is_said_before_anything_is_reached(folders, tmp_path):
    ours, others = folders / "ours", folders / "others"
    (tmp_path / "empty").mkdir()
    expired = issued(ours, tmp_path / "old", client(0), -2, -1)
    (tmp_path / "text").write_text("no certificate")
    der = ssl.PEM_cert_to_DER_cert((ours / "client-0.pem").read_text())
    usage, names = bytes.fromhex("551d0f"), bytes.fromhex("551d11")  # of extensions
    assert usage in der
    (tmp_path / "twice").write_text(ssl.DER_cert_to_PEM_cert(der.replace(usage, names)))  # its names
    authority = str(ours / "authority.pem")
    for tls, role, said in (
        (TlsConfig(folder=str(tmp_path / "none")), "server", "tls.folder: expected a folder of halfpass certs, found none at "),
        (TlsConfig(folder=str(tmp_path / "empty")), "server", "tls: expected a certificate and its key, found one missing"),
        (TlsConfig(folder=str(tmp_path / "empty")), "client-0", "tls: expected a certificate or token of client-0, found none in "),
        (TlsConfig(folder=str(ours), key=str(others / "server-key.pem")), "server", "expected the key of that certificate, without a password, found something else"),
        (TlsConfig(folder=str(ours), key=str(ours)), "server", "tls.key: expected a file that can be read, found "),
        (TlsConfig(folder=str(ours), authority=str(tmp_path / "text")), "server", "expected certificates of authorities, in PEM, found something else"),
        (TlsConfig(folder=str(ours), certificate=str(tmp_path / "text")), "client-0", "expected a certificate in PEM, found something else"),
        (TlsConfig(folder=str(ours), certificate=str(tmp_path / "twice")), "client-0", "expected a certificate in PEM, found something else"),
        (TlsConfig(certificate=str(expired[0]), key=str(expired[1]), authority=authority), "client-0", "expected a certificate that is valid now, found one of "),
        (TlsConfig(folder=str(ours), certificate=str(ours / "client-1.pem"), key=str(ours / "client-1-key.pem")), "client-0", "expected the certificate of urn:halfpass:client:0, found urn:halfpass:client:1"),
        (TlsConfig(certificate=str(ours / "server.pem"), key=str(ours / "server-key.pem")), "server", "tls: expected an authority of the clients, or tokens, found neither; give one, or the server would admit anybody"),
        (TlsConfig(folder=str(ours), tokens=str(tmp_path / "text")), "server", "text, line 1: expected lines of a client's number and the SHA-256 of its token in hex, found 14 other characters"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            trust_of(tls, role)
        assert said in str(caught.value), (str(caught.value), said)
        assert "\n" not in str(caught.value)


def test_a_renewed_certificate_is_taken_at_the_next_connection(folders, tmp_path, caplog):
    folder = tmp_path / "renewed"
    shutil.copytree(folders / "ours", folder)

    def serial(port):
        context = of(folder, "client-0").client_context()
        with socket.create_connection(("127.0.0.1", port), 5) as connection, context.wrap_socket(connection, server_hostname="localhost") as outer:
            return outer.getpeercert()["serialNumber"]

    with caplog.at_level(logging.INFO, "halfpass"), served(of(folder, "server")) as hub:
        first = serial(hub.port)
        assert serial(hub.port) == first
        connection = joined(hub.port, of(folder, "client-0"))
        (folder / "server.pem").write_text("damaged")
        assert serial(hub.port) == first
        assert "kept the old certificate" in caplog.text
        issued(folder, folder / "server", [x509.DNSName("localhost")])
        second = serial(hub.port)
        assert second != first
        assert serial(hub.port) == second
        connection.fail("done")  # it is there still


def test_what_is_there_and_does_not_fit_is_said(folders, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    shutil.copytree(folders / "ours", folder)
    with pytest.raises(InputError, match=r"server.pem: expected a server's certificate for new.example, found one without it; remove it and its key"):
        make_certificates(folder, clients=2, hosts=["localhost", "new.example"])
    (folder / "server.pem").write_text("damaged")
    with pytest.raises(InputError, match=r"server.pem: expected a server's certificate for localhost, found one without it; remove it and its key"):
        make_certificates(folder, clients=2, hosts=["localhost"])
    (folder / "server.pem").unlink()
    (folder / "server-key.pem").unlink()
    assert {file.name for file in make_certificates(folder, clients=2, hosts=["new.example"])} == {"server.pem", "server-key.pem"}
    authority = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    assert authority.not_valid_after_utc - datetime.datetime.now(datetime.UTC) > datetime.timedelta(days=3600)
    monkeypatch.setattr(certs, "AUTHORITY_LIFE", datetime.timedelta(days=2))
    make_certificates(tmp_path / "short", clients=1, days=30)
    ends = [x509.load_pem_x509_certificate((tmp_path / "short" / f"{name}.pem").read_bytes()).not_valid_after_utc for name in ("authority", "client-0")]
    assert ends[1] <= ends[0]
    monkeypatch.setattr(certs, "AUTHORITY_LIFE", datetime.timedelta(seconds=-1))
    with pytest.raises(InputError, match=r"authority.pem: expected an authority that is valid, found one until .*; choose another folder"):
        make_certificates(tmp_path / "over", clients=1) and make_certificates(tmp_path / "over", clients=2)


def test_numbers_of_names():
    for name, number in (("urn:halfpass:client:7", 7), ("client-3", 3), ("client-3.hospital.example", 3), ("urn:halfpass:client:", None),
                         ("my-client-3", None), ("client-3x", None), ("urn:halfpass:edge", None)):  # fmt: skip
        assert number_of(["other", name]) == number


def test_other_machines_without_tls_only_where_that_is_said():
    for address in ("0.0.0.0:1", "10.1.2.3:1", "server.example:1", "[::]:1"):
        with pytest.raises(InputError, match=r"found '.*'; make certificates with halfpass certs and give --tls.folder, or say --insecure"):
            check_address(address, "server address")
        check_address(address, "server address", insecure=True)
        check_address(address, "server address", encrypted=True)
    for words in (["serve", "--bind", "0.0.0.0:0"], ["join", "10.1.2.3:7465"]):
        assert main([*words, "--out", "never"]) == 2
    assert not Path("never").exists()


# --- the door ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo():
    """A server on loopback that sends back what comes, slowly at first."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            time.sleep(0.2)
            while data := connection.recv(2**16):
                connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def test_all_bytes_pass_the_door_both_ways_at_once(folders, echo, monkeypatch):
    monkeypatch.setattr(front, "WAITING_BYTES", 2**30)
    door = Front("127.0.0.1:0", of(folders / "ours", "server"), echo)
    sent = bytes(range(251)) * 80_000  # 20 MB, more than all buffers on the way hold
    context, came = of(folders / "ours", "client-0").client_context(), bytearray()
    try:
        with socket.create_connection(("127.0.0.1", door.port), 5) as connection, context.wrap_socket(connection, server_hostname="localhost") as outer:
            outer.setblocking(False)
            at = 0
            deadline = time.monotonic() + 60
            while len(came) < len(sent):
                assert time.monotonic() < deadline
                moved = False
                with contextlib.suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    if at < len(sent):
                        at += outer.send(sent[at : at + 100_000])
                        moved = True
                with contextlib.suppress(ssl.SSLWantReadError):
                    came += outer.recv(2**16)
                    moved = True
                if not moved:
                    time.sleep(0.001)
    finally:
        door.close()
    assert bytes(came) == sent


def enters(folders, door):
    """Whether a client gets through the door, and hears what it says."""
    context = of(folders / "ours", "client-0").client_context()
    with socket.create_connection(("127.0.0.1", door.port), 5) as connection, context.wrap_socket(connection, server_hostname="localhost") as outer:
        outer.sendall(b"hello")
        return outer.recv(5) == b"hello"


def test_strangers_that_say_nothing_keep_nobody_out_for_long(folders, echo, monkeypatch, caplog):
    monkeypatch.setattr(front, "HANDSHAKE_SECONDS", 1.0)
    door = Front("127.0.0.1:0", of(folders / "ours", "server"), echo)
    silent = [socket.create_connection(("127.0.0.1", door.port), 5) for _ in range(front.WAITING_EACH)]
    time.sleep(0.2)
    with pytest.raises(OSError):  # noqa: PT011
        enters(folders, door)
    assert "refused a connection from 127.0.0.1: too many have not said who they are" in caplog.text
    deadline = time.monotonic() + 10
    entered = False
    while not entered and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            entered = enters(folders, door)
        time.sleep(0.1)
    assert entered
    assert "no handshake within 1 s" in caplog.text
    for one in silent:
        one.close()
    door.close()


def test_whoever_never_says_who_it_is_is_sent_away(folders, echo, monkeypatch, caplog):
    monkeypatch.setattr(front, "WAITING_SECONDS", 1.5)
    door = Front("127.0.0.1:0", of(folders / "ours", "server"), echo)
    context = of(folders / "ours", "client-0").client_context()
    with socket.create_connection(("127.0.0.1", door.port), 5) as connection, context.wrap_socket(connection, server_hostname="localhost") as outer:
        assert outer.recv(1) == b""
    assert "it has not said who it is" in caplog.text
    door.close()


def test_connections_that_show_nobody_are_few_in_a_while_and_those_that_do_are_not_counted(folders, echo, monkeypatch, caplog):
    monkeypatch.setattr(front, "EACH_AT_ONCE", 4)
    monkeypatch.setattr(front, "EACH_A_SECOND", 0.0)
    door = Front("127.0.0.1:0", of(folders / "ours", "server"), echo)
    def hears():
        with socket.create_connection(("127.0.0.1", door.port), 5) as connection, contextlib.suppress(OSError):
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            connection.recv(1)

    assert all(enters(folders, door) for _ in range(10))
    for _ in range(4):
        hears()
    with pytest.raises(OSError):  # noqa: PT011
        enters(folders, door)
    assert caplog.text.count("it does not speak TLS") == 4
    assert caplog.text.count("too many have not said who they are") == 1
    door.close()


def test_whoever_is_not_known_may_send_and_call_little(folders, echo, monkeypatch):
    monkeypatch.setattr(front, "WAITING_BYTES", 10_000)
    door = Front("127.0.0.1:0", of(folders / "ours", "server"), echo)
    context = of(folders / "ours", "client-0").client_context()

    def connected():
        return context.wrap_socket(socket.create_connection(("127.0.0.1", door.port), 5), server_hostname="localhost")

    with connected() as outer:
        outer.sendall(bytes(9_000))
        assert len(read(outer, 9_000)) == 9_000
        with contextlib.suppress(OSError):
            outer.sendall(bytes(9_000))
        assert len(read(outer, 10**6)) <= 9_000  # and then it has ended
    with connected() as outer:
        outer.sendall(b"hello")
        assert read(outer, 5) == b"hello"
        (port,) = [port for port, peer in door._peers.items() if peer.outer.getpeername() == outer.getsockname()]
        for _ in range(front.WAITING_CALLS):
            door.count_call(port)
        outer.sendall(b"hello")
        assert read(outer, 5) == b"hello"
        door.count_call(port)
        assert read(outer, 5) == b""
    door.close()


def read(outer, size):
    came = b""
    with contextlib.suppress(OSError):
        while len(came) < size and (piece := outer.recv(size)):
            came += piece
    return came


def test_the_port_behind_the_door_admits_nobody(folders):
    with served(of(folders / "ours", "server")) as hub:
        inner = hub._front._backend
        assert "expected a connection with TLS, found one to the port behind it" in refused(inner, None)


# --- whole runs -------------------------------------------------------------------------------------------------------


def settings(out, **more):
    return Config(
        runtime="processes", out=str(out), data=DataConfig(limit=256), clients=ClientsConfig(2),
        train=TrainConfig(epochs=1, batch_size=32, threads=1), wire=WireConfig(timeout=20), **more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ours", "tokens"])
def test_a_run_with_tls_ends_with_the_same_weights(folders, tmp_path, kind):
    plain = train(dataclasses.replace(settings(tmp_path / "plain"), runtime="local"))
    secured = train(settings(tmp_path / "tls", tls=TlsConfig(folder=str(folders / kind))))
    assert secured["test"] == plain["test"]
    for owner in ("client-0", "client-1", "server"):
        assert equal(*(load_file(tmp_path / name / f"{owner}.safetensors") for name in ("plain", "tls")))
    if sys.platform == "linux":
        sent = sum(secured["bytes"]["up"].values())
        assert sent < secured["bytes"]["socket_up"] < 1.05 * sent + 20_000


def test_a_chain_with_tls(folders, tmp_path):
    chain = ModelConfig(cut="block_1", edge_cut="block_2")
    outcome = train(settings(tmp_path / "run", model=chain, tls=TlsConfig(folder=str(folders / "ours"))))
    assert outcome["test"]["accuracy"] is not None


def test_secrets_are_nowhere(folders, tmp_path, monkeypatch):
    """Not in what a run writes or prints, nor in the processes' arguments."""
    folder = tmp_path / "certs"
    shutil.copytree(folders / "tokens", folder)
    secrets = [(folder / f"client-{k}.token").read_text().strip() for k in range(2)]
    secrets += [line for file in folder.glob("*-key.pem") for line in file.read_text().splitlines() if "-----" not in line]
    words = ["train", "--debug", "--runtime", "processes", "--clients.count", "2", "--train.epochs", "1", "--data.limit", "256",
             "--tls.folder", str(folder), "--out", str(tmp_path / "run")]  # fmt: skip
    command = subprocess.Popen([sys.executable, "-m", "halfpass", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = set()
    while command.poll() is None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                seen.add(entry.read_bytes())
        time.sleep(0.3)
    printed = command.communicate()[0]
    assert command.returncode == 0, printed
    written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(written) > 5
    for secret in secrets:
        assert secret not in printed
        assert not any(secret.encode() in text for text in [*seen, *written])


def test_certs_says_what_to_copy_where(tmp_path, capsys):
    assert main(["certs", str(tmp_path / "made"), "--clients", "2", "--hosts", "server.example,10.0.0.5"]) == 0
    said = capsys.readouterr().out
    assert "Copy authority.pem, server.pem, server-key.pem to the server, authority.pem and client-N.pem" in said
    assert "keep it away from all of them" in said
    names = x509.load_pem_x509_certificate((tmp_path / "made" / "server.pem").read_bytes()).extensions
    names = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "server.example"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["127.0.0.1", "::1", "10.0.0.5"]
    for words, said in (
        (["--clients", "0"], "--clients: expected 1 to 65536 clients, found 0"),
        (["--days", "0"], "--days: expected 1 to 3650 days, found 0"),
        (["--hosts", "a..b"], "--hosts: expected names or addresses of the server, found 'a..b'"),
        (["--hosts", "http://x"], "--hosts: expected names or addresses of the server, found 'http://x'"),
    ):  # fmt: skip
        assert main(["certs", str(tmp_path / "other"), *words]) == 2
        assert re.search(re.escape(said), capsys.readouterr().err)
    assert not (tmp_path / "other").exists()
