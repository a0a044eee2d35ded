"""The same messages in one process: each is made, counted and read, tensors as the codec's bytes; no socket is opened.

To parse them again would give the same message, and cost a copy of every tensor.
"""

from torch import Tensor

from halfpass.cut import CutBatch
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import messages
from halfpass.wire.meter import Meter


class Loopback:
    """One client's wire. What comes out of each method is what the other process would have read."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.meter = Meter()

    def up(self, message: pb.ClientMessage) -> pb.ClientMessage:
        self.meter.count_up(message, message.ByteSize())
        return message

    def down(self, message: pb.ServerMessage) -> pb.ServerMessage:
        self.meter.count_down(message, message.ByteSize())
        return message

    def batch(self, message: pb.ClientMessage) -> tuple[CutBatch, pb.Batch]:
        """Up: a batch at the cut; decoded, and as it came."""
        received = self.up(message).batch
        return messages.read_batch(received), received

    def send(self, batch: CutBatch) -> CutBatch:
        """Up, in a loop of one's own: a training batch as the server would read it; `meter` has counted its bytes."""
        return self.batch(messages.write_batch(batch, self.codec))[0]

    def ack(self, *, test: bool = False) -> None:
        """Down: the server is done with the batch."""
        self.down(pb.ServerMessage(ack=pb.Ack(test=test)))

    def gradients(self, batch: CutBatch, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Down: conventional training's gradients, which acknowledge the batch too."""
        message = self.down(messages.write_gradients(batch, gradients, self.codec))
        return messages.read_gradients(message.gradients, batch)
