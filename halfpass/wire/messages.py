"""CutBatch, gradients and weights ↔ protobuf. What arrives is checked here before anyone uses it."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from halfpass.cut import CutBatch
from halfpass.errors import InputError
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.codec import CODECS

PROTOCOL = 1

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8,
                  torch.bool)
}  # fmt: skip


def write_tensor(tensor: Tensor, codec: str = "none", name: str = "") -> pb.Tensor:
    """Any dense tensor → message, in the storage order that it has: row-major, or channels-last when 4-D."""
    tensor = tensor.detach().to("cpu")
    channels_last = (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    values = (tensor.permute(0, 2, 3, 1) if channels_last else tensor).reshape(-1)
    return pb.Tensor(
        name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tensor.shape, channels_last=channels_last,
        codec=codec, data=CODECS[codec].encode(values),
    )  # fmt: skip


def read_tensor(message: pb.Tensor, place: str) -> Tensor:
    """Message → tensor, in the storage order that it had. Raises InputError where the parts do not fit together."""
    codec, dtype, shape = CODECS.get(message.codec), DTYPES.get(message.dtype), tuple(message.shape)
    remedy = "both sides must run the same halfpass"
    if codec is None:
        raise InputError(place, f"a codec of {', '.join(CODECS)}", repr(message.codec), remedy)
    if dtype is None:
        raise InputError(place, f"a dtype of {', '.join(DTYPES)}", repr(message.dtype), remedy)
    if message.channels_last and len(shape) != 4:
        raise InputError(place, "4 dimensions when channels-last", f"shape {shape}", remedy)
    data = message.data
    try:
        values = codec.decode(data, dtype)
        if message.channels_last:
            batch, channels, height, width = shape
            return values.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return values.view(shape)
    except (ValueError, RuntimeError):  # what torch raises where bytes and shape do not agree
        raise InputError(
            place, f"the values of shape {shape}, {message.dtype}", f"{len(data)} bytes", remedy
        ) from None


def write_batch(batch: CutBatch, codec: str, *, test: bool = False) -> pb.ClientMessage:
    return pb.ClientMessage(
        batch=pb.Batch(
            test=test, client=batch.client, epoch=batch.epoch, step=batch.step, labels=batch.labels.tolist(),
            tensors=[write_tensor(tensor, codec) for tensor in batch.tensors],
        )
    )  # fmt: skip


def read_batch(message: pb.Batch) -> CutBatch:
    place = f"batch of client {message.client}, epoch {message.epoch}, step {message.step}"
    tensors = tuple(read_tensor(tensor, f"{place}, tensor {i}") for i, tensor in enumerate(message.tensors))
    labels = torch.tensor(list(message.labels), dtype=torch.int64)
    return CutBatch(message.client, message.epoch, message.step, tensors, labels)


def check_batch(
    batch: CutBatch, client: int, cut_shapes: Sequence[Sequence[int]], classes: int, batch_size: int
) -> None:
    """Raises InputError unless the batch is this client's, of the shapes `cut_shapes` (per sample) and classes."""
    place = f"batch of client {client}, epoch {batch.epoch}, step {batch.step}"
    if batch.client != client:
        raise InputError(place, f"client {client}", f"client {batch.client}", "send with the number you joined with")
    if len(batch) > batch_size:
        raise InputError(place, f"at most {batch_size} samples", str(len(batch)), "send configured batches")
    for tensor in batch.tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(place, "float32, bfloat16 or float16", str(tensor.dtype), "cut where values are so")
    found = [tuple(tensor.shape[1:]) for tensor in batch.tensors]
    expected = [tuple(shape) for shape in cut_shapes]
    if found != expected:
        raise InputError(place, f"tensors of {expected} per sample", f"{found}", "cut the same model at the same layer")
    if int(batch.labels.max()) >= classes:
        raise InputError(
            place, f"labels from 0 to {classes - 1}", str(int(batch.labels.max())), "check the labels of the data set"
        )


def write_gradients(batch: CutBatch, gradients: Sequence[Tensor], codec: str) -> pb.ServerMessage:
    return pb.ServerMessage(
        gradients=pb.Gradients(
            epoch=batch.epoch, step=batch.step, tensors=[write_tensor(gradient, codec) for gradient in gradients]
        )
    )


def read_gradients(message: pb.Gradients, batch: CutBatch) -> tuple[Tensor, ...]:
    """The gradients of `batch`; raises InputError when they are another batch's or of another shape."""
    place = f"gradients for client {batch.client}, epoch {batch.epoch}, step {batch.step}"
    if (message.epoch, message.step) != (batch.epoch, batch.step):
        found = f"epoch {message.epoch}, step {message.step}"
        raise InputError(place, "the gradients of that batch", found, "both sides must run the same halfpass")
    gradients = tuple(read_tensor(tensor, f"{place}, tensor {i}") for i, tensor in enumerate(message.tensors))
    if [g.shape for g in gradients] != [t.shape for t in batch.tensors]:
        raise InputError(
            place, f"shapes {[tuple(t.shape) for t in batch.tensors]}", f"{[tuple(g.shape) for g in gradients]}",
            "both sides must run the same halfpass",
        )  # fmt: skip
    return gradients


def write_weights(state: Mapping[str, Tensor]) -> list[pb.Tensor]:
    """Weights are sent exactly, whatever the codec of the activations."""
    return [write_tensor(tensor, name=name) for name, tensor in state.items()]


def read_weights(messages: Iterable[pb.Tensor]) -> dict[str, Tensor]:
    return {message.name: read_tensor(message, f"weight {message.name!r}") for message in messages}
