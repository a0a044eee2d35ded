"""Which of a decoupled client's batches go up: every so-manieth, within a budget of bytes.

After CSE-FSL (Mu & Shen 2025, arXiv 2507.15816), whose clients upload in selected epochs. Nothing comes back, so a
client may learn from a batch and keep it to itself.
"""

from halfpass.config import Config
from halfpass.cut import CutBatch
from halfpass.run.epoch import Tally
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import write_batch


class Uplink:
    """One client's choice, the same in either runtime: it depends on the batches and their encoded sizes alone.

    A budget is spread evenly: after a share of the run's steps at most that share of it has been spent, so that a
    small one is not gone before the client half is any good.
    """

    def __init__(self, config: Config, steps: int) -> None:
        """`steps`: the client's batches per epoch."""
        self._codec, self._every, self._budget = config.wire.codec, config.wire.every, config.wire.budget
        self._steps, self._all_steps = steps, steps * config.train.epochs
        self._spent_bytes = 0

    def message(self, batch: CutBatch, tally: Tally) -> pb.ClientMessage | None:
        """A training batch, encoded, or None where it does not go up. To be asked for every batch, in order."""
        if batch.step % self._every:
            return None
        message = write_batch(batch, self._codec) if self._budget is None else self._within(self._budget, batch)
        if message is None:
            tally.withheld += 1
        else:
            tally.uploads += 1
        return message

    def _within(self, budget: int, batch: CutBatch) -> pb.ClientMessage | None:
        """The batch, encoded, or None where it would exceed the bytes that may have been spent once it has gone up."""
        done = batch.epoch * self._steps + min(batch.step + self._every, self._steps)
        share = budget * done / self._all_steps
        if self._spent_bytes >= share:
            return None
        message = write_batch(batch, self._codec)
        size = message.ByteSize()
        if self._spent_bytes + size > share:
            return None
        self._spent_bytes += size
        return message
