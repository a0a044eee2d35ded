"""After training: what crosses the cut goes up as a question, and the server half's outputs come back.

A call of one message each way, beside those of `service.py`, with the same limits, TLS and tokens. `Hub` is its door.
Tests: tests/test_answering.py.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import grpc
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from halfpass.errors import InputError, PassedOnError, RunError, printable
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.codec import CODECS
from halfpass.wire.connection import channel_to
from halfpass.wire.messages import EXACT, PROTOCOL, Crossing, check_crossing, few_parts, read_tensor, write_tensor
from halfpass.wire.reach import reach
from halfpass.wire.service import ANSWER, OVERHEAD_BYTES, SERVICE, check_address
from halfpass.wire.trust import Trust

REACH_SECONDS = 10.0
MOST_MESSAGE_BYTES = 2**31 - 1 - OVERHEAD_BYTES  # gRPC's own limit
PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds before a question is asked again
SAME = "give both sides the halves and settings of one training"
_JITTER = random.SystemRandom()  # clients that were sent away together do not come back together


@dataclass(frozen=True)
class Agreed:
    """What both sides of a question must have alike."""

    run: str
    cut: str
    fingerprint: str
    codec: str


@dataclass(frozen=True)
class Expected:
    """What a server half takes, in evaluation."""

    agreed: Agreed
    crossing: Sequence[Crossing]  # shape per sample, dtype
    whole: Sequence[Crossing]
    reads: bool
    most_samples: int
    output_shape: tuple[int, ...]  # per sample

    @property
    def most_bytes(self) -> int:
        """Of a question or its answers, with room for the rest of the message: no codec makes much more of it."""
        of_samples = sum(8 * torch.Size(shape).numel() for shape, _ in self.crossing)
        of_samples += 4 * torch.Size(self.output_shape).numel()
        of_batch = sum(8 * torch.Size(shape).numel() for shape, _ in self.whole)
        return min(of_samples * self.most_samples + of_batch + OVERHEAD_BYTES, MOST_MESSAGE_BYTES)


def write_question(
    agreed: Agreed, tensors: Sequence[Tensor], whole: Sequence[Tensor] = (), exact: frozenset[int] = frozenset()
) -> pb.Question:
    """`exact` numbers the floating point tensors that no codec may change."""
    question = pb.Question(
        protocol=PROTOCOL, run=agreed.run, cut=agreed.cut, fingerprint=agreed.fingerprint, codec=agreed.codec
    )
    exactly = "none+zstd" if CODECS[agreed.codec].zstd else "none"
    for i, tensor in enumerate(tensors):
        kept = i in exact or not tensor.is_floating_point()
        write_tensor(tensor, exactly if kept else agreed.codec, into=question.tensors.add())
    for tensor in whole:
        write_tensor(tensor, into=question.whole.add())
    return question


def read_question(data: bytes, expected: Expected) -> tuple[Tensor, ...]:
    """What crosses, as the server half takes it. Raises InputError, both values in it, for what it does not take;
    nothing is decoded before shapes and sizes are checked."""
    place = "a question"
    try:
        question = pb.Question.FromString(data) if data and few_parts(data) else None
    except DecodeError:
        question = None
    if question is None:
        raise InputError(place, "a Question", f"{len(data)} bytes that are none", "both sides must run halfpass")
    _check_agreed(place, question, expected.agreed)
    first = question.tensors[0].shape if question.tensors else ()
    samples = first[0] if first else 0
    if not 1 <= samples <= expected.most_samples:
        raise InputError(place, f"1 to {expected.most_samples} samples", f"{samples}", "ask of fewer at a time")
    check_crossing(
        place, question.tensors, question.whole, samples, expected.crossing, expected.whole, expected.reads
    )  # fmt: skip
    for i, tensor in enumerate(question.tensors):
        if tensor.codec != expected.agreed.codec and (i == 0 or tensor.codec not in EXACT):
            what = f"codec {expected.agreed.codec} (the server's)"
            raise InputError(f"{place}, tensor {i}", what, repr(tensor.codec[:20]), "use the same wire.codec")
    found = [read_tensor(tensor, f"{place}, tensor {i}") for i, tensor in enumerate(question.tensors)]
    found += [read_tensor(tensor, f"{place}, whole {i}") for i, tensor in enumerate(question.whole)]
    for i, value in enumerate(found[: len(question.tensors)]):
        if value.is_floating_point() and not (value.isfinite().all() if i == 0 else not value.isnan().any()):
            raise InputError(f"{place}, tensor {i}", "finite values", "NaN or infinity", "look at the inputs")
    return tuple(found)


def _check_agreed(place: str, question: pb.Question, agreed: Agreed) -> None:
    pairs = [
        ("protocol", PROTOCOL, question.protocol), ("cut", agreed.cut, question.cut),
        ("network (fingerprint)", agreed.fingerprint, question.fingerprint), ("codec", agreed.codec, question.codec),
        ("the half of run", agreed.run, question.run),
    ]  # fmt: skip
    for what, ours, theirs in pairs:
        if ours != theirs:
            found = printable(str(theirs))[:80] or "none"
            raise InputError(place, f"{what} {ours or 'none'} (the server's)", found, SAME)


class Answerer:
    """Answers questions with a server half, one at a time: it has the processor for itself."""

    def __init__(self, half: Callable[[tuple[Tensor, ...]], Tensor], expected: Expected) -> None:
        self._half, self.expected, self._lock = half, expected, threading.Lock()
        self.samples = self.questions = 0  # answered so far

    def __call__(self, data: bytes, waits: Callable[[], bool]) -> bytes:
        """A Question's bytes → those of its Answers. `waits`: whether somebody still does."""
        crossing = read_question(data, self.expected)
        with self._lock:
            if not waits():
                raise RunError("a question", "somebody who waits for its answer", "nobody", "wait longer")
            try:
                with torch.no_grad():
                    outputs = self._half(crossing)
            except torch.OutOfMemoryError as error:
                raise RunError("a question", "memory for it", str(error)[:200], "ask of fewer at a time") from None
            if not outputs.isfinite().all():
                raise RunError("the server half's outputs", "finite values", "NaN or infinity", "look at its training")
            self.samples, self.questions = self.samples + len(outputs), self.questions + 1
        answers = pb.Answers()
        write_tensor(outputs.float(), into=answers.outputs)
        return answers.SerializeToString()


