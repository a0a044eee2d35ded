"""A Flower app's settings as halfpass's own: the same dotted names, in the app's `[tool.flwr.app.config]`."""

from collections.abc import Mapping

from halfpass.config import Config, as_dict, flatten
from halfpass.errors import InputError
from halfpass.run import round_settings

DEFAULT_OUT = "runs/flower-{run}"


def config_of(run_config: Mapping[str, object], run: int | str) -> Config:
    """The settings of the Flower run with that number. TOML has no null: an empty text stands for it. Raises InputError
    for a key that halfpass does not know, which it names, and for a value that cannot be used."""
    nulls = {key for key, value in flatten(as_dict(Config())).items() if value is None}
    given = {key: None if value == "" and key in nulls else value for key, value in run_config.items()}
    return round_settings.config_of(given, "Flower", DEFAULT_OUT.format(run=run))


def client_of(node_config: Mapping[str, object]) -> int:
    """The client whose number a node has: `partition-id`, which simulations give and SuperNodes are given."""
    number = node_config.get("partition-id")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        expected, found = "the number of its client, from 0, as partition-id", repr(number)
        remedy = "start the SuperNode with --node-config 'partition-id=0'"
        raise InputError("node configuration", expected, "none" if number is None else found, remedy)
    return number
