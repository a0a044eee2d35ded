"""`halfpass status`: how far a server's run is, as a few lines and a table, or as JSON; `--watch` asks again."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from halfpass.errors import InputError, RunError, printable
from halfpass.run.live import LiveTable
from halfpass.wire import halfpass_pb2 as pb

WATCH_SECONDS = 1.0
WIDTH = 120  # of what is not a terminal


def as_json(reply: pb.StatusReply) -> str:
    """All of it, by the names of halfpass.proto; null for a number that is none."""
    return json.dumps(_fields(reply), indent=2)


def _fields(message: Any) -> dict[str, Any]:
    return {field.name: _plain(message, field) for field in message.DESCRIPTOR.fields}


def _plain(message: Any, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is None:
        if field.is_repeated:
            return list(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value
    if field.is_repeated:
        return [_fields(part) for part in value]
    return _fields(value) if message.HasField(field.name) else None


def show(reply: pb.StatusReply, console: Console | None = None) -> None:
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=WIDTH, file=console.file)
    where = f"epoch {reply.epoch} of {reply.epochs}, step {reply.step} of {reply.steps}, "
    if not reply.epoch:
        where = ""
    lines = [
        f"run {reply.run}: {reply.phase}, {where}{reply.batches_per_second:.3g} batches/s",
        f"{reply.connected} of {reply.clients_count} client(s) connected",
    ]
    if reply.HasField("checkpoint"):
        made = reply.checkpoint
        lines.append(f"last checkpoint: epoch {made.epoch}, step {made.step}, {_ago(made.seconds_ago)} ago")
    for line in lines:
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
    table = Table()
    for name in ("client", "state", "step", "received", "applied", "lag", "queued", "queued bytes", "reconnections"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for client in reply.clients:
        since = f" for {_ago(client.away_seconds)}" if client.state in ("away", "absent") else ""
        lag = client.received - client.applied
        numbers = (
            f"{client.step}/{client.steps}", client.received, client.applied, lag, client.queued,
            f"{client.queued_bytes:,}", client.reconnections,
        )  # fmt: skip
        table.add_row(str(client.client), Text(printable(client.state) + since), *map(str, numbers))
    console.print(table)
    if reply.clients_count > len(reply.clients):
        console.print(f"and {reply.clients_count - len(reply.clients)} more", highlight=False)


def watch(ask: Callable[[], pb.StatusReply], console: Console | None = None) -> None:
    """A table that is asked for anew each second, until the server ends. Raises InputError without a terminal, and what
    the first question does."""
    console = console or Console()
    if not console.is_terminal:
        expected, remedy = "a terminal, where a table can be drawn anew", "leave it out, or take --json"
        raise InputError("--watch", expected, "none", remedy)
    table = LiveTable(ask)
    table.add(time.monotonic(), ask())

    def drawn() -> Table:
        return table.table(console.width, console.height - 2)

    with Live(get_renderable=drawn, console=console, auto_refresh=False) as live:
        while True:
            live.refresh()
            time.sleep(WATCH_SECONDS)
            try:
                table.add(time.monotonic(), ask())
            except (InputError, RunError) as error:
                live.stop()
                console.print(f"the server answers no more: {error}", highlight=False, markup=False, soft_wrap=True)
                return


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
