"""Counts the bytes of messages as they are written, by what they are for."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from halfpass.wire import halfpass_pb2 as pb


@dataclass
class Meter:
    """Bytes of serialized messages, framing not included.

    `up` has activations, labels (targets of any kind), weights and other, `down` has gradients, weights and other; a
    tensor counts with its shape and dtype, some 30 bytes. Evaluation's messages are kept apart, so that what is
    reported is the cost of training.
    """

    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    evaluation_up: int = 0
    evaluation_down: int = 0
    _testing: bool = False  # acknowledgements and signs of life belong to the evaluation while one goes on

    def state(self) -> dict[str, Any]:
        return {
            "up": dict(self.up), "down": dict(self.down),
            "evaluation_up": self.evaluation_up, "evaluation_down": self.evaluation_down,
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.up, self.down = Counter(state["up"]), Counter(state["down"])
        self.evaluation_up, self.evaluation_down = state["evaluation_up"], state["evaluation_down"]

    def count_up(self, message: pb.ClientMessage, size: int) -> None:
        """`size` is the length of the serialized message."""
        kind = message.WhichOneof("kind")
        if kind == "test_end" or (kind == "batch" and message.batch.test) or (kind == "alive" and self._testing):
            self.evaluation_up += size
            return
        parts = {
            "activations": _size([*message.batch.tensors, *message.batch.whole]) if kind == "batch" else 0,
            "labels": _labels_size(message.batch) if kind == "batch" else 0,
            "weights": _size(message.epoch_end.weights) if kind == "epoch_end" else 0,
        }
        self.up.update(parts | {"other": size - sum(parts.values())})

    def count_down(self, message: pb.ServerMessage, size: int) -> None:
        kind = message.WhichOneof("kind")
        if kind in ("test", "begin", "finish"):
            self._testing = kind == "test"
        if self._testing and kind in ("test", "ack", "alive"):
            self.evaluation_down += size
            return
        handed_on = (message.begin, message.take, message.finish)
        parts = {
            "gradients": _size(message.gradients.tensors) if kind == "gradients" else 0,
            "weights": sum(_size(m.weights) for m in handed_on) if kind in ("begin", "take", "finish") else 0,
        }
        self.down.update(parts | {"other": size - sum(parts.values())})


def _labels_size(batch: pb.Batch) -> int:
    """Class numbers, or whatever targets there are."""
    return pb.Batch(labels=batch.labels).ByteSize() + _size(batch.targets)


def _size(tensors: Iterable[pb.Tensor]) -> int:
    return sum(tensor.ByteSize() for tensor in tensors)  # reading `data` to take its length would copy it
