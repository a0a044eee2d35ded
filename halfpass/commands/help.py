"""`halfpass COMMAND --help`: what matters first on one screen, and the rest by groups. Tests: tests/test_help.py.

The descriptions are those of `halfpass/config.py`, cut short where there is not room for all of one.
"""

import argparse
import re
import shutil
import textwrap
from argparse import Action
from collections.abc import Iterable, Sequence

from halfpass.errors import choice_error

ALL = "all"
FIRST = (  # what a newcomer sets, in this order
    "config", "data.name", "data.path", "model.name", "model.cut", "method", "runtime", "clients.count", "train.epochs",
    "train.lr", "out",
)  # fmt: skip
CHOICES = ("data.name", "model.name", "method", "runtime")  # whose descriptions begin with what there is
MANY = 30  # options, which are more than fit on a screen
NARROW, WIDE = 60, 110  # columns
EXAMPLES: dict[str, Sequence[str]] = {
    "new": ("halfpass new first",),
    "check": ("halfpass check --config run.yaml",
              "halfpass check --config run.yaml --side client --client 0 --tls.folder keys"),
    "train": ("halfpass train --config run.yaml", "halfpass train --train.epochs 3 --out runs/first"),
    "compare": ("halfpass compare --config run.yaml --methods decoupled,conventional --seeds 0,1,2",),
    "resume": ("halfpass resume runs/first",),
    "serve": ("halfpass serve --config run.yaml --bind 0.0.0.0:7465 --tls.folder keys --out runs/server",),
    "join": ("halfpass join server.example:7465 --config run.yaml --client 0 --tls.folder keys --out runs/site-0",),
    "agreement": ("halfpass agreement --config run.yaml --client 1",),
    "status": ("halfpass status server.example:7465 --tls.folder keys",),
    "certs": ("halfpass certs keys --clients 2 --hosts server.example",),
    "retrain": ("halfpass retrain runs/kept --train.lr 0.1",),
    "paper": ("halfpass paper examples/paper/small.yaml --set data.path=DIR",),
    "report": ("halfpass report runs/first runs/second --out both.html",),
    "export": ("halfpass export runs/first --with_head",),
    "cuts": ("halfpass cuts --model.name resnet20 --data.name cifar10",
             "halfpass cuts --config run.yaml --out cuts.svg"),
    "completion": ("halfpass completion bash > ~/.local/share/bash-completion/completions/halfpass",),
}  # fmt: skip


def topic_of(words: Sequence[str]) -> str | None:
    """What help is asked for: a group, an option, `all`, or "" for the first page; None where none is."""
    for i, word in enumerate(words):
        if word in ("-h", "--help"):
            following = words[i + 1] if i + 1 < len(words) else ""
            return "" if following.startswith("-") else following
        if word.startswith("--help="):
            return word.partition("=")[2]
    return None


def help_text(command: str, parser: argparse.ArgumentParser, topic: str) -> str:
    """The page on that topic. Raises InputError where there is no such topic."""
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    actions = [action for action in actions if action.dest not in _groups(actions)]  # which takes a file of one group
    width = max(NARROW, min(WIDE, shutil.get_terminal_size((80, 24)).columns))
    if topic and topic != ALL:
        return _topic(parser, actions, topic)
    examples = "".join(f"    {example}\n" for example in EXAMPLES.get(command, ()))
    if topic == ALL or len(actions) <= MANY:
        return f"for example:\n{examples}\n{parser.format_help()}" if examples else parser.format_help()
    return "\n".join(_first_page(command, parser, actions, width)) + "\n"


def _first_page(command: str, parser: argparse.ArgumentParser, actions: list[Action], width: int) -> list[str]:
    by_name = {action.dest: action for action in actions}
    first = [by_name[name] for name in FIRST if name in by_name]
    own = [action for action in actions if action.dest not in FIRST and "." not in action.dest and _is_own(action)]
    positional = [action for action in actions if not action.option_strings]
    named = " ".join(str(action.metavar or action.dest.upper()) for action in positional)
    lines = [f"    {example}" for example in EXAMPLES.get(command, ())]
    lines += [f"usage: {' '.join(['halfpass', command, named]).strip()} [--OPTION VALUE …]"]
    lines += textwrap.wrap(str(parser.description), width)
    if own or positional:
        lines += ["of this command:", *_brief([*positional, *own], width, 1)]
    lines += ["of every training, what matters first:"]
    lines += [line for action in first for line in _brief([action], width, 1 + (action.dest in CHOICES))]
    lines += [f"all others by groups, halfpass {command} --help GROUP, or all of it, --help all:"]
    return lines + [f"  {name:<11} {_cut_short(text, width - 14)}" for name, text in _groups(actions).items()]


def _is_own(action: Action) -> bool:
    names = action.option_strings
    return bool(names) and not names[0].startswith(("--print_", "-h", "--help", "--debug"))


def _groups(actions: Iterable[Action]) -> dict[str, str]:
    """The groups of settings, each with its options' names."""
    found: dict[str, list[str]] = {}
    for action in actions:
        group, dot, name = action.dest.partition(".")
        if dot:
            found.setdefault(group, []).append(name)
    return {group: ", ".join(names) for group, names in found.items()}


def _topic(parser: argparse.ArgumentParser, actions: list[Action], topic: str) -> str:
    name = topic.strip("-")
    chosen = [action for action in actions if action.dest == name or action.dest.startswith(f"{name}.")]
    if not chosen:
        known = [*_groups(actions), ALL]
        names = [action.dest for action in actions if action.option_strings]
        options = [other for other in names if other.rpartition(".")[2] == name] if name not in known else []
        otherwise = f"did you mean {' or '.join(map(repr, options))}?" if options else "use one of those"
        raise choice_error("--help", known, topic, otherwise)
    for action in parser._actions:
        action.help = action.help if action in chosen else argparse.SUPPRESS
    parser.usage, parser.description = argparse.SUPPRESS, None
    return parser.format_help()


def _brief(actions: Iterable[Action], width: int, most_lines: int) -> list[str]:
    """An option each with the beginning of its description, in so many lines at most."""
    lines = []
    for action in actions:
        name = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
        default = _default(action)
        text = _cut_short(_first_sentence(action), most_lines * (width - 24) - len(default)) + default
        head, *more = textwrap.wrap(text, width - 21) or [""]
        lines += [f"  {name:<18} {head}", *(f"{'':21}{line}" for line in more[: most_lines - 1])]
    return lines


def _first_sentence(action: Action) -> str:
    said = " ".join((action.help or "").split())
    return re.split(r"(?<=[a-z0-9)])\. (?=[A-Z])", said)[0].rstrip(".")


def _default(action: Action) -> str:
    """Where there is one that says something."""
    if action.default in (None, False, argparse.SUPPRESS) or not action.option_strings:
        return ""
    return f" (default: {action.default})"


def _cut_short(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" …")
