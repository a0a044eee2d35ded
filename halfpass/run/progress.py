"""Progress on standard error: a bar on a terminal, a line per epoch elsewhere, in JSON where all lines are."""

import datetime
import logging
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from halfpass.run import logs
from halfpass.run.records import Row

LOG = logging.getLogger("halfpass")
WIDE = 100  # columns of a terminal that has room for a bar beside the counts


View = Callable[[int, int], RenderableType]


class _Bars(Progress):
    """A bar below what `view` gives."""

    def __init__(self, view: View | None, *columns: ProgressColumn, **options: Any) -> None:
        self._view = view  # before the first look
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        if self._view is not None and not self.finished:
            yield self._view(self.console.width, self.console.height - 4)
        yield from super().get_renderables()


class EpochProgress:
    """Counts batches of a whole run: `epochs` times `batches_per_epoch`."""

    def __init__(self, title: str, epochs: int, batches_per_epoch: int, view: View | None = None) -> None:
        """`view` is shown above the bar: what it gives for so many columns and lines."""
        self._console = Console(stderr=True)
        self._title, self._epochs = title, epochs
        whole = Column(no_wrap=True, min_width=2 * len(str(epochs * batches_per_epoch)) + 1)  # kept where room is short
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"), MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[latest]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        ]  # fmt: skip
        if self._console.width >= WIDE:
            counts, left = columns[1:3]
            columns[1:3] = [BarColumn(bar_width=None), counts, TextColumn("batches"), TimeElapsedColumn(), left]
        terminal = self._console.is_terminal and not logs.in_json()
        self._bars = _Bars(view, *columns, console=self._console, disable=not terminal, refresh_per_second=4)
        self._task = self._bars.add_task(title, total=epochs * batches_per_epoch, latest="")

    def __enter__(self) -> "EpochProgress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def skip(self, batches: int) -> None:
        """So many were trained on before, when the run was broken off."""
        self._bars.advance(self._task, batches)

    def step(self) -> None:
        self._bars.advance(self._task)

    def epoch(self, row: Row) -> None:
        """The epoch of the server's (or the whole network's) row is over."""
        loss = "–" if row["loss"] is None else f"{row['loss']:.4f}"
        value = (row["test"] or {}).get(row["metric"])
        test = "" if value is None else f", {_said(row['metric'], value, row['metric_unit'])}"
        latest = f"epoch {row['epoch']}/{self._epochs}: loss {loss}{test}"
        self._bars.update(self._task, latest=latest)
        seconds = row["busy_seconds"] + row["waiting_seconds"]
        if logs.in_json():
            known = {"epoch": row["epoch"], "epochs": self._epochs}
            if row["test"] is not None:
                scores = {"event": "test", **known, "scores": row["test"]}
                LOG.info("%s after epoch %d", test.removeprefix(", ") or "test", row["epoch"], extra=scores)
            known |= {"event": "epoch", "loss": row["loss"], "seconds": seconds}
            LOG.info("%s: %s, %.1f s", self._title, latest, seconds, extra=known)
        elif not self._console.is_terminal:
            time = f"{datetime.datetime.now():%H:%M:%S}"
            self._console.print(f"{time} {self._title}: {latest}, {seconds:.1f} s", highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """What the user should know, above the bar."""
        if logs.in_json():
            LOG.info("%s", line, extra={"event": "other"})
        else:
            self._console.print(line, highlight=False, soft_wrap=True)


def _said(metric: str, value: float, unit: str) -> str:
    """`test 93.21 %` of accuracy, `test rmse 0.4321` of another metric."""
    name = "test" if metric == "accuracy" else f"test {metric}"
    return f"{name} {100 * value:.2f} %" if unit == "%" else f"{name} {value:.4g}"
