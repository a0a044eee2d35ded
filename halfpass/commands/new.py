"""`halfpass new`: a folder with a network, data, a task, settings and a test that train as they are.

Its files are those of `template/`. Tests: tests/test_new.py.
"""

from contextlib import suppress
from importlib import resources
from pathlib import Path

from halfpass.errors import InputError
from halfpass.files import make_folder, refuse_place, replacing

NEXT = ("halfpass train --config run.yaml", "halfpass check --config run.yaml", "halfpass cuts --config run.yaml")


def template() -> dict[str, bytes]:
    """The files by name, the one to read first at the front."""
    folder = resources.files("halfpass.commands") / "template"
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    return {name: files[name] for name in sorted(files, key=lambda name: (name != "README.md", name))}


def new_folder(folder: Path) -> list[Path]:
    """Writes the template's files; returns them. Raises InputError, nothing written, unless the folder is new or
    empty, and RunError, nothing left, where one cannot be written."""
    refuse_place("DIR", folder)
    if folder.is_dir() and (there := sorted(file.name for file in folder.iterdir())):
        found = f"{there[0]} in {folder}" if len(there) == 1 else f"{there[0]} and {len(there) - 1} more in {folder}"
        raise InputError("DIR", "a new or an empty folder", found, "choose another name")
    make_folder("DIR", folder)
    files = {folder / name: content for name, content in template().items()}
    try:
        for file, content in files.items():
            with replacing(file) as partial:
                partial.write_bytes(content)
    except BaseException:
        for file in files:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        raise
    return list(files)


def print_new(folder: Path) -> None:
    """Writes the folder, and says what to do next."""
    for file in new_folder(folder):
        print(f"wrote {file}")
    print(f"next, in {folder}:", *(f"    {command}" for command in NEXT), sep="\n")
