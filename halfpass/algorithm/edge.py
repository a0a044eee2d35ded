"""The part of a network between two cuts, on an edge server: client → edge → server.

To its clients an edge is a server, whose half ends in an auxiliary head; to the server above it is a client, that sends
what crosses the upper cut. Both are decoupled training as ever (`client.py`, `server.py`): the same loss at the edge's
head trains it, and nothing comes back from either side.
"""

from torch import Tensor, nn


class EdgeHalf(nn.Module):
    """tuple of (B, ...) → (B, classes), as a server half; keeps what crosses the upper cut on the way."""

    def __init__(self, between: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.between, self.head = between, head
        self.crossing: tuple[Tensor, ...] = ()  # of the last forward pass, without graph
        self.answers: Tensor | None = None  # of its head, in evaluation: class probabilities (B, classes)

    def forward(self, *tensors: Tensor) -> Tensor:
        crossing = self.between(*tensors)
        logits: Tensor = self.head(crossing[0])
        inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        # What crosses both cuts is an input, whose memory its giver may use again.
        self.crossing = tuple(
            tensor.detach().clone() if tensor.untyped_storage().data_ptr() in inputs else tensor.detach()
            for tensor in crossing
        )
        self.answers = None if self.training else logits.detach().float().softmax(1)
        return logits
