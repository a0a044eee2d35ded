"""What a server tells what is above it: nothing at the top, and the server above where it is an edge (`edge.py`)."""

from collections.abc import Callable, Mapping
from typing import Any

from halfpass.cut import CutBatch
from halfpass.run.epoch import Score, Tally


class Above:
    """Nothing: above the top there is no one to tell."""

    test_again: Callable[[int], object]  # by the server below, where the server above has lost one

    def state(self) -> dict[str, Any]:
        """What the server above needs to go on behind an epoch."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""

    def begin(self, epoch: int) -> None:
        """Waits until the server above wants this epoch."""

    def learn(self, batch: CutBatch) -> None:
        """The edge has learned from this batch, or micro-batch, as it came in."""

    def end(self, epoch: int, tally: Tally) -> None:
        """The edge's epoch is over, its replays too."""

    def begin_test(self, epoch: int) -> None:
        """Waits until the server above wants this test."""

    def test(self, batch: CutBatch) -> None:
        """The edge has answered this test batch."""

    def end_test(self, epoch: int, score: Score) -> bool:
        """How the edge's head did; False where the test must begin anew."""
        return True

    def skip_test(self, epoch: int) -> None:
        """There is no test after this epoch."""

    def finish(self) -> None:
        """All epochs are over."""

    def leave(self) -> None:
        """The edge was told to leave, and comes again."""

    def fail(self, reason: str, exit_status: int) -> None:
        """The edge stops, for this reason."""
