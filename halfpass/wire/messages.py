"""CutBatch, gradients and weights ↔ protobuf. What arrives is checked here before anyone uses it."""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halfpass.cut import CutBatch
from halfpass.errors import InputError, RunError
from halfpass.tree import flatten, unflatten
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.codec import CODECS

PROTOCOL = 11

Crossing = tuple[tuple[int, ...], str]  # shape and dtype; any of CROSSING_DTYPES stands for them all
MOST_READS = 2**12
MOST_DIMENSIONS = 16
Targets = Mapping[str, tuple[str, tuple[int, ...]]]  # by name: dtype, shape per sample
CLASS_NUMBERS: Targets = {"": ("int64", ())}

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
                  torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)
}  # fmt: skip

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions
CROSSING_DTYPES = ("float32", "bfloat16", "float16")
EXACT = ("none", "none+zstd")
MOST_PARTS = 2**16  # tensors in a message, and fields of each: weights of large networks are some thousands
ANSWERS = torch.float16  # probabilities to a thousandth of each


def write_tensor(tensor: Tensor, codec: str = "none", name: str = "", into: pb.Tensor | None = None) -> pb.Tensor:
    """Any tensor → message, in the storage order that it has: row-major, or channels-last when 4-D or 5-D. The message
    is a new one, or `into`, a part of a larger one: to put a new one there would copy it.

    Codecs with scales per channel take dimension 1 of 4-D and 5-D tensors (pictures, volumes) for channels and store
    them channels-last; of other tensors (tokens, features) they take the last dimension.
    """
    tensor = tensor.detach().to("cpu")
    channels_last = tensor.ndim in CHANNELS_LAST and (
        CODECS[codec].per_channel
        or (not tensor.is_contiguous() and tensor.is_contiguous(memory_format=CHANNELS_LAST[tensor.ndim]))
    )
    stored = _stored(tensor, channels_last).contiguous()
    message = pb.Tensor() if into is None else into
    message.name, message.dtype, message.codec = name, str(tensor.dtype).removeprefix("torch."), codec
    message.shape.extend(tensor.shape)
    message.channels_last = channels_last
    message.data = CODECS[codec].encode(stored.view(_rows_and_channels(stored.shape)))
    return message


def _stored(tensor: Tensor, channels_last: bool) -> Tensor:
    """A view with the dimensions in storage order."""
    return tensor.movedim(1, -1) if channels_last else tensor


def _rows_and_channels(stored: Sequence[int]) -> tuple[int, int]:
    """What a codec sees of a tensor whose shape in storage order is `stored`; 1-D: one channel."""
    return (math.prod(stored[:-1]), stored[-1]) if len(stored) > 1 else (math.prod(stored), 1)


def read_tensor(message: pb.Tensor, place: str, out: Tensor | None = None) -> Tensor:
    """Message → tensor: a new one in the storage order that it had, or `out`, which must have its shape and dtype.

    Raises InputError where the parts do not fit together. A few bytes may state a large shape, for which memory is
    allocated unless there is `out`: where the sender is not trusted, check the shape first.
    """
    codec, dtype, shape = CODECS.get(message.codec), DTYPES.get(message.dtype), tuple(message.shape)
    remedy = "both sides must run the same halfpass"
    if codec is None:
        raise InputError(place, f"a codec of {', '.join(CODECS)}", repr(message.codec), remedy)
    if dtype is None:
        raise InputError(place, f"a dtype of {', '.join(DTYPES)}", repr(message.dtype), remedy)
    if message.channels_last and len(shape) not in CHANNELS_LAST:
        raise InputError(place, "4 or 5 dimensions when channels-last", f"shape {shape}", remedy)
    if out is not None and (tuple(out.shape), out.dtype) != (shape, dtype):
        expected = f"shape {tuple(out.shape)}, {str(out.dtype).removeprefix('torch.')}"
        raise InputError(place, expected, f"shape {shape}, {message.dtype}", remedy)
    rows_and_channels = _rows_and_channels((shape[0], *shape[2:], shape[1]) if message.channels_last else shape)
    order = CHANNELS_LAST[len(shape)] if message.channels_last else torch.contiguous_format
    data = message.data
    try:
        codec.check_size(data, *rows_and_channels, dtype)
        out = torch.empty(shape, dtype=dtype, memory_format=order) if out is None else out
        stored = _stored(out, message.channels_last)
        dense = stored if stored.is_contiguous() else torch.empty(stored.shape, dtype=dtype)
        codec.decode(data, dense.view(rows_and_channels))
    except (ValueError, RuntimeError):  # RuntimeError: torch's, where no tensor has that shape
        raise InputError(
            place, f"the values of shape {shape}, {message.dtype}", f"{len(data)} bytes", remedy
        ) from None
    if dense is not stored:
        stored.copy_(dense)
    return out