class Asker:
    """A way to a server half at another machine. Several threads may ask at once."""

    def __init__(
        self, address: str, agreed: Agreed, output_shape: tuple[int, ...], *, limit_bytes: int, timeout: float,
        trust: Trust | None = None, insecure: bool = False,
    ) -> None:  # fmt: skip
        """`limit_bytes` of a message; `timeout` of a question and its answer, in seconds. Raises InputError where there
        is no such server, or it does not trust this client."""
        check_address(address, "server address", encrypted=trust is not None, insecure=insecure)
        reach(address, trust, REACH_SECONDS)
        self._place, self._agreed, self._shape, self._timeout = f"server at {address}", agreed, output_shape, timeout
        self._channel = channel_to(address, trust, limit_bytes)
        self._metadata = [] if trust is None else trust.metadata()
        self._ask = self._channel.unary_unary(
            f"/{SERVICE}/{ANSWER}", request_serializer=None, response_deserializer=pb.Answers.FromString
        )
        self._lock = threading.Lock()
        self.bytes_up = self.bytes_down = 0  # of messages

    def __enter__(self) -> "Asker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def ask(
        self, tensors: Sequence[Tensor], whole: Sequence[Tensor] = (), exact: frozenset[int] = frozenset()
    ) -> Tensor:
        """The server half's outputs, (B, ...) float32. Asks again for a while where the server is busy or away. Raises
        InputError where it refuses, RunError where it does not answer in time."""
        data = write_question(self._agreed, tensors, whole, exact).SerializeToString()
        deadline, pause = time.monotonic() + self._timeout, PAUSE
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                answers: pb.Answers = self._ask(data, timeout=left, metadata=self._metadata)
                break
            except grpc.RpcError as error:
                again = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
                if not again or time.monotonic() + pause > deadline:
                    raise self._refusal(error) from None
                time.sleep(pause * _JITTER.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE)
        with self._lock:
            self.bytes_up, self.bytes_down = self.bytes_up + len(data), self.bytes_down + answers.ByteSize()
        return self._checked(answers, len(tensors[0]))

    def _checked(self, answers: pb.Answers, samples: int) -> Tensor:
        outputs, shape = answers.outputs, (samples, *self._shape)
        if (tuple(outputs.shape), outputs.dtype, outputs.codec) != (shape, "float32", "none"):
            found = f"{tuple(outputs.shape)[:8]} of {outputs.dtype[:20]} in {outputs.codec[:20]}"
            raise RunError(self._place, f"outputs {shape} of float32", printable(found), SAME)
        values = read_tensor(outputs, f"{self._place}, outputs")
        if not values.isfinite().all():
            raise RunError(self._place, "finite outputs", "NaN or infinity", "do not trust it")
        return values

    def _refusal(self, error: grpc.RpcError) -> Exception:
        code, said = error.code(), printable(str(error.details()))
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            return PassedOnError(f"{self._place}: {said}", 2)
        if code is grpc.StatusCode.PERMISSION_DENIED:
            return InputError(self._place, "leave to ask", said, "show a certificate or token that it knows")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            expected, found = "a server that answers after training", "one that does not, such as one that trains"
            return InputError(self._place, expected, found, "start halfpass answer there, or correct the address")
        expected, found = f"an answer within {self._timeout:g} s", f"{code.name.lower()}: {said}"
        return RunError(self._place, expected, found, "look at what it printed, or ask again later")
