"""The parsing library's messages as ours: place, expected, found, remedy, in one line."""

import re
from collections.abc import Callable
from typing import NamedTuple

from halfpass.errors import HalfpassError, InputError, choice_error, near_miss


class Known(NamedTuple):
    """The names that the user can have meant."""

    commands: list[str]
    options: list[str]  # of the command that was given


def reworded(message: str, known: Known) -> HalfpassError:
    """The error behind the library's `message`; its version is pinned because of these patterns."""
    for pattern, reword in _PATTERNS:
        if match := re.search(pattern, message, re.DOTALL):
            return reword(match, known)
    return InputError("arguments", "valid ones", " ".join(message.split()), "see halfpass --help")


def _unknown(match: re.Match[str], known: Known) -> HalfpassError:
    name = match["name"].split("=")[0]
    if not name.startswith("-"):
        keys = [option.removeprefix("--") for option in known.options]
        if "." in name or match.re.pattern.startswith("Subcommand"):
            return InputError("configuration", "a known key", repr(name), near_miss(name, keys, "see --help"))
        return InputError("arguments", "options only", repr(name), "see --help")
    return InputError("arguments", "a known option", name, near_miss(name, known.options, "see --help"))


def _wrong_value(match: re.Match[str], known: Known) -> HalfpassError:
    key, expected, found = match["key"], match["expected"].strip(), match["found"].strip()
    literal = re.search(r"Literal\[(.*)\]", expected)
    if literal:
        return choice_error(key, re.findall(r"'([^']*)'", literal[1]), found)
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    named = re.findall(r"\b(int|float|bool|str)\b", expected)
    return InputError(key, kinds[named[0]] if named else expected, repr(found), "change it")


def _wrong_command(match: re.Match[str], known: Known) -> HalfpassError:
    return choice_error("command", known.commands, match["name"])


def _no_command(match: re.Match[str], known: Known) -> HalfpassError:
    return InputError("command", f"one of {', '.join(known.commands)}", "none", "see halfpass --help")


def _no_file(match: re.Match[str], known: Known) -> HalfpassError:
    return InputError("config", "a YAML file", f"none at {match['name']}", "check the path")


def _bad_yaml(match: re.Match[str], known: Known) -> HalfpassError:
    return InputError("config", "valid YAML", " ".join(match["reason"].split()), "correct the file")


def _no_value(match: re.Match[str], known: Known) -> HalfpassError:
    return InputError(match["name"], "a value", "none", "write it behind the option")


def _missing(match: re.Match[str], known: Known) -> HalfpassError:
    return InputError("arguments", match["name"], "none", "see --help")


_PATTERNS: list[tuple[str, Callable[[re.Match[str], Known], HalfpassError]]] = [
    (r"unrecognized arguments: (?P<name>\S+)", _unknown),
    (r"Subcommand '\w+' does not accept option '(?P<name>[^']+)'", _unknown),
    (r"invalid choice: '(?P<name>[^']*)' \(choose", _wrong_command),
    (r'expected "subcommand" to be', _no_command),
    (r"File does not exist: '?(?P<name>[^']+)'?", _no_file),
    (r"Problems parsing config: (?P<reason>.*)", _bad_yaml),
    (r'Parser key "(?P<key>[^"]+)":\s+(?:Expected an? )?(?P<expected>.*?)\. Got value: (?P<found>.*)', _wrong_value),
    (r"argument (?P<name>\S+): expected (?:one|at least one) argument", _no_value),
    (r"the following arguments are required: (?P<name>.*)", _missing),
]
