"""The settings of a run whose processes an engine starts: halfpass's own, by their dotted names."""

import dataclasses
from collections.abc import Mapping

from halfpass.config import Config, from_dict, nested
from halfpass.errors import InputError


def config_of(given: Mapping[str, object], engine: str, out: str) -> Config:
    """The settings; `out` where they name no run folder. Raises InputError for a key that halfpass does not know, which
    it names, and for a value that cannot be used."""
    if (name := given.get("runtime", "processes")) != "processes":
        raise InputError("runtime", f"none on {engine}, whose processes are its own", repr(name), "leave it out")
    config = from_dict(nested({**given, "runtime": "processes"}))
    return dataclasses.replace(config, out=config.out or out)
