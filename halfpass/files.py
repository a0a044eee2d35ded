"""Files and folders: written whole or not at all, and what is wrong with one is said in a line."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from halfpass.bounded import MOST_JSON_BYTES, MOST_YAML_BYTES, parse_json, parse_yaml, read_text
from halfpass.errors import HalfpassError, InputError, RunError, reason, room_remedy


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Its folder is made."""
    make_folder("results", file.parent)
    with replacing(file) as partial:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def at_home(place: str, path: str) -> str:
    """The path with a home folder where it begins with ~; raises InputError where nobody has that."""
    full = os.path.expanduser(path)  # noqa: PTH111  # a Path forgets the ./ of ./~
    if full.startswith("~"):
        raise InputError(place, "a path, or the home folder of a user", repr(path), "correct it, or write ./~")
    return full


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """The file to write instead, which then takes the place of `file`: whole or not at all, a reader never sees half of
    it. Raises RunError where it cannot be written."""
    file = file.resolve()  # a link stays
    partial = file.with_name(f"{file.name}.part")
    with explained(file):
        if file.exists() and not file.is_file():  # such as /dev/stdout
            yield file
            return
        try:
            yield partial
            partial.replace(file)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def explained(file: Path) -> Iterator[None]:
    """Raises RunError, which names the file, where writing it fails in it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, HalfpassError):
            raise
        first = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides it
        remedy = room_remedy(first, "make room there, or choose another place")
        raise RunError(str(file), "a file that can be written", reason(first), remedy) from error


def refuse_file(place: str, file: Path) -> None:
    """Raises InputError where no such file can be written."""
    if file.is_dir():
        raise InputError(place, "a file", f"a folder at {file}", "name a file in it")
    refuse_place(place, file.parent)


def refuse_place(place: str, folder: Path) -> None:
    """Raises InputError where nothing can be written into the folder, or it cannot be made."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise InputError(place, "a folder", f"a file at {nearest}", "choose another name")
    if not os.access(nearest, os.W_OK):
        raise InputError(place, "a folder that can be written", f"{folder}", "choose another folder")


def make_folder(place: str, folder: Path) -> None:
    """Makes it where it is missing; raises InputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found, remedy = f"{folder} ({error.strerror})", room_remedy(error, "choose another folder")
        raise InputError(place, "a folder that can be made", found, remedy) from None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder, made where it is missing, for this process's training or grid; whatever ends the process gives
    it up. Raises InputError where another holds it."""
    make_folder("out", folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for it, or choose another folder"
            raise InputError(str(folder), "no other training at work in it", "one", remedy) from None
        yield
    finally:
        os.close(descriptor)


def read_mapping(file: Path) -> tuple[str, dict[str, Any]]:
    """The file's text and what it holds. Raises InputError where that is no mapping in JSON or, by its name, YAML."""
    is_yaml = file.suffix == ".yaml"
    form = "YAML" if is_yaml else "JSON"
    try:
        text = read_text(file, MOST_YAML_BYTES if is_yaml else MOST_JSON_BYTES)
        content = parse_yaml(text) if is_yaml else parse_json(text)
    except (OSError, ValueError) as error:
        raise InputError(str(file), form, " ".join(str(error).split()), "restore the file, or run again") from error
    if not isinstance(content, dict):
        raise InputError(str(file), "keys and values", type(content).__name__, "restore the file, or run again")
    return text, content


def write_new(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Writes files that are not there yet, for this user's eyes alone; returns them. Raises InputError, none written,
    where one is there."""
    if taken := [name for name in files if (folder / name).exists()]:
        raise InputError(str(folder / taken[0]), "no such file yet", "one", "choose another folder, or remove it")
    make_folder(str(folder), folder)
    for name, content in files.items():
        with explained(folder / name):
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
    return [folder / name for name in files]