def write_batch(batch: CutBatch, codec: str, *, test: bool = False) -> pb.ClientMessage:
    message = pb.ClientMessage()
    written = message.batch
    written.test, written.client, written.epoch, written.step = test, batch.client, batch.epoch, batch.step
    written.before, written.after = batch.before, batch.after
    _write_targets(batch.targets, written)
    exactly = "none+zstd" if CODECS[codec].zstd else "none"
    for i, tensor in enumerate(batch.tensors):
        kept = i in batch.exact or not tensor.is_floating_point()
        write_tensor(tensor, exactly if kept else codec, into=written.tensors.add())
    for tensor in batch.whole:
        write_tensor(tensor, into=written.whole.add())
    if batch.answers is not None:
        write_tensor(batch.answers.to(ANSWERS), into=written.answers)
    return message


def _write_targets(targets: Any, into: pb.Batch) -> None:
    """Class numbers in a few bytes each, all else as exact tensors."""
    numbers = isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.ndim == 1
    if numbers and int(targets.min()) >= 0 and int(targets.max()) < 2**32:
        into.labels.extend(targets.tolist())
        return
    for name, tensor in flatten(targets).items():
        write_tensor(tensor, name=name, into=into.targets.add())


class Buffers:
    """Tensors to decode into, used again once they are given back: fresh ones of megabytes cost page faults each time.

    One thread may take while another gives back.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[object, ...], deque[Tensor]] = {}

    def take(self, message: pb.Tensor) -> Tensor | None:
        """One of the shape, dtype and storage order of `message`, if one is free."""
        shape = tuple(message.shape)
        # then the two orders are the same
        both = len(shape) in CHANNELS_LAST and (shape[1] == 1 or math.prod(shape[2:]) == 1)
        free = self._free.get((shape, message.dtype, message.channels_last and not both))
        return free.popleft() if free else None

    def give_back(self, tensor: Tensor) -> None:
        """Nobody may use it any more."""
        name = str(tensor.dtype).removeprefix("torch.")
        order = tensor.ndim in CHANNELS_LAST and not tensor.is_contiguous()
        self._free.setdefault((tuple(tensor.shape), name, order), deque()).append(tensor)


def read_batch(message: pb.Batch, buffers: Buffers | None = None) -> CutBatch:
    """Message → batch, in tensors of `buffers` where it has some of these shapes. Raises InputError where it is
    damaged, or an activation is not finite: it would spoil the half that learns from it."""
    place = f"batch of client {message.client}, epoch {message.epoch}, step {message.step}"
    tensors = tuple(
        read_tensor(tensor, f"{place}, tensor {i}", None if buffers is None else buffers.take(tensor))
        for i, tensor in enumerate(message.tensors)
    )
    for i, tensor in enumerate(tensors):
        _refuse_nan(f"{place}, tensor {i}", tensor, infinity_too=i == 0)
    targets = read_targets(message, place)
    answers = _read_answers(message.answers, place) if message.HasField("answers") else None
    whole = tuple(read_tensor(tensor, f"{place}, whole {i}") for i, tensor in enumerate(message.whole))
    return CutBatch(
        message.client, message.epoch, message.step, tensors, targets, message.before, message.after, answers, whole
    )


def _refuse_nan(place: str, tensor: Tensor, *, infinity_too: bool) -> None:
    """The first value that crosses must be finite, and below 10¹⁹; others may be masks of infinities."""
    if not tensor.is_floating_point():
        return
    size = torch.linalg.vector_norm(tensor, dtype=torch.float32 if tensor.element_size() < 4 else None)
    broken = not math.isfinite(size) if infinity_too else math.isnan(size)
    if broken:
        raise InputError(place, "finite values", "NaN or infinity", "lower train.lr, or look at that client's data")


def read_targets(message: pb.Batch, place: str) -> Any:
    """The targets of a batch: class numbers, or a tree of tensors."""
    if message.labels or not message.targets:
        return torch.tensor(list(message.labels), dtype=torch.int64)
    return unflatten({
        target.name: read_tensor(target, f"{place}, targets {target.name}".rstrip()) for target in message.targets
    })  # fmt: skip


def _read_answers(message: pb.Tensor, place: str) -> Tensor:
    """Raises InputError where they are no probabilities."""
    answers = read_tensor(message, f"{place}, answers")
    if not ((answers >= 0).all() and (answers <= 1).all()):  # NaN is neither
        found = f"values from {answers.min().item():g} to {answers.max().item():g}"
        remedy = "lower train.lr, or check the head"
        raise InputError(f"{place}, answers", "probabilities, from 0 to 1", found, remedy)
    return answers


def check_batch(
    batch: pb.Batch, client: int, crossing: Sequence[Crossing], outputs: int, batch_size: int,
    with_answers: bool = False, targets: Targets = CLASS_NUMBERS, whole: Sequence[Crossing] = (), reads: bool = False,
    codec: str | None = None,
) -> None:  # fmt: skip
    """Raises InputError unless the batch is this client's, of the values `crossing` (shapes per sample), `whole` and
    `reads`, and of the `targets` that were agreed on, and has the head's answers, (B, outputs), where they are wanted,
    and only there. `codec` is the one that was agreed on; what must be exact is so.

    To be asked before anything is decoded: a few bytes may state a large shape.
    """
    place, samples = f"batch of client {client}, epoch {batch.epoch}, step {batch.step}", samples_of(batch)
    if batch.client != client:
        raise InputError(place, f"client {client}", f"client {batch.client}", "send with the number you joined with")
    _check_dimensions(place, [*batch.tensors, *batch.whole, *batch.targets, batch.answers])
    together = batch.before + samples + batch.after
    if samples == 0 or together > batch_size:
        raise InputError(place, f"1 to {batch_size} samples", f"{samples} of {together}", "send configured batches")
    check_crossing(place, batch.tensors, batch.whole, samples, crossing, whole, reads)
    for i, tensor in enumerate(batch.tensors if codec is not None else ()):
        if tensor.codec != codec and (i == 0 or tensor.codec not in EXACT):
            found = repr(tensor.codec[:20])
            raise InputError(f"{place}, tensor {i}", f"codec {codec}", found, "use the same wire.codec")
    answers = batch.answers
    if batch.HasField("answers") != with_answers:
        said = ("no answers", "the head's answers")
        raise InputError(place, said[with_answers], said[not with_answers], "both sides must run the same halfpass")
    if with_answers and (*answers.shape, answers.dtype, answers.codec) != (samples, outputs, "float16", "none"):
        stated = f"{tuple(answers.shape)} of {answers.dtype} in {answers.codec}"
        raise InputError(place, f"answers of {(samples, outputs)} of float16", stated, "send the head's probabilities")
    _check_targets(place, batch, samples, outputs, targets)


def check_crossing(
    place: str, tensors: Sequence[pb.Tensor], whole: Sequence[pb.Tensor], samples: int, crossing: Sequence[Crossing],
    of_batch: Sequence[Crossing], reads: bool,
) -> None:  # fmt: skip
    """Raises InputError unless these tensors of so many samples, and of the batch as a whole, are what crosses. To be
    asked before anything is decoded."""
    _check_dimensions(place, [*tensors, *whole])
    _check_shapes(place, tensors, [((samples, *shape), dtype) for shape, dtype in crossing])
    read = list(whole)[len(of_batch) :] if reads else []
    _check_shapes(place, whole[: len(of_batch)] if reads else whole, of_batch)
    if reads and ([(tensor.dtype, tensor.codec) for tensor in read] != [("int64", "none")] or not _few(read[0].shape)):
        expected = f"one tensor of at most {MOST_READS} values that were read, as int64"
        found = f"{[(tensor.dtype, tuple(tensor.shape)) for tensor in read]}"
        raise InputError(place, expected, found, "both sides must run the same halfpass")


def _check_dimensions(place: str, tensors: Iterable[pb.Tensor]) -> None:
    """Raises InputError where one has very many: a shape of millions is large, and larger where it is shown."""
    if any(len(tensor.shape) > MOST_DIMENSIONS for tensor in tensors):
        remedy = "both sides must run the same halfpass"
        raise InputError(place, f"at most {MOST_DIMENSIONS} dimensions", "more", remedy)


def _few(shape: Sequence[int]) -> bool:
    return len(shape) == 1 and shape[0] <= MOST_READS


def _check_shapes(place: str, tensors: Sequence[pb.Tensor], expected: Sequence[Crossing]) -> None:
    for tensor, (_, dtype) in zip(tensors, expected, strict=False):
        wanted = CROSSING_DTYPES if dtype in CROSSING_DTYPES else (dtype,)
        if tensor.dtype not in wanted:
            raise InputError(place, " or ".join(wanted), tensor.dtype, "cut where values are so")
    found, shapes = [tuple(tensor.shape) for tensor in tensors], [shape for shape, _ in expected]
    if found != shapes:
        raise InputError(place, f"tensors of {shapes}", f"{found}", "cut the same model at the same layer")


def samples_of(batch: pb.Batch) -> int:
    """How many samples a batch's targets say that it has."""
    if batch.labels or not batch.targets:
        return len(batch.labels)
    return batch.targets[0].shape[0] if batch.targets[0].shape else 0


