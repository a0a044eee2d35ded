"""Every decoder of bytes from outside, with valid inputs: what `fuzz.py` and `tests/test_fuzz.py` change and decode.

A decoder gives a value, or raises one of its `refusals`: the project's own errors, and ValueError where the function's
contract says so and its callers word it anew. What decodes a file is given its bytes, and writes them into `folder`.
"""

import base64
import gzip
import hashlib
import io
import json
import pickle
import ssl
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from google.protobuf.message import DecodeError
from PIL import Image
from rich.console import Console
from safetensors.torch import save
from torch import Tensor, nn

from halfpass.bounded import parse_json, parse_yaml
from halfpass.commands.certs import make_certificates
from halfpass.commands.status import as_json, show
from halfpass.config import ClientsConfig, Config, as_dict, nested
from halfpass.cut import CutBatch
from halfpass.data.cifar import CIFAR, CifarLayout, read_layout
from halfpass.data.datasets import load
from halfpass.data.pictures import decode as decode_picture
from halfpass.data.pictures import gray_range
from halfpass.data.samples import Dataset, Samples
from halfpass.errors import HalfpassError, InputError
from halfpass.files import read_mapping
from halfpass.networks.observe import Made
from halfpass.networks.pretrained import load_weights
from halfpass.networks.replay import CutPlan, Pass, Value
from halfpass.report.runs import REQUIRED, read_run, summary
from halfpass.run import checkpoint
from halfpass.run.admission import Admission
from halfpass.run.network import build_network, read_plans, write_plans, written_spec
from halfpass.run.records import DATA, JOINED, SERVED, RunFolder, read_config, read_where
from halfpass.run.round_client import read_orders
from halfpass.run.round_hub import Reply, RoundHub
from halfpass.run.setup import agreed_settings
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import outbox, store
from halfpass.wire.asking import check_reply
from halfpass.wire.codec import CODECS, Codec
from halfpass.wire.frames import pack
from halfpass.wire.front import why
from halfpass.wire.messages import (
    CLASS_NUMBERS,
    PROTOCOL,
    Targets,
    check_batch,
    check_weights,
    few_parts,
    read_batch,
    read_gradients,
    read_weights,
    write_batch,
    write_gradients,
    write_weights,
)
from halfpass.wire.trust import Trust

Errors = tuple[type[BaseException], ...]


@dataclass(frozen=True)
class Decoder:
    seeds: tuple[bytes, ...]  # valid: each decodes
    decode: Callable[[bytes], object]
    refusals: Errors = (HalfpassError,)


# --- Messages ---------------------------------------------------------------------------------------------------------

KINDS = {"half.weight": ((3, 2), torch.float32), "half.count": ((), torch.int64), "half.running": ((3,), torch.float32)}
MEMORY = {"optimizer.0.momentum_buffer": ((3, 2), torch.float32)}
CROSSING = (((4, 3, 3), "float32"), ((5,), "int64"))
TREE: Targets = {"boxes/#0": ("float32", (4,)), "boxes/#1": ("int64", ()), "mask": ("bool", (2, 2))}
BATCH_SIZE, OUTPUTS = 8, 10
RUN = "0123456789abcdef"


