"""What goes wrong, said in one line: the place, what was expected, what was found, and the remedy.

`InputError` is the user's to mend (the command line exits with 2), `RunError` happened on the way (exit 1).
"""

import copyreg
import difflib
import errno
from collections.abc import Iterable
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk without room says


class HalfpassError(Exception):
    """Base of every error that this package raises on purpose; `str()` of it is the one line shown to users."""

    exit_status = 1

    def __init__(self, place: str, expected: str, found: str, remedy: str) -> None:
        super().__init__(printable(f"{place}: expected {expected}, found {found}; {remedy}"))
        self.place, self.expected, self.found, self.remedy = place, expected, found, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, with which a pool's process hands it on: __init__ takes something else than the message."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class InputError(HalfpassError, ValueError):
    """An argument, a file or a peer's settings that cannot be used."""

    exit_status = 2


class RunError(HalfpassError, RuntimeError):
    """A run that began and could not go on: a lost peer, a passed deadline, a loss that is not finite."""


class PassedOnError(RunError):
    """Why another process stopped, in its own words; none where the user has read them already."""

    def __init__(self, said: str, exit_status: int = 1) -> None:
        Exception.__init__(self, printable(said))
        self.place = self.expected = self.found = self.remedy = ""
        self.exit_status = exit_status if exit_status in (1, 2) else 1


LONGEST = 4000  # characters of a message, some of which a peer may have chosen


def printable(text: str) -> str:
    """One line that a terminal shows as it is: control characters, such as escape codes of a peer's, by their names."""
    shown = text[:LONGEST] + ("…" if len(text) > LONGEST else "")
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def near_miss(value: str, choices: Iterable[str], otherwise: str) -> str:
    """The remedy for a wrong name: the choices that end in it behind a dot, as train.lr in lr, or the nearest one, or
    what `otherwise` says."""
    choices, last = list(choices), value.lstrip("-").replace("-", "_")
    ends = [choice for choice in choices if choice.rpartition(".")[1:] == (".", last)]
    if 1 <= len(ends) <= 3:
        return f"did you mean {' or '.join(map(repr, ends))}?"
    bare = {choice.lstrip("-"): choice for choice in choices}  # what all have in common likens nothing
    near = difflib.get_close_matches(value.lstrip("-"), bare, n=1, cutoff=0.5)
    return f"did you mean {bare[near[0]]!r}?" if near else otherwise


def choice_error(place: str, choices: Iterable[str], found: object, otherwise: str = "use one of those") -> InputError:
    """The error for a name that is not in a table, with the near miss; `choices` are the table's."""
    names = list(choices)
    return InputError(place, f"one of {', '.join(names)}", repr(found), near_miss(str(found), names, otherwise))


def reason(error: BaseException) -> str:
    """What an error of other code says, fit for the one line of ours: its class and at most 200 characters."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def room_remedy(error: BaseException, otherwise: str) -> str:
    """What to do where a file or folder could not be written: make room, where that is what is missing."""
    return "make room there" if isinstance(error, OSError) and error.errno in FULL else otherwise
