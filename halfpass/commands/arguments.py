"""The parsing library's messages as ours: place, expected, found, remedy, in one line."""

import itertools
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from halfpass.bounded import MOST_YAML_BYTES, check_number, parse_yaml, read_text
from halfpass.config import flatten
from halfpass.errors import HalfpassError, InputError, choice_error, near_miss


class Known(NamedTuple):
    """The names that the user can have meant."""

    commands: list[str]
    options: list[str]  # of the command that was given


def check_config(file: Path, keys: Sequence[str]) -> None:
    """Raises InputError where a file of settings is none, or has other keys than these. A pipe, which can be read only
    once, is left to the library."""
    if file.is_dir() or not file.exists():
        found = f"a folder at {file}" if file.is_dir() else f"none at {file}"
        raise InputError("config", "a YAML file", found, "check the path")
    if not file.is_file():
        return
    try:
        settings = parse_yaml(read_text(file, MOST_YAML_BYTES))
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())[:200]
        raise InputError("config", f"valid YAML in {file}", found, "correct the file") from error
    if not isinstance(settings, dict):
        found = "none" if settings is None else f"a {type(settings).__name__}"
        raise InputError("config", f"keys and values in {file}", found, "halfpass train --print_config writes one")
    for key, value in settings.items():
        if any(name.startswith(f"{key}.") for name in keys) and not isinstance(value, dict):
            found = " ".join(repr(value).split())[:60]
            raise InputError(f"config {file}, {key}", "settings of that group below it", found, "correct the file")
    for key in flatten(settings):
        if key not in keys:
            raise InputError("configuration", "a known key", repr(key), near_miss(key, keys, "see --help"))


def check_words(words: Sequence[str], numbers: Collection[str]) -> None:
    """Raises InputError for a number that a file of settings takes for another than the command line does."""
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in numbers:
            value = value if equals else following
            try:
                check_number(value)
            except ValueError as error:
                raise InputError(name, "a number in the usual way", str(error), "correct it") from None


def reworded(message: str, known: Known) -> HalfpassError:
    """The error behind the library's `message`; its version is pinned because of these patterns."""
    for pattern, reword in _PATTERNS:
        if match := re.search(pattern, message, re.DOTALL):
            return reword(match, known)
    return InputError("arguments", "valid ones", " ".join(message.split()), "see halfpass --help")


def _unknown(match: re.Match[str], known: Known) -> HalfpassError:
    name = match["name"].split("=")[0]
    if not name.startswith("-") and "--exit_above" in known.options:  # of predict
        return InputError("INPUT", "all inputs right behind RUN", repr(name), "write the options behind them")
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
    return InputError(key, kinds[named[0]] if named else expected, repr(found), _in_digits(found))


def _in_digits(found: str) -> str:
    """The remedy for a number: of one with a unit, its digits."""
    if amount := re.fullmatch(r"(\d+(?:\.\d+)?) *([kKMGT])(i?)B?", found.strip("'\"")):
        size = round(float(amount[1]) * (1024 if amount[3] else 1000) ** " KMGT".index(amount[2].upper()))
        return f"write {size}"
    return "change it"


def _no_group(match: re.Match[str], known: Known) -> HalfpassError:
    """One word for a whole group of settings."""
    key = match["key"]
    first = next((option for option in known.options if option.startswith(f"--{key}.")), "--help")
    return InputError(f"--{key}", f"one of its settings by name, such as {first}", repr(match["found"]), "name it")


def _wrong_optional(match: re.Match[str], known: Known) -> HalfpassError:
    """Of a setting that may be null."""
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    found = match["found"].strip()
    return InputError(match["key"], kinds.get(match["kind"], "text"), repr(found), _in_digits(found))


def _wrong_command(match: re.Match[str], known: Known) -> HalfpassError:
    return choice_error("command", known.commands, match["name"])


def _no_command(match: re.Match[str], known: Known) -> HalfpassError:
    return InputError("command", f"one of {', '.join(known.commands)}", "none", "see halfpass --help")


def _no_value(match: re.Match[str], known: Known) -> HalfpassError:
    return InputError(match["name"], "a value", "none", "write it behind the option")


def _missing(match: re.Match[str], known: Known) -> HalfpassError:
    return InputError("arguments", match["name"], "none", "see --help")


_PATTERNS: list[tuple[str, Callable[[re.Match[str], Known], HalfpassError]]] = [
    (r"unrecognized arguments: (?P<name>\S+)", _unknown),
    (r"Subcommand '\w+' does not accept option '(?P<name>[^']+)'", _unknown),
    (r"invalid choice: '(?P<name>[^']*)' \(choose", _wrong_command),
    (r'expected "subcommand" to be', _no_command),
    (r'Parser key "(?P<key>[^"]+)":\s+Unable to load config \'(?P<found>.*?)\'\s+-', _no_group),
    (r'Parser key "(?P<key>[^"]+)":\s+Does not validate .*?<class \'(?P<kind>\w+)\'>.*Given value: (?P<found>.*)',
     _wrong_optional),
    (r'Parser key "(?P<key>[^"]+)":\s+(?:Expected an? )?(?P<expected>.*?)\. Got value: (?P<found>.*)', _wrong_value),
    (r"argument (?P<name>\S+): expected (?:one|at least one) argument", _no_value),
    (r"the following arguments are required: (?P<name>.*)", _missing),
]
