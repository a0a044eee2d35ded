"""A server that trains nothing, for benchmarks of what a client or a wire does alone."""

import time

import torch

from halfpass.config import Config
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.hub import Hub
from halfpass.wire.messages import write_gradients

JOIN_SECONDS = 120.0  # for the client's process to start


class NullServer:
    """Leads one client through its epochs. Every batch gets its answer at once: an acknowledgement, or gradients of
    zeros in conventional training."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.joins: list[pb.Join] = []
        self.hub = Hub(
            "127.0.0.1:0", clients=1, window_bytes=config.wire.window, timeout=config.wire.timeout,
            admit=self.joins.append, check=lambda client, batch: None,
        )  # fmt: skip

    def run(self, epochs: int, *, test: bool) -> tuple[list[float], pb.EpochEnd]:
        """When the batches of the last epoch had been answered, and what the client said at its end; `test` puts an
        evaluation behind each epoch."""
        self.hub.wait_for_clients(JOIN_SECONDS)
        steps = self.joins[0].steps
        for epoch in range(epochs):
            begin = pb.Begin(epoch=epoch, first_step=epoch * steps, total_steps=epochs * steps, until=steps)
            self.hub.send(0, pb.ServerMessage(begin=begin))
            answered, message = self._answer_until("epoch_end")
            if test:
                self.hub.send(0, pb.ServerMessage(test=pb.Test(epoch=epoch)))
                self._answer_until("test_end")
        self.hub.send(0, pb.ServerMessage(finish=pb.Finish()))
        self.hub.take([0], "finished")
        self.hub.release(0)
        return answered, message.epoch_end

    def _answer_until(self, kind: str) -> tuple[list[float], pb.ClientMessage]:
        """Until the first message of that kind."""
        answered = []
        while (received := self.hub.take([0], "batch", kind)[1]).batch is not None:
            batch = received.batch
            self.hub.done(0, received)
            reply = pb.ServerMessage(ack=pb.Ack(test=received.test))
            if self.config.method == "conventional" and not received.test:
                reply = write_gradients(batch, [torch.zeros_like(tensor) for tensor in batch.tensors], "none")
            self.hub.send(0, reply)
            answered.append(time.perf_counter())
        assert received.message is not None
        return answered, received.message