def _check_targets(place: str, batch: pb.Batch, samples: int, outputs: int, targets: Targets) -> None:
    if batch.labels:
        if batch.targets or dict(targets) != CLASS_NUMBERS:
            raise InputError(place, f"targets {sorted(targets)}", "labels", "both sides must run the same task")
        if max(batch.labels) >= outputs:
            raise InputError(
                place, f"labels from 0 to {outputs - 1}", str(max(batch.labels)), "check the labels of the data set"
            )
        return
    found = {t.name: (t.dtype, tuple(t.shape), t.codec) for t in batch.targets}
    expected = {name: (dtype, (samples, *shape), "none") for name, (dtype, shape) in targets.items()}
    if found != expected or len(found) != len(batch.targets):
        raise InputError(place, f"targets {expected}", f"{found}", "both sides must run the same task")


def write_gradients(batch: CutBatch, gradients: Sequence[Tensor], codec: str) -> pb.ServerMessage:
    message = pb.ServerMessage()
    message.gradients.epoch, message.gradients.step = batch.epoch, batch.step
    for gradient in gradients:
        write_tensor(gradient, codec, into=message.gradients.tensors.add())
    return message


def read_gradients(message: pb.Gradients, batch: CutBatch) -> tuple[Tensor, ...]:
    """The gradients of `batch`; raises InputError when they are another batch's or of another shape."""
    place = f"gradients for client {batch.client}, epoch {batch.epoch}, step {batch.step}"
    if (message.epoch, message.step) != (batch.epoch, batch.step):
        found = f"epoch {message.epoch}, step {message.step}"
        raise InputError(place, "the gradients of that batch", found, "both sides must run the same halfpass")
    _check_dimensions(place, message.tensors)
    shapes = [tuple(tensor.shape) for tensor in message.tensors]
    expected = [tuple(tensor.shape) for tensor in batch.crossing if tensor.is_floating_point()]
    if shapes != expected:
        raise InputError(place, f"shapes {expected}", f"{shapes}", "both sides must run the same halfpass")
    if other := [tensor.dtype for tensor in message.tensors if tensor.dtype not in (*CROSSING_DTYPES, "float64")]:
        raise InputError(place, "floating point", other[0][:20], "both sides must run the same halfpass")
    return tuple(read_tensor(tensor, f"{place}, tensor {i}") for i, tensor in enumerate(message.tensors))


