"""The user's own data, network or head: a function of theirs, given as `module:function`."""

import importlib
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path

from halfpass.errors import InputError, near_miss, reason


def call_plugin(
    place: str, name: str, *arguments: object, check: Callable[[Callable[..., object]], dict[str, object]] | None = None
) -> object:
    """What the function `name`, given as `module:function`, returns; the working directory may hold the module.

    `place` says in errors where the name was given; `check` sees the function first, and gives further arguments by
    name. Raises InputError where the module cannot be imported, has no such function, or the function fails; an
    InputError of the function's own is passed on.
    """
    function = find_plugin(place, name)
    named = {} if check is None else check(function)
    try:
        return function(*arguments, **named)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's function raises
        given = [*map(str, arguments), *(f"{key}={value!r}" for key, value in named.items())]
        expected = f"a function that can be called with ({', '.join(given)})"
        raise InputError(place, expected, reason(error), "correct the function") from error


def origin(name: str) -> str:
    """Where the code of `module:function` would be imported from; nothing is imported to say that."""
    top = name.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.machinery.PathFinder.find_spec(top, [*sys.path, str(Path.cwd())])
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return "Python itself" if top in sys.builtin_module_names else "nowhere"
    return spec.origin or f"the folder {next(iter(spec.submodule_search_locations or []), top)}"


def find_plugin(place: str, name: str) -> Callable[..., object]:
    """The function `module:function` itself. Raises InputError where there is none."""
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # an installed command does not see it, `python -m` does
        sys.path.append(here)  # last, so that a file there shadows no installed module
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise InputError(
            place, f"a module {module_name!r} that can be imported", reason(error),
            "run from the module's directory, or install it",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "none" if function is None else type(function).__name__
        choices = [choice for choice in dir(module) if callable(getattr(module, choice))]
        remedy = near_miss(function_name, choices, "write the function's name behind the colon")
        raise InputError(place, f"a function {function_name!r} in {module_name!r}", found, remedy)
    return function
