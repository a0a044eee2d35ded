"""A Flower app's settings as halfpass's own: the same dotted names, in the app's `[tool.flwr.app.config]`."""

from collections.abc import Mapping

from halfpass.config import Config, as_dict, flatten
from halfpass.errors import InputError
from halfpass.run import round_settings

DEFAULT_OUT = "runs/flower-{run}"
STREAM = "stream"  # of messages for stream mode
ADDRESS = "flower.stream"  # Flower alone has it: HOST:PORT of the server


def config_of(run_config: Mapping[str, object], run: int | str) -> Config:
    """The settings of the Flower run with that number. TOML has no null: an empty text stands for it. Raises InputError
    for a key that halfpass does not know, which it names, and for a value that cannot be used."""
    nulls = {key for key, value in flatten(as_dict(Config())).items() if value is None}
    given = {key: None if value == "" and key in nulls else value for key, value in run_config.items()}
    given.pop(ADDRESS, None)
    return round_settings.config_of(given, "Flower", DEFAULT_OUT.format(run=run))


def stream_of(run_config: Mapping[str, object]) -> str | None:
    """Where clients join in stream mode; None in rounds. Raises InputError for what is no HOST:PORT."""
    address = run_config.get(ADDRESS, "")
    if address == "":
        return None
    address_of(str(address))
    return str(address)


def address_of(text: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        expected, remedy = "HOST:PORT, such as training.example.org:8443", "correct it, or leave it out for rounds"
        raise InputError(ADDRESS, expected, repr(text), remedy)
    return host, int(port)


def client_of(node_config: Mapping[str, object]) -> int:
    """The client whose number a node has: `partition-id`, which simulations give and SuperNodes are given."""
    number = node_config.get("partition-id")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        expected, found = "the number of its client, from 0, as partition-id", repr(number)
        remedy = "start the SuperNode with --node-config 'partition-id=0'"
        raise InputError("node configuration", expected, "none" if number is None else found, remedy)
    return number
