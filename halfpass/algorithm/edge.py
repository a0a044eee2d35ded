"""The part of a network between two cuts, on an edge server: client → edge → server.

To its clients an edge is a server, whose half ends in an auxiliary head; to the server above it is a client, that sends
what crosses the upper cut. Both are decoupled training as ever (`client.py`, `server.py`): the same loss at the edge's
head trains it, and nothing comes back from either side.
"""

from collections.abc import Callable

from torch import Tensor, nn

from halfpass.algorithm.learning import probabilities
from halfpass.tree import prediction


class EdgeHalf(nn.Module):
    """tuple of (B, ...) → outputs (B, ...), as a server half; keeps what crosses the upper cut on the way."""

    def __init__(
        self, between: nn.Module, head: nn.Module,
        answers_of: Callable[[Tensor], Tensor] | None = probabilities,
    ) -> None:  # fmt: skip
        super().__init__()
        self.between, self.head, self._answers_of = between, head, answers_of
        self.crossing: tuple[Tensor, ...] = ()  # of the last forward pass, without graph
        self.answers: Tensor | None = None  # of its head, in evaluation: probabilities, where the task has any

    def forward(self, *tensors: Tensor) -> Tensor:
        crossing = self.between(*tensors)
        outputs: Tensor = prediction(self.head(crossing[0]))
        inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        # What crosses both cuts is an input, whose memory its giver may use again.
        self.crossing = tuple(
            tensor.detach().clone() if tensor.untyped_storage().data_ptr() in inputs else tensor.detach()
            for tensor in crossing
        )
        self.answers = None
        if not self.training and self._answers_of is not None:
            self.answers = self._answers_of(outputs.detach().float())
        return outputs
