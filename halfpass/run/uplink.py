"""Which of a decoupled client's batches go up: every k-th, within a budget of bytes.

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
        self.spent_bytes = 0  # of the budget
        self._waiting: list[pb.ClientMessage] = []  # micro-batches of a batch that the budget may not allow

    def messages(self, batch: CutBatch, tally: Tally) -> list[pb.ClientMessage]:
        """What goes up now: a training batch or micro-batch, encoded, or nothing; under a budget the micro-batches of a
        batch go up together, behind its last one. To be asked for every one, in order."""
        if batch.step % self._every:
            return []
        if self._budget is None:
            tally.uploads += batch.last
            return [write_batch(batch, self._codec)]
        # The bytes that may have been spent once this batch has gone up.
        done = batch.epoch * self._steps + min(batch.step + self._every, self._steps)
        share = self._budget * done / self._all_steps
        if batch.before == 0:
            self._waiting = []  # what is left of a batch that was broken off
        if self.spent_bytes < share:
            self._waiting.append(write_batch(batch, self._codec))
        return self._decide(share, tally) if batch.last else []

    def _decide(self, share: float, tally: Tally) -> list[pb.ClientMessage]:
        """A whole batch goes up where that does not spend more than `share`, or not at all."""
        messages, self._waiting = self._waiting, []
        size = sum(message.ByteSize() for message in messages)
        if not messages or self.spent_bytes + size > share:
            tally.withheld += 1
            return []
        tally.uploads += 1
        self.spent_bytes += size
        return messages