Kinds = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # of weights by name


def check_weights(place: str, messages: Sequence[pb.Tensor], required: Kinds, optional: Kinds | None = None) -> None:
    """Raises RunError unless they are those weights, each of its shape and dtype and sent as it is, and perhaps some of
    the optional ones. To be asked before anything is decoded: a few bytes may state a large shape."""
    known = {**(optional or {}), **required}
    for message in messages[: len(known) + 1]:
        _check_dimensions(place, [message])
        kind = known.get(message.name)
        if kind is None or (tuple(message.shape), DTYPES.get(message.dtype)) != kind or message.codec != "none":
            expected = f"one of {len(known)} weights, of its shape and dtype"
            found = f"{message.name[:80]!r}, {tuple(message.shape)[:8]} of {message.dtype[:20]} in {message.codec[:20]}"
            raise RunError(place, expected, found, "both sides must run the same network")
    names = {message.name for message in messages}
    if len(names) != len(messages) or not required.keys() <= names:
        expected, found = f"the {len(required)} weights, each once", f"{len(messages)}, of {len(names)} names"
        raise RunError(place, expected, found, "both sides must run the same network")


def few_parts(data: bytes, most: int = MOST_PARTS) -> bool:
    """Whether a message, not parsed yet, has at most so many parts, at its top and in each of them: a few bytes each
    would make objects of a hundred."""
    parts, count = _parts(data, 0, len(data)), 0
    for begin, end in parts:
        count += 1 + sum(1 for _ in itertools.islice(_parts(data, begin, end), most + 1))
        if count > most:
            return False
    return True


def _parts(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the parts with a length of their own begin and end, as protobuf writes them; up to what is none."""
    at = begin
    while at < end:
        key, at = _varint(data, at, end)
        kind = key & 7
        if kind == 2:
            length, at = _varint(data, at, end)
            yield at, min(at + length, end)
            at += length
        elif kind == 0:
            _, at = _varint(data, at, end)
            yield at, at
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
            yield at, at
        else:
            return


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """(a number, where it ends); a number that does not end takes all."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    return 0, end


def write_weights(state: Mapping[str, Tensor]) -> list[pb.Tensor]:
    """Weights are sent exactly, whatever the codec of the activations."""
    return [write_tensor(tensor, name=name) for name, tensor in state.items()]


def read_weights(messages: Iterable[pb.Tensor]) -> dict[str, Tensor]:
    return {message.name: read_tensor(message, f"weight {message.name!r}") for message in messages}
