"""`halfpass status`: how far a server's run is, as a few lines and a table, or as JSON."""

import json
import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfpass.errors import printable
from halfpass.wire import halfpass_pb2 as pb

WIDTH = 120  # of what is not a terminal


def as_json(reply: pb.StatusReply) -> str:
    """All of it, by the names of halfpass.proto; null for a number that is none."""
    return json.dumps(_fields(reply), indent=2)


def _fields(message: Any) -> dict[str, Any]:
    return {field.name: _plain(message, field) for field in message.DESCRIPTOR.fields}


def _plain(message: Any, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is None:
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


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
