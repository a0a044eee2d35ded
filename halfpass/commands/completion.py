"""`halfpass completion`: a script with which a shell completes commands, options and their values by itself.

All of it is in the script, so that completing starts no Python. Tests: tests/test_completion.py.
"""

import argparse
import dataclasses
from argparse import Action
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from halfpass.config import setting_types
from halfpass.data.datasets import DATASETS
from halfpass.errors import choice_error
from halfpass.networks.heads import HEADS
from halfpass.networks.models import MODELS
from halfpass.tasks.table import TASKS
from halfpass.wire.codec import CODECS

SHELLS = {  # where each shell looks for such scripts
    "bash": "~/.local/share/bash-completion/completions/halfpass",
    "zsh": "~/.zfunc/_halfpass",
    "fish": "~/.config/fish/completions/halfpass.fish",
}
INSTALL = "; ".join(f"{shell}: halfpass completion {shell} > {place}" for shell, place in SHELLS.items())
NAMES: dict[str, Iterable[str]] = {  # what a setting's text may be, besides module:function
    "data.name": DATASETS, "model.name": MODELS, "model.head": HEADS, "task.name": TASKS, "wire.codec": CODECS,
}  # fmt: skip
FILES = ("config", "model.weights", "grid", "results", "data.path", "data_path", "out")  # or folders
FOLDERS = ("run", "runs", "folder", "server.store", "tls.folder")


def check_shell(shell: str) -> None:
    """Raises InputError for one that there is no script for."""
    if shell not in SHELLS:
        raise choice_error("SHELL", SHELLS, shell)


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for that shell; `parser` has all commands with all options, which are then described for this."""
    import shtab

    hints = setting_types()
    for action in _all_actions(parser):
        _describe(action, hints)
    return str(shtab.complete(parser, shell))


def _all_actions(parser: argparse.ArgumentParser) -> list[Action]:
    found: list[Action] = []
    for action in parser._actions:
        inner = action.choices.values() if isinstance(action.choices, dict) else ()
        for child in inner:
            found += _all_actions(child)
        found.append(action)
    return found


def _describe(action: Action, hints: dict[str, Any]) -> None:
    """What its value may be, as shtab wants it."""
    import shtab

    name, hint = action.dest, hints.get(action.dest)
    if name in NAMES:
        action.choices = list(NAMES[name])
    elif get_origin(hint) is Literal:
        action.choices = list(get_args(hint))
    elif hint is bool:
        action.choices = ["true", "false"]
    elif name in FILES or (name.startswith("tls.") and name not in FOLDERS and name != "tls.server_name"):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif name in FOLDERS:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(hint):
        action.help = argparse.SUPPRESS  # it would take a file of that group alone
    elif action.help:
        action.help = " ".join(action.help.replace("%", "%%").split()).partition(". ")[0]