def draws(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def some_weights() -> dict[str, Tensor]:
    return {name: draws(*shape).to(dtype) for name, (shape, dtype) in {**KINDS, **MEMORY}.items()}


def plain_batch(samples: int = 3, **others: Any) -> CutBatch:
    tensors = (draws(samples, 4, 3, 3).relu(), torch.arange(5 * samples).view(samples, 5))
    return CutBatch(0, 1, 2, tensors, torch.arange(samples), **others)


def tree_batch() -> CutBatch:
    """Of client 1, whose task and cut are other ones: trees of targets, and values of the batch as a whole."""
    boxes = (draws(2, 4), torch.arange(2))
    return CutBatch(
        1, 0, 0, (draws(2, 6),), {"boxes": boxes, "mask": torch.ones(2, 2, 2, dtype=torch.bool)}, before=2, after=1,
        whole=(draws(7), torch.tensor([3, 1, 4])),
    )  # fmt: skip


def parsed(kind: Any, data: bytes) -> Any:
    """As either side reads what came: counted before it is parsed."""
    if not few_parts(data):
        raise InputError("message", "few parts", "more", "both sides must run the same halfpass")
    try:
        return kind.FromString(data)
    except DecodeError:
        remedy = "both sides must run the same halfpass"
        raise InputError("message", f"a {kind.__name__}", f"{len(data)} bytes", remedy) from None


def read_client_message(data: bytes) -> object:
    message: pb.ClientMessage = parsed(pb.ClientMessage, data)
    kind = message.WhichOneof("kind")
    if kind == "epoch_end":
        check_weights("client 0", message.epoch_end.weights, KINDS, MEMORY)
        return read_weights(message.epoch_end.weights)
    if kind != "batch":
        return message
    batch = message.batch
    if batch.client == 1:
        check_batch(
            batch, 1, [((6,), "float32")], OUTPUTS, BATCH_SIZE, targets=TREE, whole=[((7,), "float32")], reads=True
        )
    else:
        codec = batch.tensors[0].codec if batch.tensors and batch.tensors[0].codec in CODECS else "none"
        check_batch(batch, 0, CROSSING, OUTPUTS, BATCH_SIZE, batch.test, CLASS_NUMBERS, codec=codec)
    return read_batch(batch)


def client_messages(_: Path) -> Decoder:
    answers = draws(8, OUTPUTS).softmax(1)
    messages = [write_batch(plain_batch(), codec) for codec in ("none", "bf16", "int8", "int2+zstd")]
    messages += [write_batch(plain_batch(8, answers=answers), "none", test=True), write_batch(tree_batch(), "fp16")]
    messages += [
        pb.ClientMessage(epoch_end=pb.EpochEnd(epoch=3, loss=0.5, samples=96, weights=write_weights(some_weights()))),
        pb.ClientMessage(join=pb.Join(protocol=PROTOCOL, settings='{"wire": 3}', inputs='{"": ["float32", [3]]}')),
        pb.ClientMessage(test_end=pb.TestEnd(epoch=3, samples=9, scores=[pb.Score(metric="accuracy", value=0.5)])),
        pb.ClientMessage(failed=pb.Failed(reason="disk full", exit_status=1)),
    ]
    return Decoder(tuple(message.SerializeToString() for message in messages), read_client_message)


def newcomers(_: Path) -> Decoder:
    """What a client says of itself, to a server that has admitted another one, and how it says that it has cut."""
    config = Config(clients=ClientsConfig(count=2))
    network = build_network(config, (1, 8, 8), 10)
    said = {"data": {"classes": ["a", "b"], "scales": [["mean", 0.5]]}, "weights": {"client": None}}
    crosses = Value(0, Made(1, 0, "relu"), (4,), "float32", order=(0, 1))
    plan = CutPlan("0", Pass(1, (crosses,), (2,)), Pass(1, (crosses,)), {"": ((3,), "float32")}, ("a",), ("b",))
    join = pb.Join(
        protocol=PROTOCOL, settings=json.dumps(agreed_settings(config) | said), outputs=10, samples=300, steps=3,
        inputs=json.dumps(written_spec(network.inputs)), parameters=network.parameters,
        fingerprint=network.fingerprint, targets='{"spec": {"": ["int64", []]}, "names": ["one", "two"]}',
    )  # fmt: skip
    with_plan = pb.Join(plan=write_plans({"cut": plan, "edge_cut": None}))
    with_plan.MergeFrom(join)
    admission = Admission(config)
    admission.admit(join)

    def read(data: bytes) -> object:
        newcomer: pb.Join = parsed(pb.Join, data)
        plans = read_plans(newcomer.plan)
        admission.joins = {0: join}
        admission.admit(newcomer)
        return plans

    return Decoder((join.SerializeToString(), with_plan.SerializeToString()), read)


def replies_of_rounds(folder: Path) -> Decoder:
    """What a client says of its round, to a server that has asked it."""
    config = Config(runtime="processes")
    admission = Admission(config)
    admission.network = build_network(config, (1, 8, 8), 10)
    batches = [CutBatch(0, 0, step, (draws(3, 32, 8, 8),), torch.arange(3)) for step in range(2)]
    said = [write_batch(batch, "none") for batch in batches]
    said += [pb.ClientMessage(epoch_end=pb.EpochEnd(loss=0.5, samples=6)), pb.ClientMessage(finished=pb.Finished())]
    seeds = [pack(1, RUN, [message.SerializeToString() for message in part]) for part in (said[:3], said[1:])]
    join = pack(0, RUN, [pb.ClientMessage(join=pb.Join()).SerializeToString()])

    class Answers:
        """An engine with one node, which says these."""

        def __init__(self, *replies: bytes) -> None:
            self.replies = list(replies)

        def nodes(self) -> list[int]:
            return [0]

        def send(self, node: int, message: bytes) -> None:
            pass

        def receive(self, seconds: float) -> Reply | None:
            return Reply(0, self.replies.pop(0)) if self.replies else None

    def read(data: bytes) -> object:
        exchange = Answers(join)
        hub = RoundHub(exchange, config, run=RUN, admit=lambda join: None, check=admission.check,
                       check_values=admission.check_values)  # fmt: skip
        hub.wait_for_clients(1)
        exchange.replies.append(data)
        hub.send(0, pb.ServerMessage(begin=pb.Begin()))
        ends, taken = hub.take_ends([0]), list[object]()
        while hub.has_come(0):
            taken.append(hub.take([0], "batch", "epoch_end", "finished"))
        return ends, taken

    return Decoder(tuple(seeds), read)


def orders_of_rounds(_: Path) -> Decoder:
    begin = pb.Begin(epoch=1, first_step=3, total_steps=9, until=5, weights=write_weights(some_weights()))
    asked = [pb.ServerMessage(test=pb.Test(epoch=0)), pb.ServerMessage(begin=begin)]
    return Decoder((pack(7, RUN, [message.SerializeToString() for message in asked]),), read_orders)


def read_server_message(data: bytes) -> object:
    message: pb.ServerMessage = parsed(pb.ServerMessage, data)
    kind = message.WhichOneof("kind")
    if kind == "gradients":
        return read_gradients(message.gradients, plain_batch())
    if kind not in ("begin", "take", "finish"):
        return message
    weights = getattr(message, kind).weights
    check_weights("server", weights, KINDS, MEMORY)
    return read_weights(weights)


def server_messages(_: Path) -> Decoder:
    weights = write_weights(some_weights())
    messages = [write_gradients(plain_batch(), [draws(3, 4, 3, 3)], codec) for codec in ("none", "int4", "bf16+zstd")]
    messages += [
        pb.ServerMessage(begin=pb.Begin(epoch=1, first_step=3, total_steps=9, weights=weights, until=4)),
        pb.ServerMessage(test=pb.Test(epoch=1)), pb.ServerMessage(take=pb.Take(weights=weights)),
        pb.ServerMessage(finish=pb.Finish(weights=weights)),
        pb.ServerMessage(ack=pb.Ack(), place=2, applied=3, durable=1),
        pb.ServerMessage(rejected=pb.Rejected(reason="labels")),
    ]  # fmt: skip
    return Decoder(tuple(message.SerializeToString() for message in messages), read_server_message)


def status_replies(_: Path) -> Decoder:
    """Of a server that somebody asks how far it is, shown both ways."""
    asked = pb.StatusReply(run="0a1b", phase="training", epoch=1, epochs=2, step=3, steps=9, batches_per_second=0.5)
    asked.checkpoint.MergeFrom(pb.Checkpoint(epoch=1, step=2, seconds_ago=130.5))
    asked.clients.append(pb.ClientStatus(client=1, state="away", away_seconds=9000.0, received=5, applied=3))

    def read(data: bytes) -> object:
        reply: pb.StatusReply = parsed(pb.StatusReply, data)
        check_reply("server", reply)
        show(reply, Console(file=io.StringIO()))
        return parse_json(as_json(reply))

    return Decoder((asked.SerializeToString(), pb.StatusReply(phase="joining").SerializeToString()), read)


def handshakes(folder: Path) -> Decoder:
    """What a stranger says first to a server with TLS, which has a word for each refusal."""
    make_certificates(folder, clients=1)
    trust = Trust(folder / "server.pem", folder / "server-key.pem", folder / "authority.pem")
    server = trust.server_context()
    hello = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        trust.client_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()

    def read(data: bytes) -> object:
        said = ssl.MemoryBIO()
        said.write(data)
        try:
            server.wrap_bio(said, answer := ssl.MemoryBIO(), server_side=True).do_handshake()
        except ssl.SSLWantReadError:
            return answer.read()
        except (OSError, ValueError) as error:  # as the door of a server does
            raise InputError("connection", "TLS", why(error), "look at what it is") from None
        raise AssertionError("a handshake that ends with its first message")

    return Decoder((hello.read(),), read)


def trust_files(folder: Path) -> Decoder:
    """An input is a server's certificate, key, authority or tokens, its number first; the others are whole.
    What PEM holds is changed before it is put into letters, where nearly every change would be refused."""
    make_certificates(folder, clients=1)
    make_certificates(folder, clients=2, tokens=True)
    files = [folder / name for name in ("server.pem", "server-key.pem", "authority.pem", "tokens")]
    trust, whole = Trust(files[0], files[1], files[2], files[3]), [file.read_bytes() for file in files]
    lines = [content.splitlines(keepends=True) for content in whole]
    client = Trust(authority=files[2])
    checks = (trust.check_server, trust.server_context, partial(client.check_client, 0), trust.digests)

    def read(data: bytes) -> object:
        number = data[0] % len(files) if data else 0
        first, *_, last = lines[number]
        inside = base64.encodebytes(data[1:])
        files[number].write_bytes(data[1:] if number == 3 else first + inside + last)
        try:
            checks[number]()
            return trust
        finally:
            files[number].write_bytes(whole[number])

    inner = [base64.b64decode(b"".join(own[1:-1])) for own in lines[:3]]
    return Decoder(tuple(bytes([i]) + content for i, content in enumerate([*inner, whole[3]])), read)


# --- Codecs -----------------------------------------------------------------------------------------------------------

ROOMS = [((37, 5), torch.float32), ((16, 1), torch.float32), ((9, 3), torch.bfloat16), ((3, 4), torch.float64),
         ((0, 4), torch.float32)]  # fmt: skip


def read_payload(codec: Codec, data: bytes) -> object:
    """The first byte says which room the others are to fill."""
    shape, dtype = ROOMS[data[0] % len(ROOMS)] if data else ROOMS[0]
    out = torch.empty(shape, dtype=dtype)
    codec.check_size(data[1:], *shape, dtype)
    codec.decode(data[1:], out)
    return out


def payloads(codec: Codec, _: Path) -> Decoder:
    seeds = [
        bytes([i]) + codec.encode(values.to(dtype))
        for i, (shape, dtype) in enumerate(ROOMS)
        for values in (draws(*shape), draws(*shape).relu())
    ]
    return Decoder(tuple(seeds), partial(read_payload, codec), (HalfpassError, ValueError))


# --- Files ------------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def read_weights_file(model: nn.Module, file: Path, data: bytes) -> object:
    file.write_bytes(data)
    return load_weights("model.weights", model, str(file))


def safetensors_files(folder: Path) -> Decoder:
    state = network().state_dict()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    eighths = save({"0.bias": state["0.bias"].to(torch.float8_e4m3fn)})
    some = save({"0.weight": state["0.weight"], "other": torch.zeros(2)}, {"made": "by"})
    read = partial(read_weights_file, network(), folder / "weights.safetensors")
    return Decoder((save(state), save(halves), eighths, some), read)


def saved(value: object, **options: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **options)
    return content.getvalue()


def pytorch_files(folder: Path) -> Decoder:
    state = dict(network().state_dict())
    old = saved(state, _use_new_zipfile_serialization=False)
    seeds = (saved({"0.bias": state["0.bias"]}), saved({"state_dict": state}), old)
    return Decoder(seeds, partial(read_weights_file, network(), folder / "weights.pt"))


def whole_store(folder: Path) -> object:
    """Its identity and all its uploads."""
    with store.UploadStore.open_existing(folder) as opened:
        uploads = [opened.read(key) for key in opened.keys() + opened.keys(test=True)]
        return opened.identity, uploads


def stores(mended: bool, folder: Path) -> Decoder:
    """An input is one file of a store, its number first; the other files are whole. `mended`: checksums fit again, so
    that what stands behind them is reached."""
    place = folder / "store"
    few = mock.patch.object(store, "SEGMENTS", store.MINIMUM_BYTES // 1000)  # so that two uploads are two segments
    identity = {"cut": "a", "classes": 10}
    with few, store.UploadStore.open(place, identity=identity, limit_bytes=1 << 24) as opened:
        for step in range(2):
            opened.add([write_batch(replace(plain_batch(), step=step), "none").batch])
        opened.add([write_batch(plain_batch(2), "none", test=True).batch])
    files = sorted(place.iterdir())
    whole = [file.read_bytes() for file in files]

    def read(data: bytes) -> object:
        number = data[0] % len(files) if data else 0
        segment = files[number].suffix == ".segment"
        files[number].write_bytes(with_checksums(data[1:]) if mended and segment else data[1:])
        try:
            return whole_store(place)
        finally:
            files[number].write_bytes(whole[number])

    return Decoder(tuple(bytes([i]) + content for i, content in enumerate(whole)), read)


def with_checksums(segment: bytes) -> bytes:
    header, mended, at = struct.Struct("<?QIIIQ"), b"", 0
    while len(segment) - at >= header.size + 8:
        fields = segment[at : at + header.size]
        begin = at + header.size + 8
        at = min(begin + header.unpack(fields)[-1], len(segment))
        fields += zlib.crc32(segment[begin:at]).to_bytes(4, "little")
        mended += fields + zlib.crc32(fields).to_bytes(4, "little") + segment[begin:at]
    return mended + segment[at:]


def spools(mended: bool, folder: Path) -> Decoder:
    """An input is one segment of a spool, its number first; the other one is whole. `mended`: as with stores."""
    place = folder / "spool"
    with mock.patch.object(outbox, "SEGMENT_BYTES", 100):
        kept = outbox.Outbox(place, run="0a1b", memory_bytes=0)
        for size in (100, 30, 0, 70, 20, 40):
            kept.add(bytes(range(size)))
        kept.save()
        kept.let_go(1)  # and its segment with it
    files = sorted(place.iterdir())
    whole = [file.read_bytes() for file in files]
    head = outbox.FORMAT + b"0a1b\n"

    def read(data: bytes) -> object:
        number = data[0] % len(files) if data else 0
        files[number].write_bytes(with_checks(data[1:], head) if mended else data[1:])
        try:
            kept = outbox.Outbox(place, run="0a1b")
            kept.load(6, 0)
            return [kept.get(place) for place in range(kept.first, kept.last + 1)]
        finally:
            files[number].write_bytes(whole[number])

    seeds = [bytes([i]) + content for i, content in enumerate(whole)]
    twice = seeds[0] + whole[0][len(head) :]  # each message made again, as behind a checkpoint
    return Decoder((*seeds, twice), read)


def with_checks(segment: bytes, head: bytes) -> bytes:
    """Of a spool."""
    header, mended, at = struct.Struct("<QQ"), head, len(head)
    while len(segment) - at >= header.size + 4:
        fields = segment[at : at + header.size]
        begin = at + header.size + 4
        at = min(begin + header.unpack(fields)[1], len(segment))
        mended += fields + zlib.crc32(fields + segment[begin:at]).to_bytes(4, "little") + segment[begin:at]
    return mended + segment[at:]


def checkpoints(mended: bool, folder: Path) -> Decoder:
    """`mended`: an input is what PyTorch has saved in it, and header and digest fit."""
    file = folder / "unfinished.pt"
    with mock.patch("time.time", return_value=1.0):
        for state in ({"step": 3, "rate": 0.5, "mark": torch.tensor([1, 2])}, {"state": [None, (True, {"a": "é"})]}):
            checkpoint.write(file, "0a1b", state)
    written = [checkpoint.before(file).read_bytes(), file.read_bytes()]
    checkpoint.before(file).unlink()
    digest_bytes = hashlib.blake2b().digest_size

    def read(data: bytes) -> object:
        if mended:
            head = {"format": checkpoint.FORMAT, "run": "0a1b", "bytes": len(data)}
            data = b"halfpass checkpoint\n" + json.dumps(head).encode() + b"\n" + data
            data += hashlib.blake2b(data).digest()
        file.write_bytes(data)
        return checkpoint.read(file, "0a1b")

    inner = [content[content.index(b"}\n") + 2 : -digest_bytes] for content in written]
    return Decoder(tuple(inner if mended else written), read)


def run_folders(folder: Path) -> Decoder:
    """An input is one file of a run folder, its number first; the others are whole. It is read by what goes on with a
    run, and by what reports it."""
    run, shard = RunFolder(folder), Samples(torch.zeros(2, 1), torch.tensor([0, 1]))
    data = Dataset("own", shard, shard, 2, (), ())
    run.keep_digests([data])
    row = {"epoch": 1, "process": "server", "loss": 0.5, "test_accuracy": 0.25, "metric": "accuracy", "test": {"a": 1}}
    result = nested({**dict.fromkeys(REQUIRED), "method": "decoupled", "peak_memory_bytes.client": [1]})
    texts = {
        "config.yaml": "method: decoupled\ntrain: {seed: 1}\n", "result.json": json.dumps(result),
        "metrics.jsonl": json.dumps(row) + "\n" + json.dumps({"epoch": 2, "process": "client 0"}) + "\n",
        DATA: (folder / DATA).read_text(), SERVED: '{"bind": "127.0.0.1:7465", "above": null, "insecure": false}',
        JOINED: '{"address": "127.0.0.1:7465", "insecure": false}',
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    names = list(texts)

    def read(data_: bytes) -> object:
        name = names[data_[0] % len(names)] if data_ else names[0]
        (folder / name).write_bytes(data_[1:])
        try:
            if name == DATA:
                run.check_digests([data])
                return name
            if name in (SERVED, JOINED):
                return read_where(folder / name, "bind" if name == SERVED else "address")
            if name == "config.yaml":
                return read_config(folder), read_run(folder)
            return summary(read_run(folder)), run.rows(2)
        finally:
            (folder / name).write_text(texts[name])

    return Decoder(tuple(bytes([i]) + text.encode() for i, text in enumerate(texts.values())), read)


LAYOUT = replace(CIFAR["cifar10"], train={"data_batch_1": 1}, test={"test_batch": 1})


def cifar_pickle(protocol: int, labels: Iterable[object] = (3,)) -> bytes:
    pixels = (np.arange(3072, dtype=np.uint32) % 251).astype(np.uint8).reshape(1, 3072)
    return pickle.dumps({"batch_label": "one", "labels": list(labels), "data": pixels}, protocol)


def cifar_files(folder: Path) -> Decoder:
    """An input is the training file of a folder whose test file is whole."""
    place = folder / LAYOUT.folder
    place.mkdir()
    (place / "test_batch").write_bytes(cifar_pickle(2))

    def read(data: bytes) -> object:
        (place / "data_batch_1").write_bytes(data)
        return read_layout(LAYOUT, str(place), download=False)

    numbers = np.array([7])
    return Decoder((*map(cifar_pickle, (0, 2, 4)), cifar_pickle(2, numbers), cifar_pickle(4, numbers)), read)


def archive(names: Iterable[str], form: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as made:
        for name in names:
            raw = cifar_pickle(2)
            entry = tarfile.TarInfo(f"{LAYOUT.folder}/{name}")
            entry.size = len(raw)
            made.addfile(entry, io.BytesIO(raw))
    return content.getvalue().rstrip(b"\0") + bytes(1024)  # in place of up to 10 KB


def cifar_archives(folder: Path) -> Decoder:
    """An input is what the archive holds, decompressed, for a sum at its end would refuse nearly every other; or, where
    it begins as one, the archive."""
    file = folder / LAYOUT.archive
    layout: CifarLayout = LAYOUT

    def read(data: bytes) -> object:
        file.write_bytes(data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 0))
        return read_layout(layout, str(file), download=False)

    plain = archive(("data_batch_1", "test_batch"), tarfile.USTAR_FORMAT)
    long = archive(("test_batch", "x" * 120, "data_batch_1"), tarfile.GNU_FORMAT)
    return Decoder((plain, long, archive(("data_batch_1", "y" * 120, "test_batch"), tarfile.PAX_FORMAT),
                    gzip.compress(plain, 1)), read)  # fmt: skip


PICTURES: list[tuple[str, str, dict[str, Any]]] = [  # format, mode, options
    ("PNG", "RGB", {}), ("PNG", "P", {"transparency": 1}), ("PNG", "I;16", {}), ("PNG", "LA", {}),
    ("JPEG", "RGB", {"quality": 80}), ("JPEG", "CMYK", {"progressive": True}), ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}), ("BMP", "RGB", {}), ("BMP", "1", {}), ("TIFF", "RGB", {}),
    ("TIFF", "I;16", {"compression": "tiff_lzw"}), ("TIFF", "L", {"compression": "tiff_adobe_deflate"}),
    ("GIF", "P", {}),
]  # fmt: skip


def picture(form: str, mode: str, options: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray((np.arange(13 * 11, dtype=np.uint16) * 311).reshape(13, 11))
    else:
        channels = (np.arange(13 * 11 * 3) * 7 % 256).astype(np.uint8).reshape(13, 11, 3)
        image = Image.fromarray(channels).convert(mode)
    turned = Image.Exif()
    turned[0x0112] = 6  # its orientation
    extra = {"exif": turned} if form in ("JPEG", "WEBP", "PNG") else {}
    image.save(content, form, **options, **extra)
    return content.getvalue()


def pictures(folder: Path) -> Decoder:
    file = folder / "picture.png"  # what it holds counts, not its name

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return decode_picture(file, 8, gray_range([file], None))

    return Decoder(tuple(picture(*kind) for kind in PICTURES), read)


def tables(folder: Path) -> Decoder:
    file = folder / "table.csv"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return load("csv", str(file), target="kind", test_share=0.5)

    rows = "".join(f"{i},{i / 7:.3f},{'ab'[i % 2]},{'cat' if i % 3 else 'dog'}\n" for i in range(12))
    quoted = rows.replace("cat", '"c, a ""t"').replace("\n", "\r\n")
    return Decoder((f"x,y,z,kind\n{rows}".encode(), f"\ufeffx,y,z,kind\r\n{quoted}".encode()), read)


# --- Text -------------------------------------------------------------------------------------------------------------

YAML = (
    "a: &one {b: [1, 2.5, 'x', null, ~, yes], c: \"d\"}\ne: *one\nf: |\n  text\n",
    "runs:\n- {lr: 0.1, name: !!str 5}\n- lr: 1e-3\n  when: 2024-05-06\n  <<: {k: v}\n? 'x y'\n: z\n",
)


def text_of(parse: Callable[[str], object], data: bytes) -> object:
    return parse(data.decode(errors="surrogateescape"))


def json_texts(_: Path) -> Decoder:
    values = [{"a": [1, -2.5e3, True, None, '\\"[é\u2028'], "b": {"c": {}}}, as_dict(Config()), [[[["x"]]], 10**20]]
    texts = tuple(json.dumps(value, ensure_ascii=False).encode() for value in values)
    return Decoder(texts, partial(text_of, parse_json), (ValueError,))


def yaml_texts(_: Path) -> Decoder:
    settings = {"wire": as_dict(Config())["wire"], "out": None}
    texts = (*(text.encode() for text in YAML), yaml.safe_dump(settings).encode())
    return Decoder(texts, partial(text_of, parse_yaml), (ValueError,))


def mapping_files(folder: Path) -> Decoder:
    """Settings and results: the first byte says whether the file is YAML."""
    files = (folder / "config.yaml", folder / "result.json")

    def read(data: bytes) -> object:
        file = files[data[0] % 2] if data else files[0]
        file.write_bytes(data[1:])
        return read_mapping(file)

    return Decoder((b"\0" + YAML[0].encode(), b"\1" + json.dumps({"a": [1, {}], "b": "é"}).encode()), read)


DECODERS: dict[str, Callable[[Path], Decoder]] = {
    "client messages": client_messages,
    "server messages": server_messages,
    "replies of rounds": replies_of_rounds,
    "orders of rounds": orders_of_rounds,
    "newcomers": newcomers,
    "status replies": status_replies,
    "handshakes": handshakes,
    "trust files": trust_files,
    **{f"codec {name}": partial(payloads, codec) for name, codec in CODECS.items()},
    "safetensors files": safetensors_files,
    "PyTorch files": pytorch_files,
    "stores": partial(stores, False),
    "mended stores": partial(stores, True),
    "spools": partial(spools, False),
    "mended spools": partial(spools, True),
    "checkpoints": partial(checkpoints, False),
    "mended checkpoints": partial(checkpoints, True),
    "run folders": run_folders,
    "CIFAR files": cifar_files,
    "CIFAR archives": cifar_archives,
    "pictures": pictures,
    "tables": tables,
    "JSON texts": json_texts,
    "YAML texts": yaml_texts,
    "settings files": mapping_files,
}
