"""JSON and YAML from outside: size, depth and number of values are bounded before any object is made of them.

Both raise ValueError with what is wrong in a few words, whatever the text is. Tests: tests/test_bounded.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

MOST_DEPTH = 32  # groups in groups: what halfpass writes has 4
MOST_YAML_BYTES, MOST_YAML_VALUES = 2**17, 20_000  # of settings and grids; aliases count as what they stand for
MOST_JSON_BYTES = 2**26  # the rows of a large grid are a few megabytes
MOST_JSON_GROUPS = 2**20  # lists and objects, which take up to thirty times their bytes

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[{\]}]', re.DOTALL)
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


def read_text(file: Path, most_bytes: int) -> str:
    """The file's text; raises OSError too."""
    with file.open("rb") as opened:
        content = opened.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"more than {most_bytes} bytes")
    return content.decode()


def parse_json(text: str, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """What the text holds; NaN and infinity are no JSON."""
    if len(text) > most_bytes:
        raise ValueError(f"more than {most_bytes} bytes")
    depth = groups = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        change = {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        depth, groups = depth + change, groups + (change > 0)
        _check_depth(depth)
        if groups > MOST_JSON_GROUPS:
            raise ValueError(f"more than {MOST_JSON_GROUPS} lists and objects")
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant}, which is not a JSON number")


def parse_yaml(text: str) -> Any:
    """What the text holds. Numbers that YAML 1.1 reads otherwise than people do, 010 as 8 and 1:30 as 90, are refused
    by name."""
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"more than {MOST_YAML_BYTES} bytes")
    try:
        _check_yaml(text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # of a tag that its value does not fit
        raise ValueError(f"a value that does not fit its tag ({' '.join(str(error).split())})") from None


def _check_yaml(text: str) -> None:
    """Goes through the parser's events, of which there are no more than the text is long."""
    values: dict[str | None, int] = {}  # that an anchor stands for; none of one that is still open
    opened: list[list[Any]] = [["", 0]]  # anchor and values so far
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append([event.anchor, 1])
            _check_depth(len(opened) - 1)
            continue
        count = 0
        if isinstance(event, yaml.ScalarEvent):
            count = 1
            if event.implicit[0]:
                check_number(event.value, f" in line {event.start_mark.line + 1}" if event.start_mark else "")
            values[event.anchor] = count
        elif isinstance(event, yaml.AliasEvent):
            count = values.get(event.anchor, 1)
            if event.anchor in (anchor for anchor, _ in opened):
                raise ValueError(f"*{event.anchor} inside of what it stands for")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, count = opened.pop()
            values[anchor] = count
        opened[-1][1] += count
        if opened[-1][1] > MOST_YAML_VALUES:
            raise ValueError(f"more than {MOST_YAML_VALUES} values")


def _check_depth(depth: int) -> None:
    if depth > MOST_DEPTH:
        raise ValueError(f"more than {MOST_DEPTH} levels")


def check_number(text: str, where: str = "") -> None:
    """Raises ValueError for a number that YAML reads otherwise than people do."""
    if _OCTAL.fullmatch(text) or _SEXAGESIMAL.fullmatch(text):
        meant = yaml.safe_load(text)
        raise ValueError(f"{text}{where}, which YAML takes for {meant}: write {meant}, or quote a text")
