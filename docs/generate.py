"""The pages of the reference that are made from the code: every setting, every command.

    python docs/generate.py            writes options.md and commands.md in docs/reference, as `make docs` does
    python docs/generate.py --check    writes nothing; exits with 1 where a page is not what the code says

Settings, their types, defaults and meanings are those of `halfpass/config.py`, commands those of
`halfpass/commands/cli.py`. Checked by tests/test_docs.py.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from halfpass import config
from halfpass.commands.cli import COMMANDS

FOLDER = Path(__file__).parent / "reference"
MADE = "<!-- Made by docs/generate.py: do not edit. -->"
KINDS = {bool: "true, false", int: "whole number", float: "number", str: "text", list[float]: "list of numbers"}


def cell(text: str) -> str:
    """Text as one cell of a Markdown table, in which nothing but `code` has a meaning."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.replace("*", "\\*").replace("<", "&lt;") for i, part in enumerate(parts))


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kind(hint: Any) -> str:
    """A field's type in words; choices as they are written."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    parts = [KINDS[part] for part in (get_args(hint) if hint not in KINDS else [hint]) if part is not type(None)]
    return " or ".join(parts)


def default(value: Any) -> str:
    if value is None:
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def meanings(group: type) -> dict[str, str]:
    """The text under each field of a dataclass."""
    (made,) = ast.parse(inspect.getsource(group)).body
    assert isinstance(made, ast.ClassDef)
    return {
        field.target.id: text.value.value
        for field, text in zip(made.body, made.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def settings(group: type, prefix: str) -> Iterator[list[str]]:
    """A row for each field of a group that is no group itself."""
    hints, texts = get_type_hints(group), meanings(group)
    for field in dataclasses.fields(group):
        if not dataclasses.is_dataclass(hints[field.name]):
            row = [f"`{prefix}{field.name}`", kind(hints[field.name]), default(field.default)]
            yield [*row, cell(texts[field.name])]


def options_page() -> str:
    head = ["setting", "type", "default", "meaning"]
    parts = [
        MADE,
        "# Every setting",
        "A setting has one name everywhere: `--train.lr 0.1` on the command line, `train: {lr: 0.1}` in a file for "
        "`--config`, `TrainConfig(lr=0.1)` in Python. `--print_config` writes all of them as YAML. A later option wins "
        "over an earlier one, and any option over a file. An unknown name is refused, and the nearest one is named. "
        "– stands for none, which is `null` in a file.",
        "## The run",
        table(head, settings(config.Config, "")),
    ]
    for name, hint in get_type_hints(config.Config).items():
        if dataclasses.is_dataclass(hint):
            text = (hint.__doc__ or "").strip()
            parts += [f"## {name}", cell(text), table(head, settings(hint, f"{name}."))]
    return "\n\n".join(parts) + "\n"


@functools.cache
def actions_of(name: str) -> list[argparse.Action]:
    """The arguments of a command."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    COMMANDS[name].add_options(parser)
    return [action for action in parser._actions if action.help != argparse.SUPPRESS]


def known_settings() -> list[str]:
    return list(config.flatten(config.as_dict(config.Config())))


def own_options(name: str) -> Iterator[list[str]]:
    """A row for each argument of a command that is no setting."""
    actions = actions_of(name)
    given = {action.dest for action in actions}
    settings = {key for key in known_settings() if key in given} if any("." in dest for dest in given) else set()
    groups = {key.partition(".")[0] for key in settings if "." in key}
    for action in actions:
        if action.dest in settings | groups | {"help", "print_config", "config"} or action.dest.endswith(".help"):
            continue
        names = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
        chosen = action.default not in (None, [], argparse.SUPPRESS) and action.nargs != 0
        yield [names, default(action.default) if chosen else "–", cell(action.help or "")]


def groups_of(name: str) -> str:
    """Which settings a command takes."""
    given = {action.dest for action in actions_of(name)}
    known = known_settings()
    if given.issuperset(known):
        return "Takes [every setting](options.md), and `--config FILE`: YAML with the same keys."
    groups = dict.fromkeys(key.partition(".")[0] for key in known if key in given and "." in key)
    file = ", and `--config FILE`: YAML with the same keys" if "config" in given else ""
    links = ", ".join(f"[{group}](options.md#{group})" for group in groups)
    return f"Takes the settings of {links}{file}." if groups else ""


def commands_page() -> str:
    shared = [["`-h`, `--help`", "Say what the command takes."],
              ["`--debug`", "Show the traceback of an error."]]  # fmt: skip
    parts = [
        MADE,
        "# Every command",
        "`halfpass COMMAND …`, or `python -m halfpass COMMAND …`. [Exit statuses](errors.md) are the same for all.",
        table(["command", "what it does"], iter([f"[`{n}`](#{n})", cell(c.help)] for n, c in COMMANDS.items())),
        "Each command takes:",
        table(["option", "meaning"], iter(shared)),
        "`halfpass --version` says the version.",
    ]
    for name, command in COMMANDS.items():
        rows = list(own_options(name))
        parts += [f"## {name}", cell(command.help), groups_of(name)]
        parts += [table(["argument", "default", "meaning"], iter(rows))] if rows else []
    return "\n\n".join(part for part in parts if part) + "\n"


PAGES = {"options.md": options_page, "commands.md": commands_page}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Make the reference's pages of settings and commands from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when something would change")
    check = parser.parse_args(words).check
    stale = []
    for name, made in PAGES.items():
        file, text = FOLDER / name, made()
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                file.write_text(text, encoding="utf-8")
    for name in stale if check else []:
        print(f"docs/reference/{name}: expected what the code says, found another; run make docs", file=sys.stderr)
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
